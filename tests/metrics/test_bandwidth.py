"""The rule for a bandwidth, of one set and of several."""

import math

import pytest
import torch

from sparke import metrics
from sparke.errors import ArgumentError, ShapeError
from tests import oracles
from tests.metrics.common import rows


@pytest.mark.parametrize("n", [2, 7, 40])
def test_the_bandwidth_rule_is_the_loop(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._bandwidth, "MEDIAN_ROWS", 16)
    x = rows(n, 4)
    s = oracles.median_rule(oracles.lists(x), 16)
    assert metrics.rke(x) == pytest.approx(metrics.rke(x, bandwidth=s), rel=1e-12)
    assert metrics.vendi(x) == pytest.approx(metrics.vendi(x, bandwidth=s), rel=1e-12)


def test_the_bandwidth_rule_where_most_rows_are_alike() -> None:
    x = torch.cat([rows(1, 4).repeat(8, 1), rows(2, 4, 5)])
    s = oracles.median_rule(oracles.lists(x), 2048)
    assert s > 0.1
    assert metrics.rke(x) == pytest.approx(metrics.rke(x, bandwidth=s), rel=1e-12)


def test_the_bandwidth_rule_counts_some_duplicates_as_rows() -> None:
    x = rows(8, 4)[[0, 0, 0, 1, 2, 3, 4, 5, 6, 7]]
    s = oracles.median_rule(oracles.lists(x), 2048)
    assert metrics.rke(x) == pytest.approx(metrics.rke(x, bandwidth=s), rel=1e-12)


def test_the_bandwidth_rule_follows_the_scale() -> None:
    x = rows(9, 4)
    assert metrics.vendi(1e4 * x) == pytest.approx(metrics.vendi(x), rel=1e-9)


def test_of_one_set_it_is_the_rule() -> None:
    x = rows(9, 4)
    assert metrics.shared_bandwidth(x) == pytest.approx(
        oracles.median_rule(oracles.lists(x), 2048), rel=1e-12
    )


@pytest.mark.parametrize("most", [2048, 12, 5])
def test_of_several_each_gives_as_many_rows(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._bandwidth, "MEDIAN_ROWS", most)
    x, y, z = rows(9, 4), 3 * rows(20, 4, 1), rows(2, 4, 2) + 5
    share = most // 3
    chosen = [
        row
        for each in (x, y, z)
        for row in (
            oracles.lists(each)
            if len(each) <= share
            else [each[i * len(each) // share].tolist() for i in range(share)]
        )
    ]
    expected = oracles.median_rule(chosen, 2048)
    assert metrics.shared_bandwidth(x, y, z) == pytest.approx(expected, rel=1e-12)


def test_with_a_shared_bandwidth_the_wider_set_is_the_more_varied() -> None:
    x = rows(40, 4)
    s = metrics.shared_bandwidth(x, 3 * x)
    assert metrics.vendi(3 * x) == pytest.approx(metrics.vendi(x))
    assert metrics.vendi(3 * x, bandwidth=s) > 1.5 * metrics.vendi(x, bandwidth=s)


def test_copies_far_from_the_origin_are_copies() -> None:
    x = torch.cat([rows(1, 300).repeat(30, 1), rows(2, 300, 5)]) + 1e4
    distances = torch.pdist(x)
    expected = 0.5 * float(distances[distances > 0].quantile(0.5))
    assert metrics.shared_bandwidth(x) == pytest.approx(expected, rel=1e-9)


def test_only_the_rows_it_compares_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._bandwidth, "MEDIAN_ROWS", 5)
    x = rows(20, 4)
    expected = metrics.shared_bandwidth(x)
    x[7] = math.nan  # read are 0, 4, 8, 12 and 16
    assert metrics.shared_bandwidth(x) == expected
    x[8, 1] = math.nan
    with pytest.raises(ArgumentError, match="row 8 of 20 holds NaN"):
        metrics.shared_bandwidth(x)


def test_without_sets_there_is_nothing_to_measure() -> None:
    with pytest.raises(ArgumentError, match="sets is empty"):
        metrics.shared_bandwidth()


def test_an_error_names_the_set() -> None:
    wrong = rows(6, 4)
    wrong[1, 1] = math.nan
    with pytest.raises(ArgumentError, match="set 1 must be finite; row 1 of 6"):
        metrics.shared_bandwidth(rows(6, 4), wrong)
    with pytest.raises(ShapeError, match="set 1 has rows of width 3 and set 0 of width 4"):
        metrics.shared_bandwidth(rows(6, 4), rows(6, 3))
