"""Conformance of the hooks that take values and give values back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparke.protocols import (
    ConditionHook,
    Evaluation,
    EvaluationHook,
    GuidanceScaleHook,
    Guider,
    NoiseHook,
    Run,
    State,
)
from sparke.testing._common import expect, normal, shape

BRANCHES = (("cond",), ("uncond",), ("uncond", "cond"), ("cond", "uncond"), ())
SCALE = 5.0
TOKENS = 4


class Asked:
    """Asks a guider what hosts ask.

    Args:
        guider: the one asked.
        batch: samples of a run.
        width: of the prompt embeddings shown; None shows none.
        padding: whether padding tokens may be changed.
    """

    def __init__(self, guider: Guider, batch: int, width: int | None, padding: bool) -> None:
        self._guider, self._padding = guider, padding
        lengths = TOKENS - torch.arange(batch) % (TOKENS - 1)
        self._mask = torch.arange(TOKENS) < lengths[:, None]
        self._tokens = None if width is None else normal((batch, TOKENS, width), 6)

    def check(self, states: list[State], run: Run) -> None:
        """Raise unless each hook's answers are right, and the same whatever came between."""
        guider = self._guider
        first = {state.step: self.replies(state) for state in states}
        for state in reversed(states):
            _same(self.replies(state), first[state.step], "whatever came between")
        if isinstance(guider, NoiseHook):
            noise = self._noise(guider, states[0].x)
            expect(
                torch.equal(noise, self._noise(guider, states[0].x)),
                "on_noise() must give the same noise for the same noise",
            )
        guider.begin(run)
        for state in states:
            _same(self.replies(state), first[state.step], "in the next run with the same seeds")

    def replies(self, state: State) -> dict[str, Tensor]:
        """What the hooks say at one step, checked by itself."""
        guider, step = self._guider, state.step
        if isinstance(guider, EvaluationHook):
            for branches in BRANCHES:
                self._told(guider, Evaluation(step, branches, len(state.x)))
        found = {}
        if isinstance(guider, GuidanceScaleHook):
            scale = _called("on_guidance_scale", lambda: guider.on_guidance_scale(step, SCALE))
            expect(
                isinstance(scale, (int, float)) and math.isfinite(scale),
                f"on_guidance_scale() must return a finite number, got {scale!r}",
            )
            found["on_guidance_scale"] = torch.tensor(scale)
        if isinstance(guider, ConditionHook) and self._tokens is not None:
            for what, given, mask in self._embeddings(state.denoised.dtype):
                found[what] = self._condition(guider, state, what, given, mask)
        return found

    def _embeddings(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        assert self._tokens is not None
        tokens = self._tokens.to(dtype)
        yield "on_condition() of tokens with a mask", tokens, self._mask
        yield "on_condition() of tokens without a mask", tokens, None
        yield "on_condition() of pooled embeddings", tokens.mean(1), None

    def _condition(
        self, guider: ConditionHook, state: State, what: str, given: Tensor, mask: Tensor | None
    ) -> Tensor:
        shown, seen = given.clone(), None if mask is None else mask.clone()
        changed: Tensor = _called(what, lambda: guider.on_condition(shown, state.step, seen))
        _like(changed, given, what)
        expect(torch.equal(shown, given), f"{what} changed what it was given in place")
        expect(
            mask is None or seen is None or torch.equal(mask, seen),
            f"{what} changed the mask in place",
        )
        if mask is not None and not self._padding:
            expect(
                torch.equal(changed[~mask], given[~mask]),
                f"{what} must leave padding tokens as they are, where the mask is false; "
                "check_guider(padding=True) if it is meant to change them",
            )
        return changed.clone()

    def _noise(self, guider: NoiseHook, x: Tensor) -> Tensor:
        shown = x.clone()
        noise: Tensor = _called("on_noise()", lambda: guider.on_noise(shown))
        _like(noise, x, "on_noise()")
        expect(torch.equal(shown, x), "on_noise() changed the noise it was given in place")
        return noise.clone()

    def _told(self, guider: EvaluationHook, evaluation: Evaluation) -> None:
        try:
            guider.on_evaluation(evaluation)
        except Exception as error:
            raise AssertionError(
                f"on_evaluation() must take any branches, {evaluation.branches} too; it raised "
                f"{error!r}."
            ) from error


def _called(what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except TypeError as error:
        raise AssertionError(f"{what} cannot be called as hosts call it: {error}.") from error


def _like(value: Any, given: Tensor, what: str) -> None:
    expect(isinstance(value, Tensor), f"{what} must return a tensor, got {value!r}")
    shape(value, tuple(given.shape), what)
    expect(value.dtype == given.dtype, f"{what} must keep {given.dtype}, got {value.dtype}")
    expect(not value.requires_grad, f"{what} must be detached")


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor], when: str) -> None:
    for what, value in ours.items():
        expect(
            torch.equal(value, theirs[what]), f"{what} must be the same for the same step, {when}"
        )
