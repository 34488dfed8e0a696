"""Vendi by random features: near the exact number, with the error its docstring states."""

import math

import pytest
import torch

from sparke import metrics
from sparke.metrics._covariance import Embedding
from tests.metrics.common import S, rows


@pytest.mark.parametrize("r", [8, 64])
def test_the_spectrum_is_as_near_as_stated(r: int) -> None:
    x, seeds = rows(40, 3), 40
    exact = torch.linalg.eigvalsh(torch.exp(-torch.cdist(x, x).square() / (2 * S**2)) / len(x))
    squares = []
    for seed in range(seeds):
        phi = Embedding(r, S, seed)("features", x)
        found = torch.linalg.eigvalsh(phi @ phi.mT / len(x))
        squares.append(float((found - exact).square().sum()))
    assert 0.02 / (2 * r) < sum(squares) / seeds < 1 / (2 * r)


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, math.inf])
def test_the_number_comes_near_and_nearer(order: float) -> None:
    x = rows(40, 2)
    exact = metrics.vendi(x, bandwidth=S, order=order)
    off = [
        sum(
            abs(metrics.vendi(x, bandwidth=S, order=order, random_features=r, seed=i) - exact)
            for i in range(4)
        )
        / 4
        for r in (4, 256)
    ]
    assert off[1] < 0.05 * exact
    assert off[1] < off[0] / 3


def test_it_is_at_most_the_number_of_features() -> None:
    value = metrics.vendi(rows(60, 9), bandwidth=0.01, random_features=5)
    assert 5 < value <= 10


def test_the_seed_makes_the_draw() -> None:
    x = rows(20, 3)
    a, again, other = (metrics.vendi(x, random_features=16, seed=s) for s in (1, 1, 2))
    assert a == again != other


def test_without_a_bandwidth_it_is_the_rule() -> None:
    x = rows(20, 3)
    s = metrics.shared_bandwidth(x)
    assert metrics.vendi(x, random_features=16) == pytest.approx(
        metrics.vendi(x, random_features=16, bandwidth=s), rel=1e-12
    )


def test_a_common_offset_costs_no_digits() -> None:
    x = rows(20, 3).round(decimals=3)
    near, far = (metrics.vendi(v, bandwidth=S, random_features=16) for v in (x, x + 2.0**30))
    assert far == pytest.approx(near, rel=1e-4)
