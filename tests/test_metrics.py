"""Metrics against loops and against the packages of the papers' authors."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rke_score import RKE
from torch import Tensor
from vendi_score import vendi as vendi_score

from sparke import kernels, metrics
from sparke.errors import ArgumentError, MissingPrompts, ShapeError
from tests import oracles

ALL: list[Callable[..., float]] = [
    metrics.vendi,
    metrics.rke,
    metrics.cond_vendi,
    metrics.cond_rke,
    metrics.in_batch_similarity,
]
NUMBERS = ALL[:4]
ORDERS = [0.5, 1.0, 2.0, 5.0, math.inf]
S, S_PROMPT = 1.7, 0.6

every = pytest.mark.parametrize("metric", ALL)
effective_number = pytest.mark.parametrize("metric", NUMBERS)
each_kernel = pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
each_order = pytest.mark.parametrize("order", ORDERS)


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prompts(n: int, different: int = 3) -> Tensor:
    """(n, 5): `different` prompts in turn, near enough to weigh on each other."""
    p = rows(1, 5, 8) + 0.4 * rows(different, 5, 9)
    return p[torch.arange(n) % different]


@each_order
@each_kernel
@pytest.mark.parametrize("d", [3, 20])
def test_vendi_is_the_definition(kernel: str, order: float, d: int) -> None:
    x = rows(11, d)
    ours = metrics.vendi(x, kernel=kernel, bandwidth=S, order=order)
    assert ours == pytest.approx(oracles.vendi(oracles.lists(x), kernel, S, order), rel=1e-6)


@each_kernel
def test_rke_is_the_definition(kernel: str) -> None:
    x = rows(11, 4)
    ours = metrics.rke(x, kernel=kernel, bandwidth=S)
    assert ours == pytest.approx(oracles.rke(oracles.lists(x), kernel, S), rel=1e-10)


@each_order
@each_kernel
def test_cond_vendi_is_the_definition(kernel: str, order: float) -> None:
    x, t = rows(11, 4), prompts(11)
    ours = metrics.cond_vendi(
        x, t, kernel=kernel, bandwidth=S, cond_bandwidth=S_PROMPT, order=order
    )
    expected = oracles.cond_vendi(oracles.lists(x), oracles.lists(t), kernel, S, S_PROMPT, order)
    assert ours == pytest.approx(expected, rel=1e-6)


@each_kernel
def test_cond_rke_is_the_definition(kernel: str) -> None:
    x, t = rows(11, 4), prompts(11)
    ours = metrics.cond_rke(x, t, kernel=kernel, bandwidth=S, cond_bandwidth=S_PROMPT)
    expected = oracles.cond_rke(oracles.lists(x), oracles.lists(t), kernel, S, S_PROMPT)
    assert ours == pytest.approx(expected, rel=1e-10)


def test_in_batch_similarity_is_the_definition() -> None:
    x, t = rows(11, 4), prompts(11, 4)
    t[10] += 1  # a prompt with one sample has no pair
    for given_prompts in (None, t):
        lists = None if given_prompts is None else oracles.lists(given_prompts)
        expected = oracles.in_batch_similarity(oracles.lists(x), lists)
        assert metrics.in_batch_similarity(x, given_prompts) == pytest.approx(expected, abs=1e-12)


def test_in_batch_similarity_averages_over_prompts_not_pairs() -> None:
    # Three alike of one prompt, two opposite of the other: the mean of 1 and -1.
    x = torch.tensor([[1.0, 0], [2.0, 0], [3.0, 0], [0, 1.0], [0, -1.0]])
    t = torch.tensor([[1.0], [1.0], [1.0], [2.0], [2.0]])
    assert metrics.in_batch_similarity(x, t) == pytest.approx(0, abs=1e-12)
    shuffled = [3, 0, 4, 2, 1]
    assert metrics.in_batch_similarity(x[shuffled], t[shuffled]) == pytest.approx(0, abs=1e-12)


@each_order
def test_vendi_agrees_with_the_authors_package(order: float) -> None:
    x = rows(12, 4)
    k = np.array(oracles.matrix(oracles.lists(x), lambda u, v: oracles.gaussian(u, v, S)))
    q: Any = "inf" if math.isinf(order) else order
    theirs = float(vendi_score.score_K(k, q=q))
    assert metrics.vendi(x, bandwidth=S, order=order) == pytest.approx(theirs, rel=1e-7)


def test_vendi_by_cosine_agrees_with_the_authors_dual() -> None:
    x = rows(40, 6)
    theirs = float(vendi_score.score_dual(x.numpy(), normalize=True))
    assert metrics.vendi(x, kernel="cosine") == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("order", [1.0, 3.0])
def test_the_covariance_gives_what_the_kernel_matrix_gives(order: float) -> None:
    x = rows(9, 8)
    wide = torch.cat([x, torch.zeros(9, 5)], 1)
    small, dense = (metrics.vendi(v, kernel="cosine", order=order) for v in (x, wide))
    assert small == pytest.approx(dense, rel=1e-9)


def test_rke_agrees_with_the_authors_package() -> None:
    x = rows(12, 4)
    theirs = 1 / RKE(kernel_bandwidth=[S]).compute_rke_mc_frobenius_norm(x.numpy())[S]
    assert metrics.rke(x, bandwidth=S) == pytest.approx(theirs, rel=1e-10)


def test_order_two_is_rke() -> None:
    x, t = rows(11, 4), prompts(11)
    assert metrics.vendi(x, bandwidth=S, order=2) == pytest.approx(metrics.rke(x, bandwidth=S))
    assert metrics.cond_vendi(x, t, bandwidth=S, order=2) == pytest.approx(
        metrics.cond_rke(x, t, bandwidth=S)
    )


@each_kernel
@pytest.mark.parametrize("block", [1, 4, 11, 12])
def test_tiles_give_what_one_matrix_gives(
    kernel: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, t = rows(11, 4), prompts(11)
    whole = [f(x, t, kernel=kernel, bandwidth=S) for f in (metrics.rke, metrics.cond_rke)]
    monkeypatch.setattr(metrics, "BLOCK", block)
    tiled = [f(x, t, kernel=kernel, bandwidth=S) for f in (metrics.rke, metrics.cond_rke)]
    assert tiled == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("metric", [metrics.rke, metrics.cond_rke])
def test_no_matrix_is_larger_than_a_tile(
    metric: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 0
    original = kernels.kernel_matrix

    def watched(a: Tensor, b: Tensor, *options: Any) -> Tensor:
        nonlocal largest
        k = original(a, b, *options)
        largest = max(largest, k.numel())
        return k

    monkeypatch.setattr(metrics, "BLOCK", 8)
    monkeypatch.setattr(metrics, "kernel_matrix", watched)
    metric(rows(50, 3), prompts(50), bandwidth=S)
    assert 0 < largest <= 64


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


@pytest.mark.parametrize("n", [2, 7, 40])
def test_the_bandwidth_rule_is_the_loop(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MEDIAN_ROWS", 16)
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


@pytest.mark.parametrize("n", [1, 2])
@effective_number
def test_few_samples_are_no_exception(metric: Callable[..., float], n: int) -> None:
    assert 1 - 1e-9 <= metric(rows(n, 4), prompts(n)) <= n + 1e-9


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
