"""Precision, recall, density and coverage."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prdc import compute_prdc
from torch import Tensor

from sparke import metrics
from sparke.errors import ArgumentError, ShapeError
from tests.metrics import definitions
from tests.metrics.common import rows


@pytest.mark.parametrize("nearest", [1, 3, 5])
def test_it_is_the_definition(nearest: int) -> None:
    x, y = rows(20, 3), rows(16, 3, 1) * 0.7 + 0.5
    found = metrics.prdc(x, y, nearest=nearest)
    assert found == pytest.approx(definitions.prdc(x.tolist(), y.tolist(), nearest), rel=1e-12)
    assert min(found[:2]) > 0
    assert max(found[:2]) < 1 or nearest > 1


@pytest.mark.parametrize("nearest", [1, 5])
def test_it_agrees_with_the_authors_package(
    nearest: int, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = rows(150, 6), rows(120, 6, 1) * 0.8 + 0.3
    theirs = compute_prdc(y.numpy(), x.numpy(), nearest)
    capsys.readouterr()  # it prints
    assert metrics.prdc(x, y, nearest=nearest)._asdict() == pytest.approx(theirs, rel=1e-12)


@settings(max_examples=30)
@given(
    points=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=8, max_size=24),
    nearest=st.integers(1, 3),
    shift=st.sampled_from([0.0, 0.1]),
)
def test_ties_and_copies_are_outside_as_without_rounding(
    points: list[tuple[int, int]], nearest: int, shift: float
) -> None:
    # Of the distances on a grid many are equal; moved, none of them is a sum without rounding.
    half = len(points) // 2
    grid = torch.tensor(points, dtype=torch.float64)
    x, y = grid[:half].tolist(), grid[half:].tolist()
    expected = definitions.prdc(x, y, nearest)
    turned = (grid + shift) @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    found = metrics.prdc(turned[:half], turned[half:], nearest=nearest)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("block", [1, 7, 16])
def test_tiles_give_what_one_matrix_gives(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(20, 3), rows(16, 3, 1)
    whole = metrics.prdc(x, y)
    monkeypatch.setattr(metrics._rows, "BLOCK", block)
    assert metrics.prdc(x, y) == whole


@pytest.mark.parametrize("block", [7, 1024])
def test_a_set_is_its_own_reference(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._rows, "BLOCK", block)
    x = rows(30, 5) + 100
    assert metrics.prdc(x, x.flip(0), nearest=4) == (1.0, 1.0, 1.0, 1.0)


def test_sets_far_apart_share_nothing() -> None:
    assert metrics.prdc(rows(12, 3), rows(12, 3, 1) + 1e3) == (0.0, 0.0, 0.0, 0.0)


def test_collapsed_samples_are_precise_and_recall_little() -> None:
    y = rows(60, 2)
    x = y[:1] + 1e-3 * rows(60, 2, 1)
    precision, recall, _, coverage = metrics.prdc(x, y)
    assert precision == 1
    assert max(recall, coverage) < 0.2


def test_the_order_of_rows_changes_nothing() -> None:
    x, y = rows(20, 3), rows(16, 3, 1)
    assert metrics.prdc(x.flip(0), y.flip(0)) == pytest.approx(metrics.prdc(x, y), rel=1e-12)


def test_the_unit_of_features_changes_nothing() -> None:
    x, y = rows(20, 3), rows(16, 3, 1)
    assert metrics.prdc(1024 * x, 1024 * y) == metrics.prdc(x, y)


def test_the_sides_are_told_apart() -> None:
    x, y = rows(20, 3), 3 * rows(16, 3, 1)
    there, back = metrics.prdc(x, y), metrics.prdc(y, x)
    assert (there.precision, there.recall) == (back.recall, back.precision)
    assert there.precision > there.recall


def test_half_precision_and_arrays_are_taken() -> None:
    x, y = rows(20, 3).half(), rows(16, 3, 1).half()
    assert metrics.prdc(x.numpy(), y) == metrics.prdc(x.double(), y.double())


def test_widths_must_agree() -> None:
    with pytest.raises(ShapeError, match="width 2 and features of width 3"):
        metrics.prdc(rows(20, 3), rows(20, 2))


@pytest.mark.parametrize("nearest", [0, -1, 2.5, True, "5"])
def test_the_number_of_neighbours_is_a_whole_number(nearest: object) -> None:
    with pytest.raises(ArgumentError, match="nearest must be a whole number above 0"):
        metrics.prdc(rows(20, 3), rows(20, 3), nearest=nearest)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "m", "short"), [(5, 9, "features"), (9, 5, "reference")])
def test_there_must_be_that_many_neighbours(n: int, m: int, short: str) -> None:
    with pytest.raises(ArgumentError, match=f"nearest=5 needs more than 5 rows, and {short} has 5"):
        metrics.prdc(rows(n, 3), rows(m, 3))
    assert len(metrics.prdc(rows(6, 3), rows(6, 3))) == 4


def test_what_is_not_finite_is_refused() -> None:
    y: Tensor = rows(9, 3)
    y[4, 0] = math.inf
    with pytest.raises(ArgumentError, match="reference must be finite; row 4 of 9"):
        metrics.prdc(rows(9, 3), y)
