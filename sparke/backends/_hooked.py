"""The hooks of a guider, of all its members in their order, as a host calls them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from sparke.errors import GuidanceWarning, ShapeError
from sparke.guidance._hooks import having
from sparke.protocols import (
    ConditionHook,
    EncoderHook,
    Evaluation,
    EvaluationHook,
    Guider,
    ModelHook,
    NoiseHook,
    Step,
)

__all__ = ["Hooks", "named", "warn"]


class Hooks:
    """What of one run a guider wants to be asked, found once when the run begins.

    Args:
        guider: a chain or a single one.

    Attributes:
        noise: members that change the initial noise.
        conditions: that change prompt embeddings.
        models: that hold the network hooked.
        evaluations: that are told of its calls.
        encoders: that have prompts encoded a second time.
    """

    def __init__(self, guider: Guider) -> None:
        self.noise = having(guider, NoiseHook)
        self.conditions = having(guider, ConditionHook)
        self.models = having(guider, ModelHook)
        self.evaluations = having(guider, EvaluationHook)
        self.encoders = having(guider, EncoderHook)

    @property
    def inside(self) -> bool:
        """Whether any of them acts on the network, so that evaluating it again is another thing."""
        return bool(self.conditions or self.models or self.evaluations or self.encoders)

    @property
    def offered(self) -> list[str]:
        """Names of the hooks that somebody offers."""
        found = {
            "on_noise": self.noise,
            "on_condition": self.conditions,
            "on_model": self.models,
            "on_evaluation": self.evaluations,
            "on_encoder": self.encoders,
        }
        return [name for name, members in found.items() if members]

    def start(self, x: Tensor) -> Tensor:
        """The initial noise to start from; `x` itself where nobody changes it.

        Raises:
            ShapeError: a guider returned something of another shape or dtype.
        """
        for member in self.noise:
            x = _like(x, member.on_noise(x), f"on_noise of {named([member])}")
        return x

    def condition(self, embeds: Tensor, step: Step, mask: Tensor | None = None) -> Tensor:
        """The embeddings to evaluate with; `embeds` itself where nobody changes them.

        Raises:
            ShapeError: a guider returned something of another shape or dtype.
        """
        for member in self.conditions:
            changed = member.on_condition(embeds, step, mask)
            embeds = _like(embeds, changed, f"on_condition of {named([member])}")
        return embeds

    def evaluating(self, step: Step, branches: tuple[str, ...], batch: int) -> None:
        """Tell of a call of the network that is about to be made."""
        if self.evaluations:
            told = Evaluation(step, branches, batch)
            for member in self.evaluations:
                member.on_evaluation(told)

    @contextmanager
    def holding(self, networks: Iterable[Any]) -> Iterator[None]:
        """Hold each network as the members want it held."""
        with ExitStack() as held:
            for network in networks:
                for member in self.models:
                    held.enter_context(member.on_model(network))
            yield

    def encoding(self, encoders: Iterable[Any]) -> AbstractContextManager[None] | None:
        """A context for encoding prompts differently; None if nobody would.

        Without a use for it, and not idle, a member returns ``contextlib.nullcontext()``.
        """
        contexts = [member.on_encoder(e) for e in encoders for member in self.encoders]
        if all(isinstance(context, nullcontext) for context in contexts):
            return None
        return _entered(contexts)


def named(members: Iterable[object]) -> str:
    """Their classes, for messages."""
    return " and ".join(dict.fromkeys(type(member).__name__ for member in members))


def warn(message: str, level: int) -> None:
    """A GuidanceWarning; `level` frames above the caller are ours."""
    warnings.warn(message, GuidanceWarning, stacklevel=level + 2)


@contextmanager
def _entered(contexts: Iterable[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as held:
        for context in contexts:
            held.enter_context(context)
        yield


def _like(given: Tensor, returned: Any, what: str) -> Tensor:
    if not isinstance(returned, Tensor):
        raise ShapeError(f"{what} must return a tensor, got {type(returned).__name__}.")
    if returned.shape != given.shape or returned.dtype != given.dtype:
        raise ShapeError(
            f"{what} must return shape {tuple(given.shape)} of {given.dtype}, as it was given; got "
            f"{tuple(returned.shape)} of {returned.dtype}."
        )
    return returned
