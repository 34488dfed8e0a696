"""Memories: where finished samples are kept. One file each."""

from __future__ import annotations

from sparke.memory.ring import RingMemory as RingMemory

__all__ = ["RingMemory"]
