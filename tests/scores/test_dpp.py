"""The volume a sample adds: the score against determinants written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparke.errors import ArgumentError
from sparke.kernels import QuantileRule
from sparke.protocols import Features, Selection
from sparke.scores.dpp import DPP
from sparke.testing import check_score
from tests import float64, oracles
from tests.float64 import log_det, rows

S, JITTER = 1.3, 1e-4
HIDDEN = -math.inf
Matrix = list[list[float]]


def close(ours: Tensor, expected: Any, tolerance: float = 1e-8) -> None:
    float64.close(ours, expected, tolerance)


def log_likelihood(x: Matrix, kernel: str, s: float = S, jitter: float = JITTER) -> float:
    n = len(x)
    low = [[oracles.similarity(kernel, x[i], x[j], s) for j in range(n)] for i in range(n)]
    high = [list(row) for row in low]
    for i in range(n):
        low[i][i] += jitter
        high[i][i] += 1 + jitter
    return log_det(low) - log_det(high)


def gain(z: list[float], bank: Matrix, kernel: str) -> float:
    alone = math.log(1 + JITTER) - math.log(2 + JITTER)
    return log_likelihood([*bank, z], kernel) - log_likelihood(bank, kernel) - alone


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_it_conforms(kernel: str) -> None:
    check_score(DPP(kernel))
    check_score(DPP(kernel, bandwidth=0.9), cond_width=4, width=11)


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_value_is_the_volume_it_adds(kernel: str, n: int) -> None:
    query, bank = rows(3, 6, 0), rows(n, 6, 1)
    expected = [gain(z, bank.tolist(), kernel) for z in query.tolist()]
    close(DPP(kernel, S)(Features(query), Features(bank)), expected)
    assert max(expected) < 0


def test_hidden_rows_add_no_volume_and_take_none() -> None:
    query, bank = rows(2, 4, 0), rows(5, 4, 1)
    weight = torch.zeros(2, 5).double()
    weight[0, [1, 4]] = weight[1, 0] = HIDDEN
    expected = []
    for z, seen in zip(query.tolist(), weight.isfinite(), strict=True):
        expected.append(gain(z, bank[seen].tolist(), "gaussian"))
    close(DPP(bandwidth=S)(Features(query), Selection(bank, None, weight)), expected)


def test_among_mates_the_gradient_is_that_of_the_whole_batchs_likelihood() -> None:
    x, step = rows(4, 3, 0), 1e-5
    expected = torch.zeros(4, 3).double()
    for i in range(4):
        for k in range(3):
            for sign in (1, -1):
                moved = x.clone()
                moved[i, k] += sign * step
                expected[i, k] += sign * log_likelihood(moved.tolist(), "gaussian") / (2 * step)
    mates = torch.zeros(4, 4).double().fill_diagonal_(HIDDEN)
    ours = DPP(bandwidth=S).direction(Features(x), Selection(x, None, mates, mates=True))
    close(ours, expected, 1e-6)
    assert float(ours.norm(dim=1).min()) > 0.01


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
@pytest.mark.parametrize("width", [0.9, QuantileRule(), torch.tensor([[0.5], [1.0], [2.0]])])
def test_the_closed_form_is_autograds(kernel: str, width: Any) -> None:
    query, bank = 0.5 * rows(3, 9, 0), 0.5 * rows(7, 9, 1)
    weight = torch.zeros(3, 7).double()
    weight[0, 2] = weight[2, 5] = HIDDEN
    selection, score = Selection(bank, None, weight), DPP(kernel, width)
    leaf = query.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(Features(leaf), selection).sum(), leaf)
    close(score.direction(Features(query), selection), gradient)
    assert float(gradient.abs().max()) > 1e-3


def test_a_duplicate_has_as_little_volume_as_the_jitter_leaves() -> None:
    bank = rows(1, 4, 1)
    value = float(DPP(bandwidth=S)(Features(bank.clone()), Features(bank)))
    assert value == pytest.approx(math.log(8 * JITTER / 3), abs=1e-3)
    far = DPP(bandwidth=S)(Features(bank + 100), Features(bank))
    close(far, [0.0])


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-6, 1e-3])
def test_rows_that_nearly_coincide_stay_finite(gap: float) -> None:
    bank = rows(1, 4, 1).repeat(6, 1).float() + gap * rows(6, 4, 2).float()
    query = Features(bank[:3] + gap)
    score = DPP(bandwidth=S)
    for reading in (score(query, Features(bank)), score.direction(query, Features(bank))):
        assert bool(reading.isfinite().all())


def test_the_newest_rows_are_read_where_there_are_too_many() -> None:
    query, bank = Features(rows(2, 4, 0)), rows(12, 4, 1)
    score, kept = DPP(bandwidth=S, max_rows=5), Features(bank[-5:])
    close(score(query, Features(bank)), score(query, kept))
    close(score.direction(query, Features(bank)), score.direction(query, kept))


@pytest.mark.parametrize("options", [{"jitter": 0}, {"jitter": -1.0}, {"max_rows": 0}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        DPP(**options)
