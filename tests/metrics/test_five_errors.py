"""What the five measures refuse."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sparke import metrics
from sparke.errors import ArgumentError, MissingPrompts, ShapeError
from tests.metrics.common import ALL, effective_number, every, prompts, rows


@pytest.mark.parametrize("metric", [metrics.cond_vendi, metrics.cond_rke])
def test_conditional_ones_need_prompts(metric: Callable[..., float]) -> None:
    with pytest.raises(MissingPrompts, match=metric.__name__):
        metric(rows(9, 4))


@every
@pytest.mark.parametrize("shape", [(), (6,), (6, 2, 2)])
def test_features_must_be_a_matrix(metric: Callable[..., float], shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="features"):
        metric(torch.ones(shape), prompts(6))


@pytest.mark.parametrize("metric", ALL[2:])
@pytest.mark.parametrize("shape", [(6,), (5, 4), (6, 4, 1)])
def test_prompts_must_be_a_matrix_of_as_many_rows(
    metric: Callable[..., float], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeError, match="prompt_embeds"):
        metric(rows(6, 4), torch.ones(shape))


@every
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_nothing_has_no_diversity(metric: Callable[..., float], shape: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match="empty"):
        metric(torch.ones(shape), torch.ones(shape[0], 3))


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_or_has_no_finite_length_is_refused(
    metric: Callable[..., float], value: float
) -> None:
    x = rows(6, 4)
    x[3, 1] = value
    with pytest.raises(ArgumentError, match="row 3 of 6"):
        metric(x, prompts(6))


@pytest.mark.parametrize("metric", ALL[2:])
def test_prompts_must_be_finite(metric: Callable[..., float]) -> None:
    t = prompts(6)
    t[2, 0] = math.nan
    with pytest.raises(ArgumentError, match="prompt_embeds must be finite; row 2"):
        metric(rows(6, 4), t)


@every
@pytest.mark.parametrize(
    "x", [np.array([["a", "b"]]), np.ones((3, 2), complex), torch.ones(3, 2) * 1j]
)
def test_only_real_numbers_are_taken(metric: Callable[..., float], x: Any) -> None:
    with pytest.raises(ArgumentError, match="real numbers"):
        metric(x, prompts(len(x)))


@effective_number
def test_a_row_of_zeros_has_no_cosine_and_a_gaussian(metric: Callable[..., float]) -> None:
    x = rows(6, 4)
    x[4] = 0
    with pytest.raises(ArgumentError, match="row 4 of 6 is zero"):
        metric(x, prompts(6), kernel="cosine")
    assert math.isfinite(metric(x, prompts(6)))
    with pytest.raises(ArgumentError, match="row 4 of 6 is zero"):
        metrics.in_batch_similarity(x)


def test_lone_samples_have_no_similarity() -> None:
    with pytest.raises(ArgumentError, match="no two of one prompt"):
        metrics.in_batch_similarity(rows(4, 3), torch.eye(4))
    with pytest.raises(ArgumentError, match="no two of one prompt"):
        metrics.in_batch_similarity(rows(1, 3))


@effective_number
@pytest.mark.parametrize("options", [{"kernel": "linear"}, {"bandwidth": 0}, {"bandwidth": -1}])
def test_forbidden_options_are_refused(
    metric: Callable[..., float], options: dict[str, Any]
) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        metric(rows(6, 4), prompts(6), **options)


@pytest.mark.parametrize("metric", [metrics.cond_vendi, metrics.cond_rke])
def test_a_forbidden_prompt_bandwidth_is_refused(metric: Callable[..., float]) -> None:
    with pytest.raises(ArgumentError, match="cond_bandwidth"):
        metric(rows(6, 4), prompts(6), cond_bandwidth=0)


@pytest.mark.parametrize("metric", [metrics.vendi, metrics.cond_vendi])
@pytest.mark.parametrize("order", [0, -1, math.nan])
def test_a_forbidden_order_is_refused(metric: Callable[..., float], order: float) -> None:
    with pytest.raises(ArgumentError, match="order"):
        metric(rows(6, 4), prompts(6), order=order)
