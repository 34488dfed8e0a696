"""SPELL as a score: shields against loops, and what lies outside them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparke.errors import ArgumentError, ShapeError
from sparke.kernels import QuantileRule
from sparke.protocols import Features, Selection
from sparke.scores import spell
from sparke.scores.spell import SPELL
from sparke.testing import check_score
from tests import oracles
from tests.float64 import close, rows

R = 2.2
HIDDEN = -math.inf


def shielded(
    z: list[float], bank: list[list[float]], weights: list[float], r: float
) -> tuple[float, list[float], float]:
    """Value, gradient and depth."""
    value, away, depth = 0.0, [0.0] * len(z), 0.0
    for y, w in zip(bank, weights, strict=True):
        distance = oracles.distance(z, y)
        if distance < r:
            value -= 0.5 * w * (r - distance) ** 2
            away = [
                a + w * (r / distance - 1) * (p - q) for a, p, q in zip(away, z, y, strict=True)
            ]
            depth = max(depth, w * (1 - distance / r))
    return value, away, depth


def test_it_conforms() -> None:
    check_score(SPELL())
    check_score(SPELL(2.0), cond_width=4, width=11)


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_formula(weighted: bool) -> None:
    query, bank = rows(4, 3, 0), rows(7, 3, 1)
    weight = torch.zeros(4, 7).double()
    if weighted:
        weight = -torch.rand(4, 7, generator=torch.Generator().manual_seed(2)).double()
        weight[1, 3] = HIDDEN
    selection = Selection(bank, None, weight)
    expected = [
        shielded(z, bank.tolist(), w, R)
        for z, w in zip(query.tolist(), weight.exp().tolist(), strict=True)
    ]
    inside = [sum(oracles.distance(z, y) < R for y in bank.tolist()) for z in query.tolist()]
    assert 0 < sum(inside) < 28
    score = SPELL(R)
    close(score(Features(query), selection), [value for value, _, _ in expected])
    close(score.direction(Features(query), selection), [away for _, away, _ in expected])
    close(score.crowding(Features(query), selection), [depth for _, _, depth in expected])


def test_the_displacement_is_the_gradient_of_the_value() -> None:
    query, bank = rows(4, 3, 0), Features(rows(7, 3, 1))
    leaf = query.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(SPELL(R)(Features(leaf), bank).sum(), leaf)
    close(SPELL(R).direction(Features(query), bank), gradient)


def test_outside_all_shields_it_is_exactly_nothing() -> None:
    query, bank = Features(rows(4, 3, 0).float()), Features(rows(7, 3, 1).float() + 30)
    for reading in (SPELL(R)(query, bank), *SPELL(R).direction_and_crowding(query, bank)):
        assert torch.equal(reading, torch.zeros_like(reading))


def test_at_a_center_there_is_no_direction() -> None:
    bank = rows(1, 3, 1)
    away, depth = SPELL(R).direction_and_crowding(Features(bank.clone()), Features(bank))
    assert torch.equal(away, torch.zeros_like(away))
    assert float(depth) == 1.0


def test_near_rows_are_found_far_from_the_origin() -> None:
    # Squared lengths are 1e6 times the squared radius: matrix products alone would not tell.
    center = 1000 * torch.nn.functional.normalize(rows(1, 16, 3), dim=1)
    bank = (center + 0.2 * rows(40, 16, 1)).float()
    query = (bank[:5].double() + 0.1 * rows(5, 16, 2)).float()
    expected = [shielded(z, bank.tolist(), [1.0] * 40, 1.0)[1] for z in query.tolist()]
    ours = SPELL(1.0).direction(Features(query), Features(bank))
    close(ours, expected, 1e-3)
    assert float(ours.norm(dim=1).min()) > 0.1


def test_how_many_rows_are_subtracted_at_a_time_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, bank = Features(rows(4, 3, 0)), Features(rows(30, 3, 1))
    whole = SPELL(R).direction_and_crowding(query, bank)
    monkeypatch.setattr(spell, "PART", 7)
    for ours, theirs in zip(SPELL(R).direction_and_crowding(query, bank), whole, strict=True):
        close(ours, theirs)


def test_a_rule_gives_each_query_a_radius() -> None:
    query, bank = Features(rows(3, 3, 0)), rows(9, 3, 1)
    weight = torch.zeros(3, 9).double()
    weight[0, :5] = weight[1, 5:] = HIDDEN
    selection = Selection(bank, None, weight)
    rule = QuantileRule(rows=0.5, factor=0.8)
    expected = []
    for z, seen in zip(query.x.tolist(), weight.isfinite(), strict=True):
        near = bank[seen].tolist()
        pairs = [oracles.distance(u, v) for i, u in enumerate(near) for v in near[:i]]
        radius = 0.8 * oracles.quantile(pairs, 0.5)
        expected.append(shielded(z, near, [1.0] * len(near), radius)[1])
    close(SPELL(rule).direction(query, selection), expected)
    close(SPELL(rule).calibrate(selection).direction(query, selection), expected)


@pytest.mark.parametrize("radius", [0, -1.0, math.nan, "wide"])
def test_a_bad_radius_is_refused(radius: Any) -> None:
    with pytest.raises(ArgumentError, match="radius"):
        SPELL(radius)


def test_rows_of_another_width_are_refused() -> None:
    query, bank = Features(rows(3, 3, 0)), Features(rows(3, 4, 1))
    for reading in (SPELL(R), SPELL(R).direction, SPELL(R).crowding):
        with pytest.raises(ShapeError):
            reading(query, bank)
