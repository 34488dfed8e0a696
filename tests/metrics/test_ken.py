"""Kernel-based entropic novelty."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparke import metrics
from sparke.errors import ArgumentError, ShapeError
from tests.metrics import definitions
from tests.metrics.common import S, each_kernel, rows
from tests.oracles import lists


def modes(counts: list[int]) -> Tensor:
    """Samples of modes at right angles and far apart, so many of each."""
    return torch.eye(len(counts)).repeat_interleave(torch.tensor(counts), 0) * 1e3


@each_kernel
@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("d", [3, 30])
def test_it_is_the_definition(kernel: str, eta: float, d: int) -> None:
    x, y = rows(9, d), 0.3 * rows(7, d, 1) + 1
    ours = metrics.ken(x, y, kernel=kernel, bandwidth=S, eta=eta)
    expected = definitions.ken(lists(x), lists(y), kernel, S, eta)
    assert expected > 0.01
    assert ours == pytest.approx(expected, rel=1e-7)


@each_kernel
@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
def test_of_modes_far_apart_it_is_the_excess_and_its_entropy(kernel: str, eta: float) -> None:
    x, y = modes([4, 1, 3, 0]), modes([1, 2, 3, 4])
    excess = [a - eta * b for a, b in zip([4 / 8, 1 / 8, 3 / 8], [0.1, 0.2, 0.3], strict=True)]
    above = [v for v in excess if v > 0]
    expected = -sum(v * math.log(v / sum(above)) for v in above)
    found = metrics.ken(x, y, kernel=kernel, bandwidth=1.0, eta=eta)
    assert found == pytest.approx(expected, rel=1e-9)


@each_kernel
def test_one_new_kind_has_no_entropy_and_many_have(kernel: str) -> None:
    def ken(x: Tensor, y: Tensor) -> float:
        return metrics.ken(x, y, kernel=kernel, bandwidth=1.0)

    assert ken(modes([6, 0, 0]), modes([0, 3, 3])) == pytest.approx(0, abs=1e-9)
    x, y = modes([1, 1, 1, 1, 1, 0]), modes([0, 0, 0, 0, 0, 9])
    assert ken(x, y) == pytest.approx(math.log(5), rel=1e-9)


@each_kernel
@pytest.mark.parametrize("d", [3, 30])
def test_a_set_is_not_novel_against_itself(kernel: str, d: int) -> None:
    x = rows(12, d)
    for y in (x, x.flip(0), x.repeat(2, 1)):
        assert metrics.ken(x, y, kernel=kernel, bandwidth=S) == pytest.approx(0, abs=1e-9)


@each_kernel
def test_copies_of_the_samples_change_nothing(kernel: str) -> None:
    x, y = rows(8, 4), rows(6, 4, 1)
    once = metrics.ken(x, y, kernel=kernel, bandwidth=S)
    twice = metrics.ken(x.repeat(2, 1), y.repeat(3, 1), kernel=kernel, bandwidth=S)
    assert twice == pytest.approx(once, rel=1e-8)


@each_kernel
def test_the_order_of_rows_changes_nothing(kernel: str) -> None:
    x, y = rows(8, 4), rows(6, 4, 1)
    assert metrics.ken(x.flip(0), y.flip(0), kernel=kernel) == pytest.approx(
        metrics.ken(x, y, kernel=kernel), rel=1e-9
    )


@each_kernel
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 99), eta=st.floats(0.1, 5))
def test_it_lies_between_nothing_and_all_being_new(
    kernel: str, n: int, m: int, seed: int, eta: float
) -> None:
    value = metrics.ken(rows(n, 4, seed), rows(m, 4, seed + 1), kernel=kernel, eta=eta)
    assert 0 <= value <= math.log(n) + 1e-9


@each_kernel
def test_what_the_reference_shows_often_enough_is_not_new(kernel: str) -> None:
    x, y = rows(20, 4), rows(15, 4, 1) + 0.3
    found = [metrics.ken(x, y, kernel=kernel, bandwidth=S, eta=e) for e in (0.1, 1.0, 10.0)]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("order", [1.0, 3.0])
def test_covariances_give_what_pairs_give(order: float) -> None:
    x, y = rows(9, 8), rows(7, 8, 1)
    wide = (torch.cat([v, torch.zeros(len(v), 20)], 1) for v in (x, y))
    dense = metrics.ken(*wide, kernel="cosine", eta=order)
    assert metrics.ken(x, y, kernel="cosine", eta=order) == pytest.approx(dense, rel=1e-9)


def test_without_a_bandwidth_it_is_the_shared_one() -> None:
    x, y = rows(9, 4), 3 * rows(7, 4, 1)
    s = metrics.shared_bandwidth(x, y)
    assert metrics.ken(x, y) == pytest.approx(metrics.ken(x, y, bandwidth=s), rel=1e-12)
    assert metrics.ken(100 * x, 100 * y) == pytest.approx(metrics.ken(x, y), rel=1e-8)


def test_random_features_come_near_and_nearer() -> None:
    x, y = rows(40, 3), rows(30, 3, 1) + 0.5
    exact = metrics.ken(x, y, bandwidth=S)

    def off(r: int) -> float:
        found = [
            metrics.ken(x, y, bandwidth=S, random_features=r, seed=seed) - exact
            for seed in range(4)
        ]
        return math.sqrt(sum(v * v for v in found) / len(found))

    few, many = off(8), off(256)
    assert many < 0.05 * exact
    assert many < few / 3
    same = metrics.ken(x, x, bandwidth=S, random_features=64)
    assert same == pytest.approx(0, abs=1e-9)


def test_widths_must_agree() -> None:
    for options in ({}, {"kernel": "cosine"}, {"random_features": 8}):
        with pytest.raises(ShapeError, match="width 3 and features of width 4"):
            metrics.ken(rows(6, 4), rows(6, 3), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 0},
        {"eta": -1},
        {"eta": math.nan},
        {"kernel": "linear"},
        {"bandwidth": 0},
        {"random_features": 0},
        {"random_features": 2.5},
        {"random_features": True},
        {"random_features": 8, "kernel": "cosine"},
    ],
)
def test_forbidden_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        metrics.ken(rows(6, 4), rows(6, 4), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_an_error_names_the_reference(kernel: str) -> None:
    y = rows(6, 4)
    y[2, 1] = math.nan
    with pytest.raises(ArgumentError, match="reference must be finite; row 2 of 6"):
        metrics.ken(rows(6, 4), y, kernel=kernel)
