"""Errors: what they derive from, what they say, and the rules in checks that raise them."""

import math

import pytest
import torch

from sparke import checks, errors
from sparke.errors import ArgumentError, ShapeError, SparkeError, UnknownName
from sparke.protocols import Features

BUILT_IN: dict[str, type[Exception]] = {
    "ArgumentError": ValueError,
    "ShapeError": ValueError,
    "MissingPrompts": ValueError,
    "UnsupportedTarget": TypeError,
    "MissingHost": ImportError,
    "MemoryFileError": OSError,
    "NonFiniteGuidance": ArithmeticError,
    "UnknownName": LookupError,
}


@pytest.mark.parametrize(("name", "expected"), BUILT_IN.items())
def test_every_error_is_ours_and_a_built_in(name: str, expected: type[Exception]) -> None:
    error = getattr(errors, name)
    assert issubclass(error, SparkeError)
    assert issubclass(error, expected)


def test_the_list_above_is_complete() -> None:
    assert set(errors.__all__) - {"SparkeError", "GuidanceWarning"} == set(BUILT_IN)


def test_a_warning_is_no_error() -> None:
    assert issubclass(errors.GuidanceWarning, UserWarning)
    assert not issubclass(errors.GuidanceWarning, SparkeError)


@pytest.mark.parametrize(
    ("asked", "near"),
    [("cond-rek", "cond-rke"), ("Cond_RKEE", "cond-rke"), ("vendy", "vendi"), ("rkee", "rke")],
)
def test_an_unknown_name_offers_near_ones(asked: str, near: str) -> None:
    error = UnknownName("score", asked, ["rke", "cond-rke", "vendi"])
    assert f"Did you mean {near!r}" in str(error)
    assert repr(asked) in str(error)


def test_an_unknown_name_far_from_all_offers_none_and_lists_all() -> None:
    error = UnknownName("score", "xyzzy", ["vendi", "rke"])
    assert "Did you mean" not in str(error)
    assert str(error).endswith("Known: rke, vendi.")
    assert (error.kind, error.name, error.known) == ("score", "xyzzy", ("rke", "vendi"))


def test_several_near_names_are_all_offered() -> None:
    assert "'cond-rke' or 'cond-rkf'" in str(
        UnknownName("s", "cond-rke2", ["cond-rke", "cond-rkf"])
    )


def test_no_names_at_all_is_said_so() -> None:
    assert "Known: none." in str(UnknownName("backend", "x", []))


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1.5x", None, [1]])
def test_positive_refuses(value: float) -> None:
    with pytest.raises(ArgumentError, match=r"width must be .*above 0"):
        checks.positive("width", value)


def test_positive_takes_zero_only_where_allowed() -> None:
    assert checks.positive("width", 0, zero=True) == 0.0
    with pytest.raises(ArgumentError, match="at least 0"):
        checks.positive("width", -1e-9, zero=True)


def test_positive_gives_a_float() -> None:
    assert isinstance(checks.positive("width", 3), float)


def test_choice_names_what_is_allowed() -> None:
    assert checks.choice("mode", "b", ("a", "b")) == "b"
    with pytest.raises(ArgumentError, match="mode must be one of a, b; got 'c'"):
        checks.choice("mode", "c", ("a", "b"))


@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2)])
def test_features_must_be_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"query\.x must be \(rows, width\)"):
        checks.features("query", Features(torch.zeros(shape)))


@pytest.mark.parametrize("shape", [(3,), (2, 4), (3, 4, 1)])
def test_prompts_must_be_one_row_a_sample(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"query\.cond must be \(3, width\)"):
        checks.features("query", Features(torch.zeros(3, 2), torch.zeros(shape)))


def test_a_pair_needs_equal_widths() -> None:
    query = Features(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="width 3 and bank rows 5"):
        checks.pair(query, Features(torch.zeros(2, 5), torch.zeros(2, 4)))
    with pytest.raises(ShapeError, match="width 4 and bank prompts 5"):
        checks.pair(query, Features(torch.zeros(2, 3), torch.zeros(2, 5)))
    checks.pair(query, Features(torch.zeros(2, 3), torch.zeros(2, 4)))
    checks.pair(query, Features(torch.zeros(0, 0)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_row_that_is_not_finite_is_named(value: float) -> None:
    x = torch.zeros(4, 3)
    x[2, 1] = x[3, 0] = value
    with pytest.raises(ArgumentError, match="items must be finite; row 2 of 4"):
        checks.finite("items", x)
    assert checks.finite("items", x[:2]).shape == (2, 3)
    assert checks.finite("items", x[:0]).shape == (0, 3)


def test_shape_is_exact() -> None:
    assert checks.shape("w", torch.zeros(2, 3), (2, 3)).shape == (2, 3)
    with pytest.raises(ShapeError, match=r"w must have shape \(3, 2\), got \(2, 3\)"):
        checks.shape("w", torch.zeros(2, 3), (3, 2))
