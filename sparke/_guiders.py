"""A guider from the arguments people give: by name, as an object, or described."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from sparke import guidance, scores
from sparke._discover import GUIDERS, key
from sparke.errors import ArgumentError, UnknownName
from sparke.guidance import DiversityGuider, GuiderChain, SharedMemory, members
from sparke.guidance.diversity import SCALE
from sparke.memory import memory as memory_of
from sparke.protocols import Guider, Memory, Score
from sparke.schedules import Schedule

__all__ = ["CFG_INTERVAL", "SCALE", "SCORE", "Given", "compares_prompts", "guider_of"]

# Defaults are told by identity from the same value given: with `guider` only what was given counts.
# Literals of equal strings are one object; these are objects of their own.
SCORE = str(b"cond-rke", "ascii")
CFG_INTERVAL = str(b"auto", "ascii")

Given: TypeAlias = "Guider | str | Sequence[Guider | str]"

SHARED = ("score", "scale", "features", "schedule", "in_batch", "cfg_interval", "memory")
"""Options of `sparke.wrap` itself, which only a guider that names them is given."""


def guider_of(
    given: Given | None,
    score: str | Score,
    memory: Memory | str | None,
    /,
    *,
    scale: float,
    features: Callable[[Tensor], Tensor] | None,
    schedule: Schedule | str | None,
    in_batch: bool | None,
    cfg_interval: tuple[float, float] | str | None,
    **own: Any,
) -> Guider:
    """The guider given, or a DiversityGuider made from the other arguments.

    With `given`, `memory` goes to every guider made here by name that takes one, and the other
    options to the one made by name, if there is one only.

    Raises:
        ArgumentError: an option would go nowhere, or has a forbidden value.
        UnknownName: no such guider or score.
    """
    memory = None if memory is None else memory_of(memory)
    if given is None:
        return DiversityGuider(
            score,
            memory,
            scale=scale,
            features=features,
            schedule=schedule,
            in_batch=True if in_batch is None else in_batch,
            cfg_interval=cfg_interval,
            **own,
        )
    told = {
        "score": (score, SCORE),
        "scale": (scale, SCALE),
        "features": (features, None),
        "schedule": (schedule, None),
        "in_batch": (in_batch, None),
        "cfg_interval": (cfg_interval, CFG_INTERVAL),
    }
    asked = {k: value for k, (value, left) in told.items() if value is not left}
    return _made(given, memory, {**asked, **own})


def compares_prompts(guider: Guider) -> bool:
    """Whether a score of this guider, or of one in its chain, needs prompt embeddings."""
    needs = (getattr(getattr(g, "score", None), "requires", None) for g in members(guider))
    return any(bool(getattr(need, "cond", False)) for need in needs)


@dataclass(frozen=True)
class _Named:
    """A guider to be made, by the name of a guider or, if there is none, of a score."""

    name: str

    @functools.cached_property
    def factory(self) -> Callable[..., Guider]:
        wanted = key(self.name)
        if wanted in guidance.names():
            made_by: Callable[..., Guider] = GUIDERS.factory(self.name)
            return made_by
        if wanted in scores.names():
            return functools.partial(DiversityGuider, self.name)
        raise UnknownName("guider", self.name, {*guidance.names(), *scores.names()})

    @property
    def options(self) -> list[inspect.Parameter]:
        parameters = inspect.signature(self.factory).parameters.values()
        return [p for p in parameters if p.kind is not p.VAR_POSITIONAL]

    def takes(self, option: str) -> bool:
        """Whether it has this option; it may pass on those that are no option of `wrap`."""
        passes_on = option not in SHARED and any(p.kind is p.VAR_KEYWORD for p in self.options)
        return passes_on or option in {p.name for p in self.options if p.kind is not p.VAR_KEYWORD}

    def made(self, options: Mapping[str, Any]) -> Guider:
        if isinstance(self.factory, functools.partial):  # a score's name
            guider: Guider = self.factory(**options)
            return guider
        made: Guider = GUIDERS.make(self.name, self.factory, options)
        return made


def _made(given: Given, memory: Memory | None, options: Mapping[str, Any]) -> Guider:
    listed = not isinstance(given, str) and isinstance(given, Sequence)
    parts: list[Any] = list(given) if listed else [given]  # type: ignore[arg-type]
    parts = [_Named(part) if isinstance(part, str) else part for part in parts]
    named = [part for part in parts if isinstance(part, _Named)]
    lost = [name for name in options if len(named) != 1 or not named[0].takes(name)]
    keepers = _keepers(named)
    if memory is not None and not keepers:
        lost.append("memory")
    if lost:
        raise ArgumentError(_nowhere(", ".join(lost), named))
    if memory is not None and len(keepers) > 1:
        memory = SharedMemory(memory)
    for at, part in enumerate(parts):
        if isinstance(part, _Named):
            kept = {"memory": memory} if memory is not None and part in keepers else {}
            parts[at] = part.made({**kept, **options})
    # A chain also says what is wrong with an object that is no guider.
    only: Guider | None = parts[0] if len(parts) == 1 and not listed else None
    alone = isinstance(only, Guider) and not isinstance(only, type)
    return only if alone and only is not None else GuiderChain(parts)


def _keepers(named: Sequence[_Named]) -> list[_Named]:
    """Those that `memory` is for.

    A factory with a true attribute ``own_memory`` makes guiders that keep other rows than finished
    samples: what others write it cannot read, so it is given a memory only if nobody else is.
    """
    found = [one for one in named if one.takes("memory")]
    shared = [one for one in found if not getattr(one.factory, "own_memory", False)]
    return shared or found[:1]


def _nowhere(lost: str, named: Sequence[_Named]) -> str:
    """Why these options reach no guider, and what to do."""
    if not named:
        return (
            f"guider is given, so {lost} would go nowhere. Set it where the guider is made, such "
            "as sparke.DiversityGuider(...), or give the guider by name."
        )
    if len(named) == 1:
        known = [p.name for p in named[0].options if p.kind is not p.VAR_KEYWORD]
        return (
            f"guider {named[0].name!r} takes no {lost}, which would go nowhere. Its options: "
            f"{', '.join(known) or 'none'}."
        )
    names = [one.name for one in named]
    return (
        f"{lost} could be meant for any of the guiders {names}. Make the one it is for with its "
        f"options, e.g. sparke.guidance.guider({names[0]!r}, ...), and give that one in place of "
        "its name."
    )
