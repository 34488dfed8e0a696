"""From what a call asks for to the guider that does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sparke.compat._keywords import Asked
from sparke.errors import ArgumentError
from sparke.features import ClipFeatures
from sparke.guidance import DiversityGuider
from sparke.kernels import cosine
from sparke.memory import RingMemory
from sparke.protocols import Guider, Run, Score, State
from sparke.schedules import EveryNth
from sparke.scores import CondRKE

__all__ = ["guider"]

UNSQUARED_FROM = {"cond-rke": 10, "rke": 20}
"""Rows in history from which published code leaves out the square of the Gaussian kernel."""
WRITTEN_AT = (20, 1, 0)
"""Timesteps at which published code writes its history, if it guides there."""


def guider(
    asked: Asked,
    memory: RingMemory,
    vae: Any,
    timesteps: Callable[[], Sequence[Any]] | None = None,
) -> Guider:
    """The guider for one kind of call.

    Args:
        asked: what the call asks for.
        memory: of the calls before.
        vae: decodes latents for an image encoder; None if the pipeline has none.
        timesteps: of the run, for history kept exactly as published; None keeps what is finished.
    """
    features = None if asked.encoder is None else _features(asked.encoder, vae)
    if not asked.published:
        options: dict[str, Any] = {"kernel": asked.kernel}
        if asked.algorithm.startswith("cond-"):
            options["cond_bandwidth"] = asked.sigma_text
        return DiversityGuider(asked.algorithm, memory, features=features, **options)
    score, options = _score(asked, len(memory), exact=timesteps is not None)
    if features is None:
        made = DiversityGuider.published(
            score, memory, eta=asked.scale, every=asked.every, **options
        )
    else:
        # A noisy picture says nothing to an encoder: the denoised one is read, as published.
        made = DiversityGuider(
            score,
            memory,
            scale=asked.scale,
            schedule=EveryNth(asked.every),
            gate=False,
            keep_residual=False,
            features=features,
            displaces="latents",
            in_batch=False,
            cfg_interval=None,
            **options,
        )
    return made if timesteps is None else _AsWritten(made, timesteps, asked.every)


def _features(encoder: Any, vae: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(encoder, ClipFeatures):
        return encoder
    if vae is None:
        raise ArgumentError(
            "use_latents_for_guidance=False decodes with the pipeline's vae, and it has none. Give "
            "clip_for_guidance=sparke.features.ClipFeatures(model, vae), or leave it True."
        )
    return ClipFeatures(encoder, vae)


def _score(asked: Asked, rows: int, *, exact: bool) -> tuple[str | Score, dict[str, Any]]:
    """The score, by name with its options or as an object."""
    # exp(-d^2 / 2 s^2) is the square of the Gaussian kernel of bandwidth s sqrt(2).
    wider = (
        exact
        and asked.kernel == "gaussian"
        and rows >= UNSQUARED_FROM.get(asked.algorithm, math.inf)
    )
    factor = math.sqrt(2) if wider else 1.0
    if exact and asked.kernel == "cosine" and asked.algorithm == "cond-rke":
        return _CosinePrompts("cosine"), {}
    options: dict[str, Any] = {"kernel": asked.kernel, "bandwidth": factor * asked.sigma_image}
    if asked.algorithm.startswith("cond-"):
        options["cond_bandwidth"] = factor * asked.sigma_text
    return asked.algorithm, options


@dataclass(frozen=True)
class _CosinePrompts(CondRKE):
    """Conditional RKE with the cosine of prompts, too, where it is the kernel of samples."""

    def log_weight(self, query_cond: Tensor, bank_cond: Tensor) -> Tensor:
        squared = cosine(query_cond.float(), bank_cond.float()).square()
        return squared.clamp(1e-12, 1.0).log()


class _AsWritten:
    """Keeps what published code keeps: latents as they are when a guided step meets timestep 20.

    Prompts are compared from the origin, as there.

    Args:
        inner: guides.
        timesteps: of the scheduler, known once the run is on.
        every: steps from hit to hit.
    """

    def __init__(
        self, inner: DiversityGuider, timesteps: Callable[[], Sequence[Any]], every: int
    ) -> None:
        self.memory = inner.memory
        self._inner, self._timesteps, self._every = inner, timesteps, every
        self._kept: Tensor | None = None

    def begin(self, run: Run) -> None:
        self._kept = None
        self._inner.begin(replace(run, cond_origin=None))

    def __call__(self, state: State) -> Tensor:
        index, timesteps = state.step.index, self._timesteps()
        hit = index % self._every == 0 and index < len(timesteps)
        if hit and int(timesteps[index]) in WRITTEN_AT:
            seen = state.x if self._inner.reads == "noisy" else state.denoised
            self._kept = seen.detach().clone()
        return self._inner(state)

    def finish(self, x: Tensor) -> None:
        if self._kept is not None:
            self._inner.finish(self._kept)
