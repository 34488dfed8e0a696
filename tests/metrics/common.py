"""Rows, prompts and the five measures of one signature, for the tests of this folder."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparke import metrics

ALL: list[Callable[..., float]] = [
    metrics.vendi,
    metrics.rke,
    metrics.cond_vendi,
    metrics.cond_rke,
    metrics.in_batch_similarity,
]
NUMBERS = ALL[:4]
ORDERS = [0.5, 1.0, 2.0, 5.0, math.inf]
S, S_PROMPT = 1.7, 0.6

every = pytest.mark.parametrize("metric", ALL)
effective_number = pytest.mark.parametrize("metric", NUMBERS)
each_kernel = pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
each_order = pytest.mark.parametrize("order", ORDERS)


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prompts(n: int, different: int = 3) -> Tensor:
    """(n, 5): `different` prompts in turn, near enough to weigh on each other."""
    p = rows(1, 5, 8) + 0.4 * rows(different, 5, 9)
    return p[torch.arange(n) % different]
