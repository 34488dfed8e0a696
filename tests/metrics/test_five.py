"""The five measures of one set against loops and against the packages of the papers' authors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from rke_score import RKE
from vendi_score import vendi as vendi_score

from sparke import metrics
from tests import oracles
from tests.metrics.common import S_PROMPT, S, each_kernel, each_order, prompts, rows


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
