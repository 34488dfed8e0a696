"""An index as usearch writes it, checked before usearch reads it.

usearch follows the numbers in its file without asking whether they lead anywhere: a damaged or
hostile file could make it read or write anywhere in this process. A checksum tells damage, and
nothing of intent. So every size and every reference is compared here, in the layout of usearch 2
(`save` of a dense index with 8-bit vectors, 64-bit keys and 32-bit references):

- the number of vectors and their width, and the vectors;
- 64 bytes: ``usearch``, version, kinds, counts;
- of the graph: size, references per node above and on the ground level, height, entry;
- for each node its level; then for each node its key, its level again, and for each of its levels
  how many references there are and room for as many as there may be.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

HEAD = 64
KINDS = b"c\x17\x0e\x0f"
"""Metric (cosine), numbers (8-bit), keys (64-bit), references (32-bit)."""
TALLEST = 64
CHUNK = 1 << 16
"""Nodes looked at together."""


def check(data: bytes, width: int, connectivity: int) -> NDArray[np.uint64]:
    """The keys of an index whose every reference leads to a node of the level it is on.

    Args:
        data: what usearch is to read.
        width: of the vectors.
        connectivity: references a node has above the ground level; there it has twice as many.

    Raises:
        ValueError: it is something else.
    """
    sizes = _numbers(data, 0, "<u4", 2)
    size = int(sizes[0])
    head = 8 + size * width
    graph = head + HEAD
    if int(sizes[1]) != width or not size or len(data) < graph + 40 + 2 * size:
        raise ValueError(f"it holds {sizes[0]} prompts of width {sizes[1]}, expected {width}")
    told = data[head:graph]
    counts = _numbers(data, head + 17, "<u8", 3).tolist()
    # What follows the counts says whether one key may stand for several prompts: never here.
    if told[:7] != b"usearch" or told[13:17] != KINDS or any(told[41:]):
        raise ValueError("it is an index of another kind")
    expected = [size, connectivity, 2 * connectivity]
    height, entry = _numbers(data, graph + 24, "<u8", 2).tolist()
    if counts != [size, 0, width] or _numbers(data, graph, "<u8", 3).tolist() != expected:
        raise ValueError("it counts its prompts in two ways")
    levels = _numbers(data, graph + 40, "<i2", size).astype(np.int64)
    if levels.min() < 0 or levels.max() != height or height >= TALLEST or entry >= size:
        raise ValueError("it has no way in")
    if levels[entry] != height:
        raise ValueError("it has no way in")
    return _nodes(data, graph + 40 + 2 * size, levels, connectivity)


def _nodes(
    data: bytes, start: int, levels: NDArray[np.int64], connectivity: int
) -> NDArray[np.uint64]:
    """The keys; every reference was looked at."""
    ground, above = 4 + 8 * connectivity, 4 + 4 * connectivity
    lengths = 10 + ground + levels * above
    offsets = start + np.cumsum(lengths) - lengths
    if start + int(lengths.sum()) != len(data):
        raise ValueError("its size is not that of its nodes")
    every = np.frombuffer(data, np.uint8)
    keys = np.empty(len(levels), np.uint64)
    for low in range(0, len(levels), CHUNK):
        part = slice(low, low + CHUNK)
        keys[part] = _at(every, offsets[part], "<u8", 1)[:, 0]
        if not np.array_equal(_at(every, offsets[part] + 8, "<i2", 1)[:, 0], levels[part]):
            raise ValueError("it tells the level of a node in two ways")
        _references(every, offsets[part] + 10, 2 * connectivity, levels, 0)
        for level in range(1, int(levels[part].max()) + 1):
            there = offsets[part][levels[part] >= level]
            begin = there + 10 + ground + (level - 1) * above
            _references(every, begin, connectivity, levels, level)
    if len(np.unique(keys)) < len(keys):
        raise ValueError("a key occurs twice")
    return keys


def _references(
    every: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    most: int,
    levels: NDArray[np.int64],
    level: int,
) -> None:
    counts = _at(every, offsets, "<u4", 1)[:, 0].astype(np.int64)
    if counts.max(initial=0) > most:
        raise ValueError("a node has more references than there is room for")
    found = _at(every, offsets + 4, "<u4", most)
    used = found[np.arange(most) < counts[:, None]]
    if used.max(initial=0) >= len(levels) or (levels[used] < level).any():
        raise ValueError("a reference leads nowhere")


def _at(every: NDArray[np.uint8], offsets: NDArray[np.int64], dtype: str, count: int) -> Any:
    """(n, count) numbers, those of each row at its own offset."""
    span = np.arange(np.dtype(dtype).itemsize * count)
    return np.ascontiguousarray(every[offsets[:, None] + span]).view(dtype)


def _numbers(data: bytes, at: int, dtype: str, count: int) -> NDArray[Any]:
    if len(data) < at + np.dtype(dtype).itemsize * count:
        raise ValueError(f"it has {len(data)} bytes, and that is too short")
    return np.frombuffer(data, dtype, count, at)
