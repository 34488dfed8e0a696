"""What a host must tell a guider, return and leave behind."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparke.protocols import Run, State, Step
from sparke.testing import _held
from sparke.testing._common import expect
from sparke.testing._onlookers import Onlooker


def check_kind(target: Any, wrapped: Any) -> None:
    """Raise unless the wrapped target is used as the bare one is."""
    if not inspect.isroutine(target):
        expect(
            isinstance(wrapped, type(target)),
            f"attach() must return the target's own kind, {type(target).__name__}; got {wrapped!r}",
        )
        return
    expect(callable(wrapped), f"attach() must return a function as it was given, got {wrapped!r}")
    for kind in (inspect.isgeneratorfunction, inspect.iscoroutinefunction):
        expect(
            kind(target) == kind(wrapped),
            f"{kind.__name__}() must say of the wrapped function what it says of the bare one",
        )
    theirs = list(inspect.signature(target).parameters.values())
    ours = [p for p in inspect.signature(wrapped).parameters.values() if p.name != "prompt_embeds"]
    plain = [(p.name, p.kind, p.default) for p in theirs if p.name != "prompt_embeds"]
    expect(
        [(p.name, p.kind, p.default) for p in ours] == plain,
        f"the wrapped function must keep the signature {inspect.signature(target)}, and may add "
        f"prompt_embeds alone; it has {inspect.signature(wrapped)}",
    )


def check_step(step: Step, where: str) -> None:
    """Raise unless a step says where in the schedule it is."""
    expect(
        isinstance(step, Step) and 0 < step.sigma <= math.inf,
        f"step.sigma must be noise over signal, above 0, {where}; got {step!r}",
    )
    expect(
        0 <= step.sigma_next < step.sigma,
        f"step.sigma_next must be the next lower level, {where}; got {step!r}",
    )
    total = step.total
    expect(
        step.index >= 0 and (total is None or step.index < total),
        f"step.index must count from 0 and stay below step.total, {where}; got {step!r}",
    )


class Watched:
    """What a host looks like now: classes, attributes that can be called, networks."""

    def __init__(self, objects: Sequence[object]) -> None:
        self._networks = [_held.Trace(one) for one in objects if isinstance(one, nn.Module)]
        self._others = [one for one in objects if not isinstance(one, nn.Module)]
        self._seen = [self._look(one) for one in self._others]

    def check(self, when: str) -> None:
        """Raise if anything is not as it was."""
        for network in self._networks:
            network.check(when)
        for one, before in zip(self._others, self._seen, strict=True):
            now = self._look(one)
            changed = [k for k in {*before, *now} if before.get(k, now) is not now.get(k, before)]
            expect(
                not changed,
                f"{when} must leave the host as it was; {', '.join(sorted(changed))} of a "
                f"{type(one).__name__} is another",
            )

    @staticmethod
    def _look(one: object) -> dict[str, Any]:
        held = getattr(one, "__dict__", {})
        return {"class": type(one), **{k: v for k, v in held.items() if callable(v)}}


def check_told(onlooker: Onlooker, x: Tensor) -> None:
    """What one run told its guider."""
    order = onlooker.order
    expect(
        order.count("begin") == 1 and order[0] == "begin",
        f"begin() must come once and first, not so: {order}",
    )
    expect(
        order.count("finish") == 1 and order[-1] == "finish",
        f"finish() must come once and last, not so: {order}",
    )
    expect(len(onlooker.states) > 0, "the guider must be called at each evaluation, it never was")
    (run,), (finished,) = onlooker.runs, onlooker.finished
    expect(torch.equal(finished, x), "finish() must receive the finished samples that call returns")
    expect(
        isinstance(run, Run) and tuple(run.shape) == tuple(x.shape),
        f"Run.shape must be that of the samples, {tuple(x.shape)}, got {tuple(run.shape)}",
    )
    expect(run.device == x.device, f"Run.device must be {x.device}, got {run.device}")
    seeds = run.seeds
    expect(
        not seeds or (len(seeds) == len(x) and all(isinstance(s, int) for s in seeds)),
        f"Run.seeds must be empty or one int for each of {len(x)} samples, got {seeds!r}",
    )
    for state in onlooker.states:
        where = f"at sigma {state.step.sigma}"
        check_step(state.step, where)
        for name in ("x", "denoised"):
            shown = getattr(state, name)
            expect(
                tuple(shown.shape) == tuple(run.shape),
                f"State.{name} must have Run.shape {tuple(run.shape)} {where}, got "
                f"{tuple(shown.shape)}",
            )
    levels = [state.step.sigma for state in onlooker.states]
    expect(levels[0] == max(levels), f"the first state must have the most noise, got {levels}")
    expect(levels[-1] < levels[0] or len(levels) == 1, f"sigma must come down, got {levels}")


def check_evaluate(state: State, where: str) -> None:
    assert state.evaluate is not None
    with torch.enable_grad():
        leaf = state.x.detach().clone().requires_grad_()
        found = state.evaluate(leaf)
        expect(
            found.requires_grad and found.shape == state.denoised.shape,
            f"state.evaluate must be a differentiable function of x {where}; leave it out (None) "
            "where the host allows none",
        )
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
    expect(bool(gradient.isfinite().all()), f"state.evaluate must have finite gradients {where}")
    off = rms(found.detach() - state.denoised)
    expect(
        off <= 1e-3 * max(rms(state.denoised), 1e-3),
        f"state.evaluate(state.x) must be state.denoised {where}, it is {off:.3g} away",
    )


def rms(x: Tensor) -> float:
    return float(x.detach().float().square().mean().sqrt())
