"""The denoised estimate of a scheduler's step that is already taken, and a push after the fact.

A callback at the end of a step sees the latents before and after it, not the model's output. With
x = a D + b E before the step and x' = a' D + b' E after it, a step that keeps the noise E (DDIM,
arXiv 2010.02502; Euler) is undone by

    D = (b x' - b' x) / (a' b - a b').

Schedulers that keep what the model said of D or E are asked instead. Had D been displaced by d
before the step, with E as the residual x - a D demands, x' would have moved by

    a' d (1 - r),    r = (b'/a') / (b/a),

or by a' d (1 - r^2) where the step renews noise as ancestral sampling does. Solvers that start over
from latents they stored are pushed between, or have what they stored pushed along.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparke.backends._families import Level
from sparke.backends._schedulers import Reading
from sparke.guidance._vectors import working
from sparke.protocols import Step

__all__ = ["Passed", "Track"]

CLEAN = Level(1.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Passed:
    """A step whose end the latents have reached.

    Attributes:
        x: (b, ...) latents it started from, over their signal scale.
        denoised: (b, ...) clean latents it aimed at.
        step: where in the schedule it started.
        gain: how far the latents move when `denoised` does.
    """

    x: Tensor
    denoised: Tensor
    step: Step
    gain: float


class Track:
    """Follows the latents of one run from callback to callback.

    Args:
        scheduler: takes the steps.
        eta: share of fresh noise in each of them.

    Raises:
        UnsupportedTarget: its noise levels cannot be read.
    """

    def __init__(self, scheduler: Any, eta: float) -> None:
        self.scheduler, self.reading = scheduler, Reading(scheduler)
        self._eta = eta
        self._before: Tensor | None = None
        self._open = False
        self._at = self._start = 0
        self._x: Tensor | None = None
        self._denoised: Tensor | None = None

    def obstacle(self, denoised: Tensor | None) -> str | None:
        """Why latents cannot be guided after this scheduler's steps; None if they can."""
        name = type(self.scheduler).__name__
        if name.startswith("SASolver"):
            return f"{name}'s corrector starts over from latents of its own and discards a push"
        takes = inspect.signature(self.scheduler.step).parameters
        if "old_pred_original_sample" in takes:
            return f"{name} adds fresh noise and leaves its denoised estimate to the pipeline"
        told = denoised is not None or hasattr(self.scheduler, "model_outputs")
        # KDPM2Ancestral adds its noise in the second of two evaluations; the first tells.
        if self._eta and not told and not hasattr(self.scheduler, "sigmas_interpol"):
            return f"{name} adds fresh noise and keeps no denoised estimate"
        return None

    @property
    def is_last(self) -> bool:
        """Whether the latents are clean now."""
        return self.reading.is_last(self._at)

    def next_step(self) -> Step:
        """Where the coming evaluation stands."""
        return self.reading.step(min(self._at + 1, len(self.reading.levels) - 1))

    def arrived(self, timestep: Any, latents: Tensor, denoised: Tensor | None) -> Passed | None:
        """Take note of a step's end.

        Args:
            timestep: of the step.
            latents: after it.
            denoised: its clean estimate, where the pipeline shows one.

        Returns:
            The step, if latents may be pushed now and the estimate is known: not in the middle of a
            step of several evaluations, and not after a first step that left no other trace.
        """
        index = getattr(self.scheduler, "step_index", None)
        at = self.reading.position(self.scheduler, timestep) if index is None else int(index) - 1
        self._at = at = min(max(at, 0), len(self.reading.levels) - 1)
        after = working(latents.detach())
        if not self._open:
            self._start = at
            before = _stored(self.scheduler) if self._before is None else self._before
            self._x = None if before is None else working(before.detach())
            self._denoised = self._estimate(after, denoised)
        self._open = not self.is_last and _unfinished(self.scheduler)
        if self._open or self._x is None or self._denoised is None:
            return None
        start, end = self.reading.levels[self._start], self._end
        # A ladder's next rung may be one that the step has visited on its way.
        step = dataclasses.replace(self.reading.step(self._start), sigma_next=end.noise)
        return Passed(self._x / start.scale, self._denoised, step, self._gain(start, end))

    def leave(self, latents: Tensor) -> None:
        """Take note of the latents that the next step starts from."""
        self._before = latents

    def pushed(self, latents: Tensor, move: Tensor) -> Tensor:
        """The latents moved, in their dtype, and what the scheduler will start over from with them.

        Args:
            latents: after the step.
            move: (b, ...) in their units, float32 or better.
        """
        last = getattr(self.scheduler, "last_sample", None)
        end = self._end
        if isinstance(last, Tensor) and last.shape == latents.shape and end.sigma > 0:
            # UniPC's corrector repeats the step from here, times sigma'/sigma (x0 prediction) or
            # alpha'/alpha (noise prediction).
            start = self.reading.levels[self._at]
            clean = getattr(self.scheduler, "predict_x0", True)
            ratio = start.sigma / end.sigma if clean else start.scale / end.scale
            self.scheduler.last_sample = (working(last.detach()) + ratio * move).to(last.dtype)
        return (working(latents.detach()) + move).to(latents.dtype)

    @property
    def _end(self) -> Level:
        """The level reached."""
        levels = self.reading.levels
        return CLEAN if self.is_last or self._at + 1 >= len(levels) else levels[self._at + 1]

    def _gain(self, start: Level, end: Level) -> float:
        if "LCM" in type(self.scheduler).__name__:
            return end.alpha  # all of the noise is new
        kept = (end.sigma * start.alpha) / (end.alpha * start.sigma)
        return float(end.alpha * (1 - kept ** (2 if self._eta else 1)))

    def _estimate(self, after: Tensor, denoised: Tensor | None) -> Tensor | None:
        """The clean estimate of the step just taken; fills in `_x` where only that is missing."""
        level, end = self.reading.levels[self._at], self._end
        if denoised is None:
            denoised = self._kept(level, end, after)
        if denoised is None:
            if self._x is None:
                return None
            return (level.sigma * after - end.sigma * self._x) / (
                end.alpha * level.sigma - level.alpha * end.sigma
            )
        found = working(denoised.detach())
        if self._x is None and end.sigma > 0 and not self._eta:
            noise = (after - end.alpha * found) / end.sigma
            self._x = level.alpha * found + level.sigma * noise
        return found

    def _kept(self, level: Level, end: Level, after: Tensor) -> Tensor | None:
        """From what multistep solvers keep of the model's outputs."""
        held = vars(self.scheduler)
        outputs = [held.get(name) for name in ("model_outputs", "derivatives", "ets")]
        last = [_like(values[-1], after) if values else None for values in outputs]
        converted, noise, raw = last
        if converted is not None:
            if _predicts_clean(self.scheduler):
                return converted
            noise = converted
        if noise is not None:
            if self._x is not None and level.alpha == level.scale:
                return (self._x - level.sigma * noise) / level.alpha
            # A first step is one of first order.
            return None if self._eta else (after - end.sigma * noise) / end.alpha
        if raw is not None and self._x is not None and hasattr(self.scheduler, "counter"):
            return level.denoised(raw, self._x)  # PNDM
        return None


