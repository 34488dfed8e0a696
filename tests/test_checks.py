"""Numbers: what counts as one, in every place that takes one."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import sparke
from sparke import checks
from sparke.entropy import check_order
from sparke.errors import ArgumentError, ShapeError
from sparke.guidance.interval import Interval
from sparke.memory import RingMemory

NO_NUMBERS = [
    "0.5",
    b"0.5",
    True,
    np.bool_(True),
    torch.tensor(True),
    None,
    [0.5],
    1j,
    torch.tensor([0.5, 0.5]),
    np.array([0.5, 0.5]),
]
NUMBERS = [0.5, Decimal("0.5"), Fraction(1, 2), np.float32(0.5), torch.tensor(0.5)]
ENDLESS = [math.nan, math.inf, -math.inf, 10**400, torch.tensor(math.nan)]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers_of_every_kind_are_taken(value: Any) -> None:
    assert checks.positive("width", value) == 0.5
    assert type(checks.positive("width", value)) is float


@pytest.mark.parametrize("value", [*NO_NUMBERS, *ENDLESS], ids=repr)
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"width must be .* above 0"):
        checks.positive("width", value)
    with pytest.raises(ArgumentError, match=r"width must be .* at least 0"):
        checks.positive("width", value, zero=True)


def test_a_tensor_in_the_place_of_a_number_is_told_by_its_shape() -> None:
    with pytest.raises(ArgumentError, match=r"got a tensor of shape \(3, 400\)"):
        checks.positive("width", torch.zeros(3, 400))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_an_order_and_a_noise_level_are_numbers_too(value: Any) -> None:
    with pytest.raises(ArgumentError, match="order"):
        check_order(value)
    with pytest.raises(ArgumentError, match="hi must be"):
        Interval(hi=value)


GUIDERS: list[tuple[str, dict[str, Any]]] = [
    ("diversity", {}),
    ("particle", {}),
    ("dpp", {}),
    ("spell", {}),
    ("eddy", {}),
    ("novelty", {"reference": torch.zeros(2, 4)}),
    ("cvsg", {"exemplars": torch.zeros(2, 4)}),
]


@pytest.mark.parametrize(("name", "options"), GUIDERS, ids=[name for name, _ in GUIDERS])
def test_a_scale_is_a_number_at_least_zero_without_an_upper_end(
    name: str, options: dict[str, Any]
) -> None:
    for value in (*NO_NUMBERS, *ENDLESS, -1):
        if value is None and name in ("particle", "cvsg"):
            continue  # there it stands for the default
        with pytest.raises(ArgumentError, match=r"scale must be .*at least 0"):
            sparke.guidance.guider(name, scale=value, **options)
    for value in (0, 1e6):
        sparke.guidance.guider(name, scale=value, **options)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None])
def test_a_count_is_a_whole_number(value: Any) -> None:
    with pytest.raises(ArgumentError, match="capacity must be a whole number above 0"):
        RingMemory(value)
    with pytest.raises(ArgumentError, match="rows must be a whole number above 0"):
        checks.whole("rows", value)
    assert checks.whole("rows", 3) == 3


def test_a_class_is_no_memory() -> None:
    with pytest.raises(ArgumentError, match=r"memory=RingMemory is a class.*RingMemory\(\.\.\.\)"):
        sparke.DiversityGuider(memory=RingMemory)  # type: ignore[arg-type]


# Bandwidths as tensors.

SCORES = [name for name in sparke.scores() if name != "spell"]


def made(name: str, width: Any) -> sparke.Score:
    return sparke.score(name, **{"radius" if name == "spell" else "bandwidth": width})


@pytest.mark.parametrize("name", [*SCORES, "spell"])
@pytest.mark.parametrize(
    "values", [[[0.5], [0.0]], [[-1.0]], [[math.nan], [1.0]], [[math.inf]], -1.0, math.nan]
)
def test_every_number_of_a_bandwidth_is_above_zero(name: str, values: Any) -> None:
    with pytest.raises(ArgumentError, match="must be finite and above 0 throughout"):
        made(name, torch.tensor(values))


@pytest.mark.parametrize("name", [*SCORES, "spell"])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 2), (3, 1, 1)])
def test_a_bandwidth_is_a_number_or_a_column(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"must be a single number or \(b, 1\)"):
        made(name, torch.ones(shape))


@pytest.mark.parametrize("name", [*SCORES, "spell"])
def test_a_bandwidth_has_as_many_rows_as_there_are_queries(name: str) -> None:
    query = sparke.Features(torch.randn(3, 4), torch.randn(3, 2))
    bank = sparke.Features(torch.randn(5, 4), torch.randn(5, 2))
    with pytest.raises(ShapeError, match=r"each of 2 queries .* there are 3"):
        made(name, torch.ones(2, 1))(query, bank)
    one, each, number = (
        made(name, w)(query, bank) for w in (torch.tensor(0.8), torch.full((3, 1), 0.8), 0.8)
    )
    torch.testing.assert_close(one, number)
    torch.testing.assert_close(each, number)
