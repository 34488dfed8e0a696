"""Memories: where finished samples are kept. One file each."""

from __future__ import annotations

from sparke.memory._folder import MemoryFileWarning as MemoryFileWarning
from sparke.memory._ranks import RankError as RankError
from sparke.memory.disk import DiskMemory as DiskMemory
from sparke.memory.reference import ReferenceMemory as ReferenceMemory
from sparke.memory.ring import RingMemory as RingMemory
from sparke.memory.sharded import ShardedMemory as ShardedMemory

__all__ = [
    "DiskMemory",
    "MemoryFileWarning",
    "RankError",
    "ReferenceMemory",
    "RingMemory",
    "ShardedMemory",
]
