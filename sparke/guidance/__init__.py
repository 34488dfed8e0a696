"""Guiders: what displaces the denoised estimate. One file each."""

from __future__ import annotations

from sparke.guidance.chain import GuiderChain as GuiderChain
from sparke.guidance.diversity import DiversityGuider as DiversityGuider

__all__ = ["DiversityGuider", "GuiderChain"]
