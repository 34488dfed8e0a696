"""Several guiders as one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparke.errors import ArgumentError
from sparke.protocols import GuidanceScaleHook, Guider, Memory, Run, State, Step

__all__ = ["GuiderChain"]


class GuiderChain:
    """Guiders in order: each sees `denoised` as those before it left it, displacements add up.

    Args:
        guiders: at least one.

    Raises:
        ArgumentError: no guider, or something that is none.
    """

    def __init__(self, guiders: Sequence[Guider]) -> None:
        if not guiders:
            raise ArgumentError("guider must name at least one guider, got an empty list.")
        for guider in guiders:
            if not isinstance(guider, Guider):
                raise ArgumentError(
                    f"guider={guider!r} is no Guider: it needs begin(run), __call__(state) and "
                    "finish(x)."
                )
        self.guiders = tuple(guiders)

    def __repr__(self) -> str:
        return f"GuiderChain({', '.join(map(repr, self.guiders))})"

    @property
    def memory(self) -> Memory | None:
        """The first memory among the guiders, None if none has one."""
        memories = (getattr(guider, "memory", None) for guider in self.guiders)
        return next((m for m in memories if isinstance(m, Memory)), None)

    def begin(self, run: Run) -> None:
        """Begin each."""
        for guider in self.guiders:
            guider.begin(run)

    def __call__(self, state: State) -> Tensor:
        """The sum of the displacements."""
        start = state.denoised
        for guider in self.guiders:
            denoised = state.denoised + guider(state).to(state.denoised)
            state = State(
                state.x, denoised, state.step, state.cond, state.conditional, state.evaluate
            )
        return state.denoised - start

    def finish(self, x: Tensor) -> None:
        """Hand the finished samples to each."""
        for guider in self.guiders:
            guider.finish(x)

    def on_guidance_scale(self, step: Step, guidance_scale: float) -> float:
        """The scale after each guider that has a say in it."""
        for guider in self.guiders:
            if isinstance(guider, GuidanceScaleHook):
                guidance_scale = guider.on_guidance_scale(step, guidance_scale)
        return guidance_scale
