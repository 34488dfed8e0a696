"""Which pictures of a set are most alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparke.kernels import kernel_matrix

BLOCK = 1024


@dataclass(frozen=True)
class Pair:
    """Two pictures by their row, and how alike they are, 1 if they are the same to the encoder."""

    first: int
    second: int
    likeness: float


@dataclass(frozen=True)
class Nearest:
    """The pairs that are most alike, and the likeness of every picture to its nearest one.

    Attributes:
        pairs: the most alike first; no picture is in two of them.
        likeness: (m,), of the pictures that have another one to be compared with.
    """

    pairs: tuple[Pair, ...]
    likeness: Tensor


@torch.no_grad()
def within(
    x: Tensor,
    groups: list[Tensor],
    *,
    kernel: str,
    bandwidth: float,
    most: int,
    tell: Callable[[int, int], None],
) -> Nearest:
    """Among the rows of each group.

    Args:
        x: (n, d) features.
        groups: of row numbers that may be compared; the pictures of one prompt.
        kernel: that says how alike two rows are.
        bandwidth: of the Gaussian kernel.
        most: pairs to find.
        tell: called with the blocks done and all of them.
    """
    total = sum(-(-len(group) // BLOCK) for group in groups)
    found: list[Pair] = []
    likeness, done = [], 0
    for group in groups:
        # In float64, and about their mean: equal pictures then have likeness 1.
        rows = x[group].double()
        rows = rows - rows.mean(0) if kernel == "gaussian" else rows
        for start in range(0, len(group), BLOCK):
            done += 1
            tell(done, total)
            if len(group) < 2:
                continue
            alike = kernel_matrix(rows[start : start + BLOCK], rows, kernel, bandwidth)
            here = torch.arange(start, start + len(alike))
            alike[torch.arange(len(alike)), here] = -torch.inf
            best, other = alike.max(1)
            likeness.append(best)
            found += [
                Pair(int(group[i]), int(group[j]), min(1.0, k))
                for i, j, k in zip(here.tolist(), other.tolist(), best.tolist(), strict=True)
            ]
    return Nearest(_apart(found, most), torch.cat(likeness) if likeness else torch.empty(0))


@torch.no_grad()
def across(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str,
    bandwidth: float,
    most: int,
    tell: Callable[[int, int], None],
) -> tuple[Pair, ...]:
    """Pairs of a row of x and the row of y nearest to it, the most alike first."""
    mean = torch.cat([x, y]).double().mean(0) if kernel == "gaussian" else 0.0
    y, found = y.double() - mean, []
    for start in range(0, len(x), BLOCK):
        alike = kernel_matrix(x[start : start + BLOCK].double() - mean, y, kernel, bandwidth)
        best, other = alike.max(1)
        found += [
            Pair(start + i, int(j), min(1.0, float(k)))
            for i, (j, k) in enumerate(zip(other, best, strict=True))
        ]
        tell(min(start + BLOCK, len(x)), len(x))
    return tuple(sorted(found, key=lambda p: (-p.likeness, p.first)))[:most]


def _apart(found: list[Pair], most: int) -> tuple[Pair, ...]:
    """The most alike, each picture once: of many copies of one picture, one pair is enough."""
    used: set[int] = set()
    kept: list[Pair] = []
    for pair in sorted(found, key=lambda p: (-p.likeness, p.first, p.second)):
        if len(kept) == most:
            break
        if used.isdisjoint((pair.first, pair.second)):
            used |= {pair.first, pair.second}
            kept.append(pair)
    return tuple(kept)
