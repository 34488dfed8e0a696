"""Memories: where finished samples are kept. One file each."""

from __future__ import annotations

from sparke.memory._folder import MemoryFileWarning as MemoryFileWarning
from sparke.memory.disk import DiskMemory as DiskMemory
from sparke.memory.ring import RingMemory as RingMemory

__all__ = ["DiskMemory", "MemoryFileWarning", "RingMemory"]
