"""Rows in float64, compared in float64; nothing of sparke in here."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

F64 = torch.float64
Rows = list[list[float]]


def rows(n: int, d: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    """(n, d) independent normal numbers."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def close(ours: Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    theirs = torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def log_det(matrix: Rows) -> float:
    """By Gauss's elimination."""
    rest = [list(row) for row in matrix]
    total = 0.0
    for i in range(len(rest)):
        pivot = rest[i][i]
        total += math.log(pivot)
        for j in range(i + 1, len(rest)):
            share = rest[j][i] / pivot
            rest[j] = [a - share * b for a, b in zip(rest[j], rest[i], strict=True)]
    return total
