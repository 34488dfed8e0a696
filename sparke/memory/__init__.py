"""Memories: where finished samples are kept. One file each, named like the memory."""

from __future__ import annotations

import os
from typing import Any

from sparke._discover import MEMORIES
from sparke.errors import ArgumentError
from sparke.memory._folder import MemoryFileWarning as MemoryFileWarning
from sparke.memory._ranks import RankError as RankError
from sparke.memory.disk import DiskMemory as DiskMemory
from sparke.memory.reference import ReferenceMemory as ReferenceMemory
from sparke.memory.ring import RingMemory as RingMemory
from sparke.memory.sharded import ShardedMemory as ShardedMemory
from sparke.protocols import Memory

__all__ = [
    "DiskMemory",
    "MemoryFileWarning",
    "RankError",
    "ReferenceMemory",
    "RingMemory",
    "ShardedMemory",
    "memory",
    "names",
]


def names() -> list[str]:
    """Names of all memories, those of installed plugins (``sparke.memory``) included."""
    return MEMORIES.names()


def memory(name: str | Memory, **options: Any) -> Memory:
    """A new memory by name; an object that is one already is returned as it is.

    Args:
        name: see [names][sparke.memory.names]. Every call makes a memory of its own; to share one,
            keep the object.
        **options: the memory's own, e.g. ``memory("disk", path="history")``,
            ``memory("ring", capacity=64)``.

    Raises:
        UnknownName: nobody registered the name; near matches are in the message.
        ArgumentError: an option is unknown, missing, or has a forbidden value; the object is no
            Memory, or a file; the name is that of a plugin that cannot be used.
    """
    if _is_path(name):
        raise ArgumentError(
            f"memory={str(name)!r} looks like a file. RingMemory.load(path) reads one "
            "written by save(path); memory('disk', path=...) keeps a folder."
        )
    built: Memory = MEMORIES.object(name, options)
    return built


def _is_path(name: Any) -> bool:
    if isinstance(name, str):
        return "/" in name or os.sep in name or name.endswith(".safetensors")
    return isinstance(name, os.PathLike)
