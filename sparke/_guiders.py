"""A guider from the arguments people give: by name, as an object, or described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from sparke.errors import ArgumentError
from sparke.guidance import DiversityGuider, GuiderChain
from sparke.guidance.diversity import SCALE
from sparke.protocols import Guider, Memory, Score
from sparke.schedules import Schedule

__all__ = ["SCALE", "Given", "compares_prompts", "guider_of"]

Given: TypeAlias = "Guider | str | Sequence[Guider | str]"


def guider_of(
    given: Given | None,
    score: str | Score,
    memory: Memory | None,
    /,
    *,
    scale: float,
    features: Callable[[Tensor], Tensor] | None,
    schedule: Schedule | str | None,
    in_batch: bool,
    cfg_interval: tuple[float, float] | str | None,
    **score_options: Any,
) -> Guider:
    """The guider given, or a DiversityGuider made from the other arguments.

    Raises:
        ArgumentError: a guider is given along with options that would go nowhere, or an option has
            a forbidden value.
        UnknownName: no such score.
    """
    if given is None:
        return DiversityGuider(
            score,
            memory,
            scale=scale,
            features=features,
            schedule=schedule,
            in_batch=in_batch,
            cfg_interval=cfg_interval,
            **score_options,
        )
    _refuse(
        score=score != "cond-rke",
        scale=scale != SCALE,
        features=features is not None,
        schedule=schedule is not None,
        in_batch=not in_batch,
        cfg_interval=cfg_interval != "auto",
        memory=memory is not None and not _names(given),
        **dict.fromkeys(score_options, True),
    )
    return _made(given, memory)


def compares_prompts(guider: Guider) -> bool:
    """Whether a score of this guider, or of one in its chain, needs prompt embeddings."""
    parts = getattr(guider, "guiders", (guider,))
    needs = (getattr(getattr(part, "score", None), "requires", None) for part in parts)
    return any(bool(getattr(need, "cond", False)) for need in needs)


def _refuse(**given: bool) -> None:
    lost = [name for name, is_given in given.items() if is_given]
    if lost:
        raise ArgumentError(
            f"guider is given, so {', '.join(lost)} would go nowhere. Set it where the guider is "
            "made: sparke.DiversityGuider(...)."
        )


def _names(guider: Given) -> bool:
    """Whether any guider is given by name, and so made here with the memory given."""
    if isinstance(guider, str):
        return True
    return isinstance(guider, Sequence) and any(isinstance(g, str) for g in guider)


def _made(given: Given, memory: Memory | None) -> Guider:
    if isinstance(given, str):
        return DiversityGuider(given, memory)
    if isinstance(given, Sequence):
        return GuiderChain([DiversityGuider(g, memory) if isinstance(g, str) else g for g in given])
    return given if isinstance(given, Guider) else GuiderChain([given])
