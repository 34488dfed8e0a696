"""Scores: how different a sample is from a bank. One file each, named like the score.

`sparke.scores` is also callable: ``sparke.scores()`` lists the names that
[score][sparke.scores.score] knows, plugins included.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from sparke._discover import SCORES
from sparke.protocols import Score
from sparke.scores.cond_rke import CondRKE as CondRKE
from sparke.scores.cond_vendi import CondVendi as CondVendi
from sparke.scores.dpp import DPP as DPP
from sparke.scores.particle import Particle as Particle
from sparke.scores.rke import RKE as RKE
from sparke.scores.spell import SPELL as SPELL
from sparke.scores.vendi import Vendi as Vendi

__all__ = [
    "DPP",
    "RKE",
    "SPELL",
    "CondRKE",
    "CondVendi",
    "Particle",
    "Vendi",
    "names",
    "score",
]


def names() -> list[str]:
    """Names of all scores, those of installed plugins (entry points ``sparke.scores``) included."""
    return SCORES.names()


def score(name: str | Score, **options: Any) -> Score:
    """A score by name; an object that is one already is returned as it is.

    Args:
        name: see [names][sparke.scores.names].
        **options: the score's own, e.g. ``bandwidth=0.8``, ``kernel="cosine"``, ``order=2``.

    Raises:
        UnknownName: nobody registered the name; near matches are in the message.
        ArgumentError: an option is unknown or has a forbidden value; the object is no Score; the
            name is that of a plugin that cannot be used.
    """
    built: Score = SCORES.object(name, options)
    return built


class _Callable(ModuleType):
    def __call__(self) -> list[str]:
        return names()


# The public name `sparke.scores` is a folder and a function; one module object can be both.
sys.modules[__name__].__class__ = _Callable
