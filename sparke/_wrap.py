"""`wrap`: the one function most people need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from sparke import backends
from sparke._guiders import CFG_INTERVAL, SCALE, SCORE, guider_of
from sparke.errors import ArgumentError
from sparke.protocols import Backend, Guider, Memory, Score
from sparke.schedules import Schedule

__all__ = ["wrap"]

T = TypeVar("T")


def wrap(
    target: T,
    score: str | Score = SCORE,
    *,
    guider: Guider | str | Sequence[Guider | str] | None = None,
    memory: Memory | str | None = None,
    scale: float = SCALE,
    prompt_embeds: Any = None,
    prompt_encoder: Callable[[list[str]], Any] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    schedule: Schedule | str | None = None,
    in_batch: bool | None = None,
    cfg_interval: tuple[float, float] | str | None = CFG_INTERVAL,
    backend: Backend | str | None = None,
    **score_options: Any,
) -> T:
    """A sampler that makes different pictures, used exactly like the one given.

    Samples of one batch repel each other, and all of them repel what earlier calls made. Each call
    writes its finished samples to memory once, at the end.

    Args:
        target: a pipeline of diffusers, classic or modular; or a function shaped
            ``(model, x, sigmas, ...) -> x`` or ``(model, x, sigma_min, sigma_max, ...) -> x``, such
            as k-diffusion's ``sample_*``.
        score: how difference is measured; a name (``sparke.scores()``) or a Score; ``"cond-rke"``
            unless told otherwise.
        guider: in place of a DiversityGuider made from the other arguments: a guider's name
            (``sparke.guidance.names()``), a score's name (a DiversityGuider of that score), a
            guider, or a sequence of these, which act in that order; see
            [GuiderChain][sparke.guidance.GuiderChain]. Of the other arguments, `memory` then goes
            to every guider given by name that keeps finished samples (contextual keeps other rows),
            once for each sample, and the rest to the one given by name, if it has them and is the
            only one.
        memory: where finished samples are kept; a new ring of 1024 if None. Share one between
            wrapped samplers, or load one from a file. By name (``sparke.memory.names()``) it is a
            new one with that memory's own defaults.
        scale: strength; 0 is bit-identical to the bare target.
        prompt_embeds: (b, c), (b, tokens, c), or a pair of the latter with its mask, or a function
            of the sampler's `extra_args` or of the pipeline call's arguments. If None, those of the
            host: a floating point ``extra_args["cond"]``, the pipeline's own encoding. A wrapped
            sampler also takes them per call.
        prompt_encoder: list of strings -> (n, c), in place of a pipeline's own encoding.
        features: latents -> rows to compare; flattened latents if None.
        schedule: length of the push at a step; see `sparke.schedules`. ``"few-step"`` for models
            of 4 to 8 steps.
        in_batch: whether samples of one batch repel each other; True if None, or with `guider` what
            is that guider's own default.
        cfg_interval: where the host's classifier-free guidance stays on; see DiversityGuider.
        backend: what brings the guider to the target, by name (``sparke.backends.names()``) or an
            object with `accepts` and `attach`; the one that accepts the target if None.
        **score_options: the score's own, e.g. ``bandwidth=0.8``; with `guider`, that guider's own,
            e.g. ``guider="cads", s=0.3``.

    Returns:
        The target's own kind, with attributes ``guider`` and ``memory``. A wrapped pipeline shares
        all others with the one given, and as a context manager guides the calls of that one.

    Raises:
        UnsupportedTarget: no backend knows such a target, or not the one given.
        UnknownName: no such score, guider, memory or backend; near matches are in the message.
        ArgumentError: an option has a forbidden value or would reach no guider; two guiders decide
            the same thing alone; a name is that of a plugin that cannot be used.

    Example:
        ```python
        bare = StableDiffusionXLPipeline.from_pretrained(...)
        pipe = sparke.wrap(bare, score="cond-rke")
        images = pipe("a red cat", num_images_per_prompt=4).images

        sampler = sparke.wrap(k_diffusion.sampling.sample_dpmpp_2m, score="cond-rke")
        x = sampler(model, noise, sigmas, extra_args={"cond": embeds, "cond_scale": 6.0})

        pipe = sparke.wrap(bare, guider=["cads", "cond-rke"], memory=memory)
        ```
    """
    found = backends.of(target, backend)
    made = guider_of(
        guider,
        score,
        memory,
        scale=scale,
        features=features,
        schedule=schedule,
        in_batch=in_batch,
        cfg_interval=cfg_interval,
        **score_options,
    )
    options = {} if prompt_encoder is None else {"prompt_encoder": prompt_encoder}
    if options and not _takes(found, "prompt_encoder"):
        raise ArgumentError(
            "prompt_encoder= needs a host that is called with prompts, such as a diffusers "
            "pipeline; a sampler knows embeddings only. Give prompt_embeds= instead."
        )
    wrapped: T = found.attach(target, made, prompt_embeds=prompt_embeds, **options)
    return wrapped


def _takes(backend: Backend, option: str) -> bool:
    parameters = inspect.signature(backend.attach).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
