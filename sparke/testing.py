"""Conformance checks for one's own Score, Memory and Guider: one line in one's own tests.

    def test_my_score_conforms():
        sparke.testing.check_score(MyScore())

Each check raises AssertionError and says what was expected and what came. They cover what sparke
relies on and cannot see: shapes, gradients, purity, what is left behind. They do not tell whether
an object does anything useful. Random numbers are their own; nobody else's generator is moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparke.protocols import (
    Calibrated,
    Closed,
    ConditionHook,
    Crowded,
    Features,
    Fused,
    GuidanceScaleHook,
    Guider,
    Memory,
    NoiseHook,
    PromptWeighted,
    Requires,
    Run,
    Score,
    Selection,
    State,
    Step,
)

__all__ = ["check_guider", "check_memory", "check_score"]

WIDTH = 6
COND_WIDTH = 5
QUERIES, ROWS = 3, 7
CLOSE = 1e-3
"""Largest relative difference between float32 results that should be equal."""
HIDDEN = -math.inf


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
    _expect(
        isinstance(score, Score) and isinstance(score.requires, Requires),
        f"{score!r} is no Score: it needs __call__(query, bank) and a `requires` of type Requires",
    )
    if cond_width is None and score.requires.cond:
        cond_width = COND_WIDTH
    b = max(QUERIES, score.requires.batch)
    query, bank = _features(b, width, cond_width, 0), _features(ROWS, width, cond_width, 1)
    weight = torch.zeros(b, ROWS)
    weight[0, 1] = weight[1, 4] = HIDDEN
    banks: dict[str, Features] = {
        "a bank": bank,
        "a bank with hidden rows": Selection(bank.x, bank.cond, weight),
        "batch mates": _mates(query),
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
        _expect(isinstance(fixed, Score), f"calibrate() must return a Score, got {fixed!r}")
        _close(fixed(query, bank), score(query, bank), "a calibrated score must agree on its bank")
    if isinstance(score, PromptWeighted):
        _check_weights(score, _features(b, width, cond_width or COND_WIDTH, 2))


def check_memory(factory: Callable[[], Memory], *, width: int = WIDTH) -> None:
    """Raise unless what `factory` makes behaves as a [Memory][sparke.protocols.Memory].

    Rows come back in float32, detached, with their own prompts and weights; nothing is shared with
    who commits; a selection handed out is not changed by later commits; rows of another width, not
    finite or without the prompts the others have are refused and leave it as it was.

    Args:
        factory: makes a new, empty memory with room for at least 8 rows.
        width: of the rows it is given.

    Raises:
        AssertionError: it does not; the message says how.
    """
    memory = factory()
    _expect(
        isinstance(memory, Memory),
        f"{memory!r} is no Memory: it needs __len__, commit(items) and select(cond, weigh)",
    )
    _expect(len(memory) == 0, f"a new memory must be empty, len() is {len(memory)}")
    prompts = _features(QUERIES, width, COND_WIDTH, 3).cond
    for cond in (None, prompts):
        _expect(len(memory.select(cond)) == 0, "an empty memory must select no rows")
    given = _features(4, width, COND_WIDTH, 0)
    x, cond = given.x.clone().requires_grad_(), _of(given).clone().requires_grad_()
    memory.commit(Features(x, cond))
    _expect(len(memory) == 4, f"4 rows were committed, len() is {len(memory)}")
    with torch.no_grad():
        x.zero_()
        cond.zero_()
    _check_selection(memory, given)
    memory.commit(Features(given.x[:0], _rows(given.cond, slice(0))))
    _expect(len(memory) == 4, f"no rows were committed, len() went to {len(memory)}")

    selection = memory.select(prompts)
    before = _copied(selection)
    later = _features(4, width, COND_WIDTH, 1)
    memory.commit(later)
    _expect(len(memory) == 8, f"8 rows were committed, len() is {len(memory)}")
    _expect(_alike(selection, before), "a later commit changed a selection handed out before")
    _check_selection(
        memory, Features(torch.cat([given.x, later.x]), torch.cat([_of(given), _of(later)]))
    )
    _check_refusals(memory, later)

    bare = factory()
    bare.commit(Features(given.x))
    found = bare.select()
    _expect(found.cond is None, "rows committed without prompts must come back without")
    _expect(_contains(given.x, found.x), "rows committed without prompts came back changed")


def check_guider(
    guider: Guider, *, shape: tuple[int, ...] = (3, 4, 4, 4), cond_width: int | None = COND_WIDTH
) -> None:
    """Raise unless `guider` behaves as a [Guider][sparke.protocols.Guider].

    Displacements have the shape and dtype of ``denoised`` and are finite, from the first evaluation
    to the last, in single and half precision and under inference mode; between ``begin`` and
    ``finish`` the same state gives the same displacement whatever came between; a run that never
    reaches ``finish`` leaves nothing behind; states are left untouched. Two runs are finished, so a
    guider with a memory is seen empty and filled. Hooks, where offered, are called too.

    Args:
        guider: the object to check, new; it is left with two finished runs behind it.
        shape: of the latents, batch first.
        cond_width: width of the prompt embeddings; None shows it none.

    Raises:
        AssertionError: it does not; the message says how.
    """
    _expect(
        isinstance(guider, Guider),
        f"{guider!r} is no Guider: it needs begin(run), __call__(state) and finish(x)",
    )
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        states = [_state(shape, cond_width, s, dtype, number) for s in _LADDER]
        run = Run(torch.Size(shape), torch.device("cpu"), dtype, states[0].cond, 1.0)
        for state in states:
            _check_displacement(guider, run, state)
        _check_purity(guider, run, states)
        guider.begin(run)
        _check_hooks(guider, states)
        last = states[-1].denoised
        before = last.clone()
        guider.finish(last)
        _expect(torch.equal(last, before), "finish() changed the finished samples in place")


# Scores.


def _check_reading(score: Score, query: Features, bank: Features, where: str) -> None:
    """Shapes, finiteness, the closed form against autograd, and inputs left alone."""
    parts = [t for t in (query.x, query.cond, bank.x, bank.cond, _weight(bank)) if t is not None]
    before = [t.clone() for t in parts]
    value, gradient = _gradient(score, query, bank, where)
    if isinstance(score, Closed):
        direction = score.direction(query, bank)
        _shape(direction, tuple(query.x.shape), f"direction() {where}")
        _close(direction, gradient, f"direction() must be the gradient autograd finds, {where}")
    crowding = None
    if isinstance(score, Crowded):
        crowding = score.crowding(query, bank)
        _shape(crowding, (len(query),), f"crowding() {where}")
        _expect(
            bool(((crowding >= 0) & (crowding <= 1)).all()),
            f"crowding() must lie in [0, 1) {where}, got {crowding.tolist()}",
        )
    if isinstance(score, Fused):
        direction, crowded = score.direction_and_crowding(query, bank)
        _close(direction, gradient, f"direction_and_crowding() must agree with autograd, {where}")
        if crowding is not None:
            _close(crowded, crowding, f"direction_and_crowding() must agree with both, {where}")
    _close(score(query, bank), value, f"the same call twice must give the same value, {where}")
    _expect(
        all(torch.equal(a, b) for a, b in zip(parts, before, strict=True)),
        f"the score changed its inputs in place, {where}",
    )


def _gradient(score: Score, query: Features, bank: Features, where: str) -> tuple[Tensor, Tensor]:
    leaf = query.x.detach().clone().requires_grad_()
    value = score(Features(leaf, query.cond), bank)
    _shape(value, (len(query),), f"the value {where}")
    _expect(value.requires_grad, f"the value must be differentiable in query.x, {where}")
    (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
    _expect(gradient is not None, f"the value does not depend on query.x, {where}")
    _shape(gradient, tuple(query.x.shape), f"the gradient {where}")
    return value.detach(), gradient


def _check_order(score: Score, query: Features, bank: Features) -> None:
    order = torch.arange(len(bank)).roll(3).flip(0)
    moved = _take(bank, order)
    what = "the order of the bank's rows must change nothing"
    for ours, theirs in zip(
        _gradient(score, query, moved, what), _gradient(score, query, bank, what), strict=True
    ):
        _close(ours, theirs, what)


def _check_singles(score: Score, query: Features, bank: Features) -> None:
    what = "a batch must give what its samples give one by one"
    whole = _gradient(score, query, bank, what)
    for i in range(len(query)):
        one = Features(query.x[i : i + 1], _rows(query.cond, slice(i, i + 1)))
        for alone, together in zip(_gradient(score, one, bank, what), whole, strict=True):
            _close(alone, together[i : i + 1], what)


def _check_hidden(score: Score, query: Features, bank: Features) -> None:
    weight = torch.zeros(len(query), len(bank))
    weight[:, 2] = HIDDEN
    seen = torch.arange(len(bank)) != 2
    without = Selection(bank.x[seen], _rows(bank.cond, seen), weight[:, seen])
    what = "a row of log weight -inf must count as if it were not there"
    hidden = Selection(bank.x, bank.cond, weight)
    for ours, theirs in zip(
        _gradient(score, query, hidden, what), _gradient(score, query, without, what), strict=True
    ):
        _close(ours, theirs, what)
    mates = _mates(query)
    for i in range(len(query)):
        x = query.x.clone()
        x[i] += 5
        moved = score(query, replace(mates, x=x))[i]
        what = "a sample must not see itself among its mates"
        _close(moved, score(query, mates)[i], what)


def _check_degenerate(score: Score, query: Features, bank: Features) -> None:
    b, n = len(query), len(bank)
    same = bank.x[:1]
    zeros = torch.zeros_like(bank.x)
    cases: dict[str, tuple[Features, Features]] = {
        "an empty bank": (query, _take(bank, slice(0))),
        "a single row": (query, _take(bank, slice(1))),
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
            _shape(score.direction(asked, rows), tuple(query.x.shape), f"direction(), {name}")
        if isinstance(score, Crowded):
            crowding = score.crowding(asked, rows)
            _shape(crowding, (b,), f"crowding(), {name}")
            if not len(rows):
                _expect(not bool(crowding.any()), "crowding() must be 0 against an empty bank")


def _check_weights(score: PromptWeighted, query: Features) -> None:
    asked = _of(query)
    rows = torch.cat([asked, _of(_features(ROWS, 1, asked.shape[1], 4))])
    weight = score.log_weight(asked, rows)
    _expect(
        tuple(weight.shape) == (len(asked), len(rows)),
        f"log_weight() must be {(len(asked), len(rows))}, got {tuple(weight.shape)}",
    )
    _expect(
        not bool(weight.isnan().any()) and bool((weight <= 1e-5).all()),
        f"log_weight() must be at most 0 and no NaN, got {weight.tolist()}",
    )


# Memories.


def _check_selection(memory: Memory, given: Features) -> None:
    """All that is selected was given, row with prompt, and weighed as asked."""
    prompts = _of(_features(QUERIES, 1, COND_WIDTH, 3))

    def weigh(query: Tensor, rows: Tensor) -> Tensor:
        return -(query[:, None] - rows[None]).square().sum(-1)

    for cond, kernel in ((None, None), (prompts, None), (prompts, weigh)):
        found = memory.select(cond, kernel)
        _expect(isinstance(found, Selection), f"select() must return a Selection, got {found!r}")
        _expect(len(found) > 0, "select() found no rows where there are some")
        _expect(found.x.dtype == torch.float32, f"rows must be float32, are {found.x.dtype}")
        parts = [t for t in (found.x, found.cond, found.log_weight) if t is not None]
        _expect(not any(t.requires_grad for t in parts), "a selection must be detached")
        _expect(found.cond is not None, "rows committed with prompts came back without")
        both = torch.cat([found.x, _of(found).float()], 1)
        _expect(
            _contains(torch.cat([given.x, _of(given)], 1), both),
            "select() returned rows, or prompts with them, that nobody committed",
        )
        if cond is None:
            continue
        weight = found.log_weight
        _expect(weight is not None, "select(cond) must weigh the rows by prompt")
        if weight is None:
            continue
        _expect(
            tuple(weight.shape) == (len(cond), len(found)),
            f"log weights must be {(len(cond), len(found))}, are {tuple(weight.shape)}",
        )
        _expect(
            not bool(weight.isnan().any()) and bool((weight <= 1e-5).all()),
            f"log weights must be at most 0 and no NaN, got {weight.tolist()}",
        )
        if kernel is not None:
            expected = kernel(cond, _of(found).float())
            _close(weight, expected, "the log weights must be those of `weigh`, row for row")


def _check_refusals(memory: Memory, good: Features) -> None:
    cond = _of(good)
    bad = {
        "rows of another width": Features(torch.cat([good.x, good.x], 1), cond),
        "prompts of another width": Features(good.x, torch.cat([cond, cond], 1)),
        "fewer prompts than rows": Features(good.x, cond[1:]),
        "no prompts where the others have some": Features(good.x),
        "NaN": Features(good.x * math.nan, cond),
        "infinity": Features(good.x / 0, cond),
    }
    for what, items in bad.items():
        before, size = _copied(memory.select()), len(memory)
        try:
            memory.commit(items)
        except Exception:  # noqa: BLE001  whatever the memory finds right
            refused = True
        else:
            refused = False
        _expect(refused, f"commit() must refuse {what}")
        _expect(
            len(memory) == size and _alike(memory.select(), before),
            f"commit() refused {what} and changed the memory all the same",
        )


# Guiders.

_LADDER = (Step(0, 14.0, 6.0, 5), Step(1, 6.0, 2.5, 5), Step(2, 2.5, 1.0, 5), Step(4, 0.3, 0.0, 5))


def _state(
    shape: tuple[int, ...], cond_width: int | None, step: Step, dtype: torch.dtype, seed: int
) -> State:
    noise = _normal((*shape,), 10 + seed + 10 * step.index)

    def evaluate(x: Tensor) -> Tensor:
        return x / (1 + step.sigma**2)

    x = (noise * (1 + step.sigma**2) ** 0.5).to(dtype)
    denoised = evaluate(x)
    cond = None if cond_width is None else _normal((1, cond_width), 5).repeat(shape[0], 1)
    return State(x, denoised, step, cond, lambda: denoised * 0.9, evaluate)


def _check_displacement(guider: Guider, run: Run, state: State) -> None:
    guider.begin(run)
    before = state.x.clone(), state.denoised.clone()
    delta = guider(state)
    where = f"at sigma {state.step.sigma}"
    _expect(isinstance(delta, Tensor), f"a displacement must be a tensor, got {delta!r} {where}")
    _shape(delta, tuple(state.denoised.shape), f"a displacement {where}")
    _expect(
        delta.dtype == state.denoised.dtype,
        f"a displacement must be {state.denoised.dtype} as denoised is, got {delta.dtype}",
    )
    _expect(not delta.requires_grad, f"a displacement must be detached {where}")
    _expect(
        torch.equal(state.x, before[0]) and torch.equal(state.denoised, before[1]),
        f"the guider changed the state in place {where}",
    )


def _check_purity(guider: Guider, run: Run, states: list[State]) -> None:
    guider.begin(run)
    first = [guider(state).clone() for state in states]
    what = "the same state must give the same displacement between begin() and finish(), "
    for state, delta in zip(reversed(states), reversed(first), strict=True):
        _expect(torch.equal(guider(state), delta), what + "whatever came between")
    with torch.inference_mode():
        for state, delta in zip(states, first, strict=True):
            _expect(torch.equal(guider(state), delta), what + "under inference mode too")
    guider.begin(run)
    for state, delta in zip(states, first, strict=True):
        _expect(
            torch.equal(guider(state), delta),
            "a run that never reached finish() must leave nothing behind for the next",
        )


def _check_hooks(guider: Guider, states: list[State]) -> None:
    for state in states:
        if isinstance(guider, GuidanceScaleHook):
            scale = guider.on_guidance_scale(state.step, 5.0)
            _expect(
                isinstance(scale, (int, float)) and math.isfinite(scale),
                f"on_guidance_scale() must return a finite number, got {scale!r}",
            )
        if isinstance(guider, ConditionHook) and state.cond is not None:
            embeds = guider.on_condition(state.cond.clone(), state.step)
            _shape(embeds, tuple(state.cond.shape), "on_condition()")
    if isinstance(guider, NoiseHook):
        noise = guider.on_noise(states[0].x.clone())
        _shape(noise, tuple(states[0].x.shape), "on_noise()")


# What the checks share.


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"{message}.")


def _shape(value: Tensor, expected: tuple[int, ...], what: str) -> None:
    _expect(
        tuple(value.shape) == expected,
        f"{what} must have shape {expected}, got {tuple(value.shape)}",
    )
    _expect(bool(value.isfinite().all()), f"{what} must be finite, got {value.tolist()}")


def _close(ours: Tensor, theirs: Tensor, what: str) -> None:
    _expect(ours.shape == theirs.shape, f"{what}; shapes {ours.shape} and {theirs.shape}")
    off = (ours.detach() - theirs.detach()).abs()
    allowed = CLOSE * theirs.detach().abs().max().clamp_min(1e-3) if theirs.numel() else 0.0
    _expect(bool((off <= allowed).all()), f"{what}; got {ours.tolist()}, not {theirs.tolist()}")


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _features(n: int, width: int, cond_width: int | None, seed: int) -> Features:
    cond = None if cond_width is None else _normal((n, cond_width), 100 + seed)
    return Features(_normal((n, width), seed), cond)


def _mates(query: Features) -> Selection:
    weight = torch.zeros(len(query), len(query)).fill_diagonal_(HIDDEN)
    return Selection(query.x, query.cond, weight, mates=True)


def _weight(bank: Features) -> Tensor | None:
    return bank.log_weight if isinstance(bank, Selection) else None


def _rows(cond: Tensor | None, index: Tensor | slice) -> Tensor | None:
    return None if cond is None else cond[index]


def _take(bank: Features, index: Tensor | slice) -> Features:
    if not isinstance(bank, Selection) or bank.log_weight is None:
        return replace(bank, x=bank.x[index], cond=_rows(bank.cond, index))
    return Selection(bank.x[index], _rows(bank.cond, index), bank.log_weight[:, index], bank.mates)


def _of(features: Features) -> Tensor:
    """Prompts that are known to be there."""
    if features.cond is None:
        raise AssertionError("prompts are missing.")
    return features.cond


def _contains(given: Tensor, found: Tensor) -> bool:
    """Whether every row found is one of those given, up to storage in half precision."""
    off = (found[:, None] - given[None]).abs() - 0.01 * given.abs()
    return bool((off.amax(-1).amin(-1) <= 1e-3).all())


def _copied(selection: Selection) -> list[Tensor | None]:
    parts = (selection.x, selection.cond, selection.log_weight)
    return [None if part is None else part.clone() for part in parts]


def _alike(selection: Selection, copy: list[Tensor | None]) -> bool:
    return all(
        then is None if now is None else then is not None and torch.equal(now, then)
        for now, then in zip(_copied(selection), copy, strict=True)
    )
