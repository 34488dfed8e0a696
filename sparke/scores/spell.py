"""SPELL's sparse repellency as a score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparke.kernels import QuantileRule, squared_distances
from sparke.protocols import Features, Requires
from sparke.scores import _kernel

__all__ = ["SPELL", "build"]

SLACK = 1e-4
"""Rounding of squared distances by matrix products, relative to the squared lengths."""
PART = 2**24
"""At most this many differences are held at a time."""


@dataclass(frozen=True)
class SPELL:
    r"""How far a sample lies inside the shields of a bank: 0 outside all of them.

    $$s(z) = -\frac{1}{2} \sum_j w_j \left(r - \|z - x_j\|\right)_+^2$$

    Its gradient is the displacement of SPELL (arXiv 2410.06025),
    $\sum_j w_j (r/\|z - x_j\| - 1)_+ (z - x_j)$, which is exactly zero unless a row is nearer than
    the radius r; w are weights of the rows, 1 unless a selection has others. At a row itself there
    is no direction, and the gradient is taken to be 0. It costs one matrix product with the rows,
    and exact distances to those near.

    It is not the published method: a DiversityGuider gives the direction a length of its own, and
    the promise that one row is left at r or more is the guider's of the same name.

    Attributes:
        radius: r, in the units of the features, or a rule.

    Raises:
        ArgumentError: radius not above 0.
    """

    radius: _kernel.Bandwidth = QuantileRule(rows=0.5, factor=1.0)

    def __post_init__(self) -> None:
        _kernel.check_bandwidth("radius", self.radius)

    @property
    def requires(self) -> Requires:
        """Nothing."""
        return Requires()

    def __call__(self, query: Features, bank: Features) -> Tensor:
        """(b,) scores of b query rows (b, d) against n bank rows (n, d); 0 for an empty bank."""
        _kernel.check_selection(query, bank)
        if not len(bank):
            return query.x.sum(-1) * 0
        distance = torch.cdist(
            query.x, bank.x.to(query.x), compute_mode="donot_use_mm_for_euclid_dist"
        )
        inside = (_kernel.width_of(self.radius, query, bank) - distance).clamp_min(0)
        return -(_kernel.given_weight(query, bank).exp() * inside.square()).sum(-1) / 2

    def direction(self, query: Features, bank: Features) -> Tensor:
        """(b, d) gradient of the score in ``query.x``, in closed form."""
        return self.direction_and_crowding(query, bank)[0]

    def crowding(self, query: Features, bank: Features) -> Tensor:
        r"""(b,) largest $w_j (1 - \|z - x_j\| / r)_+$: 0 outside all shields, 1 at a center."""
        return self.direction_and_crowding(query, bank)[1]

    def direction_and_crowding(self, query: Features, bank: Features) -> tuple[Tensor, Tensor]:
        """Both from one search for the rows that are near."""
        _kernel.check_selection(query, bank)
        away, depth = torch.zeros_like(query.x), query.x.new_zeros(len(query))
        if not len(bank):
            return away, depth
        rows = bank.x.to(query.x.device)
        width = _kernel.width_of(self.radius, query, bank)
        radius = torch.as_tensor(width, dtype=query.x.dtype, device=query.x.device)
        radius = radius.expand(len(query), 1)
        weight = _kernel.given_weight(query, bank).exp()
        for i, near in enumerate(_near(query.x, rows.to(query.x), radius, weight > 0)):
            for part in near.split(max(1, PART // rows.shape[1])):
                if not len(part):
                    continue
                apart = query.x[i] - rows[part].to(query.x)
                distance = apart.norm(dim=1)
                inside = weight[i, part] * (radius[i] - distance).clamp_min(0)
                push = torch.where(distance > 0, inside / distance, 0.0)
                away[i] += push @ apart
                depth[i] = torch.maximum(depth[i], (inside / radius[i]).max())
        return away, depth

    def calibrate(self, bank: Features) -> SPELL:
        """The same score with a rule's radius read off this bank."""
        return _kernel.calibrated(self, "radius", bank)


def _near(query: Tensor, rows: Tensor, radius: Tensor, seen: Tensor) -> list[Tensor]:
    """For each query the rows that may be nearer than its radius, and no fewer."""
    rough = squared_distances(query, rows)
    lengths = query.square().sum(1, keepdim=True) + rows.square().sum(1)
    near = (rough <= radius.square() + SLACK * lengths) & seen
    return [row.nonzero().squeeze(1) for row in near]


build = SPELL
