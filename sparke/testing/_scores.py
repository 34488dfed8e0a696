"""Conformance of scores."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

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
from sparke.testing._common import (
    COND_WIDTH,
    HIDDEN,
    QUERIES,
    ROWS,
    WIDTH,
    close,
    expect,
    features,
    mates_of,
    of,
    picked,
    shape,
    take,
    weight,
)


def check_score(score: Score, *, cond_width: int | None = None, width: int = WIDTH) -> None:
    """Raise unless `score` behaves as a [Score][sparke.protocols.Score].

    Values, gradients and, where offered, closed form, crowding, calibration and prompt weights:
    their shapes; finite also for duplicates, zeros, an empty bank and hidden rows; the same in any
    order of the bank; the same for a batch as for singles (unless ``requires.batch`` is above 1);
    hidden rows without influence; the closed form equal to autograd's gradient; inputs untouched.

    Args:
        score: the object to check.
        cond_width: width of the prompt embeddings it is shown. None: 5 if it requires prompts, else
            none are shown.
        width: width of the rows it is shown.

    Raises:
        AssertionError: it does not; the message says how.
    """
    expect(
        isinstance(score, Score) and isinstance(score.requires, Requires),
        f"{score!r} is no Score: it needs __call__(query, bank) and a `requires` of type Requires",
    )
    if cond_width is None and score.requires.cond:
        cond_width = COND_WIDTH
    b = max(QUERIES, score.requires.batch)
    query, bank = features(b, width, cond_width, 0), features(ROWS, width, cond_width, 1)
    weight = torch.zeros(b, ROWS)
    weight[0, 1] = weight[1, 4] = HIDDEN
    banks: dict[str, Features] = {
        "a bank": bank,
        "a bank with hidden rows": Selection(bank.x, bank.cond, weight),
        "batch mates": mates_of(query),
    }
    for name, rows in banks.items():
        _check_reading(score, query, rows, f"against {name}")
    _check_order(score, query, banks["a bank with hidden rows"])
    if score.requires.batch <= 1:
        _check_singles(score, query, bank)
    _check_hidden(score, query, bank)
    _check_degenerate(score, query, bank)
    if isinstance(score, Calibrated):
        fixed = score.calibrate(bank)
        expect(isinstance(fixed, Score), f"calibrate() must return a Score, got {fixed!r}")
        close(fixed(query, bank), score(query, bank), "a calibrated score must agree on its bank")
    if isinstance(score, PromptWeighted):
        _check_weights(score, features(b, width, cond_width or COND_WIDTH, 2))


def _check_reading(score: Score, query: Features, bank: Features, where: str) -> None:
    """Shapes, finiteness, the closed form against autograd, and inputs left alone."""
    parts = [t for t in (query.x, query.cond, bank.x, bank.cond, weight(bank)) if t is not None]
    before = [t.clone() for t in parts]
    value, gradient = _gradient(score, query, bank, where)
    if isinstance(score, Closed):
        direction = score.direction(query, bank)
        shape(direction, tuple(query.x.shape), f"direction() {where}")
        close(direction, gradient, f"direction() must be the gradient autograd finds, {where}")
    crowding = None
    if isinstance(score, Crowded):
        crowding = score.crowding(query, bank)
        shape(crowding, (len(query),), f"crowding() {where}")
        expect(
            bool(((crowding >= 0) & (crowding <= 1)).all()),
            f"crowding() must lie in [0, 1) {where}, got {crowding.tolist()}",
        )
    if isinstance(score, Fused):
        direction, crowded = score.direction_and_crowding(query, bank)
        close(direction, gradient, f"direction_and_crowding() must agree with autograd, {where}")
        if crowding is not None:
            close(crowded, crowding, f"direction_and_crowding() must agree with both, {where}")
    close(score(query, bank), value, f"the same call twice must give the same value, {where}")
    expect(
        all(torch.equal(a, b) for a, b in zip(parts, before, strict=True)),
        f"the score changed its inputs in place, {where}",
    )


def _gradient(score: Score, query: Features, bank: Features, where: str) -> tuple[Tensor, Tensor]:
    leaf = query.x.detach().clone().requires_grad_()
    value = score(Features(leaf, query.cond), bank)
    shape(value, (len(query),), f"the value {where}")
    expect(value.requires_grad, f"the value must be differentiable in query.x, {where}")
    (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    expect(gradient is not None, f"the value does not depend on query.x, {where}")
    shape(gradient, tuple(query.x.shape), f"the gradient {where}")
    return value.detach(), gradient


def _check_order(score: Score, query: Features, bank: Features) -> None:
    order = torch.arange(len(bank)).roll(3).flip(0)
    moved = take(bank, order)
    what = "the order of the bank's rows must change nothing"
    for ours, theirs in zip(
        _gradient(score, query, moved, what), _gradient(score, query, bank, what), strict=True
    ):
        close(ours, theirs, what)


def _check_singles(score: Score, query: Features, bank: Features) -> None:
    what = "a batch must give what its samples give one by one"
    whole = _gradient(score, query, bank, what)
    for i in range(len(query)):
        one = Features(query.x[i : i + 1], picked(query.cond, slice(i, i + 1)))
        for alone, together in zip(_gradient(score, one, bank, what), whole, strict=True):
            close(alone, together[i : i + 1], what)


def _check_hidden(score: Score, query: Features, bank: Features) -> None:
    weight = torch.zeros(len(query), len(bank))
    weight[:, 2] = HIDDEN
    seen = torch.arange(len(bank)) != 2
    without = Selection(bank.x[seen], picked(bank.cond, seen), weight[:, seen])
    what = "a row of log weight -inf must count as if it were not there"
    hidden = Selection(bank.x, bank.cond, weight)
    for ours, theirs in zip(
        _gradient(score, query, hidden, what), _gradient(score, query, without, what), strict=True
    ):
        close(ours, theirs, what)
    mates = mates_of(query)
    for i in range(len(query)):
        x = query.x.clone()
        x[i] += 5
        moved = score(query, replace(mates, x=x))[i]
        what = "a sample must not see itself among its mates"
        close(moved, score(query, mates)[i], what)


def _check_degenerate(score: Score, query: Features, bank: Features) -> None:
    b, n = len(query), len(bank)
    same = bank.x[:1]
    zeros = torch.zeros_like(bank.x)
    cases: dict[str, tuple[Features, Features]] = {
        "an empty bank": (query, take(bank, slice(0))),
        "a single row": (query, take(bank, slice(1))),
        "a bank of duplicates": (query, replace(bank, x=same.repeat(n, 1))),
        "queries that are in the bank": (replace(query, x=same.repeat(b, 1)), bank),
        "a bank of zeros": (query, replace(bank, x=zeros)),
        "zeros against zeros": (replace(query, x=zeros[:1].repeat(b, 1)), replace(bank, x=zeros)),
        "a bank hidden from all": (
            query,
            Selection(bank.x, bank.cond, torch.full((b, n), HIDDEN)),
        ),
        "half precision's largest": (query, replace(bank, x=zeros + 65504)),
        "half precision's smallest": (replace(query, x=query.x * 0 + 6e-8), bank),
    }
    for name, (asked, rows) in cases.items():
        _gradient(score, asked, rows, f"against {name}")
        if isinstance(score, Closed):
            shape(score.direction(asked, rows), tuple(query.x.shape), f"direction(), {name}")
        if isinstance(score, Crowded):
            crowding = score.crowding(asked, rows)
            shape(crowding, (b,), f"crowding(), {name}")
            if not len(rows):
                expect(not bool(crowding.any()), "crowding() must be 0 against an empty bank")


def _check_weights(score: PromptWeighted, query: Features) -> None:
    asked = of(query)
    rows = torch.cat([asked, of(features(ROWS, 1, asked.shape[1], 4))])
    weight = score.log_weight(asked, rows)
    expect(
        tuple(weight.shape) == (len(asked), len(rows)),
        f"log_weight() must be {(len(asked), len(rows))}, got {tuple(weight.shape)}",
    )
    expect(
        not bool(weight.isnan().any()) and bool((weight <= 1e-5).all()),
        f"log_weight() must be at most 0 and no NaN, got {weight.tolist()}",
    )
