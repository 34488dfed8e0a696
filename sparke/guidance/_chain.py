"""Several guiders as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import combinations
from typing import Any

from torch import Tensor

from sparke.errors import ArgumentError
from sparke.guidance import _hooks
from sparke.guidance._samples import Heard, heard_once
from sparke.guidance._shared import SharedMemory, stores
from sparke.protocols import (
    ConditionHook,
    EncoderHook,
    Evaluation,
    EvaluationHook,
    GuidanceScaleHook,
    Guider,
    Memory,
    ModelHook,
    NoiseHook,
    Run,
    State,
    Step,
)

__all__ = ["GuiderChain"]

WIDEST = 100
DECIDES = {
    "guidance_scale": "the scale of classifier-free guidance",
    "noise": "the initial noise",
    "condition": "the prompt embeddings",
    "model": "the blocks of the network",
}
CURES = {"guidance_scale": " (a DiversityGuider leaves it alone with cfg_interval=None)"}


class GuiderChain:
    """Guiders in order: each sees `denoised` as those before it left it, displacements add up.

    Hooks go round in the same order: the second guider's ``on_noise``, ``on_condition`` and
    ``on_guidance_scale`` are given what the first one's returned; ``on_model`` and ``on_encoder``
    are entered in order and left in the reverse one, all of them, whatever fails. A chain offers a
    hook only if one of its guiders does. A chain within a chain counts as the guiders in it.

    A sample whose guidance is not finite, or that is not finite in the end, is warned of once in a
    run, by the first guider that finds it.

    What a guider decides alone ([Exclusive][sparke.protocols.Exclusive]), no other in the chain may
    claim; those that yield it ([Yielding][sparke.protocols.Yielding]) are not asked.

    Args:
        guiders: at least one.

    Raises:
        ArgumentError: no guider, or something that is none; the same guider twice; two guiders that
            claim the same; one memory in two guiders, whose samples it would take twice.
    """

    def __init__(self, guiders: Sequence[Guider]) -> None:
        if not guiders:
            raise ArgumentError("guider must name at least one guider, got an empty list.")
        for guider in guiders:
            if isinstance(guider, type):
                raise ArgumentError(
                    f"guider={guider.__name__} is a class; make a guider of it: "
                    f"{guider.__name__}(...)."
                )
            if not isinstance(guider, Guider):
                raise ArgumentError(
                    f"guider={guider!r} is no Guider: it needs begin(run), __call__(state) and "
                    "finish(x)."
                )
        self.guiders = tuple(inner for guider in guiders for inner in _hooks.members(guider))
        _check(self.guiders)
        self._offer()
        self._heard = Heard()

    def __repr__(self) -> str:
        lines = []
        for place, guider in enumerate(self.guiders, 1):
            hooks = _hooks.told(self, guider)
            line = f"  {place}. {guider!r} runs {hooks}"
            lines.append(
                line if len(line) <= WIDEST else f"  {place}. {guider!r}\n     runs {hooks}"
            )
        return "\n".join(("GuiderChain(", *lines, ")"))

    @property
    def memory(self) -> Memory | None:
        """The first memory among the guiders, None if none has one."""
        memories = (getattr(guider, "memory", None) for guider in self.guiders)
        first = next((m for m in memories if isinstance(m, Memory)), None)
        return first.memory if isinstance(first, SharedMemory) else first

    def begin(self, run: Run) -> None:
        """Begin each.

        Raises:
            ArgumentError: guiders were changed meanwhile and now claim the same.
        """
        _check(self.guiders)
        self._heard = Heard()
        for guider in self.guiders:
            guider.begin(run)

    def __call__(self, state: State) -> Tensor:
        """The sum of the displacements."""
        start = state.denoised
        with heard_once(self._heard):
            total = self.guiders[0](state).to(start)
            for guider in self.guiders[1:]:
                moved = replace(state, denoised=start + total)
                total = total + guider(moved).to(start)
        return total

    def finish(self, x: Tensor) -> None:
        """Hand the finished samples to each, in order.

        Those after one that fails get theirs all the same; its error is raised after that.
        """
        with ExitStack() as once:
            for memory in {id(m): m for guider in self.guiders for m in stores(guider)}.values():
                if isinstance(memory, SharedMemory):
                    once.enter_context(memory.one_run())
            with heard_once(self._heard), ExitStack() as finishing:
                for guider in reversed(self.guiders):
                    finishing.callback(guider.finish, x)

    def _offer(self) -> None:
        """Have the hooks, as attributes of this one chain, that one of its guiders has.

        As methods of the class they would be there for every chain, and hosts would do the work of
        hooks that nobody has.
        """
        for name, protocol in _hooks.HOOKS.items():
            if any(isinstance(guider, protocol) for guider in self.guiders):
                setattr(self, f"on_{name}", getattr(self, f"_{name}"))

    def _guidance_scale(self, step: Step, guidance_scale: float) -> float:
        for guider in _hooks.having(self, GuidanceScaleHook):
            guidance_scale = guider.on_guidance_scale(step, guidance_scale)
        return guidance_scale

    def _noise(self, x: Tensor) -> Tensor:
        for guider in _hooks.having(self, NoiseHook):
            x = guider.on_noise(x)
        return x

    def _condition(self, prompt_embeds: Tensor, step: Step, mask: Tensor | None = None) -> Tensor:
        for guider in _hooks.having(self, ConditionHook):
            prompt_embeds = guider.on_condition(prompt_embeds, step, mask)
        return prompt_embeds

    def _evaluation(self, evaluation: Evaluation) -> None:
        for guider in _hooks.having(self, EvaluationHook):
            guider.on_evaluation(evaluation)

    @contextmanager
    def _model(self, model: Any) -> Iterator[None]:
        with ExitStack() as held:
            for guider in _hooks.having(self, ModelHook):
                held.enter_context(guider.on_model(model))
            yield

    @contextmanager
    def _encoder(self, encoder: Any) -> Iterator[None]:
        with ExitStack() as held:
            for guider in _hooks.having(self, EncoderHook):
                held.enter_context(guider.on_encoder(encoder))
            yield


def _check(guiders: tuple[Guider, ...]) -> None:
    """Raise unless these guiders can work together."""
    for first, second in combinations(guiders, 2):
        if first is second:
            raise ArgumentError(f"the same guider is given twice: {first!r}. Make two of them.")
        for name in sorted(_hooks.claims(first) & _hooks.claims(second)):
            raise ArgumentError(
                f"guiders {first!r} and {second!r} each decide {DECIDES.get(name, name)} alone, so "
                f"one would undo the other. Leave one of them out, or set one so that it does not"
                f"{CURES.get(name, '')}."
            )
        both = {id(memory) for memory in stores(second)}
        common = [memory for memory in stores(first) if id(memory) in both]
        if common and not any(isinstance(memory, SharedMemory) for memory in common):
            raise ArgumentError(
                f"guiders {first!r} and {second!r} have one memory, which would take each sample "
                "twice. Give each its own, or make both with one "
                "sparke.guidance.SharedMemory(memory)."
            )
