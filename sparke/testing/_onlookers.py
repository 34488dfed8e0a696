"""Guiders that look on, to see what a backend tells them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparke.protocols import Evaluation, Run, State, Step

Move = Callable[[State], Tensor]


def still(state: State) -> Tensor:
    """No displacement."""
    return torch.zeros_like(state.denoised)


class Onlooker:
    """Keeps what it is told, displaces as `move` says, and raises `error` where it is to.

    Args:
        move: state -> displacement.
        error: raised in `fails`: ``"begin"``, ``"finish"``, or at the n-th evaluation.
    """

    memory = None

    def __init__(
        self,
        move: Move = still,
        *,
        error: BaseException | None = None,
        fails: str | int | None = None,
    ) -> None:
        self._move, self._error, self._fails = move, error, fails
        self.runs: list[Run] = []
        self.states: list[State] = []
        self.finished: list[Tensor] = []
        self.order: list[str] = []

    def begin(self, run: Run) -> None:
        self.order.append("begin")
        self.runs.append(run)
        self._fail_at("begin")

    def __call__(self, state: State) -> Tensor:
        self.order.append("state")
        self._fail_at(len(self.states))
        self.states.append(state)
        return self._move(state)

    def finish(self, x: Tensor) -> None:
        self.order.append("finish")
        self._fail_at("finish")
        self.finished.append(x.detach().clone())

    def _fail_at(self, place: str | int) -> None:
        if self._error is not None and self._fails == place:
            raise self._error


class WithNoise(Onlooker):
    """Starts from the noise turned round, or from the noise itself."""

    def __init__(self, *, turned: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.asked: list[Tensor] = []
        self._sign = -1 if turned else 1

    def on_noise(self, x: Tensor) -> Tensor:
        self.order.append("noise")
        self.asked.append(x)
        return self._sign * x


class WithCondition(Onlooker):
    """Returns the prompt embeddings it is given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.asked: list[Tensor] = []

    def on_condition(self, prompt_embeds: Tensor, step: Step, mask: Tensor | None = None) -> Tensor:
        self.asked.append(prompt_embeds)
        return prompt_embeds


class WithModel(Onlooker):
    """Counts how often the network is held, and let go."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.asked: list[Any] = []
        self.left = 0

    @contextlib.contextmanager
    def on_model(self, model: Any) -> Iterator[None]:
        self.order.append("model")
        self.asked.append(model)
        try:
            yield
        finally:
            self.order.append("left")
            self.left += 1


class WithEvaluation(Onlooker):
    """Is told of evaluations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.asked: list[Evaluation] = []

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self.asked.append(evaluation)


class WithScale(Onlooker):
    """Leaves the guidance scale as it is."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.asked: list[float] = []

    def on_guidance_scale(self, step: Step, guidance_scale: float) -> float:
        self.asked.append(guidance_scale)
        return guidance_scale


class WithEncoder(Onlooker):
    """Has prompts encoded a second time, as they were."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.asked: list[Any] = []

    @contextlib.contextmanager
    def on_encoder(self, encoder: Any) -> Iterator[None]:
        self.asked.append(encoder)
        yield


HOOKED: dict[str, Callable[..., Any]] = {
    "guidance_scale": WithScale,
    "noise": WithNoise,
    "condition": WithCondition,
    "model": WithModel,
    "evaluation": WithEvaluation,
    "encoder": WithEncoder,
}
"""Name of a hook -> an onlooker that has it, and a list ``asked`` of what it was given."""
