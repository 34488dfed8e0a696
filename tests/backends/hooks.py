"""Guiders with hooks, to see what a host makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sparke.protocols import Evaluation, Step
from tests.probe import Probe


class OnNoise(Probe):
    """Starts from what `change` makes of the noise."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.change_noise = change
        self.noises: list[Tensor] = []
        self.begun: list[int] = []

    def on_noise(self, x: Tensor) -> Tensor:
        self.noises.append(x.clone())
        self.begun.append(len(self.runs))
        found: Tensor = self.change_noise(x)
        return found


class OnCondition(Probe):
    """Evaluates with what `change` makes of the embeddings."""

    def __init__(self, change: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.change = change
        self.given: list[Tensor] = []
        self.steps: list[Step] = []
        self.masks: list[Tensor | None] = []

    def on_condition(self, prompt_embeds: Tensor, step: Step, mask: Tensor | None = None) -> Tensor:
        self.given.append(prompt_embeds.clone())
        self.steps.append(step)
        self.masks.append(mask)
        found: Tensor = self.change(prompt_embeds)
        return found


class OnModel(Probe):
    """Counts who is held; `hooked` is what it does to them."""

    def __init__(self, hooked: Callable[[Any], AbstractContextManager[None]] | None = None) -> None:
        super().__init__()
        self.hooked = hooked
        self.entered: list[Any] = []
        self.held = 0
        self.held_at_evaluations: list[int] = []

    def __call__(self, state: Any) -> Tensor:
        self.held_at_evaluations.append(self.held)
        return super().__call__(state)

    @contextmanager
    def on_model(self, model: Any) -> Iterator[None]:
        self.entered.append(model)
        self.held += 1
        try:
            if self.hooked is None:
                yield
            else:
                with self.hooked(model):
                    yield
        finally:
            self.held -= 1


class OnEvaluation(Probe):
    """Keeps what it was told."""

    def __init__(self, *, again: bool = False, conditional: bool = False) -> None:
        super().__init__()
        self.again, self.conditional = again, conditional
        self.told: list[Evaluation] = []
        self.seen_again: list[Tensor | None] = []
        self.conditionals: list[Tensor] = []

    def on_evaluation(self, evaluation: Evaluation) -> None:
        self.told.append(evaluation)

    def __call__(self, state: Any) -> Tensor:
        if self.conditional:
            self.conditionals.append(state.conditional())
        if self.again:
            self.seen_again.append(None if state.again is None else state.again())
        return super().__call__(state)


class OnEncoder(OnEvaluation):
    """Has the prompts encoded a second time while `encoding` holds the encoders."""

    def __init__(
        self, encoding: Callable[[Any], AbstractContextManager[None]] = lambda _: nullcontext()
    ) -> None:
        super().__init__(again=True, conditional=True)
        self.encoding = encoding
        self.encoders: list[Any] = []

    def on_encoder(self, encoder: Any) -> AbstractContextManager[None]:
        self.encoders.append(encoder)
        return self.encoding(encoder)


def moved(x: Tensor) -> Tensor:
    """Other embeddings, without a random number."""
    return x.flip(-1) * 0.5 + 0.25


def negated(x: Tensor) -> Tensor:
    return -x


@contextmanager
def scaled(module: torch.nn.Module, factor: float = 0.5) -> Iterator[None]:
    """The module's answers, first part, times `factor`."""

    def hook(_: torch.nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return out * factor
        if isinstance(out, tuple):
            return (out[0] * factor, *out[1:])
        first = next(iter(out))
        out[first] = out[first] * factor
        return out

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
