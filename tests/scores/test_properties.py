"""What must hold for every score, whatever its formula."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparke
from sparke.errors import ArgumentError, MissingPrompts, ShapeError, SparkeError, UnknownName
from sparke.kernels import QuantileRule
from sparke.protocols import (
    Calibrated,
    Closed,
    Crowded,
    Features,
    Fused,
    PromptWeighted,
    Requires,
    Score,
    Selection,
)
from tests import oracles
from tests.float64 import rows

HIDDEN = -math.inf
FACTOR = 0.5

# SPELL knows a radius and no kernel; tests/scores/test_spell.py is about it.
NAMES = [n for n in sparke.scores() if n != "spell"]
SETTINGS = [
    pytest.param(name, {"kernel": kernel, **order}, id="-".join([name, kernel, *map(str, order)]))
    for name in NAMES
    for kernel in ("gaussian", "cosine")
    for order in ([{}, {"order": math.inf}] if name.endswith("vendi") else [{}])
]
every_score = pytest.mark.parametrize(("name", "options"), SETTINGS)
closed = pytest.mark.parametrize(
    ("name", "options"), [p for p in SETTINGS if not str(p.values[0]).endswith("vendi")]
)
by_distance = pytest.mark.parametrize(
    ("name", "options"), [p for p in SETTINGS if "gaussian" in str(p.id)]
)
every_name = pytest.mark.parametrize("name", NAMES)
conditional = pytest.mark.parametrize("name", [n for n in NAMES if sparke.score(n).requires.cond])
spectral = pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("vendi")])


def sides(b: int = 3, n: int = 7, d: int = 4) -> tuple[Features, Features]:
    """Query and bank; prompts of two kinds, so that rows weigh differently."""
    prompts = rows(2, 5, 4)[torch.arange(b + n) % 2] + 0.1 * rows(b + n, 5, 5)
    return Features(rows(b, d, 0), prompts[:b]), Features(rows(n, d, 1), prompts[b:])


def at(features: Features, index: Any) -> Features:
    return Features(features.x[index], None if features.cond is None else features.cond[index])


def weighted(bank: Features, b: int = 3) -> Selection:
    """The bank with weights of its own per query, two rows hidden from two queries."""
    weight = -2 * torch.rand(b, len(bank), generator=torch.Generator().manual_seed(6)).double()
    weight[0, 1] = weight[1, 4] = HIDDEN
    return Selection(bank.x, bank.cond, weight)


def mates(query: Features) -> Selection:
    b = len(query)
    weight = -torch.rand(b, b, generator=torch.Generator().manual_seed(7)).double()
    return Selection(query.x, query.cond, weight.fill_diagonal_(HIDDEN), mates=True)


def gradient(score: Score, query: Features, bank: Features) -> Tensor:
    leaf = query.x.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(score(Features(leaf, query.cond), bank).sum(), leaf)
    return found


def readings(score: Score, query: Features, bank: Features) -> Iterator[Tensor]:
    """Everything a score tells: value, gradient, closed form, crowding."""
    yield score(query, bank)
    yield gradient(score, query, bank)
    if isinstance(score, Closed):
        yield score.direction(query, bank)
    if isinstance(score, Crowded):
        yield score.crowding(query, bank)
    if isinstance(score, Fused):
        yield from score.direction_and_crowding(query, bank)


def same(ours: Any, theirs: Any, tolerance: float = 1e-9) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Symmetry.


@every_score
def test_the_order_of_the_bank_changes_nothing(name: str, options: dict[str, Any]) -> None:
    score = sparke.score(name, **options)
    query, bank = sides()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    same(readings(score, query, at(bank, order)), readings(score, query, bank))
    own = weighted(bank)
    assert own.log_weight is not None
    moved = Selection(bank.x[order], at(bank, order).cond, own.log_weight[:, order])
    same(readings(score, query, moved), readings(score, query, own))


@every_score
def test_a_batch_is_as_many_singles(name: str, options: dict[str, Any]) -> None:
    score = sparke.score(name, **options)
    query, bank = sides()
    own = weighted(bank)
    assert own.log_weight is not None
    for whole in (bank, own):
        singles = []
        for i in range(3):
            one = whole
            if isinstance(whole, Selection):
                one = replace(own, log_weight=own.log_weight[i : i + 1])
            singles.append(list(readings(score, at(query, slice(i, i + 1)), one)))
        joined = [torch.cat(parts) for parts in zip(*singles, strict=True)]
        same(readings(score, query, whole), joined)


@spectral
def test_a_batch_is_as_many_singles_where_rows_are_left_out(name: str) -> None:
    query, bank = sides(4, 30)
    weight = -3 * torch.rand(4, 30, generator=torch.Generator().manual_seed(2)).double()
    weight[3] = weight[0]
    own = Selection(bank.x, bank.cond, weight)
    score = sparke.score(name, max_rows=6).calibrate(own)  # type: ignore[attr-defined]
    together = list(readings(score, query, own))
    for i in range(4):
        one = replace(own, log_weight=weight[i : i + 1])
        alone = sparke.score(name, max_rows=6)
        same(readings(alone, at(query, slice(i, i + 1)), one), [r[i : i + 1] for r in together])


@every_score
def test_inputs_are_left_as_they_were(name: str, options: dict[str, Any]) -> None:
    query, bank = sides()
    own = weighted(bank)
    parts = [query.x, query.cond, own.x, own.cond, own.log_weight]
    before = [part.clone() for part in parts if part is not None]
    list(readings(sparke.score(name, **options), query, own))
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True) if a is not None)


# Gradients.


@closed
@pytest.mark.parametrize("width", [0.9, QuantileRule(), torch.tensor([[0.5], [1.0], [2.0]])])
def test_the_closed_form_is_the_gradient(name: str, options: dict[str, Any], width: Any) -> None:
    score = sparke.score(name, bandwidth=width, **options)
    assert isinstance(score, Closed)
    query, bank = sides()
    for other in (bank, weighted(bank), mates(query)):
        found = score.direction(query, other)
        torch.testing.assert_close(found, gradient(score, query, other), rtol=1e-9, atol=1e-9)
        # Not of all: sums of kernels vanish where everything is far.
        assert float(found.norm(dim=1).max()) > 1e-3


@every_score
def test_both_at_once_are_what_each_is_alone(name: str, options: dict[str, Any]) -> None:
    score = sparke.score(name, **options)
    # One pass over the bank gives both where their two sums are weighted alike.
    assert isinstance(score, Fused) == (name in ("rke", "cond-rke"))
    if not isinstance(score, Fused):
        return
    assert isinstance(score, Closed)
    assert isinstance(score, Crowded)
    query, bank = sides()
    for other in (bank, weighted(bank), mates(query)):
        away, crowding = score.direction_and_crowding(query, other)
        assert torch.equal(away, score.direction(query, other))
        assert torch.equal(crowding, score.crowding(query, other))


@every_score
def test_the_gradient_is_the_numerical_one(name: str, options: dict[str, Any]) -> None:
    query, bank = sides()
    score = sparke.score(name, bandwidth=1.0, **options)
    leaf = query.x.clone().requires_grad_()
    for other in (bank, weighted(bank)):
        assert torch.autograd.gradcheck(
            lambda x, other=other: score(Features(x, query.cond), other), (leaf,)
        )


@every_score
@pytest.mark.parametrize("b", [1, 4])
def test_a_small_step_along_the_gradient_raises_the_score(
    name: str, options: dict[str, Any], b: int
) -> None:
    query, bank = sides(b)
    score = sparke.score(name, bandwidth=1.0, **options)
    up = gradient(score, query, bank)
    moved = Features(query.x + 1e-3 * up / up.norm(dim=1, keepdim=True), query.cond)
    assert bool((score(moved, bank) > score(query, bank)).all())


def test_the_gradient_leads_out_of_a_crowd() -> None:
    bank = Features(0.1 * rows(20, 4, 1), torch.ones(20, 5).double())
    query = Features(0.1 * rows(3, 4, 0), torch.ones(3, 5).double())
    for name in NAMES:
        score = sparke.score(name, bandwidth=1.0)
        moving = query
        for _ in range(30):
            up = gradient(score, moving, bank)
            up = up / up.norm(dim=1, keepdim=True)
            moving = Features(moving.x + 0.1 * up, query.cond)
        assert float(moving.x.norm(dim=1).min()) > 2.5, name


@by_distance
def test_crowding_falls_with_distance(name: str, options: dict[str, Any]) -> None:
    score = sparke.score(name, bandwidth=1.0, **options)
    assert isinstance(score, Crowded)
    query, bank = sides(1)
    ray = rows(1, 4, 9)
    found = [
        float(score.crowding(Features(ray * r, query.cond), bank)) for r in (0.5, 3.0, 6.0, 100.0)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.1
    assert found[-1] < 1e-6


# Degenerate sets. Nothing may be NaN, in value, gradient, closed form or crowding.


def assert_finite(score: Score, query: Features, bank: Features, kind: str = "") -> None:
    for reading in readings(score, query, bank):
        assert reading.shape[0] == len(query)
        assert bool(reading.isfinite().all()), (kind, reading)
    if isinstance(score, Crowded):
        crowding = score.crowding(query, bank)
        assert bool(((crowding >= 0) & (crowding <= 1)).all())


def degenerate(b: int, n: int, d: int = 5) -> Iterator[tuple[str, Features, Features]]:
    prompts = rows(b + n, 5, 3).float()
    x, y = rows(b, d, 0).float(), rows(n, d, 1).float()

    def case(
        kind: str, query: Tensor, bank: Tensor, cond: Tensor = prompts
    ) -> tuple[str, Features, Features]:
        return kind, Features(query, cond[:b]), Features(bank, cond[b:])

    yield case("as is", x, y)
    yield case("identical prompts", x, y, prompts[:1].repeat(b + n, 1))
    yield case("prompts of zeros", x, y, torch.zeros(b + n, 5))
    yield case("bank of duplicates", x, x[:1].repeat(n, 1))
    yield case("all duplicates", x[:1].repeat(b, 1), x[:1].repeat(n, 1))
    yield case("query of zeros", torch.zeros(b, d), y)
    yield case("bank of zeros", x, torch.zeros(n, d))
    yield case("all zeros", torch.zeros(b, d), torch.zeros(n, d))
    yield case("at right angles", torch.eye(d)[:1].repeat(b, 1), torch.eye(d)[1:2].repeat(n, 1))
    yield case("opposite", x[:1].repeat(b, 1), -x[:1].repeat(n, 1))
    for size in (65504.0, 6e-8):  # largest and smallest of half precision
        extreme = size * torch.ones(1, d)
        yield case(f"all at {size}", extreme.repeat(b, 1), extreme.repeat(n, 1))
        yield case(f"query at {size}", extreme.repeat(b, 1), y)
        yield case(f"bank at {size}", x, extreme.repeat(n, 1))
        yield case(f"both signs of {size}", -extreme.repeat(b, 1), extreme.repeat(n, 1))
        yield case(f"noise of size {size}", size * x.clamp(-1, 1), size * y.clamp(-1, 1))


@every_score
@pytest.mark.parametrize(
    ("b", "n", "bandwidth"),
    [(1, 0, 0.8), (1, 1, QuantileRule()), (3, 1, 1e-3), (2, 4, QuantileRule()), (2, 4, 1e-3)],
)
def test_degenerate_sets_give_finite_numbers(
    name: str, options: dict[str, Any], b: int, n: int, bandwidth: Any
) -> None:
    score = sparke.score(name, bandwidth=bandwidth, **options)
    for kind, query, bank in degenerate(b, n):
        own = torch.zeros(b, b).fill_diagonal_(HIDDEN)
        assert_finite(score, query, bank, kind)
        assert_finite(score, query, Selection(bank.x, bank.cond, torch.zeros(b, n)), kind)
        assert_finite(score, query, Selection(query.x, query.cond, own, mates=True), kind)


@every_score
def test_rows_hidden_from_a_query_leave_it_alone(name: str, options: dict[str, Any]) -> None:
    score = sparke.score(name, **options)
    query, bank = sides()
    weight = torch.zeros(3, 7).double()
    weight[1] = HIDDEN
    hidden = Selection(bank.x, bank.cond, weight)
    assert_finite(score, query, hidden)
    empty = Features(bank.x[:0], None if bank.cond is None else bank.cond[:0])
    nothing = list(readings(score, query, empty))
    same([r[1] for r in readings(score, query, hidden)], [r[1] for r in nothing], 1e-7)


@every_score
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    b=st.integers(1, 3),
    n=st.integers(1, 5),
    exponents=st.lists(st.integers(-7, 4), min_size=8, max_size=8),
)
def test_rows_of_very_different_size_give_finite_numbers(
    name: str, options: dict[str, Any], seed: int, b: int, n: int, exponents: list[int]
) -> None:
    scales = torch.tensor([10.0**e for e in exponents])[:, None]
    x, prompts = rows(8, 3, seed).float() * scales, rows(8, 4, seed + 1).float() * scales.flip(0)
    query = Features(x[:b], prompts[:b])
    assert_finite(sparke.score(name, **options), query, Features(x[b : b + n], prompts[b : b + n]))


@every_score
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bank_rows_in_half_precision_are_read_in_the_querys(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    score = sparke.score(name, **options)
    query, bank = sides()
    query = Features(query.x.float(), query.cond)
    half = Features(bank.x.to(dtype), bank.cond)
    for reading in readings(score, query, half):
        assert reading.dtype == torch.float32
    single = Features(half.x.float(), bank.cond)
    same(readings(score, query, half), readings(score, query, single), 1e-6)


# Bandwidths read off the bank.


@every_name
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_a_rule_is_the_loops_bandwidth_per_query(name: str, n: int) -> None:
    query, bank = sides(3, n)
    assert query.cond is not None
    assert bank.cond is not None
    plain = sparke.score(name)
    weight = torch.zeros(3, n).double()
    if isinstance(plain, PromptWeighted):
        weight = plain.log_weight(query.cond, bank.cond)
    selection = Selection(bank.x, bank.cond, weight)
    widths = [
        oracles.rows_rule(oracles.lists(bank.x), line, 0.75, FACTOR, 256)
        for line in weight.tolist()
    ]
    told = sparke.score(name, bandwidth=torch.tensor(widths, dtype=torch.float64)[:, None])
    same(readings(plain, query, selection), readings(told, query, selection))
    if isinstance(plain, PromptWeighted) and n == 9:
        assert len({round(w, 9) for w in widths}) > 1


@every_name
def test_a_rule_among_mates_is_the_loops_bandwidth_per_query(name: str) -> None:
    query, _ = sides(5)
    bank = mates(query)
    assert bank.log_weight is not None
    widths = [
        oracles.mates_rule(z, oracles.lists(bank.x), line, 0.5, FACTOR)
        for z, line in zip(oracles.lists(query.x), bank.log_weight.tolist(), strict=True)
    ]
    told = sparke.score(name, bandwidth=torch.tensor(widths, dtype=torch.float64)[:, None])
    same(readings(sparke.score(name), query, bank), readings(told, query, bank), 1e-6)


@every_name
@pytest.mark.parametrize("n", [0, 1, 2, 9, 300])
def test_calibrating_is_the_rule_applied_beforehand(name: str, n: int) -> None:
    score = sparke.score(name)
    assert isinstance(score, Calibrated)
    query, bank = sides(3, n)
    weight = torch.linspace(-4, 0, 3 * n).reshape(n, 3).T.double()
    selection = Selection(bank.x, bank.cond, weight)
    fixed = score.calibrate(selection)
    assert not isinstance(fixed.bandwidth, QuantileRule)  # type: ignore[attr-defined]
    same(readings(fixed, query, selection), readings(score, query, selection))
    # Constants do not move with the query.
    elsewhere = Features(query.x + 1, query.cond)
    same(readings(fixed, elsewhere, selection), readings(score, elsewhere, selection))


@every_name
def test_calibrating_a_fixed_bandwidth_changes_nothing(name: str) -> None:
    score = sparke.score(name, bandwidth=0.7)
    assert isinstance(score, Calibrated)
    assert score.calibrate(sides()[1]) == score


# Rows left out where there are too many.


@spectral
def test_too_many_rows_leave_the_newest(name: str) -> None:
    query, bank = sides(2, 20)
    score = sparke.score(name, bandwidth=1.0, max_rows=5)
    kept = at(bank, slice(15, 20))
    if not score.requires.cond:
        same([score(query, bank)], [score(query, kept)])
    weight = torch.zeros(2, 20).double()
    value = score(query, Selection(bank.x, bank.cond, weight))
    same([value], [score(query, Selection(kept.x, kept.cond, weight[:, :5]))])


@spectral
def test_too_many_rows_leave_the_heaviest(name: str) -> None:
    query, bank = sides(2, 20)
    score = sparke.score(name, bandwidth=1.0, max_rows=5)
    weight = torch.full((2, 20), -3.0).double()
    heavy = [[0, 3, 4, 9], [1, 3, 5, 6]]
    for line, chosen in zip(weight, heavy, strict=True):
        line[chosen] = -1.0
    value = score(query, Selection(bank.x, bank.cond, weight))
    for i, chosen in enumerate(heavy):
        rest = Selection(bank.x[[*chosen, 19]], at(bank, [*chosen, 19]).cond, torch.zeros(1, 5))
        same([value[i : i + 1]], [score(at(query, slice(i, i + 1)), rest)])


def test_cond_vendi_keeps_the_rows_of_the_querys_prompt() -> None:
    query, bank = sides(1, 20)
    assert bank.cond is not None
    assert query.cond is not None
    score = sparke.score("cond-vendi", bandwidth=1.0, max_rows=4)
    assert isinstance(score, PromptWeighted)
    nearest = score.log_weight(query.cond, bank.cond)[0].argsort()[-4:].sort().values
    same([score(query, bank)], [score(query, at(bank, nearest))])


# What is refused.

BAD_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"kernel": "linear"}) for name in NAMES),
    *((name, {"bandwidth": v}) for name in NAMES for v in (0, -1, math.nan, "wide", None)),
    *((name, {"colour": 1}) for name in NAMES),
    *((n, {"cond_bandwidth": v}) for n in ("cond-rke", "cond-vendi") for v in (0, -1, math.inf)),
    *((n, {"order": v}) for n in ("vendi", "cond-vendi") for v in (0, -1, math.nan, "two", None)),
    *((n, {"max_rows": v}) for n in ("vendi", "cond-vendi") for v in (0, -1, 2.5, True, "all")),
    ("rke", {"cond_bandwidth": 0.3}),
    ("rke", {"order": 2}),
]


@pytest.mark.parametrize(("name", "options"), BAD_OPTIONS)
def test_bad_options_are_refused_when_the_score_is_made(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        sparke.score(name, **options)


@pytest.mark.parametrize(
    ("name", "near"), [("cond-rek", "cond-rke"), ("vendy", "vendi"), ("cond_vendii", "cond-vendi")]
)
def test_an_unknown_score_offers_near_names(name: str, near: str) -> None:
    with pytest.raises(UnknownName, match=f"Did you mean .*{near}"):
        sparke.score(name)


@every_name
def test_names_are_forgiving_about_case_and_underscores(name: str) -> None:
    assert sparke.score(name.upper().replace("-", "_")) == sparke.score(name)


@every_name
def test_an_object_is_taken_as_it_is_and_takes_no_options(name: str) -> None:
    score = sparke.score(name)
    assert sparke.score(score) is score
    with pytest.raises(ArgumentError, match="bandwidth"):
        sparke.score(score, bandwidth=1.0)


@pytest.mark.parametrize("thing", [3, None, len, object()])
def test_what_is_no_score_is_refused(thing: Any) -> None:
    with pytest.raises(ArgumentError, match="no Score"):
        sparke.score(thing)


@conditional
def test_missing_prompts_are_missed(name: str) -> None:
    score = sparke.score(name)
    assert score.requires == Requires(cond=True)
    query, bank = sides()
    for q, k in ((Features(query.x), bank), (query, Features(bank.x))):
        with pytest.raises(MissingPrompts, match=name):
            score(q, k)


def test_unconditional_scores_ignore_prompts() -> None:
    query, bank = sides()
    for name in ("rke", "vendi"):
        score = sparke.score(name)
        assert score.requires == Requires()
        bare = readings(score, Features(query.x), Features(bank.x))
        same(readings(score, query, bank), bare, 0)


@every_name
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    score = sparke.score(name)
    query, bank = sides()
    assert bank.cond is not None
    wrong = [
        (Features(query.x[0], query.cond), bank),
        (Features(query.x[:2], query.cond), bank),
        (query, Features(bank.x[:, :3], bank.cond)),
        (query, Features(bank.x, bank.cond[:, :3])),
        (query, Features(bank.x, bank.cond[:3])),
        (query, Selection(bank.x, bank.cond, torch.zeros(3, 6).double())),
        (query, Selection(bank.x, bank.cond, torch.zeros(2, 7).double())),
    ]
    for q, k in wrong:
        with pytest.raises(ShapeError):
            score(q, k)
        assert isinstance(score, Crowded)
        with pytest.raises(SparkeError):
            score.crowding(q, k)
