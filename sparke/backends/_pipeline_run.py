"""One call of a diffusers pipeline, guided."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from sparke.backends import _denoisers, _encodings, _schedulers
from sparke.backends._calls import Call
from sparke.backends._families import Level
from sparke.backends._run_start import RunStart
from sparke.guidance._vectors import working
from sparke.protocols import GuidanceScaleHook, State

__all__ = ["PipelineRun"]

SCALE_NAMES = ("true_cfg_scale", "guidance_scale")
FROM_ZERO = ("ZImage", "Kandinsky3")
"""Pipelines that add their scale times the difference to the conditional prediction."""


class PipelineRun(RunStart):
    """Brings a guider to one call: begun before the first evaluation, finished after the last."""

    _answer: Any = None
    _at = 0
    _finished: Tensor | None = None

    @contextmanager
    def guiding(self) -> Iterator[None]:
        """Hold the pipeline's seams, and commit the finished samples if all went well."""
        with ExitStack() as held:
            for part in self._parts():
                encoder = "encode_prompt" if hasattr(part, "encode_prompt") else "_encode_prompt"
                held.enter_context(_encodings.listened(part, encoder, self._on_prompts))
                held.enter_context(_encodings.listened(part, "prepare_latents", self._on_latents))
                found = held.enter_context(_denoisers.watched(part, self._on_denoiser))
                self._hooks.networks.extend(found)
            held.enter_context(_schedulers.stepping(self._scheduler, self._on_step))
            self._hooks.held = held
            yield
        self.finish()

    def finish(self) -> None:
        """Hand the finished samples to the guider; nothing without them."""
        if self._run is None:
            self._warn("none of its scheduler's steps came by (it may step copies of it)")
        if self._finished is not None:
            self._guider.finish(self._finished)

    def _parts(self) -> list[Any]:
        """The pipeline, and those inside it that run the same scheduler."""
        inner = [
            value
            for value in vars(self._pipeline).values()
            if getattr(value, "scheduler", None) is self._scheduler and callable(value)
        ]
        return [self._pipeline, *inner]

    def _on_denoiser(
        self, module: _denoisers.Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        reading = self._read()
        if self._run is None and (self._hooks.hooks.inside or not self._learned.late):
            self._begin_at(args, kwargs)
        kind = self._predictions.kind(args, kwargs)
        if kind == "other" and self._guides_itself(args, kwargs):
            self._hooks.leave_scale()
        at = reading.upcoming(self._scheduler, lambda: _denoisers.time_of(args, kwargs))
        share = self._share(kind, reading, at)
        if kind == "uncond" and share == 1 and self._answer is not None:
            return self._answer  # what the pipeline would compute is the conditional prediction
        out = self._hooks.answer(Call(module, args, kwargs, kind), lambda: reading.step(at))
        if kind == "cond":
            self._answer = out
        return self._predictions.answered(kind, out, share)

    def _guides_itself(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call has rows of several branches, to be combined by the pipeline."""
        rows = _denoisers.first_input(args, kwargs)
        several = rows is not None and len(rows) >= 2 * self._predictions.batch > 0
        return several and bool(getattr(self._pipeline, "do_classifier_free_guidance", False))

    def _share(self, kind: str, reading: _schedulers.Reading, at: int) -> float:
        """How far the unconditional prediction moves to the conditional one."""
        if "uncond" not in kind or not isinstance(self._guider, GuidanceScaleHook):
            return 0.0
        scale = self._guidance_scale()
        wanted = self._guider.on_guidance_scale(reading.step(at), scale)
        if wanted == 1:
            return 1.0
        return 0.0 if scale == 1 else (wanted - scale) / (1 - scale)

    def _guidance_scale(self) -> float:
        """The host's scale; any but 1 where it is not told, since guidance is being done."""
        told = (self._prompts.arguments.get(name) for name in SCALE_NAMES)
        scale = next((float(s) for s in told if isinstance(s, (int, float))), 2.0)
        return scale + any(name in type(self._pipeline).__name__ for name in FROM_ZERO)

    def _on_step(self, step: Callable[..., Any], bound: Any) -> Any:
        given = bound.arguments
        output, sample = given.get("model_output"), given.get("sample")
        if not isinstance(output, Tensor) or not isinstance(sample, Tensor):
            self._warn("its step takes neither model_output nor sample as tensors")
            return step(*bound.args, **bound.kwargs)
        if given.get("per_token_timesteps") is not None:
            self._warn("its tokens are at noise levels of their own")
            return step(*bound.args, **bound.kwargs)
        # A second call that brings its own clean sample (Cosmos) has what the first call displaced.
        if given.get("pred_original_sample") is None or self._run is None:
            moved = self.displaced(output, given.get("timestep"), sample)
            if moved is None:
                return step(*bound.args, **bound.kwargs)
            given["model_output"] = moved
        result = step(*bound.args, **bound.kwargs)
        self.stepped(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    def displaced(self, output: Tensor, timestep: Any, sample: Tensor) -> Tensor | None:
        """The model's output for which the denoised estimate is the guided one.

        Args:
            output: of the model, after classifier-free guidance.
            timestep: of the scheduler's step about to be taken.
            sample: the latents it will be taken from.

        Returns:
            What to give the scheduler, of `output`'s shape and dtype; None, after a warning, if
            `output` is no estimate of `sample`.
        """
        reading = self._read()
        self._at = reading.position(self._scheduler, timestep)
        rows = self._rows(sample)
        self._hooks.check()
        head = _head(output, sample)
        if head is None:
            self._warn(
                f"model output {tuple(output.shape)} is no estimate of {tuple(sample.shape)}"
            )
            return None
        delta = self._delta(reading, self._at, head[:rows], sample[:rows])
        if rows < len(sample):
            delta = torch.cat([delta, delta])  # twins, of which pipelines keep the first
        moved = reading.levels[self._at].moved(working(head), delta).to(output.dtype)
        tail = output[:, head.shape[1] :] if head.shape != output.shape else None
        return moved if tail is None else torch.cat([moved, tail], 1)

    def stepped(self, previous: Tensor) -> None:
        """Note the latents after the step for which the output was displaced."""
        assert self._reading is not None
        assert self._run is not None
        self._predictions.next_step()
        if self._hooks.network is not None:
            self._hooks.network.next_step()
        self._answer = None
        if self._reading.is_last(self._at):
            self._finished = previous[: self._run.shape[0]].detach().clone()

    def _delta(
        self, reading: _schedulers.Reading, at: int, output: Tensor, sample: Tensor
    ) -> Tensor:
        level = reading.levels[at]
        noisy, answer = working(sample.detach()), working(output.detach())
        denoised = level.denoised(answer, noisy)

        def conditional() -> Tensor:
            seen = self._predictions.as_output(answer)
            return denoised if seen is None else level.denoised(seen, noisy)

        network, again = self._hooks.network, None
        look = None if network is None else network.again(self._predictions, answer)
        if look is not None:
            again = functools.partial(_seen, level, look, noisy)
        state = State(
            noisy / level.scale,
            denoised,
            reading.step(at),
            None if self._run is None else self._run.cond,
            conditional,
            again=again,
        )
        return self._guider(state).to(denoised)


def _seen(level: Level, look: Callable[[], Tensor], noisy: Tensor) -> Tensor:
    return level.denoised(look(), noisy)


def _head(output: Tensor, sample: Tensor) -> Tensor | None:
    """The part of a model's output that estimates the sample; the rest is its variance."""
    if output.shape == sample.shape:
        return output
    if output.ndim == sample.ndim and output.shape[1] == 2 * sample.shape[1]:
        head = output[:, : sample.shape[1]]
        return head if head.shape == sample.shape else None
    return None
