"""A score: how far the nearest rows are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sparke import Features, Requires
from sparke.errors import ArgumentError
from sparke.protocols import Selection
from torch import Tensor

__all__ = ["Neighbours"]


@dataclass(frozen=True)
class Neighbours:
    r"""Distance to the k nearest rows, the nearest-neighbour estimate of how much a batch covers.

    $$s(z) = \log\Bigl(1 + \tfrac{1}{k} \sum_{j=1}^{k} \lVert z - x_{(j)} \rVert\Bigr)$$

    with $x_{(j)}$ the j-th nearest row. Summed over a batch it estimates the batch's entropy up to
    constants (Kozachenko and Leonenko 1987), here in the form of arXiv 2103.04551, equation 5,
    which uses it as a reward for exploring. Only the nearest rows push, so a sample in a crowd
    leaves it by the shortest way, whatever lies elsewhere. With fewer than k rows, all count.

    It is not a kernel score: rows have no weight beyond being there, so prompts play no part, and
    its scale is that of the rows. The sum is over distances, not over squared ones, so a row far
    away pulls no harder than one nearby.

    Attributes:
        k: number of rows, at least 1.
        requires: nothing; a batch of one has its memory to be compared with.
    """

    k: int = 3
    requires: Requires = Requires()

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ArgumentError(f"k must be a whole number above 0, got {self.k!r}.")

    def __call__(self, query: Features, bank: Features) -> Tensor:
        """(b,) values, from 0 where all k neighbours are duplicates; 0 against no rows."""
        # Distances by matrix products are wrong for near rows, which are those that matter.
        off = torch.cdist(query.x, bank.x, compute_mode="donot_use_mm_for_euclid_dist")
        if isinstance(bank, Selection) and bank.log_weight is not None:
            off = off.masked_fill(bank.log_weight == -torch.inf, torch.inf)
        nearest = off.topk(min(self.k, len(bank)), largest=False).values
        seen = nearest.isfinite()
        total = torch.where(seen, nearest, 0.0).sum(1)
        return torch.log1p(total / seen.sum(1).clamp_min(1))
