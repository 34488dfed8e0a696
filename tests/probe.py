"""A guider to look through."""

from __future__ import annotations

import torch
from torch import Tensor

from sparke.protocols import Run, State


class Probe:
    """Pushes every number by `push` and keeps what it was shown."""

    def __init__(self, push: float = 0.0) -> None:
        self.push = push
        self.runs: list[Run] = []
        self.states: list[State] = []
        self.finished: list[Tensor] = []

    def begin(self, run: Run) -> None:
        self.runs.append(run)

    def __call__(self, state: State) -> Tensor:
        self.states.append(state)
        return torch.full_like(state.denoised, self.push)

    def finish(self, x: Tensor) -> None:
        self.finished.append(x)
