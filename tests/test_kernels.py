"""Kernels and bandwidth rules against loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparke.errors import ArgumentError
from sparke.kernels import (
    KERNELS,
    QuantileRule,
    cosine,
    gaussian,
    kernel_matrix,
    normalize,
    prompt_log_weight,
    squared_distances,
)
from sparke.protocols import Features, Selection
from tests import oracles

HIDDEN = -math.inf


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, theirs: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(
        ours, torch.as_tensor(theirs, dtype=ours.dtype), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_matrices_are_the_definitions(kernel: str) -> None:
    a, b = rows(4, 3), rows(5, 3, 1)
    expected = [
        [oracles.similarity(kernel, u, v, 0.7) for v in oracles.lists(b)] for u in oracles.lists(a)
    ]
    close(kernel_matrix(a, b, kernel, 0.7), expected)


def test_squared_distances_are_the_definition() -> None:
    a, b = rows(4, 3), rows(5, 3, 1)
    expected = [[oracles.distance(u, v) ** 2 for v in oracles.lists(b)] for u in oracles.lists(a)]
    close(squared_distances(a, b), expected)


def test_squared_distances_are_never_negative() -> None:
    a = rows(50, 4).float() * 1e4
    assert bool((squared_distances(a, a) >= 0).all())


def test_a_bandwidth_per_query_broadcasts() -> None:
    a, b, s = rows(4, 3), rows(5, 3, 1), torch.tensor([[0.5], [1.0], [2.0], [3.0]]).double()
    close(gaussian(a, b, s), torch.cat([gaussian(a[i : i + 1], b, float(s[i])) for i in range(4)]))


def test_kernels_have_the_right_gradients() -> None:
    a, b = rows(3, 4).requires_grad_(), rows(5, 4, 1).requires_grad_()
    assert torch.autograd.gradcheck(squared_distances, (a, b))
    assert torch.autograd.gradcheck(lambda x, y: gaussian(x, y, 0.8), (a, b))
    assert torch.autograd.gradcheck(cosine, (a, b))


def test_rows_of_any_length_become_units_and_zero_stays_zero() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6e-8, 0.0], [65504.0, 65504.0]])
    unit = normalize(x)
    close(unit.norm(dim=1), [1.0, 0.0, 1.0, 1.0], 1e-6)
    close(cosine(x, x).diagonal(), [1.0, 0.0, 1.0, 1.0], 1e-6)


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    cosine(x, torch.ones(2, 3)).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("bandwidth", [0, -1.0, math.nan, math.inf, "wide", None])
def test_a_forbidden_bandwidth_is_refused(bandwidth: float) -> None:
    with pytest.raises(ArgumentError, match="bandwidth"):
        gaussian(rows(2, 2), rows(2, 2), bandwidth)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ArgumentError, match="gaussian, cosine"):
        kernel_matrix(rows(2, 2), rows(2, 2), "linear")


def test_prompt_weights_are_the_squared_kernel_of_normalised_embeddings() -> None:
    query, bank = rows(3, 6) * 20, rows(5, 6, 1) * 30
    expected = [
        [math.log(oracles.prompt_similarity(t, p, 0.35) ** 2) for t in oracles.lists(bank)]
        for p in oracles.lists(query)
    ]
    close(prompt_log_weight(query, bank, 0.35), expected, 1e-10)


def test_prompt_weights_in_half_precision_are_computed_in_single() -> None:
    query, bank = (rows(3, 6) * 20).half(), (rows(5, 6, 1) * 30).half()
    weight = prompt_log_weight(query, bank, 0.35)
    assert weight.dtype == torch.float32
    close(weight.double(), prompt_log_weight(query.double(), bank.double(), 0.35), 1e-4)


def test_equal_prompts_weigh_in_full_and_others_less() -> None:
    p = rows(3, 6)
    weight = prompt_log_weight(p, p * torch.tensor([[1.0], [7.0], [0.1]]), 0.35)
    close(weight.diagonal(), torch.zeros(3), 1e-12)
    assert bool((weight[~torch.eye(3, dtype=torch.bool)] < -0.1).all())


@pytest.mark.parametrize("quantile", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("n", [2, 3, 9])
def test_the_rule_on_rows_is_the_loop(n: int, quantile: float) -> None:
    bank = rows(n, 4)
    rule = QuantileRule(rows=quantile, factor=0.35)
    expected = oracles.rows_rule(oracles.lists(bank), [0.0] * n, quantile, 0.35, 256)
    close(rule(Features(rows(3, 4, 1)), Features(bank)), [[expected]] * 3)


def test_the_rule_on_rows_reads_those_of_each_querys_prompt() -> None:
    # The first query sees four near rows, the second five far ones, the third too few of its own.
    bank = torch.cat([rows(4, 3) * 0.1, rows(5, 3, 1) * 10])
    far, near = math.log(0.05), math.log(0.2)
    weight = torch.tensor(
        [
            [0.0, near, near, 0.0, far, far, HIDDEN, far, far],
            [far, far, HIDDEN, far, 0.0, near, 0.0, 0.0, 0.0],
            [0.0, near, far, far, far, far, far, far, far],
        ]
    ).double()
    expected = [
        [oracles.rows_rule(oracles.lists(bank), [float(w) for w in line], 0.75, 0.5, 256)]
        for line in weight
    ]
    assert len({round(e[0], 6) for e in expected}) == 3
    close(QuantileRule()(Features(rows(3, 3, 2)), Selection(bank, None, weight)), expected)


def test_the_rule_looks_at_the_newest_rows_only() -> None:
    bank = torch.cat([rows(300, 2) * 100, rows(256, 2, 1)])
    expected = oracles.rows_rule(oracles.lists(bank), [0.0] * 556, 0.75, 0.5, 256)
    assert expected < 5
    close(QuantileRule()(Features(bank[:1]), Features(bank)), [[expected]])


def test_one_row_gives_the_distance_of_an_independent_one() -> None:
    bank = torch.tensor([[3.0, 4.0]]).double()
    close(QuantileRule(factor=1.0)(Features(bank), Features(bank)), [[5 * math.sqrt(2)]])


def test_no_row_gives_the_factor() -> None:
    assert QuantileRule()(Features(rows(2, 3)), Features(rows(0, 3))).tolist() == [[0.5], [0.5]]


def test_identical_rows_give_some_positive_bandwidth() -> None:
    x = rows(1, 3).repeat(5, 1)
    own = torch.zeros(5, 5).double().fill_diagonal_(HIDDEN)
    for bank in (Features(x), Selection(x, None, own, mates=True)):
        assert bool((QuantileRule()(Features(x), bank) > 0).all())


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_the_rule_on_mates_is_the_loop(quantile: float) -> None:
    x = rows(5, 3)
    far = math.log(0.05)
    # The last sample has no mate of its own prompt and looks at all of them.
    weight = torch.tensor(
        [
            [HIDDEN, 0.0, 0.0, far, far],
            [0.0, HIDDEN, 0.0, far, far],
            [0.0, 0.0, HIDDEN, 0.0, far],
            [far, far, 0.0, HIDDEN, far],
            [far, far, far, far, HIDDEN],
        ]
    ).double()
    expected = [
        [oracles.mates_rule(z, oracles.lists(x), [float(w) for w in line], quantile, 0.5)]
        for z, line in zip(oracles.lists(x), weight, strict=True)
    ]
    rule = QuantileRule(mates=quantile)
    close(rule(Features(x), Selection(x, None, weight, mates=True)), expected, 1e-7)


def test_a_sample_without_mates_gets_the_factor() -> None:
    x = rows(1, 3)
    bank = Selection(x, None, torch.full((1, 1), HIDDEN).double(), mates=True)
    assert QuantileRule()(Features(x), bank).tolist() == [[0.5]]


def test_the_rule_is_constant_under_differentiation() -> None:
    x = rows(4, 3).requires_grad_()
    assert not QuantileRule()(Features(x), Features(rows(5, 3))).requires_grad
    assert not QuantileRule()(Features(x), Selection(x, mates=True)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rule_reads_half_precision_rows(dtype: torch.dtype) -> None:
    bank = rows(6, 3).to(dtype)
    width = QuantileRule()(Features(rows(2, 3)), Features(bank))
    close(width, QuantileRule()(Features(rows(2, 3)), Features(bank.double())))


@pytest.mark.parametrize(
    "options", [{"factor": 0}, {"factor": -1}, {"rows": 0}, {"rows": 1.1}, {"mates": math.nan}]
)
def test_a_forbidden_rule_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        QuantileRule(**options)


@given(n=st.integers(2, 12), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_the_rule_follows_the_scale_of_the_rows(n: int, scale: float, seed: int) -> None:
    bank, query = rows(n, 3, seed), Features(rows(1, 3))
    rule = QuantileRule()
    close(rule(query, Features(bank * scale)), rule(query, Features(bank)) * scale, 1e-9)