def _predicts_clean(scheduler: Any) -> bool:
    """Whether a multistep solver keeps clean estimates; else it keeps noise."""
    found = getattr(scheduler, "predict_x0", None)
    if found is not None:
        return bool(found)
    kind = scheduler.config.get("algorithm_type", "dpmsolver++")
    return str(kind).endswith("dpmsolver++")


def _unfinished(scheduler: Any) -> bool:
    """Whether the next evaluation belongs to a step that starts from latents stored before."""
    if not getattr(scheduler, "state_in_first_order", True):
        return True  # Heun, KDPM2, DPMSolverSDE
    orders = getattr(scheduler, "order_list", None)
    if orders is not None:  # DPMSolverSinglestep
        at = int(scheduler.step_index)
        return at < len(orders) and orders[at] > 1
    counter = getattr(scheduler, "counter", None)
    if counter is not None:  # PNDM: four evaluations of Runge-Kutta, or one pair to begin with
        rounds = 0 if scheduler.config.skip_prk_steps else len(scheduler.prk_timesteps)
        return counter % 4 != 0 if counter < rounds else not rounds and counter == 1
    return False


def _stored(scheduler: Any) -> Tensor | None:
    """The latents a first step started from, where the scheduler stored them."""
    held = vars(scheduler)
    stored = (held.get(name) for name in ("sample", "cur_sample", "last_sample"))
    return next((s for s in stored if isinstance(s, Tensor)), None)


def _like(value: object, x: Tensor) -> Tensor | None:
    if isinstance(value, Tensor) and value.shape == x.shape:
        return value.detach().to(x)
    return None
