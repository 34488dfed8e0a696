"""The methods of the arena: how each is made at a strength, and the strengths it is swept over.

Not here: ERG and contextual repulsion act on attention, of which neither bed has any; novelty and
c-VSG answer another question, for they need a set of pictures to stay away from or go towards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.bed import Bed
from sparke.guidance import DiversityGuider, GuiderChain
from sparke.guidance.cads import CADS
from sparke.guidance.dpp import DPP
from sparke.guidance.eddy import EDDY
from sparke.guidance.interval import Interval
from sparke.guidance.noise import Noise
from sparke.guidance.particle import Particle
from sparke.guidance.spell import SPELL
from sparke.protocols import Guider

BATCH, MEMORY, BOTH = ("batches",), ("sequential",), ("sequential", "batches")
ALONE: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """A method of the arena.

    Attributes:
        build: a guider at a strength, for a bed.
        strengths: those it is swept over; `default` is among them.
        default: the one its authors, or we, give it.
        ways: in which it has something to do; empty for methods that treat each sample by itself.
    """

    build: Callable[[float, Bed], Guider | None]
    strengths: tuple[float, ...]
    default: float
    ways: tuple[str, ...] = BOTH

    def make(self, strength: float, bed: Bed) -> Guider | None:
        """A new guider of this strength."""
        return self.build(strength, bed)


def _spell(share: float, bed: Bed) -> Guider:
    """A radius in units of the distance between independent samples of one prompt."""
    distance = bed.model.sigma_data * math.sqrt(2 * math.prod(bed.model.latent_shape))
    return SPELL(radius=share * distance)


def _of(make: Callable[[float], Guider]) -> Callable[[float, Bed], Guider]:
    return lambda strength, _: make(strength)


SCALES = (0.2, 0.4, 0.8, 1.6, 3.2)
METHODS: dict[str, Method] = {
    "unguided": Method(lambda *_: None, (0.0,), 0.0, ALONE),
    "sparke": Method(_of(lambda scale: DiversityGuider(scale=scale)), SCALES, 0.4),
    "sparke, few-step": Method(
        _of(lambda scale: DiversityGuider(scale=scale, schedule="few-step")), (0.4, 0.8), 0.4
    ),
    "sparke + cads": Method(
        _of(lambda s: GuiderChain([CADS(s), DiversityGuider()])), (0.25,), 0.25
    ),
    "SPARKE as published": Method(
        _of(lambda eta: DiversityGuider.published(eta=eta, every=5)),
        (0.01, 0.03, 0.1),
        0.03,
        MEMORY,
    ),
    "interval": Method(
        _of(lambda hi: Interval(0.0, hi, relative=True)), (0.8, 1.6, 3.2), 1.6, ALONE
    ),
    "cads": Method(_of(CADS), (0.25, 0.5, 1.0, 2.0), 0.25, ALONE),
    "particle": Method(_of(Particle), (10.0, 30.0, 100.0), 30.0, BATCH),
    "spell": Method(_spell, (0.1, 0.25, 0.4), 0.25),
    "dpp": Method(_of(DPP), (0.1, 0.25, 0.5), 0.5, BATCH),
    "eddy": Method(_of(EDDY), (1.0, 16.0), 1.0, BATCH),
    "orthogonal noise": Method(_of(lambda _: Noise("orthogonal")), (1.0,), 1.0, BATCH),
}
