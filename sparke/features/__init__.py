"""Ready-made features: latents to the rows that scores compare and memory keeps. One file each."""

from __future__ import annotations

from sparke.features.clip import ClipFeatures as ClipFeatures

__all__ = ["ClipFeatures"]
