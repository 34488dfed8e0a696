"""One bandwidth for several sets."""

from __future__ import annotations

import torch
from torch import Tensor

from sparke.errors import ArgumentError
from sparke.kernels import squared_distances
from sparke.metrics._rows import Array, Table, same_width, table

MEDIAN_ROWS = 2048
"""At most this many rows are compared pairwise for a bandwidth."""


@torch.no_grad()
def shared_bandwidth(*sets: Array) -> float:
    """One bandwidth of the Gaussian kernel for several sets, so that they can be compared.

    Half the median distance between rows of all sets together, of which each gives the same number,
    2048 divided by the number of sets, at even strides (all of its rows if it has fewer). Where
    most rows are alike it is the median between rows that differ, and 1 where all are. Of one set
    it is the bandwidth that the measures choose when they are given none.

    Effective numbers of two sets say which is more varied only if both were taken with the same
    bandwidth: without one, each measure follows the scale of its own set, and a set twice as wide
    has the same number. There is no randomness in the rule, and no right bandwidth either: if a
    conclusion holds at half and at twice this one, say so.

    Args:
        sets: (n, d) each, of one width; tensors or arrays, of which only those rows are read.

    Returns:
        A bandwidth in the units of the features.

    Raises:
        ArgumentError: there is no set, or one is empty or given in chunks, or a row that is read
            is not finite.
        ShapeError: a set is not a matrix, or of another width than the first.
    """
    if not sets:
        raise ArgumentError("sets is empty: shared_bandwidth needs at least one set of features.")
    tables = [table(f"set {i}", value, "shared_bandwidth") for i, value in enumerate(sets)]
    return of_tables(*tables)


def of_tables(*tables: Table) -> float:
    """The rule."""
    for other in tables[1:]:
        same_width(tables[0], other)
    share = max(1, MEDIAN_ROWS // len(tables))
    x = torch.cat([each.strided(share).to(tables[0].device) for each in tables])
    x = x - x.mean(0)
    distance = _distances(x)
    if not bool(distance.any()):
        return 1.0
    return 0.5 * (_median(distance) or _median(distance[distance > 0]))


def _distances(x: Tensor) -> Tensor:
    """Of all pairs; 0 where rounding is as large as what is left of it."""
    squares = x.square().sum(1)
    rounding = (x.shape[1] + 4) * torch.finfo(x.dtype).eps * (squares[:, None] + squares)
    found = squared_distances(x, x)
    found = torch.where(found > rounding, found, 0.0)
    rows, columns = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return found[rows, columns].sqrt()


def _median(values: Tensor) -> float:
    return float(values.quantile(0.5))
