"""Rows of a million numbers as rows of a few, with the same inner products."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Span", "Whole"]

EQUAL = 1e-6
"""Rows that differ by less than this share of their length count as equal: it is rounding."""


class Span:
    r"""Coordinates of B rows in an orthonormal basis of the space they span.

    A score made of inner products or distances, and its gradient, never leave that space, so that
    repulsion over many rounds costs what B x B matrices cost, and the rows are read twice. The
    basis is the rows' mean and what is left of the rows without it: rows that share nearly all of
    their length lose nothing to rounding.

    Args:
        rows: (B, d), float32 or better.
    """

    def __init__(self, rows: Tensor) -> None:
        mean = rows.mean(0)
        length = mean.norm()
        self._axis = mean / length.clamp_min(torch.finfo(rows.dtype).tiny ** 0.5)
        self._rest = rows - mean
        along = self._rest @ self._axis
        self._rest.addr_(along, self._axis, alpha=-1)
        # Vector by vector: a product of matrices may be told to round to ten bits (TF32).
        gram = torch.stack([self._rest @ row for row in self._rest])
        told = torch.cat([gram, along[:, None], length.expand(len(rows), 1)], 1).cpu().double()
        gram, along, size = told[:, :-2], told[:, -2], told[0, -1]
        values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
        real = values > max(float(EQUAL * size) ** 2, EQUAL * float(values[-1]), 0.0)
        scales = values[real].sqrt()
        self._into = vectors[:, real] / scales
        self.coordinates = torch.cat([(size + along)[:, None], vectors[:, real] * scales], 1)

    @property
    def one_point(self) -> bool:
        """Whether all rows are equal, or differ in length only."""
        return self.coordinates.shape[1] == 1

    def within(self, moves: Tensor) -> Tensor:
        """The displacements: all rows may move everywhere."""
        return moves

    def back(self, moves: Tensor) -> Tensor:
        """(B, d) displacements from (B, r) ones of the coordinates."""
        own = moves[:, 1:].to(self._into) @ self._into.mT
        own, along = own.to(self._rest.dtype), moves[:, 0].to(self._rest.dtype)
        device = self._rest.device
        moved: Tensor = own.to(device) @ self._rest + along.to(device)[:, None] * self._axis
        return moved


class Whole:
    """The rows themselves: for scores that may look at single features, and for uneven padding.

    Args:
        rows: (B, d).
        free: (B, d), true where a row may move; None where all of it may.
    """

    def __init__(self, rows: Tensor, free: Tensor | None = None) -> None:
        self.coordinates, self._free = rows, free
        self.one_point = bool((rows == rows[0]).all())

    def within(self, moves: Tensor) -> Tensor:
        """The part of the displacements that may be."""
        return moves if self._free is None else torch.where(self._free, moves, 0.0)

    def back(self, moves: Tensor) -> Tensor:
        """The displacements as they are."""
        return moves
