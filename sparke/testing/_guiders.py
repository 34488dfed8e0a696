"""Conformance of guiders: their displacements, and what is left of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparke.errors import SparkeError
from sparke.guidance._hooks import HOOKS
from sparke.protocols import Exclusive, Guider, Idle, Run, State, Step, Yielding
from sparke.testing import _held, _hooks
from sparke.testing._common import COND_WIDTH, expect, normal, shape

LADDER = (Step(0, 14.0, 6.0, 5), Step(1, 6.0, 2.5, 5), Step(2, 2.5, 1.0, 5), Step(4, 0.3, 0.0, 5))


def check_guider(
    guider: Guider,
    *,
    shape: tuple[int, ...] = (3, 4, 4, 4),
    cond_width: int | None = COND_WIDTH,
    padding: bool = False,
    model: nn.Module | None = None,
    forward: Callable[[nn.Module], Any] | None = None,
) -> None:
    """Raise unless `guider` behaves as a [Guider][sparke.protocols.Guider].

    Displacements have the shape and dtype of ``denoised`` and are finite, from the first evaluation
    to the last, in single and half precision and under inference mode; between ``begin`` and
    ``finish`` the same state gives the same displacement whatever came between; a run that never
    reaches ``finish`` leaves nothing behind; states are left untouched, and so are torch's global
    generators. Two runs are finished, so a guider with a memory is seen empty and filled.

    Hooks, where offered, are held to the same: ``on_noise`` and ``on_condition`` keep shape and
    dtype, change nothing in place and give the same result for the same step; ``on_condition``
    leaves padding alone; ``on_evaluation`` takes any branches; ``on_model`` and ``on_encoder`` give
    back the network exactly as it was, also after an exception and after KeyboardInterrupt in one
    of its blocks. A guider may refuse a network that it does not know with a SparkeError.

    Args:
        guider: the object to check, new; it is left with two finished runs behind it.
        shape: of the latents, batch first.
        cond_width: width of the prompt embeddings; None shows it none.
        padding: whether the guider is meant to change padding tokens too.
        model: a network for ``on_model``, which must then be taken; a small transformer if None.
        forward: calls `model` once; given together with it.

    Raises:
        AssertionError: it does not; the message says how.
    """
    expect(
        isinstance(guider, Guider),
        f"{guider!r} is no Guider: it needs begin(run), __call__(state) and finish(x)",
    )
    _check_claims(guider)
    generator = torch.get_rng_state()
    asked = _hooks.Asked(guider, shape[0], cond_width, padding)
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        states = [_state(shape, cond_width, step, dtype, number) for step in LADDER]
        run = Run(
            torch.Size(shape),
            torch.device("cpu"),
            dtype,
            states[0].cond,
            1.0,
            seeds=tuple(range(7, 7 + shape[0])),
        )
        if not number:
            _check_early(guider, asked, states)
            _check_unseeded(guider, run, states)
        for state in states:
            _check_displacement(guider, run, state)
        _check_purity(guider, run, states)
        guider.begin(run)
        asked.check(states, run)
        _held.check(guider, run, states[0], model, forward)
        _check_finish(guider, run, states)
    expect(
        torch.equal(torch.get_rng_state(), generator),
        "a guider must draw from generators of its own, seeded by run.seeds; it moved torch's",
    )


def _state(
    size: tuple[int, ...], cond_width: int | None, step: Step, dtype: torch.dtype, seed: int
) -> State:
    noise = normal(size, 10 + seed + 10 * step.index)

    def evaluate(x: Tensor) -> Tensor:
        return x / (1 + step.sigma**2)

    x = (noise * (1 + step.sigma**2) ** 0.5).to(dtype)
    denoised = evaluate(x)
    cond = None if cond_width is None else normal((1, cond_width), 5).repeat(size[0], 1)
    return State(x, denoised, step, cond, lambda: denoised * 0.9, evaluate, lambda: denoised * 0.8)


def _check_claims(guider: Guider) -> None:
    """What it says of its hooks is said in names that hosts know."""
    for name, protocol in (("exclusive", Exclusive), ("yields", Yielding), ("idle", Idle)):
        if isinstance(guider, protocol):
            said = getattr(guider, name)
            expect(
                isinstance(said, frozenset) and said <= set(HOOKS),
                f"{name} must be a frozenset of names among {', '.join(HOOKS)}; got {said!r}",
            )


def _check_early(guider: Guider, asked: _hooks.Asked, states: list[State]) -> None:
    """Hosts that learn the latents' shape late call a guider before they can begin it."""
    try:
        for state in states:
            guider(state)
            asked.replies(state)
    except AssertionError:
        raise  # of what it answered
    except Exception as error:
        raise AssertionError(
            f"called before begin(), a guider must do without a run, not raise {error!r}."
        ) from error


def _check_unseeded(guider: Guider, run: Run, states: list[State]) -> None:
    """A host that shows no noise tells no seeds; a guider that needs them says so in begin()."""
    try:
        with contextlib.suppress(SparkeError):
            guider.begin(replace(run, seeds=()))
        for state in states:
            guider(state)
    except Exception as error:
        raise AssertionError(
            f"a run without seeds must be done without, or refused by begin(); got {error!r}."
        ) from error


def _check_displacement(guider: Guider, run: Run, state: State) -> None:
    guider.begin(run)
    before = state.x.clone(), state.denoised.clone()
    delta = guider(state)
    where = f"at sigma {state.step.sigma}"
    expect(isinstance(delta, Tensor), f"a displacement must be a tensor, got {delta!r} {where}")
    shape(delta, tuple(state.denoised.shape), f"a displacement {where}")
    expect(
        delta.dtype == state.denoised.dtype,
        f"a displacement must be {state.denoised.dtype} as denoised is, got {delta.dtype}",
    )
    expect(not delta.requires_grad, f"a displacement must be detached {where}")
    expect(
        torch.equal(state.x, before[0]) and torch.equal(state.denoised, before[1]),
        f"the guider changed the state in place {where}",
    )


def _check_purity(guider: Guider, run: Run, states: list[State]) -> None:
    guider.begin(run)
    first = [guider(state).clone() for state in states]
    what = "the same state must give the same displacement between begin() and finish(), "
    for state, delta in zip(reversed(states), reversed(first), strict=True):
        expect(torch.equal(guider(state), delta), what + "whatever came between")
    with torch.inference_mode():
        for state, delta in zip(states, first, strict=True):
            expect(torch.equal(guider(state), delta), what + "under inference mode too")
    guider.begin(run)
    for state, delta in zip(states, first, strict=True):
        expect(
            torch.equal(guider(state), delta),
            "a run that never reached finish() must leave nothing behind for the next",
        )


def _check_finish(guider: Guider, run: Run, states: list[State]) -> None:
    guider.begin(run)
    for state in states:
        guider(state)
    last = states[-1].denoised
    before = last.clone()
    guider.finish(last)
    expect(torch.equal(last, before), "finish() changed the finished samples in place")
