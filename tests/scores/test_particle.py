"""Particle Guidance's potential: the score against loops, and against the joint potential."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparke.kernels import QuantileRule
from sparke.protocols import Features, Selection
from sparke.scores.particle import Particle
from sparke.testing import check_score
from tests import oracles
from tests.float64 import close, rows

S = 1.3
HIDDEN = -math.inf


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_it_conforms(kernel: str) -> None:
    check_score(Particle(kernel))
    check_score(Particle(kernel, bandwidth=0.9), cond_width=4, width=11)


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_the_value_is_minus_the_weighted_sum_of_kernels(kernel: str) -> None:
    query, bank = rows(3, 4, 0), rows(7, 4, 1)
    weight = torch.log(torch.rand(3, 7, generator=torch.Generator().manual_seed(2)).double())
    weight[1, 3] = HIDDEN
    score = Particle(kernel, S)
    for given, log_weights in ((Features(bank), None), (Selection(bank, None, weight), weight)):
        expected = []
        for i, z in enumerate(query.tolist()):
            total = 0.0
            for j, x in enumerate(bank.tolist()):
                w = 1.0 if log_weights is None else math.exp(float(log_weights[i, j]))
                total -= w * oracles.similarity(kernel, x, z, S)
            expected.append(total)
        close(score(Features(query), given), expected)


def test_the_gradient_is_the_sum_written_out() -> None:
    query, bank = rows(3, 4, 0), rows(7, 4, 1)
    expected = []
    for z in query.tolist():
        away = [0.0] * 4
        for x in bank.tolist():
            k = oracles.gaussian(x, z, S)
            away = [a + k * (p - q) / S**2 for a, p, q in zip(away, z, x, strict=True)]
        expected.append(away)
    close(Particle(bandwidth=S).direction(Features(query), Features(bank)), expected)


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
@pytest.mark.parametrize("width", [0.6, QuantileRule(), torch.tensor([[0.5], [1.0], [2.0]])])
def test_the_closed_form_is_autograds(kernel: str, width: Any) -> None:
    query, bank = rows(3, 4, 0), rows(7, 4, 1)
    weight = -torch.rand(3, 7, generator=torch.Generator().manual_seed(2)).double()
    weight[0, 2] = HIDDEN
    selection, score = Selection(bank, None, weight), Particle(kernel, width)
    leaf = query.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(Features(leaf), selection).sum(), leaf)
    close(score.direction(Features(query), selection), gradient)
    assert float(gradient.abs().max()) > 1e-3


def test_among_mates_it_is_the_gradient_of_the_joint_potential() -> None:
    x = rows(5, 3, 0).requires_grad_()
    kernel = torch.stack(
        [torch.stack([torch.exp(-(a - b).square().sum() / (2 * S**2)) for b in x]) for a in x]
    )
    # Each pair is in the double sum twice.
    (joint,) = torch.autograd.grad(-kernel.sum() / 2, x)
    mates = torch.zeros(5, 5).double().fill_diagonal_(HIDDEN)
    with torch.no_grad():
        bank = Selection(x.detach(), None, mates, mates=True)
        ours = Particle(bandwidth=S).direction(Features(x.detach()), bank)
    close(ours, joint)


def test_nothing_near_gives_nothing() -> None:
    query, bank = Features(rows(2, 4, 0)), Features(rows(6, 4, 1) + 1000)
    score = Particle(bandwidth=S)
    assert not bool(score.direction(query, bank).any())
    assert not bool(score.crowding(query, bank).any())


def test_a_rule_is_read_off_the_bank_once() -> None:
    bank = Features(rows(9, 4, 1))
    fixed = Particle().calibrate(bank)
    assert isinstance(fixed.bandwidth, Tensor)
    query = Features(rows(3, 4, 0))
    close(fixed(query, bank), Particle()(query, bank))
