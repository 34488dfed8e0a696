"""When and how strongly to push, as functions of a step.

A schedule maps a [Step][sparke.protocols.Step] to the length of the push in units of noise: the
displacement of `denoised` has that length times the guider's `scale`. Any callable of that shape is
a schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from sparke import checks
from sparke.errors import ArgumentError
from sparke.protocols import Step

__all__ = ["NAMES", "Constant", "EveryNth", "FewSteps", "NoiseLevel", "RemainingNoise", "Schedule"]

Schedule: TypeAlias = Callable[[Step], float]

NAMES = ("few-step",)
"""Schedules that go by a name; their window is in units of the data, which a run tells."""


def _window(lo: float, hi: float) -> None:
    if not 0 <= lo <= hi:
        raise ArgumentError(f"a sigma window needs 0 <= lo <= hi, got lo={lo}, hi={hi}.")


@dataclass(frozen=True)
class RemainingNoise:
    r"""$\sigma_\text{next} (\sigma_\text{next} / \sigma)^{p}$ inside (lo, hi], 0 outside.

    A push the size of the noise that will still be there to absorb it. With many steps this is
    about `sigma`; with few steps it is much less, which is what lets one strength serve both: a
    push of size `sigma` would land almost undiluted.

    Attributes:
        lo: lowest sigma pushed at, in the host's units.
        hi: highest.
        power: p, at least 0; larger values spare samplers of few steps more.
    """

    lo: float = 0.0
    hi: float = float("inf")
    power: float = 0.0

    def __post_init__(self) -> None:
        _window(self.lo, self.hi)
        checks.positive("power", self.power, zero=True)

    def __call__(self, step: Step) -> float:
        if not self.lo <= step.sigma <= self.hi or step.sigma <= 0:
            return 0.0
        return float(step.sigma_next * (step.sigma_next / step.sigma) ** self.power)


@dataclass(frozen=True)
class FewSteps:
    r"""$w\, \sigma_\text{next} (1 - \sigma_\text{next} / \sigma)$ inside [lo, hi], 0 outside.

    For distilled and flow models of 4 to 8 steps, which decide the picture in the first two. A
    displacement d of the denoised estimate moves the sample by $d (1 - \sigma_\text{next}/\sigma)$
    in an Euler step; the fewer the steps, the less of the way is left in which small pushes could
    add up, so that here they grow with the part of the noise that a step removes. In many steps it
    is weaker than [RemainingNoise][sparke.schedules.RemainingNoise].

    Attributes:
        lo: lowest sigma pushed at, in the host's units.
        hi: highest.
        weight: w, above 0.
    """

    lo: float = 0.0
    hi: float = float("inf")
    weight: float = 10.0

    def __post_init__(self) -> None:
        _window(self.lo, self.hi)
        checks.positive("weight", self.weight)

    def __call__(self, step: Step) -> float:
        if not self.lo <= step.sigma <= self.hi or step.sigma <= 0:
            return 0.0
        return float(self.weight * step.sigma_next * (1 - step.sigma_next / step.sigma))


@dataclass(frozen=True)
class NoiseLevel:
    """`sigma` inside [lo, hi], 0 outside. For samplers of many steps."""

    lo: float = 0.0
    hi: float = float("inf")

    def __post_init__(self) -> None:
        _window(self.lo, self.hi)

    def __call__(self, step: Step) -> float:
        return step.sigma if self.lo <= step.sigma <= self.hi else 0.0


@dataclass(frozen=True)
class Constant:
    """The same `value` inside [lo, hi], 0 outside."""

    value: float = 1.0
    lo: float = 0.0
    hi: float = float("inf")

    def __post_init__(self) -> None:
        checks.positive("value", self.value, zero=True)
        _window(self.lo, self.hi)

    def __call__(self, step: Step) -> float:
        return self.value if self.lo <= step.sigma <= self.hi else 0.0


@dataclass(frozen=True)
class EveryNth:
    """`schedule` at every n-th step counted from the first, 0 between.

    Counting steps is what published code does (every 10th of 50, arXiv 2506.10173). Samplers that
    evaluate twice per step have no exact count, and pushing at every step above a sigma measured
    better at the same total.
    """

    n: int
    schedule: Schedule = Constant()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ArgumentError(f"n must be at least 1, got {self.n}.")

    def __call__(self, step: Step) -> float:
        return self.schedule(step) if step.index % self.n == 0 else 0.0
