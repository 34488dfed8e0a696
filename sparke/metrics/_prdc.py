"""Precision, recall, density and coverage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparke.errors import ArgumentError
from sparke.kernels import squared_distances
from sparke.metrics._pairs import Kernel, count, tiles
from sparke.metrics._progress import Progress, Steps
from sparke.metrics._rows import Array, Table, same_width, table
from sparke.metrics._whole import whole


class PRDC(NamedTuple):
    """What [prdc][sparke.metrics.prdc] finds.

    Attributes:
        precision: share of the samples inside the reference, 0 to 1.
        recall: share of the reference inside the samples, 0 to 1.
        density: how densely the reference lies where the samples are; about 1 for equal
            distributions, and not bounded by 1.
        coverage: share of the reference that has a sample nearer than its own neighbours, 0 to 1.
    """

    precision: float
    recall: float
    density: float
    coverage: float


@torch.no_grad()
def prdc(
    features: Array,
    reference: Array,
    *,
    nearest: int = 5,
    progress: Progress | None = None,
) -> PRDC:
    r"""Precision and recall, density and coverage of a set against a reference.

    With $B_k(y)$ the open ball around y that reaches to the k-th nearest other row of its own set,
    samples $x_i$, i up to n, and reference $y_j$, j up to m,

    $$\text{precision} = \frac1n \sum_i 1[x_i \in \cup_j B_k(y_j)], \quad
      \text{recall} = \frac1m \sum_j 1[y_j \in \cup_i B_k(x_i)]$$

    $$\text{density} = \frac{1}{k n} \sum_i \sum_j 1[x_i \in B_k(y_j)], \quad
      \text{coverage} = \frac1m \sum_j 1[\exists i: x_i \in B_k(y_j)]$$

    (Kynkäänniemi and others, arXiv 1904.06991; Naeem and others, arXiv 2002.09797.) O((n + m)^2 d)
    time, in tiles: no matrix of all distances is kept.

    Precision and density speak of fidelity, recall and coverage of diversity against the reference,
    so both sets must be of comparable prompts. They move with k, n and m: compare at equal ones.
    Precision and recall are swayed by single outliers, whose balls are large; density and coverage
    of the reference's outliers only. More than k copies of a row have a ball of radius 0, which
    holds nothing. Nearness is Euclidean: scale the features as you want them compared.

    Args:
        features: (n, d), the samples to judge; tensor or array of any real dtype.
        reference: (m, d), usually real pictures, likewise.
        nearest: k, below n and m.
        progress: called with the tiles done and their total.

    Returns:
        The four numbers, by name.

    Raises:
        ShapeError: an argument is not a matrix, or the widths differ.
        ArgumentError: one is empty, not finite or has no k-th neighbour, or k is not above 0.
    """
    x, y = table("features", features, "prdc"), table("reference", reference, "prdc")
    same_width(x, y)
    nearest = whole("nearest", nearest)
    _check_nearest(nearest, x, y)
    Kernel("gaussian", 1.0, x, y)  # looks at each row, and takes the common mean off
    steps = Steps(progress, count(x) + count(y) + count(x, y))
    mine, theirs = _radii(x, nearest, steps), _radii(y, nearest, steps).to(x.device)
    inside = torch.zeros(x.n, dtype=torch.long, device=x.device)
    reached, covered = inside.new_zeros(y.n), inside.new_zeros(y.n)
    for tile in tiles(x, y):
        distance = squared_distances(tile.a, tile.b)
        around_reference = distance < theirs[tile.columns]
        inside[tile.rows] += around_reference.sum(1)
        covered[tile.columns] += around_reference.sum(0)
        reached[tile.columns] += (distance < mine[tile.rows, None]).sum(0)
        steps.advance()
    precision, recall, coverage = (
        float((hits > 0).double().mean()) for hits in (inside, reached, covered)
    )
    return PRDC(precision, recall, float(inside.sum()) / (nearest * x.n), coverage)


def _radii(x: Table, nearest: int, steps: Steps) -> Tensor:
    """(n,) squared radii, less what rounding can make of a distance.

    A row exactly as far as the neighbour lies outside, also where its distance is rounded down.
    """
    best = torch.full((x.n, nearest), torch.inf, dtype=torch.float64, device=x.device)
    squares = best.new_empty(x.n)
    for tile in tiles(x):
        distance = squared_distances(tile.a, tile.b)
        if tile.times == 1:
            distance.fill_diagonal_(torch.inf)
            squares[tile.rows] = tile.a.square().sum(1)
        best[tile.rows] = _smallest(best[tile.rows], distance)
        if tile.times == 2:
            best[tile.columns] = _smallest(best[tile.columns], distance.mT)
        steps.advance()
    radii = best.amax(1)
    # A row b within r of a is no longer than |a| + r; so are the sums that make up its distance.
    rounding = (x.width + 4) * torch.finfo(torch.float64).eps * (3 * squares + 2 * radii)
    return radii - 2 * rounding


def _smallest(best: Tensor, distance: Tensor) -> Tensor:
    k = best.shape[1]
    return torch.cat([best, distance], 1).topk(k, largest=False, sorted=False).values


def _check_nearest(nearest: int, x: Table, y: Table) -> None:
    for each in (x, y):
        if nearest >= each.n:
            raise ArgumentError(
                f"nearest={nearest} needs more than {nearest} rows, and {each.name} has {each.n}. "
                "Give more samples, or lower nearest."
            )
