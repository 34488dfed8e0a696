"""Samplers in the shape of k-diffusion's ``sample_*`` functions, of whatever library.

The sampler is called unchanged with a model of ours in place of its own, so every solver works
that asks ``denoised = model(x, sigma, **extra_args)``. k-diffusion itself is never imported.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from sparke.backends import _ladder, _noise, _prompts
from sparke.backends._guided_model import GuidedModel, network_of, told
from sparke.backends._hooked import Hooks, named, warn
from sparke.errors import ArgumentError, ShapeError
from sparke.protocols import Guider, Run

__all__ = ["GuidedModel", "accepts", "attach"]

PromptSource: TypeAlias = "_prompts.Prompts | Callable[[Mapping[str, Any]], _prompts.Prompts]"

FAR = 10.0
"""An image is drowned by noise of this many times its spread, where no model tells a level."""


def accepts(target: object) -> bool:
    """Whether `target` is a function (model, x, sigmas, ...) or (model, x, sigma_min, ...)."""
    if not callable(target) or isinstance(target, type):
        return False
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return False
    return names[:2] == ["model", "x"] and len(names) > 2 and names[2] in ("sigmas", "sigma_min")


def attach(
    target: Callable[..., Tensor], guider: Guider, *, prompt_embeds: PromptSource | None = None
) -> Callable[..., Tensor]:
    """The sampler with guidance inside: same signature plus the keyword ``prompt_embeds``.

    Args:
        target: the sampler.
        guider: displaces `denoised` at each evaluation.
        prompt_embeds: (b, c), (b, tokens, c), a pair of those with a mask, or a function of the
            sampler's `extra_args`. If None, and the call gives none, a floating point
            ``extra_args["cond"]`` with one row per sample is used.

    Returns:
        A function that calls `target` with the arguments it was given, the model replaced. It has
        the attributes ``guider`` and ``memory``. Its errors come before the first evaluation:
        ArgumentError for sigmas that do not descend, ShapeError for prompts that do not match.

    Hooks of the guider: ``on_noise`` is asked where the sampler is given noise alone, which is when
    it starts at the ``sigma_max`` that the model tells (or, where it tells none, at ten times its
    ``sigma_data`` or more) from what looks like white noise of that level; elsewhere a warning says
    that it was not. ``on_condition`` gets the floating point tensors of ``cond`` that have a row
    for each sample, with the mask in ``cond_mask`` or ``mask`` where there is one; ``on_model`` the
    outermost torch module in the model, or the model itself. ``on_evaluation`` is told
    ``("cond",)`` for a call at scale 1 and no branches otherwise: what a denoiser does to guide is
    its own business. ``on_encoder`` has nothing to encode here, and a warning says so.
    """
    signature = inspect.signature(target)
    if "prompt_embeds" in signature.parameters:
        raise ArgumentError(
            "the sampler has a parameter prompt_embeds already; is it wrapped? Wrap the bare "
            "one, sampler.__wrapped__."
        )

    @functools.wraps(target)
    def sampler(*args: Any, **kwargs: Any) -> Tensor:
        per_call = kwargs.pop("prompt_embeds", None)
        bound = signature.bind(*args, **kwargs)
        arguments = bound.arguments
        x, model = arguments["x"], arguments["model"]
        if not isinstance(x, Tensor) or x.ndim < 2:
            raise ShapeError(
                f"x must be a tensor (batch, ...), got {tuple(getattr(x, 'shape', ()))}."
            )
        ladder = _ladder.of(arguments)
        extra_args = arguments.get("extra_args") or {}
        source = prompt_embeds if per_call is None else per_call
        run = Run(
            shape=x.shape,
            device=x.device,
            dtype=x.dtype,
            cond=_prompts_of(source, extra_args, x),
            sigma_data=told(model, "sigma_data"),
            eta=_eta(signature, arguments),
            seeds=_noise.seeds(x),
        )
        hooks = Hooks(guider)
        guider.begin(run)
        if hooks.encoders:
            warn(
                f"{named(hooks.encoders)} has prompts encoded a second time, and a sampler gets "
                "embeddings only: there is no second encoding. Guide a pipeline of diffusers that "
                "encodes its prompts, or turn that part of the guider off.",
                1,
            )
        arguments["x"] = _started(hooks, x, ladder.highest, model)
        arguments["model"] = GuidedModel(model, guider, run, ladder, hooks)
        with hooks.holding([network_of(model)] if hooks.models else []):
            result: Tensor = target(*bound.args, **bound.kwargs)
        # dpm_adaptive hands back a pair when it is asked for its statistics.
        guider.finish(result[0] if isinstance(result, tuple) else result)
        return result

    sampler.__signature__ = _with_prompts(signature)  # type: ignore[attr-defined]
    sampler.guider = guider  # type: ignore[attr-defined]
    sampler.memory = getattr(guider, "memory", None)  # type: ignore[attr-defined]
    return sampler


def _started(hooks: Hooks, x: Tensor, sigma: float, model: Any) -> Tensor:
    """The latents to start from: `x`, or noise in its place where it is noise and nothing else."""
    if not hooks.noise:
        return x
    highest = told(model, "sigma_max")
    if highest is not None and sigma < 0.99 * highest:
        why = f"the run starts at sigma {sigma:.4g}, below the model's sigma_max {highest:.4g}"
    elif highest is None and sigma < FAR * (told(model, "sigma_data") or 1.0):
        why = (
            f"the run starts at sigma {sigma:.4g}, where an image would show; if it is noise, set "
            "the model's attribute sigma_max to that"
        )
    elif not _noise.is_white(x, sigma):
        why = f"x is no white noise of standard deviation {sigma:.4g}, the first of the sigmas"
    else:
        return hooks.start(x)
    warn(f"the initial noise is left to the host, {named(hooks.noise)} is not asked: {why}.", 2)
    return x


def _eta(signature: inspect.Signature, arguments: Mapping[str, Any]) -> float:
    """The `eta` of this call, k-diffusion's name for the share of fresh noise; 0 without one."""
    parameter = signature.parameters.get("eta")
    value = arguments.get("eta", parameter.default if parameter else 0.0)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _prompts_of(
    source: PromptSource | None, extra_args: Mapping[str, Any], x: Tensor
) -> Tensor | None:
    if source is None:
        # The host's own conditioning, where it is embeddings; anything else is left alone.
        cond = extra_args.get("cond")
        if not isinstance(cond, Tensor) or not cond.is_floating_point():
            return None
        if cond.ndim not in (2, 3) or cond.shape[0] != x.shape[0]:
            return None
        source = cond
    embeds = source(extra_args) if callable(source) else source
    return _prompts.pool(embeds, x.shape[0], x.device)


def _with_prompts(signature: inspect.Signature) -> inspect.Signature:
    added = inspect.Parameter("prompt_embeds", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    last = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        last -= 1
    return signature.replace(parameters=[*parameters[:last], added, *parameters[last:]])
