"""Options that a guider passes on to its score, checked against what both take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from sparke._discover import SCORES
from sparke.errors import ArgumentError
from sparke.protocols import Score

__all__ = ["check"]


def check(
    guider: type, score: str | Score | None, options: Iterable[str], base: type | None = None
) -> None:
    """Raise if an option that `guider` passes on is its score's neither.

    Args:
        guider: whose options these were given as.
        score: which they are for; one that is no name takes none, and says so itself.
        options: names.
        base: takes the options as well, before the score.

    Raises:
        ArgumentError: there is such an option.
        UnknownName: no such score.
    """
    own = _taken(guider) + [name for name in _taken(base) if name not in _taken(guider)]
    lost = [name for name in options if name not in own]
    if not isinstance(score, str) or not lost:
        return
    made_by = SCORES.factory(score)
    known = _taken(made_by)
    lost = [name for name in lost if name not in known]
    if lost and not _takes_any(made_by):
        raise ArgumentError(
            f"neither {guider.__name__} nor its score {score!r} takes {', '.join(lost)}. Options "
            f"of {guider.__name__}: {', '.join(own)}; of the score: {', '.join(known) or 'none'}."
        )


def _parameters(made_by: Callable[..., Any] | None) -> list[inspect.Parameter]:
    return [] if made_by is None else list(inspect.signature(made_by).parameters.values())


def _taken(made_by: Callable[..., Any] | None) -> list[str]:
    various = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in _parameters(made_by) if p.kind not in various]


def _takes_any(made_by: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in _parameters(made_by))
