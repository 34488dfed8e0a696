"""One call of a diffusers pipeline, guided."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from sparke.backends import _denoisers, _encodings, _prompts, _schedulers
from sparke.errors import ArgumentError, GuidanceWarning, UnsupportedTarget
from sparke.protocols import GuidanceScaleHook, Guider, Run, State

__all__ = ["PipelineRun", "PromptSource", "Prompts", "scheduler_of"]

PromptSource: TypeAlias = "_prompts.Prompts | Callable[[Mapping[str, Any]], _prompts.Prompts]"
SCALE_NAMES = ("true_cfg_scale", "guidance_scale")
MASK_NAMES = ("prompt_embeds_mask", "prompt_attention_mask", "prompt_embeds_attention_mask")


@dataclass
class Prompts:
    """Where the prompts of a pipeline's calls are read.

    Attributes:
        embeds: rows, or a function of the call's arguments, in place of the pipeline's own.
        encoder: list of strings -> (n, c), in place of the pipeline's own.
        origins: origin of the embeddings, by the encoder they come from.
    """

    embeds: PromptSource | None = None
    encoder: Callable[[list[str]], Any] | None = None
    origins: dict[int, Tensor | None] = field(default_factory=dict)


def scheduler_of(pipeline: Any) -> Any:
    """The scheduler that takes the pipeline's last denoising loop.

    Raises:
        UnsupportedTarget: it has none, or one that cannot be guided.
    """
    held = vars(pipeline)
    found = [held.get("scheduler"), *(v for k, v in held.items() if k.endswith("scheduler"))]
    scheduler = next((s for s in found if s is not None and _schedulers.is_scheduler(s)), None)
    if scheduler is None:
        raise UnsupportedTarget(
            f"{type(pipeline).__name__} has no scheduler whose steps could be guided."
        )
    if not _schedulers.supported(scheduler):
        _schedulers.Reading(scheduler)  # raises, and says why
    return scheduler


class PipelineRun:
    """Brings a guider to one call: begun before the first evaluation, finished after the last.

    Args:
        pipeline: the pipeline called.
        guider: displaces the denoised estimate.
        arguments: of the call, defaults included.
        prompts: where prompt embeddings come from.
    """

    def __init__(
        self, pipeline: Any, guider: Guider, arguments: Mapping[str, Any], prompts: Prompts
    ) -> None:
        self._pipeline, self._guider, self._prompts = pipeline, guider, prompts
        self._arguments = dict(arguments)
        self._scheduler = scheduler_of(pipeline)
        self._reading: _schedulers.Reading | None = None
        self._encoding: _encodings.Encoding | None = None
        self._origin: Tensor | None = None
        self._latents: Tensor | None = None
        self._run: Run | None = None
        self._predictions = _denoisers.Predictions(0, None)
        self._answer: Any = None
        self._finished: Tensor | None = None
        self._warned = False

    @contextmanager
    def guiding(self) -> Iterator[None]:
        """Hold the pipeline's seams, and commit the finished samples if all went well."""
        with ExitStack() as held:
            for part in self._parts():
                held.enter_context(_encodings.listened(part, "encode_prompt", self._on_encode))
                held.enter_context(_encodings.listened(part, "prepare_latents", self._on_latents))
                held.enter_context(_denoisers.watched(part, self._on_denoiser))
            held.enter_context(_schedulers.stepping(self._scheduler, self._on_step))
            yield
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

    def _on_encode(self, encode: Callable[..., Any], heard: Any, result: Any) -> None:
        if self._encoding is not None or self._prompts.encoder or self._prompts.embeds is not None:
            return  # later calls are for negative prompts
        self._encoding = _encodings.Encoding.of(result)
        if self._encoding is None:
            return
        key = id(getattr(self._pipeline, "text_encoder", None))
        if key not in self._prompts.origins:
            reference = getattr(self._pipeline, "reference_prompts", _encodings.REFERENCE)
            self._prompts.origins[key] = _encodings.origin(encode, heard, reference)
        self._origin = self._prompts.origins[key]

    def _on_latents(self, _: Callable[..., Any], heard: Any, result: Any) -> None:
        latents = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(latents, Tensor) and latents.ndim > 1:
            self._latents = latents

    def _on_denoiser(
        self, module: _denoisers.Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        reading = self._read()
        if self._run is None:
            self._begin_at(args, kwargs)
        kind = self._predictions.kind(args, kwargs)
        at = reading.upcoming(self._scheduler, lambda: _denoisers.time_of(args, kwargs))
        share = self._share(kind, reading, at)
        if kind == "uncond" and share == 1 and self._answer is not None:
            return self._answer  # what the pipeline would compute is the conditional prediction
        out = module(*args, **kwargs)
        if kind == "cond":
            self._answer = out
        return self._predictions.answered(kind, out, share)

    def _share(self, kind: str, reading: _schedulers.Reading, at: int) -> float:
        """How far the unconditional prediction moves to the conditional one."""
        if "uncond" not in kind or not isinstance(self._guider, GuidanceScaleHook):
            return 0.0
        told = (self._arguments.get(name) for name in SCALE_NAMES)
        scale = next((float(s) for s in told if isinstance(s, (int, float))), 2.0)
        wanted = self._guider.on_guidance_scale(reading.step(at), scale)
        if wanted == 1:
            return 1.0
        return 0.0 if scale == 1 else (wanted - scale) / (1 - scale)

    def _on_step(self, step: Callable[..., Any], bound: Any) -> Any:
        given = bound.arguments
        output, sample = given.get("model_output"), given.get("sample")
        if not isinstance(output, Tensor) or not isinstance(sample, Tensor):
            self._warn("its step takes neither model_output nor sample as tensors")
            return step(*bound.args, **bound.kwargs)
        reading = self._read()
        at = reading.position(self._scheduler, given.get("timestep"))
        rows = self._rows(sample)
        head = _head(output, sample)
        if head is None:
            self._warn(
                f"model output {tuple(output.shape)} is no estimate of {tuple(sample.shape)}"
            )
            return step(*bound.args, **bound.kwargs)
        delta = self._delta(reading, at, head[:rows], sample[:rows])
        if rows < len(sample):
            delta = torch.cat([delta, delta])  # twins, of which pipelines keep the first
        moved = reading.levels[at].moved(_working(head), delta).to(output.dtype)
        tail = output[:, head.shape[1] :] if head.shape != output.shape else None
        given["model_output"] = moved if tail is None else torch.cat([moved, tail], 1)
        result = step(*bound.args, **bound.kwargs)
        self._predictions.next_step()
        self._answer = None
        if reading.is_last(at):
            previous = result[0] if isinstance(result, tuple) else result.prev_sample
            self._finished = previous[:rows].detach().clone()
        return result

    def _delta(
        self, reading: _schedulers.Reading, at: int, output: Tensor, sample: Tensor
    ) -> Tensor:
        level = reading.levels[at]
        noisy, answer = _working(sample.detach()), _working(output.detach())
        denoised = level.denoised(answer, noisy)

        def conditional() -> Tensor:
            seen = _as_output(self._predictions, answer)
            return denoised if seen is None else level.denoised(seen, noisy)

        cond = None if self._run is None else self._run.cond
        state = State(noisy / level.scale, denoised, reading.step(at), cond, conditional)
        return self._guider(state).to(denoised)

    def _read(self) -> _schedulers.Reading:
        if self._reading is None or not self._reading.is_of(self._scheduler):
            self._reading = _schedulers.Reading(self._scheduler)
            self._run = None  # another loop over the noise levels is another run
        return self._reading

    def _rows(self, sample: Tensor) -> int:
        """Samples in the batch, begun now if the latents are not those expected."""
        if self._run is not None:
            shape = self._run.shape
            if shape == sample.shape or (shape[1:], 2 * shape[0]) == (
                sample.shape[1:],
                len(sample),
            ):
                return shape[0]
        self._begin(len(sample) if self._run is None else self._batch(len(sample)), sample)
        assert self._run is not None
        return self._run.shape[0]

    def _begin_at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = self._latents
        if latents is not None:
            self._begin(len(latents), latents)
            return
        rows = _denoisers.first_input(args, kwargs)
        if isinstance(rows, Tensor):
            self._begin(self._batch(len(rows)), rows)

    def _batch(self, rows: int) -> int:
        """Samples among this many rows: half of them where both prompts share a batch."""
        labels = self._arguments.get("class_labels")
        if isinstance(labels, (list, Tensor)):
            return len(labels)
        return rows // 2 if getattr(self._pipeline, "do_classifier_free_guidance", False) else rows

    def _begin(self, batch: int, latents: Tensor) -> None:
        cond = self._cond(batch, latents.device)
        run = Run(
            shape=torch.Size((batch, *latents.shape[1:])),
            device=latents.device,
            dtype=latents.dtype,
            cond=cond,
            cond_origin=None if self._origin is None else self._origin.to(latents.device),
            sigma_data=getattr(self._pipeline, "sigma_data", None),
            eta=_schedulers.fresh_noise(self._scheduler, self._arguments),
        )
        self._guider.begin(run)
        self._run = run
        known = self._arguments.get("class_labels")
        if known is not None:
            known = torch.as_tensor(known, device=latents.device)
        elif self._encoding is not None:
            known = _repeated(self._encoding.embeds, batch)
        elif (given := self._given()) is not None:
            known = _repeated(given.embeds, batch)
        self._predictions = _denoisers.Predictions(batch, known)

    def _cond(self, batch: int, device: torch.device) -> Tensor | None:
        source = self._prompts.embeds
        if source is not None:
            return _prompts.pool(
                source(self._arguments) if callable(source) else source, batch, device
            )
        if self._prompts.encoder is not None:
            return self._by_encoder(self._prompts.encoder, batch, device)
        encoding = self._encoding or self._given()
        if encoding is not None:
            return _encodings.rows_of(encoding.pooled().to(device), batch)
        labels = self._arguments.get("class_labels")
        if labels is not None:
            found = torch.as_tensor(labels, device=device).long().reshape(-1)
            # Classes are either the same or unrelated.
            return F.one_hot(found, max(1001, int(found.max()) + 1)).float()
        return None

    def _by_encoder(
        self, encoder: Callable[[list[str]], Any], batch: int, device: torch.device
    ) -> Tensor:
        prompt = self._arguments.get("prompt")
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
            raise ArgumentError(
                f"prompt_encoder= encodes the call's prompt, a string or a list of them, got "
                f"{type(prompt).__name__}. Give prompt_embeds= instead."
            )
        origins = self._prompts.origins
        if id(encoder) not in origins:
            origins[id(encoder)] = _encodings.encoded(encoder, _encodings.REFERENCE).mean(0)
        self._origin = origins[id(encoder)]
        return _encodings.rows_of(_encodings.encoded(encoder, texts).to(device), batch)

    def _given(self) -> _encodings.Encoding | None:
        """Embeddings the caller handed to the pipeline itself."""
        embeds = self._arguments.get("prompt_embeds")
        if embeds is None:
            return None
        masks = (self._arguments.get(name) for name in MASK_NAMES)
        return _encodings.Encoding.of((embeds, next((m for m in masks if m is not None), None)))

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self._pipeline).__name__} goes on unguided: {why}.",
                GuidanceWarning,
                stacklevel=4,
            )


