"""A host under a backend, run again and again, each time for one thing it must do."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparke.errors import GuidanceWarning, SparkeError
from sparke.guidance import DiversityGuider
from sparke.memory import RingMemory
from sparke.protocols import Backend, Guider, Run, State
from sparke.testing._common import COND_WIDTH, expect, normal
from sparke.testing._onlookers import HOOKED, Onlooker, WithNoise
from sparke.testing._told import Watched, check_evaluate, check_kind, check_told, rms

SAID = ("noise", "condition", "model", "encoder")
"""Hooks that change the run: a backend that does not reach one says so."""
NEAR = 0.05
"""Distance at which samples have reached a point; schedules of old end a little above no noise."""


@dataclass(frozen=True)
class _Sampled:
    """What came of one call: samples, and the next number of torch's generator."""

    x: Tensor
    generator: Tensor


class HostRuns:
    """The target under the backend, called again and again from the same seed."""

    def __init__(self, backend: Backend, target: Any, call: Callable[[Any], Tensor]) -> None:
        self._backend, self._target, self._call = backend, target, call
        self._bare = self._run(target)
        x = self._bare.x
        expect(
            isinstance(x, Tensor) and x.ndim >= 2 and x.is_floating_point(),
            f"call must return the finished samples (b, ...), got {type(x).__name__}",
        )
        expect(bool(x.isfinite().all()), "call must return finite samples of the bare target")
        expect(
            torch.equal(self._run(target).x, x),
            "call must give the same samples each time; draw its noise from torch's generator, or "
            "from one that is seeded in call",
        )

    def check_onlooker(self) -> Run:
        """A guider that displaces nothing changes nothing and is told of everything."""
        onlooker = Onlooker()
        wrapped = self._attach(onlooker)
        check_kind(self._target, wrapped)
        if not hasattr(self._target, "guider"):
            expect(
                getattr(wrapped, "guider", None) is onlooker,
                "the wrapped target must have the guider as its attribute `guider`",
            )
        expect(
            getattr(wrapped, "memory", onlooker) is None,
            "the wrapped target must have an attribute `memory`, the guider's or None",
        )
        self._same(wrapped, "a guider that displaces nothing")
        check_told(onlooker, self._bare.x)
        again = self._run(wrapped)
        expect(
            len(onlooker.runs) == len(onlooker.finished) == 2,
            "each call must be a run of its own, with one begin() and one finish()",
        )
        expect(torch.equal(again.x, self._bare.x), "a second call must give what the first gave")
        self._same(self._target, "attach() and a guided call, the bare target")
        return onlooker.runs[0]

    def check_memory(self, run: Run) -> None:
        """Samples are written once; strength 0 changes nothing."""
        memory, b = RingMemory(), run.shape[0]
        guider = DiversityGuider("rke", memory, scale=0)
        wrapped = self._attach(guider)
        expect(wrapped.memory is memory, "the wrapped target's `memory` must be its guider's")
        for calls in (1, 2):
            self._same(wrapped, "a DiversityGuider of scale 0")
            expect(
                len(memory) == calls * b,
                f"{calls} finished run(s) of {b} must leave {calls * b} rows in memory, there are "
                f"{len(memory)}",
            )

    def check_prompts(self, run: Run) -> None:
        """Embeddings given to attach() reach the guider, a row for each sample."""
        given, onlooker = normal((run.shape[0], COND_WIDTH), 9), Onlooker()
        self._same(self._attach(onlooker, prompt_embeds=given), "prompt_embeds given to attach()")
        for what, cond in (("Run", onlooker.runs[0].cond), ("State", onlooker.states[0].cond)):
            expect(
                isinstance(cond, Tensor) and torch.equal(cond.to(given), given),
                f"prompt_embeds given to attach() must be {what}.cond, got {cond!r}",
            )

    def check_displacement(self, run: Run) -> None:
        """Moved to one point at every evaluation, samples end in it."""
        point = 0.8 * normal(tuple(run.shape), 11).tanh()

        def move(state: State) -> Tensor:
            return point.to(state.denoised) - state.denoised

        onlooker = Onlooker(move)
        found = self._run(self._attach(onlooker)).x
        off = rms(found - point.to(found))
        allowed = NEAR + 3 * onlooker.states[-1].step.sigma_next
        expect(
            math.isfinite(allowed) and off <= allowed,
            "a displacement of `denoised` to one point at each evaluation must lead there, to "
            f"within {allowed:.3g}, the noise left in the end; samples are {off:.3g} away (those "
            f"of the bare target: {rms(self._bare.x - point.to(found)):.3g})",
        )

    def check_evaluations(self) -> None:
        """What a state offers to evaluate agrees with it, and leaves the run alone."""

        def ask(state: State) -> Tensor:
            where = f"at sigma {state.step.sigma:.4g}"
            for name in ("conditional", "again"):
                offered = getattr(state, name)
                if offered is not None:
                    shown = offered()
                    expect(
                        shown.shape == state.denoised.shape and bool(shown.isfinite().all()),
                        f"state.{name}() must be a prediction like `denoised` {where}",
                    )
            if state.evaluate is not None:
                check_evaluate(state, where)
            return torch.zeros_like(state.denoised)

        self._same(self._attach(Onlooker(ask)), "a guider that evaluates the host again")

    def check_hook(self, name: str, *, promised: bool) -> None:
        """A hook that changes nothing changes nothing; one not called is told of."""
        guider = HOOKED[name]()
        refused: SparkeError | None = None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", GuidanceWarning)
            try:
                self._same(self._attach(guider), f"an on_{name} that changes nothing")
            except SparkeError as error:
                refused = error
        told = refused or any(issubclass(w.category, GuidanceWarning) for w in said)
        called = bool(guider.asked)
        expect(called or not promised, f"on_{name} was promised and is not called")
        expect(
            called or bool(told) or name not in SAID,
            f"on_{name} is not called: a GuidanceWarning or a SparkeError must say so",
        )
        if called and name == "noise":
            self._check_noise(guider)
        if called and name == "model":
            expect(
                guider.left == len(guider.asked) and guider.order[-1] in ("left", "finish"),
                "on_model() must be entered once for each network and left when the run ends",
            )
            self._check_model_left()

    def _check_noise(self, plain: Any) -> None:
        expect(
            plain.order.index("begin") < plain.order.index("noise") < plain.order.index("state"),
            f"on_noise() must come after begin() and before the first evaluation, not so: "
            f"{plain.order[:3]}",
        )
        expect(len(plain.asked) == 1, f"on_noise() must come once, it came {len(plain.asked)}x")
        turned = WithNoise(turned=True)
        self._run(self._attach(turned))
        first, other = plain.states[0].x, turned.states[0].x
        expect(
            bool(torch.allclose(other, -first, rtol=1e-3, atol=1e-4 * float(first.abs().max()))),
            "the run must start from what on_noise() returned",
        )

    def _check_model_left(self) -> None:
        error = KeyboardInterrupt()
        guider = HOOKED["model"](error=error, fails=0)
        with suppress(KeyboardInterrupt):
            self._run(self._attach(guider))
        expect(
            guider.left == len(guider.asked) > 0,
            "on_model() must be left after KeyboardInterrupt too",
        )

    def check_errors(self, before: Watched) -> None:
        """Errors come through; nothing is written; the host is as it was."""
        errors: tuple[BaseException, ...] = (RuntimeError("of a guider"), KeyboardInterrupt())
        places: tuple[str | int, ...] = ("begin", 0, 1, "finish")
        for place in places:
            for error in errors:
                where = f"{type(error).__name__} in {place if isinstance(place, str) else 'a step'}"
                guider = Onlooker(error=error, fails=place)
                came: BaseException | None = None
                try:
                    self._run(self._attach(guider))
                except BaseException as raised:  # noqa: BLE001  KeyboardInterrupt is one of them
                    came = raised
                if came is None and place == 1 and len(guider.states) < 2:
                    continue  # a host of one evaluation
                expect(came is error, f"{where} of the guider must come through, {came!r} came")
                expect(not guider.finished, f"after {where} no samples are finished")
                expect(
                    place == "finish" or "finish" not in guider.order,
                    f"after {where} finish() must not be called",
                )
                before.check(f"a run left by {where}")
                self._same(self._target, f"a run left by {where}, the bare target")

    def check_left_early(self, before: Watched) -> None:
        """A generator that is closed after its first item is a run that did not finish."""
        onlooker = Onlooker()
        wrapped = self._attach(onlooker)

        @functools.wraps(wrapped)
        def leaving(*args: Any, **kwargs: Any) -> Any:
            items = wrapped(*args, **kwargs)
            yield next(items)
            items.close()

        with suppress(Exception):  # of a call that wants all items
            self._run(leaving)
        expect(
            "state" in onlooker.order and "finish" not in onlooker.order,
            "a generator that is left early must not finish its run",
        )
        before.check("a generator left early")

    def _attach(self, guider: Guider, **options: Any) -> Any:
        given = {"prompt_embeds": None, **options}
        return self._backend.attach(self._target, guider, **given)

    def _run(self, target: Any) -> _Sampled:
        torch.manual_seed(0)
        x = self._call(target)
        return _Sampled(x.clone() if isinstance(x, Tensor) else x, torch.get_rng_state())

    def _same(self, target: Any, what: str) -> None:
        found = self._run(target)
        expect(
            torch.equal(found.x, self._bare.x),
            f"with {what} samples must be bit for bit the bare target's",
        )
        expect(
            torch.equal(found.generator, self._bare.generator),
            f"with {what} torch's generator must be left where the bare target leaves it",
        )
