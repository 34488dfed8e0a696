"""Effective modes of labels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparke import metrics
from sparke.errors import ArgumentError, ShapeError
from tests.metrics import definitions
from tests.metrics.common import ORDERS, each_order


@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.sampled_from("abc")), min_size=1, max_size=20),
    order=st.sampled_from(ORDERS),
)
def test_it_is_the_definition(pairs: list[tuple[int, str]], order: float) -> None:
    labels, prompts = [p[0] for p in pairs], [p[1] for p in pairs]
    found = metrics.effective_modes(labels, prompts, order=order)
    assert found == pytest.approx(definitions.effective_modes(labels, prompts, order), rel=1e-9)
    assert 1 - 1e-12 <= found <= len(set(labels)) + 1e-9


@each_order
def test_even_labels_count_each(order: float) -> None:
    assert metrics.effective_modes([0, 1, 2, 3] * 5, order=order) == pytest.approx(4, rel=1e-12)
    assert metrics.effective_modes(["cat"] * 5, order=order) == pytest.approx(1, rel=1e-12)


def test_prompts_are_averaged_however_many_samples_they_have() -> None:
    labels, prompts = ["a", "b"] + ["a"] * 6, [1, 1] + [2] * 6
    assert metrics.effective_modes(labels, prompts) == pytest.approx(1.5, rel=1e-12)


@each_order
def test_it_is_vendi_of_labels(order: float) -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    one_hot = torch.eye(4)[labels]
    vendi = metrics.vendi(one_hot, kernel="cosine", order=order)
    assert metrics.effective_modes(labels, order=order) == pytest.approx(vendi, rel=1e-9)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([3, 3, 5]),
        np.array([3, 3, 5], np.uint8),
        np.array(["x", "x", "y"]),
        (c for c in "xxy"),
        [torch.tensor(3), torch.tensor(3), 5],
        [np.int64(3), 3, 5],
    ],
)
def test_any_list_of_labels_is_taken(labels: Any) -> None:
    assert metrics.effective_modes(labels) == pytest.approx(
        definitions.effective_modes("xxy", "ppp", 1)
    )


@pytest.mark.parametrize("as_type", [torch.tensor, np.array])
def test_prompts_may_be_rows_of_embeddings(as_type: Any) -> None:
    rows = as_type([[0.0, 1.0], [-0.0, 1.0], [0.5, 1.0], [0.5, 1.0]])
    assert metrics.effective_modes(["a", "b", "a", "a"], rows) == pytest.approx(1.5)
    assert metrics.effective_modes(["a", "b", "a", "a"], list(rows)) == pytest.approx(1.5)


def test_very_uneven_labels_keep_their_digits() -> None:
    labels = [0] * 999_999 + [1]
    p = 1e-6
    expected = math.exp(-p * math.log(p) - (1 - p) * math.log1p(-p))
    assert metrics.effective_modes(labels) == pytest.approx(expected, rel=1e-12)
    assert metrics.effective_modes(list(range(1000)), order=300.0) == pytest.approx(1000)


@pytest.mark.parametrize(
    "labels", [[0.5, 1.0], [None], [[1, 2]], torch.rand(3, 2), np.array([1.0]), [b"x"]]
)
def test_only_strings_and_whole_numbers_are_labels(labels: Any) -> None:
    with pytest.raises(ArgumentError, match="labels must be strings or whole numbers; number 0"):
        metrics.effective_modes(labels)


@pytest.mark.parametrize("labels", ["cat", 3, None, np.array(3), torch.tensor(3)])
def test_one_thing_is_no_list(labels: Any) -> None:
    with pytest.raises(ArgumentError, match="labels must be a list or array"):
        metrics.effective_modes(labels)


def test_prompts_must_be_as_many_and_comparable() -> None:
    with pytest.raises(ShapeError, match="got 1 for 2 labels"):
        metrics.effective_modes([1, 2], ["p"])
    with pytest.raises(ArgumentError, match="prompts must be strings"):
        metrics.effective_modes([1, 2], [0.5, 0.7])


def test_nothing_has_no_modes() -> None:
    with pytest.raises(ArgumentError, match="labels is empty"):
        metrics.effective_modes([])


@pytest.mark.parametrize("order", [0, -1, math.nan])
def test_a_forbidden_order_is_refused(order: float) -> None:
    with pytest.raises(ArgumentError, match="order"):
        metrics.effective_modes([1, 2], order=order)