def _working(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _head(output: Tensor, sample: Tensor) -> Tensor | None:
    """The part of a model's output that estimates the sample; the rest is its variance."""
    if output.shape == sample.shape:
        return output
    if output.ndim == sample.ndim and output.shape[1] == 2 * sample.shape[1]:
        head = output[:, : sample.shape[1]]
        return head if head.shape == sample.shape else None
    return None


def _as_output(predictions: _denoisers.Predictions, output: Tensor) -> Tensor | None:
    """The conditional prediction in the form of the scheduler's model output, if that is certain.

    Pipelines turn the denoiser's answer about before the scheduler sees it (signs, variances cut
    off); what they did is known to be undone when the output lies on the line of the two answers.
    """
    c, u = (_tensor(p, output) for p in (predictions.conditional, predictions.unconditional))
    if c is None:
        return None
    if u is None:
        return None
    for sign in (1.0, -1.0):
        step, off = sign * (c - u), output - sign * c
        along = (step * off).sum() / step.square().sum().clamp_min(1e-20)
        if (off - along * step).norm() <= 0.02 * output.norm():
            return sign * c
    return None


def _tensor(prediction: Any, like: Tensor) -> Tensor | None:
    if isinstance(prediction, (list, tuple)):
        prediction = torch.stack(list(prediction)) if prediction else None
    if not isinstance(prediction, Tensor):
        return None
    prediction = _working(prediction.detach())
    if prediction.ndim == like.ndim and prediction.shape[1] > like.shape[1]:
        prediction = prediction[:, : like.shape[1]]
    if prediction.numel() != like.numel():
        return None
    found: Tensor = prediction.reshape(like.shape)
    return found


def _repeated(embeds: Any, batch: int) -> Any:
    """Prompts as the denoiser gets them, one for each sample."""
    times = batch // len(embeds)
    if isinstance(embeds, Tensor):
        return embeds if times == 1 else embeds.repeat_interleave(times, 0)
    return [e for e in embeds for _ in range(times)]
