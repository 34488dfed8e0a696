"""Relative RKE."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rke_score import RKE

from sparke import metrics
from sparke.errors import ArgumentError, ShapeError
from tests.metrics import definitions
from tests.metrics.common import S, each_kernel, rows
from tests.oracles import lists


@each_kernel
@pytest.mark.parametrize("d", [3, 30])
def test_it_is_the_definition(kernel: str, d: int) -> None:
    x, y = rows(9, d), rows(7, d, 1) + 0.5
    ours = metrics.relative_rke(x, y, kernel=kernel, bandwidth=S)
    assert ours == pytest.approx(definitions.relative_rke(lists(x), lists(y), kernel, S), rel=1e-6)


def test_it_agrees_with_the_authors_package() -> None:
    x, y = rows(12, 4), rows(9, 4, 1) + 0.5
    theirs = RKE(kernel_bandwidth=[S]).compute_rrke(x.numpy(), y.numpy(), 12, 9)[S]
    assert metrics.relative_rke(x, y, bandwidth=S) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("d", [3, 30])
def test_it_is_minus_the_logarithm_of_a_fidelity(d: int) -> None:
    x, y = rows(9, d), rows(7, d, 1) + 0.5
    expected = definitions.negative_log_fidelity(lists(x), lists(y))
    assert metrics.relative_rke(x, y, kernel="cosine") == pytest.approx(expected, rel=1e-6)


@each_kernel
def test_of_modes_far_apart_it_is_the_renyi_divergence_of_their_shares(kernel: str) -> None:
    x = torch.eye(3).repeat_interleave(torch.tensor([4, 1, 5]), 0) * 1e3
    y = torch.eye(3).repeat_interleave(torch.tensor([1, 4, 0]), 0) * 1e3
    overlap = sum(math.sqrt(p * q) for p, q in ((0.4, 0.2), (0.1, 0.8), (0.5, 0)))
    found = metrics.relative_rke(x, y, kernel=kernel, bandwidth=1.0)
    assert found == pytest.approx(-2 * math.log(overlap), rel=1e-7)


@each_kernel
@pytest.mark.parametrize("d", [3, 30])
def test_a_set_is_not_far_from_itself(kernel: str, d: int) -> None:
    x = rows(12, d)
    for y in (x, x.flip(0), x.repeat(2, 1)):
        assert metrics.relative_rke(x, y, kernel=kernel, bandwidth=S) == pytest.approx(0, abs=1e-7)


@each_kernel
def test_sets_with_nothing_alike_are_infinitely_far(kernel: str) -> None:
    x, y = torch.eye(4)[:2] * 1e3, torch.eye(4)[2:] * 1e3
    assert metrics.relative_rke(x, y, kernel=kernel, bandwidth=1.0) == math.inf


@each_kernel
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 99))
def test_it_is_at_least_zero_and_the_same_both_ways(kernel: str, n: int, m: int, seed: int) -> None:
    x, y = rows(n, 4, seed), rows(m, 4, seed + 1)
    there, back = (metrics.relative_rke(a, b, kernel=kernel) for a, b in ((x, y), (y, x)))
    assert there >= 0
    assert back == pytest.approx(there, rel=1e-6, abs=1e-7)


def test_covariances_give_what_pairs_give() -> None:
    x, y = rows(9, 8), rows(7, 8, 1)
    wide = (torch.cat([v, torch.zeros(len(v), 20)], 1) for v in (x, y))
    dense = metrics.relative_rke(*wide, kernel="cosine")
    assert metrics.relative_rke(x, y, kernel="cosine") == pytest.approx(dense, rel=1e-6)


def test_random_features_come_near_and_nearer() -> None:
    x, y = rows(40, 2), rows(30, 2, 1) + 1
    exact = metrics.relative_rke(x, y, bandwidth=S)
    off = [
        np.mean(
            [
                abs(metrics.relative_rke(x, y, bandwidth=S, random_features=r, seed=i) - exact)
                for i in range(4)
            ]
        )
        for r in (8, 256)
    ]
    assert off[1] < 0.1 * exact
    assert off[1] < off[0] / 3


def test_widths_must_agree() -> None:
    for options in ({}, {"kernel": "cosine"}, {"random_features": 8}):
        with pytest.raises(ShapeError, match="width 3 and features of width 4"):
            metrics.relative_rke(rows(6, 4), rows(6, 3), **options)


@pytest.mark.parametrize("options", [{"kernel": "linear"}, {"bandwidth": -1}])
def test_forbidden_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        metrics.relative_rke(rows(6, 4), rows(6, 4), **options)  # type: ignore[arg-type]
