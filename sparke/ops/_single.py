"""One query on a CPU: vectors in place of matrices, by numpy's BLAS.

Products with one vector are bound by reading the tile, and numpy's read it nearly as fast as a
plain sum does. The second product finds the tile in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparke.ops._rows import tile_rows


def fits(rows: Tensor) -> bool:
    """Whether numpy can read these rows as they lie, each in one piece."""
    return rows.stride(1) == 1 and rows.dtype in (torch.float32, torch.float64)


def run(towards: Tensor, rows: Tensor, score: Tensor, gap: float) -> Tensor:
    """(1, d) mean of (n, d) rows under the softmax of ``score + towards @ rows.T``.

    `score`, (1, n), is completed in place. Tiles whose best exponent lies `gap` below the best so
    far are left out of the mean. NaN where all of it is -inf.
    """
    x, toward, exponents = rows.numpy(), towards[0].numpy(), score[0].numpy()
    step = tile_rows(x.shape[1], rows.dtype)
    total: NDArray[np.floating[Any]] = np.zeros_like(toward)
    part = np.empty_like(toward)
    best, weight = -np.inf, 0.0
    with np.errstate(all="ignore"):  # what is not finite shows in the result
        for low in range(0, len(x), step):
            tile, found = x[low : low + step], exponents[low : low + step]
            found += tile @ toward
            top = float(found.max())
            if top == -np.inf or top < best - gap:
                continue
            if top > best:
                fade = np.exp(best - top)
                total *= fade
                weight *= fade
                best = top
            p = np.exp(found - found.dtype.type(best))
            total += np.matmul(p, tile, out=part)
            weight += float(p.sum())
        total /= total.dtype.type(weight)
    return torch.from_numpy(total)[None]
