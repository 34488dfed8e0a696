"""One evaluation for a guider to act on, and what it makes of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparke.memory import RingMemory
from sparke.protocols import Features, Guider, Run, State, Step
from tests.float64 import rows

STEP = Step(index=2, sigma=3.0, sigma_next=2.0, total=8)


def state(n: int, d: int, step: Step = STEP) -> State:
    """Estimates, and noise on top of them."""
    denoised = rows(n, d, 1)
    return State(denoised + step.sigma * rows(n, d, 0), denoised, step)


def pushed(guider: Guider, at: State, **fields: Any) -> Tensor:
    """The displacement in a run of this state alone."""
    told: dict[str, Any] = {"sigma_data": 1.0, **fields}
    guider.begin(Run(at.x.shape, at.x.device, at.x.dtype, **told))
    return guider(at)


def remembering(x: Tensor, cond: Tensor | None = None) -> RingMemory:
    """A memory of these rows."""
    memory = RingMemory()
    memory.commit(Features(x.float(), None if cond is None else cond.float()))
    return memory
