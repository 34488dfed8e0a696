"""Options of contextual repulsion: their rules, and what they mean at a step."""

from __future__ import annotations

import math
from typing import Any

from sparke.errors import ArgumentError
from sparke.protocols import Score, Step
from sparke.scores import score as score_of

__all__ = ["acts", "cosine", "first_steps"]


def cosine(score: str | Score, options: dict[str, Any]) -> Score:
    """The score; one given by name compares cosines if it can and is not told otherwise."""
    made = score_of(score, **options)
    if isinstance(score, str) and hasattr(made, "kernel") and "kernel" not in options:
        return score_of(score, **options, kernel="cosine")
    return made


def first_steps(value: float) -> int | float:
    """`value` if it is a number of steps or a share of them."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise ArgumentError(
        "steps must be a whole number of steps above 0, or a share of them above 0 and below 1; "
        f"got {value!r}."
    )


def acts(steps: int | float, step: Step) -> bool:
    """Whether a step is among the first `steps`."""
    if isinstance(steps, int):
        return step.index < steps
    if step.total is None:
        raise ArgumentError(
            f"steps={steps} is a share of all steps, and this host does not tell how many there "
            "are. Give a whole number, such as steps=1."
        )
    return step.index < max(1, math.floor(steps * step.total + 0.5))
