"""The beginning of a run in a pipeline's call: its samples, their prompts and their noise."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparke.backends import _denoisers, _noise, _schedulers
from sparke.backends._guided import scheduler_of
from sparke.backends._pipeline_hooks import PipelineHooks
from sparke.backends._predictions import Predictions
from sparke.backends._prompt_reader import PromptReader, Prompts
from sparke.errors import GuidanceWarning
from sparke.protocols import Guider, Run

__all__ = ["Learned", "RunStart"]


@dataclass
class Learned:
    """What the calls of one wrapped pipeline have shown so far.

    Attributes:
        late: the samples of the scheduler's steps have another shape than the latents prepared, so
            that only the first step can tell it.
    """

    late: bool = False


class RunStart:
    """Begins a run with the latents prepared, or with what the denoiser or the scheduler is given.

    Args:
        pipeline: the pipeline called.
        guider: displaces the denoised estimate.
        arguments: of the call, defaults included.
        prompts: where prompt embeddings come from.
        learned: from earlier calls, and for later ones; None forgets it with this one.
    """

    def __init__(
        self,
        pipeline: Any,
        guider: Guider,
        arguments: Mapping[str, Any],
        prompts: Prompts,
        learned: Learned | None = None,
    ) -> None:
        self._pipeline, self._guider, self._sources = pipeline, guider, prompts
        self._learned = Learned() if learned is None else learned
        self._prompts = PromptReader(pipeline, prompts, arguments)
        self._scheduler = scheduler_of(pipeline)
        self._reading: _schedulers.Reading | None = None
        self._hooks = PipelineHooks(pipeline, guider)
        self._latents: Tensor | None = None
        self._drawn: Tensor | None = None
        self._run: Run | None = None
        self._early = False
        self._predictions = Predictions(0, None)
        self._warned = False

    def _on_prompts(
        self, encode: Callable[..., Any], heard: inspect.BoundArguments, result: Any
    ) -> None:
        self._prompts.hear(encode, heard, result)
        self._hooks.hear(encode, heard, result)

    def _on_latents(self, _: Callable[..., Any], heard: inspect.BoundArguments, result: Any) -> Any:
        """The result of ``prepare_latents``, other noise in it if the guider wants that."""
        several = isinstance(result, (tuple, list)) and len(result) > 0
        latents = result[0] if several else result
        if not isinstance(latents, Tensor) or latents.ndim < 2:
            return result
        started = self.started(heard.arguments, latents)
        if started is latents:
            return result
        return type(result)([started, *result[1:]]) if several else started

    def started(self, arguments: Mapping[str, Any], latents: Tensor) -> Tensor:
        """The latents to start from, begun with those that the pipeline prepared."""
        self._latents = self._drawn = latents
        if self._hooks.refuses_noise(arguments, latents, self._prompts.ready):
            return latents
        self._begin(len(latents), latents)
        self._early = True
        self._latents = self._hooks.hooks.start(latents)
        return self._latents

    def _read(self) -> _schedulers.Reading:
        if self._reading is None or not self._reading.is_of(self._scheduler):
            self._reading = _schedulers.Reading(self._scheduler)
            if not self._early:
                self._run = None  # another loop over the noise levels is another run
            self._early = False  # unless it began with the noise for it
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
            self._learned.late = True
        labels = self._labels()
        doubled = labels is not None and len(sample) == 2 * labels
        self._begin(len(sample) // 2 if doubled else len(sample), sample)
        assert self._run is not None
        return self._run.shape[0]

    def _begin_at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = self._latents
        if latents is not None:
            self._begin(len(latents), latents)
            return
        rows = _denoisers.first_input(args, kwargs)
        if isinstance(rows, Tensor):
            self._begin(self._batch(rows), rows)

    def _batch(self, rows: Tensor) -> int:
        """Samples in a denoiser's input: half its rows where both prompts share a batch."""
        labels, half = self._labels(), len(rows) // 2
        if labels is not None:
            return labels
        guided = getattr(self._pipeline, "do_classifier_free_guidance", False)
        if guided and len(rows) == 2 * half and torch.equal(rows[:half], rows[half:]):
            return half
        return len(rows)

    def _labels(self) -> int | None:
        """How many class labels the call has, None if it has none."""
        labels = self._prompts.arguments.get("class_labels")
        return len(labels) if isinstance(labels, (list, Tensor)) else None

    def _begin(self, batch: int, latents: Tensor) -> None:
        cond, origin = self._prompts.rows(batch, latents.device), self._prompts.origin
        drawn = self._drawn if self._drawn is not None and len(self._drawn) == batch else None
        run = Run(
            shape=torch.Size((batch, *latents.shape[1:])),
            device=latents.device,
            dtype=latents.dtype,
            cond=cond,
            cond_origin=None if origin is None else origin.to(latents.device),
            sigma_data=getattr(self._pipeline, "sigma_data", None),
            eta=_schedulers.fresh_noise(self._scheduler, self._prompts.arguments),
            seeds=_noise.seeds(latents[:batch] if drawn is None else drawn),
        )
        self._guider.begin(run)
        self._run = run
        self._hooks.begun(batch)
        known = self._prompts.as_given(batch, latents.device)
        perturbed = getattr(self._pipeline, "do_perturbed_attention_guidance", False)
        self._predictions = Predictions(batch, known, perturbed=bool(perturbed))

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self._pipeline).__name__} goes on unguided: {why}.",
                GuidanceWarning,
                stacklevel=4,
            )
