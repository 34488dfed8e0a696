"""What must hold of the five measures whatever the samples."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparke import metrics
from tests.metrics.common import S, each_kernel, effective_number, every, prompts, rows


@effective_number
@each_kernel
@given(n=st.integers(1, 12), seed=st.integers(0, 99), different=st.integers(1, 4))
def test_effective_numbers_lie_between_one_and_n(
    metric: Callable[..., float], kernel: str, n: int, seed: int, different: int
) -> None:
    value = metric(rows(n, 4, seed), prompts(n, different), kernel=kernel)
    assert 1 - 1e-9 <= value <= n * (1 + 1e-9)


@effective_number
@each_kernel
def test_duplicates_count_once(metric: Callable[..., float], kernel: str) -> None:
    x, t = (rows(1, 4) + 1e3).repeat(9, 1), prompts(1).repeat(9, 1)
    assert metric(x, t, kernel=kernel) == pytest.approx(1, rel=1e-9)
    assert metrics.in_batch_similarity(x, t) == pytest.approx(1)


@effective_number
def test_rows_far_apart_count_each(metric: Callable[..., float]) -> None:
    x, t = torch.eye(6) * 1e3, prompts(1).repeat(6, 1)
    assert metric(x, t, bandwidth=1.0) == pytest.approx(6, rel=1e-9)
    assert metric(torch.eye(6), t, kernel="cosine") == pytest.approx(6, rel=1e-9)


@effective_number
def test_each_row_twice_counts_as_once(metric: Callable[..., float]) -> None:
    x, t = rows(6, 4), prompts(6)
    once, twice = metric(x, t, bandwidth=S), metric(x.repeat(2, 1), t.repeat(2, 1), bandwidth=S)
    assert twice == pytest.approx(once, rel=1e-6)


def test_one_prompt_for_all_gives_the_unconditional_number() -> None:
    x, t = rows(9, 4), prompts(1).repeat(9, 1)
    assert metrics.cond_vendi(x, t, bandwidth=S) == pytest.approx(metrics.vendi(x, bandwidth=S))
    assert metrics.cond_rke(x, t, bandwidth=S) == pytest.approx(metrics.rke(x, bandwidth=S))


def test_prompts_far_apart_leave_nothing_to_compare() -> None:
    x, t = rows(6, 4), torch.eye(6)
    for metric in (metrics.cond_vendi, metrics.cond_rke):
        assert metric(x, t, bandwidth=S, cond_bandwidth=0.05) == pytest.approx(1, rel=1e-9)


def test_only_the_direction_of_a_prompt_counts() -> None:
    x, t = rows(8, 4), prompts(8)
    longer = t * torch.arange(1, 9)[:, None]
    for metric in (metrics.cond_vendi, metrics.cond_rke):
        assert metric(x, longer) == pytest.approx(metric(x, t), rel=1e-9)


def test_a_common_offset_changes_nothing() -> None:
    x = rows(9, 4).round(decimals=3)
    for metric in (metrics.rke, metrics.vendi):
        assert metric(x + 1e8, bandwidth=0.5) == pytest.approx(metric(x, bandwidth=0.5), rel=1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_any_real_dtype_is_computed_in_double(
    metric: Callable[..., float], dtype: torch.dtype
) -> None:
    x, t = (rows(9, 4) * 10).to(dtype), prompts(9).float()
    assert metric(x, t) == pytest.approx(metric(x.double(), t.double()), rel=1e-12)


@every
def test_arrays_are_taken_as_tensors_are(metric: Callable[..., float]) -> None:
    x, t = rows(9, 4), prompts(9)
    array = x.numpy().copy()
    array.setflags(write=False)
    assert metric(array, t.numpy()) == metric(x, t)
    assert metric(x.numpy().astype(np.float16), t.numpy()) == pytest.approx(
        metric(x.half(), t), rel=1e-12
    )


@every
def test_the_value_is_a_plain_number_and_nothing_is_tracked(metric: Callable[..., float]) -> None:
    x, t = rows(9, 4).requires_grad_(), prompts(9)
    before = x.detach().clone()
    assert type(metric(x, t)) is float
    assert torch.equal(x, before)
    assert torch.is_grad_enabled()


@every
def test_the_order_of_the_samples_changes_nothing(metric: Callable[..., float]) -> None:
    x, t = rows(9, 4), prompts(9)
    order = torch.tensor([4, 2, 8, 0, 6, 1, 3, 7, 5])
    assert metric(x[order], t[order]) == pytest.approx(metric(x, t), rel=1e-9)


@pytest.mark.parametrize("metric", [metrics.vendi, metrics.rke])
def test_unconditional_ones_ignore_prompts(metric: Callable[..., float]) -> None:
    x = rows(9, 4)
    assert metric(x, prompts(9)) == metric(x) == metric(x, prompts(3))


@pytest.mark.parametrize("n", [1, 2])
@effective_number
def test_few_samples_are_no_exception(metric: Callable[..., float], n: int) -> None:
    assert 1 - 1e-9 <= metric(rows(n, 4), prompts(n)) <= n + 1e-9
