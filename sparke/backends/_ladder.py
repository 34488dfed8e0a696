"""From a sigma to its place in the schedule, whatever the solver evaluates in between."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch

from sparke.errors import ArgumentError
from sparke.protocols import Step

__all__ = ["Ladder", "of"]

CLOSE = 1e-4
"""Relative distance below which two sigmas are the same rung."""
ADAPTIVE_RATIO = 0.8
"""sigma_next / sigma where the solver picks its own steps; it needs a pure function of sigma."""


class Ladder:
    """The noise levels of one run, descending.

    Args:
        sigmas: at least two, strictly descending, the last one 0 or more.
        raised: noise level at which step i evaluates, where the solver adds noise first (churn).
        adaptive: the solver chooses its own steps between the first and the last.
    """

    def __init__(
        self, sigmas: list[float], raised: list[float] | None = None, *, adaptive: bool = False
    ) -> None:
        self._sigmas, self._raised = sigmas, raised or []
        self._rising = sorted(s for s in sigmas if s > 0)
        self._adaptive = adaptive
        self._total = None if adaptive else len(sigmas) - 1

    @property
    def highest(self) -> float:
        """The first noise level."""
        return self._sigmas[0]

    def __call__(self, sigma: float) -> Step:
        """The step at this noise level; `sigma_next` is the next rung below it."""
        for i, level in enumerate(self._raised):
            if math.isclose(sigma, level, rel_tol=CLOSE):
                return Step(i, sigma, self._sigmas[i + 1], self._total)
        below = bisect.bisect_left(self._rising, sigma * (1 - CLOSE))
        index = len(self._rising) - bisect.bisect_right(self._rising, sigma * (1 + CLOSE))
        if self._adaptive:
            return Step(index, sigma, sigma * ADAPTIVE_RATIO)
        return Step(index, sigma, self._rising[below - 1] if below else 0.0, self._total)


def of(arguments: Mapping[str, Any]) -> Ladder:
    """The ladder of a sampler call, from ``sigmas`` or ``sigma_min, sigma_max[, n]``.

    Raises:
        ArgumentError: they do not descend, or are not finite.
    """
    if "sigmas" in arguments:
        sigmas = _checked(arguments["sigmas"])
        return Ladder(sigmas, _churned(sigmas, arguments))
    lowest, highest = float(arguments["sigma_min"]), float(arguments["sigma_max"])
    if not 0 < lowest < highest < math.inf:
        raise ArgumentError(
            f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, got {lowest} and "
            f"{highest}."
        )
    n = arguments.get("n")
    if n is None:
        return Ladder([highest, lowest], adaptive=True)
    steps = max(int(n), 1)
    ratio = lowest / highest
    return Ladder([highest * ratio ** (i / steps) for i in range(steps + 1)])


def _churned(sigmas: list[float], arguments: Mapping[str, Any]) -> list[float] | None:
    """Levels after the noise that Euler, Heun and DPM-2 may add (arXiv 2206.00364, algorithm 2)."""
    churn = float(arguments.get("s_churn") or 0.0)
    if churn <= 0:
        return None
    lo, hi = float(arguments.get("s_tmin", 0.0)), float(arguments.get("s_tmax", math.inf))
    factor = 1 + min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    return [s * factor if lo <= s <= hi else s for s in sigmas[:-1]]


def _checked(sigmas: Any) -> list[float]:
    table = torch.as_tensor(sigmas)
    if table.ndim != 1 or len(table) < 2:
        raise ArgumentError(
            f"sigmas must be a 1-D table of at least two noise levels, got shape "
            f"{tuple(table.shape)}."
        )
    values = [float(v) for v in table.tolist()]
    for i, (high, low) in enumerate(itertools.pairwise(values)):
        if not (math.isfinite(high) and high > low >= 0):
            raise ArgumentError(
                f"sigmas must descend strictly to 0 or above; entry {i} is {high:.6g} and entry "
                f"{i + 1} is {low:.6g}. Pass the table from most to least noise."
            )
    return values
