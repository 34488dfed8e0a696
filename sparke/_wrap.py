"""`wrap`: the one function most people need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from sparke import backends
from sparke.errors import ArgumentError
from sparke.guidance import DiversityGuider, GuiderChain
from sparke.guidance.diversity import SCALE
from sparke.protocols import Guider, Memory, Score
from sparke.schedules import Schedule

__all__ = ["wrap"]

T = TypeVar("T")


def wrap(
    target: T,
    score: str | Score = "cond-rke",
    *,
    guider: Guider | str | Sequence[Guider | str] | None = None,
    memory: Memory | None = None,
    scale: float = SCALE,
    prompt_embeds: Any = None,
    prompt_encoder: Callable[[list[str]], Any] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    schedule: Schedule | None = None,
    in_batch: bool = True,
    cfg_interval: tuple[float, float] | str | None = "auto",
    **score_options: Any,
) -> T:
    """A sampler that makes different pictures, used exactly like the one given.

    Samples of one batch repel each other, and all of them repel what earlier calls made. Each call
    writes its finished samples to memory once, at the end.

    Args:
        target: a function shaped ``(model, x, sigmas, ...) -> x`` or
            ``(model, x, sigma_min, sigma_max, ...) -> x``, such as k-diffusion's ``sample_*``.
        score: how difference is measured; a name (``sparke.scores()``) or a Score.
        guider: a guider, a score's name, or a sequence of them, in place of the one built from the
            other arguments; see [DiversityGuider][sparke.guidance.diversity.DiversityGuider] for
            all its options.
        memory: where finished samples are kept; a new ring of 1024 if None. Share one between
            wrapped samplers, or load one from a file.
        scale: strength; 0 is bit-identical to the bare target.
        prompt_embeds: (b, c), (b, tokens, c), or a pair of the latter with its mask, or a function
            of the sampler's `extra_args`; may also be given per call. If None, a floating point
            ``extra_args["cond"]`` is used.
        features: latents -> rows to compare; flattened latents if None.
        schedule: length of the push at a step; see `sparke.schedules`.
        in_batch: whether samples of one batch repel each other.
        cfg_interval: where the host's classifier-free guidance stays on; see DiversityGuider.
        **score_options: the score's own, e.g. ``bandwidth=0.8``.

    Returns:
        The target's own kind, with attributes ``guider`` and ``memory``.

    Raises:
        UnsupportedTarget: no backend knows such a target.
        UnknownName: no such score; near matches are in the message.
        ArgumentError: an option has a forbidden value.

    Example:
        ```python
        sampler = sparke.wrap(k_diffusion.sampling.sample_dpmpp_2m, score="cond-rke")
        x = sampler(model, noise, sigmas, extra_args={"cond": embeds, "cond_scale": 6.0})
        ```
    """
    backend = backends.of(target)
    if guider is None:
        guider = DiversityGuider(
            score,
            memory,
            scale=scale,
            features=features,
            schedule=schedule,
            in_batch=in_batch,
            cfg_interval=cfg_interval,
            **score_options,
        )
    else:
        _refuse(
            score=score != "cond-rke",
            scale=scale != SCALE,
            features=features is not None,
            schedule=schedule is not None,
            in_batch=not in_batch,
            cfg_interval=cfg_interval != "auto",
            memory=memory is not None and not _names(guider),
            **dict.fromkeys(score_options, True),
        )
        guider = _guider(guider, memory)
    options = {} if prompt_encoder is None else {"prompt_encoder": prompt_encoder}
    if options and "prompt_encoder" not in inspect.signature(backend.attach).parameters:
        raise ArgumentError(
            "prompt_encoder= needs a host that is called with prompts, such as a diffusers "
            "pipeline; a sampler knows embeddings only. Give prompt_embeds= instead."
        )
    wrapped: T = backend.attach(target, guider, prompt_embeds=prompt_embeds, **options)
    return wrapped


def _refuse(**given: bool) -> None:
    lost = [name for name, is_given in given.items() if is_given]
    if lost:
        raise ArgumentError(
            f"guider is given, so {', '.join(lost)} would go nowhere. Set it where the guider is "
            "made: sparke.DiversityGuider(...)."
        )


def _names(guider: Guider | str | Sequence[Guider | str]) -> bool:
    """Whether any guider is given by name, and so made here with the memory given."""
    if isinstance(guider, str):
        return True
    return isinstance(guider, Sequence) and any(isinstance(g, str) for g in guider)


def _guider(given: Guider | str | Sequence[Guider | str], memory: Memory | None) -> Guider:
    if isinstance(given, str):
        return DiversityGuider(given, memory)
    if isinstance(given, Sequence):
        return GuiderChain([DiversityGuider(g, memory) if isinstance(g, str) else g for g in given])
    return given if isinstance(given, Guider) else GuiderChain([given])
