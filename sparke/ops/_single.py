"""One query on a CPU: tiles as the batch of an attention, whose keys and values they are.

A loop over tiles waits for every thread twice a tile, and one query has little else to do. torch's
attention takes all tiles in one call, a thread to a tile, and returns each tile's log sum with its
mean; what remains is to merge a few of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparke.ops._rows import TILE_BYTES

GROUP = 256
"""Tiles of one call: their means, a row each, are held at once."""


def available() -> bool:
    """Whether this torch has the operator, which is not part of its promised interface."""
    return hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def run(towards: Tensor, rows: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """(1,) log sum and (1, d) mean of (n, d) rows with exponents ``towards @ rows.T + score``.

    Zeros for the mean where all of `score`, (1, n), is -inf.
    """
    n, d = rows.shape
    step = min(n, max(4, TILE_BYTES // (2 * d * rows.element_size())))
    whole = n - n % step
    found = [
        _attend(towards, part.unflatten(0, (-1, step)), known.unflatten(0, (-1, step)))
        for part, known in zip(
            rows[:whole].split(GROUP * step), score[0, :whole].split(GROUP * step), strict=True
        )
    ]
    if whole < n:
        found.append(_attend(towards, rows[None, whole:], score[:, whole:]))
    return _merge(torch.cat([lse for lse, _ in found]), torch.cat([mean for _, mean in found]))


def _attend(towards: Tensor, tiles: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """(t, r, d) tiles and (t, r) scores -> the (1,) log sum and (1, d) mean of all of them."""
    keys = tiles[:, None]
    means, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        towards.expand(len(tiles), 1, 1, -1), keys, keys, attn_mask=score[:, None, None], scale=1.0
    )
    means, lse = means.flatten(1), lse.flatten()
    hidden = score.amax(1) == -torch.inf
    if bool(hidden.any()):
        means = means.masked_fill(hidden[:, None], 0)
        lse = lse.masked_fill(hidden, -torch.inf)
    return _merge(lse, means)


def _merge(lse: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """(t,) log sums and (t, d) means -> those of the union."""
    total = torch.logsumexp(lse, 0, keepdim=True)
    p = torch.exp(lse - total.masked_fill(total == -torch.inf, 0))
    return total, p[None] @ means
