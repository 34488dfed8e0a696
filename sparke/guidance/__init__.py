"""Guiders: what displaces the denoised estimate. One file each, named like the guider.

The class of each file can be imported from here too, ``from sparke.guidance import CADS``; it is
loaded when it is asked for.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from sparke import _discover
from sparke._discover import GUIDERS
from sparke.guidance._chain import GuiderChain as GuiderChain
from sparke.guidance._hooks import having as having
from sparke.guidance._hooks import members as members
from sparke.guidance._shared import SharedMemory as SharedMemory
from sparke.guidance.diversity import DiversityGuider as DiversityGuider
from sparke.protocols import Guider

if TYPE_CHECKING:
    from sparke.guidance.cads import CADS as CADS
    from sparke.guidance.contextual import Contextual as Contextual
    from sparke.guidance.cvsg import CVSG as CVSG
    from sparke.guidance.dpp import DPP as DPP
    from sparke.guidance.eddy import EDDY as EDDY
    from sparke.guidance.erg import ERG as ERG
    from sparke.guidance.interval import Interval as Interval
    from sparke.guidance.noise import Noise as Noise
    from sparke.guidance.novelty import Novelty as Novelty
    from sparke.guidance.particle import Particle as Particle
    from sparke.guidance.spell import SPELL as SPELL

__all__ = [
    "DiversityGuider",
    "GuiderChain",
    "SharedMemory",
    "guider",
    "having",
    "members",
    "names",
]


def names() -> list[str]:
    """Names of all guiders, those of installed plugins (entry points ``sparke.guiders``) included.

    Wherever a guider's name is taken, a score's is too: it stands for a DiversityGuider of that
    score.
    """
    return GUIDERS.names()


def guider(name: str | Guider, **options: Any) -> Guider:
    """A guider by name; an object that is one already is returned as it is.

    Args:
        name: see [names][sparke.guidance.names].
        **options: the guider's own, e.g. ``s=0.25`` for CADS.

    Raises:
        UnknownName: nobody registered the name; near matches are in the message.
        ArgumentError: an option is unknown, missing, or has a forbidden value; the object is no
            Guider; the name is that of a plugin that cannot be used.
    """
    built: Guider = GUIDERS.object(name, options)
    return built


def __getattr__(name: str) -> Any:
    """The class `name` of the file named like it."""
    path = _discover.modules(sys.modules[__name__]).get(_discover.key(name))
    found = getattr(importlib.import_module(path), name, None) if path else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
