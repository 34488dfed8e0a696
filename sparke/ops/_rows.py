"""Rows of a bank in tiles, and what is computed of them once per generation."""

from __future__ import annotations

import torch
from torch import Tensor

TILE_BYTES = 2**22
"""Rows are processed in tiles of this size: small enough for the cache, large enough for BLAS."""
CENTER_ROWS = 64
"""The center is the mean of at most this many rows, evenly spaced."""


def working_dtype(x: Tensor) -> torch.dtype:
    """float32 or better; half precision is for storage."""
    return torch.promote_types(x.dtype, torch.float32)


def tile_rows(width: int, dtype: torch.dtype, queries: int = 1) -> int:
    """How many rows of this width make a tile, at least 4.

    Products of matrices copy their operands in pieces, which is cheaper for fewer rows.
    """
    size = TILE_BYTES if queries == 1 else TILE_BYTES // 2
    return max(4, size // max(1, width * dtype.itemsize))


def center_of(rows: Tensor) -> Tensor:
    """(d,) mean of at most 64 evenly spaced rows, in the working dtype; zeros if there are none."""
    if not len(rows):
        return rows.new_zeros(rows.shape[1], dtype=working_dtype(rows))
    some = rows.detach()[:: max(1, -(-len(rows) // CENTER_ROWS))]
    return some.to(working_dtype(rows)).mean(0)


def squared_norms(rows: Tensor, center: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""What [pull][sparke.ops.pull] needs to know of a bank, computed once per generation.

    Distances by products, $\|q - x\|^2 = \|q - c\|^2 + \|x - c\|^2 - 2 (q - c) \cdot (x - c)$, lose
    in float32 what the terms have in common. Norms about a point c near the rows keep it; any c
    gives the right sum, a nearer one gives more digits of it.

    Args:
        rows: (n, d), any float dtype; reduced in float32 or better, a tile at a time.
        center: (d,), the mean of at most 64 evenly spaced rows if None.

    Returns:
        (n,) squared norms of ``rows - center``, and the (d,) center.
    """
    rows = rows.detach()
    dtype = working_dtype(rows)
    center = center_of(rows) if center is None else center.detach().to(rows.device, dtype)
    norms = rows.new_empty(len(rows), dtype=dtype)
    step = tile_rows(rows.shape[1], dtype) * (1 if rows.device.type == "cpu" else 32)
    for part, tile in zip(norms.split(step), rows.split(step), strict=True):
        part.copy_(torch.linalg.vector_norm(tile - center, dim=1).square())
    return norms, center
