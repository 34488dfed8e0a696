"""diffusers' schedulers while they run: where the noise stands, and the step as a seam.

diffusers is never imported here.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from sparke.backends import _ladder
from sparke.backends._families import ENDING_CLEAN, family_of, names_of
from sparke.errors import UnsupportedTarget
from sparke.protocols import Step

__all__ = ["Reading", "fresh_noise", "is_scheduler", "stepping", "supported"]

STOCHASTIC = ("Ancestral", "DDPM", "LCM", "SDE", "SASolver", "UnCLIP", "SCM", "CMStochastic")
"""Parts of the names of schedulers that add fresh noise at each step."""
ALWAYS_STOCHASTIC = ("CosineDPMSolver", "CogVideoXDPM")
"""The same, whatever their `eta` and their algorithm are said to be."""


def is_scheduler(value: object) -> bool:
    """Whether `value` takes steps as diffusers' schedulers do."""
    return callable(getattr(value, "step", None)) and hasattr(value, "set_timesteps")


def supported(scheduler: Any) -> bool:
    """Whether the denoised estimate can be read off this scheduler's model outputs."""
    return family_of(scheduler) is not None


class Reading:
    """The noise levels of one run, by position in ``scheduler.timesteps``.

    Args:
        scheduler: after ``set_timesteps``.

    Raises:
        UnsupportedTarget: its model outputs are not linear in the clean sample, or not read here.
    """

    def __init__(self, scheduler: Any) -> None:
        family = family_of(scheduler)
        if family is None:
            raise UnsupportedTarget(
                f"scheduler {type(scheduler).__name__} cannot be guided: sparke reads a denoised "
                "estimate off the model's output, and this one has none that it knows (discrete "
                "tokens, or a parametrisation of its own). Give the pipeline another scheduler."
            )
        self.timesteps = scheduler.timesteps
        self.times = [float(t) for t in self.timesteps.reshape(-1).tolist()]
        self.levels = family(scheduler, self.times)
        self._steps = len(self.times) - (family in ENDING_CLEAN)
        noises = {level.noise for level in self.levels[: self._steps] if level.noise > 0}
        self._ladder = _ladder.Ladder([*sorted(noises, reverse=True), 0.0])
        self._last = -1

    def is_of(self, scheduler: Any) -> bool:
        """Whether the scheduler still has the time table this was read from."""
        return scheduler.timesteps is self.timesteps

    def position(self, scheduler: Any, timestep: Any) -> int:
        """Where in the time table the step about to be taken stands."""
        if getattr(scheduler, "step_index", None) is None and hasattr(
            scheduler, "_init_step_index"
        ):
            scheduler._init_step_index(timestep)  # as its step would
        known = getattr(scheduler, "step_index", None)
        if known is not None:
            at = int(known)
        else:
            at = self._found(float(torch.as_tensor(timestep).reshape(-1)[0]), self._last + 1)
        self._last = at
        return min(at, len(self.levels) - 1)

    def upcoming(self, scheduler: Any, hint: Callable[[], float | None]) -> int:
        """The same while the model is being evaluated, before the scheduler is told.

        Args:
            scheduler: whose time table this is.
            hint: tells the time the model was given, if known: t, t / 1000 or (1000 - t) / 1000;
                asked at most once per run, as reading it makes a device wait.
        """
        at = getattr(scheduler, "step_index", None)
        if at is None and self._last >= 0 and not hasattr(scheduler, "step_index"):
            at = self._last + 1
        if at is None:
            at = getattr(scheduler, "begin_index", None)
        if at is None:
            at = self._first_like(hint())
        return min(int(at), len(self.levels) - 1)

    def step(self, at: int) -> Step:
        """The step at a position of the time table, in noise over signal."""
        return self._ladder(self.levels[at].noise)

    def is_last(self, at: int) -> bool:
        """Whether a step from here ends at the clean sample."""
        return at == self._steps - 1

    def _first_like(self, time: float | None) -> int:
        known = () if time is None else (time, time * 1000, 1000 - time * 1000)
        for i, t in enumerate(self.times):
            if any(math.isclose(t, k, rel_tol=1e-3, abs_tol=1e-6) for k in known):
                return i
        return 0

    def _found(self, time: float, expected: int) -> int:
        # Time tables may name a time twice (PNDM); the next one in turn comes first.
        order = [*range(expected, len(self.times)), *range(min(expected, len(self.times)))]
        return next((i for i in order if math.isclose(self.times[i], time, abs_tol=1e-6)), expected)


Watcher: TypeAlias = Callable[[Callable[..., Any], inspect.BoundArguments], Any]


@contextmanager
def stepping(scheduler: Any, watcher: Watcher) -> Iterator[None]:
    """Let `watcher` take the scheduler's steps, given the step function and its arguments.

    The scheduler is of a subclass of its own class and name meanwhile, so that copies which
    pipelines make of it step by themselves, unwatched.
    """
    kind, held = type(scheduler), vars(scheduler)
    # The signature must stay: pipelines look into it for `eta` and `generator`.
    if "step" in held:  # somebody else's replacement on the instance
        before = held["step"]
        bare = inspect.signature(before)

        @functools.wraps(before)
        def on_instance(*args: Any, **kwargs: Any) -> Any:
            return watcher(before, bare.bind(*args, **kwargs))

        held["step"] = on_instance
        try:
            yield
        finally:
            held["step"] = before
        return

    signature = inspect.signature(kind.step)

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not scheduler:
            return kind.step(self, *args, **kwargs)
        return watcher(kind.step, signature.bind(self, *args, **kwargs))

    names: dict[str, Any] = {
        "step": step,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    if not hasattr(kind, "scale_model_input"):  # some pipelines ask unless the type is exact
        names["scale_model_input"] = lambda _self, sample, *_args, **_kwargs: sample
    scheduler.__class__ = type(kind.__name__, (kind,), names)
    try:
        yield
    finally:
        scheduler.__class__ = kind


def fresh_noise(scheduler: Any, arguments: Mapping[str, Any]) -> float:
    """The share of fresh noise in each step, eta in the terms of DDIM: 0 for ODE solvers.

    Args:
        scheduler: which takes the steps.
        arguments: of the pipeline's call, of which ``eta`` is read where steps take one.
    """
    name, config = names_of(scheduler), scheduler.config
    takes = inspect.signature(scheduler.step).parameters
    if any(part in name for part in ALWAYS_STOCHASTIC):
        return 1.0
    if "LTXEulerAncestralRF" in name:
        return float(config.get("eta", 1.0))
    if "eta" in takes:
        value = arguments.get("eta")
        value = takes["eta"].default if value is None else value
        return float(value) if isinstance(value, (int, float)) else 0.0
    told = str(config.get("algorithm_type", "")).startswith("sde")
    told = told or bool(config.get("stochastic_sampling", False))
    return 1.0 if told or any(part in name for part in STOCHASTIC) else 0.0
