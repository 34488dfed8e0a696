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

from sparke.backends import _ladder, _prompts
from sparke.errors import ArgumentError, ShapeError
from sparke.protocols import GuidanceScaleHook, Guider, Run, State, Step

__all__ = ["GuidedModel", "accepts", "attach"]

PromptSource: TypeAlias = "_prompts.Prompts | Callable[[Mapping[str, Any]], _prompts.Prompts]"

SCALE_NAMES = ("cond_scale", "guidance_scale", "cfg_scale")
"""Keywords under which denoisers take their classifier-free guidance scale; 1 turns it off."""


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
    """
    signature = inspect.signature(target)
    if "prompt_embeds" in signature.parameters:
        raise ArgumentError("the sampler has a parameter prompt_embeds already; is it wrapped?")

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
            sigma_data=_sigma_data(model),
            eta=_eta(signature, arguments),
        )
        guider.begin(run)
        arguments["model"] = GuidedModel(model, guider, run, ladder)
        result: Tensor = target(*bound.args, **bound.kwargs)
        # dpm_adaptive hands back a pair when it is asked for its statistics.
        guider.finish(result[0] if isinstance(result, tuple) else result)
        return result

    sampler.__signature__ = _with_prompts(signature)  # type: ignore[attr-defined]
    sampler.guider = guider  # type: ignore[attr-defined]
    sampler.memory = getattr(guider, "memory", None)  # type: ignore[attr-defined]
    return sampler


class GuidedModel:
    """A denoiser ``model(x, sigma, **extra_args)`` that adds the guider's displacement.

    Attributes it does not have are the wrapped model's.
    """

    def __init__(self, model: Any, guider: Guider, run: Run, ladder: _ladder.Ladder) -> None:
        self._model, self._guider, self._run, self._ladder = model, guider, run, ladder

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # asked for before it is set, as copy does
            raise AttributeError(name)
        return getattr(self._model, name)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        step = self._ladder(float(sigma.reshape(-1)[0]))
        kwargs = self._scaled(step, kwargs)
        denoised: Tensor = self._model(x, sigma, **kwargs)

        def evaluate(z: Tensor) -> Tensor:
            out: Tensor = self._model(z, sigma, **kwargs)
            return out

        def conditional() -> Tensor:
            name = _scale_name(kwargs)
            if name is None or kwargs[name] == 1:
                return denoised
            out: Tensor = self._model(x, sigma, **{**kwargs, name: 1.0})
            return out

        delta = self._guider(State(x, denoised, step, self._run.cond, conditional, evaluate))
        return denoised + delta.to(denoised.dtype)

    def _scaled(self, step: Step, kwargs: dict[str, Any]) -> dict[str, Any]:
        name = _scale_name(kwargs)
        if name is None or not isinstance(self._guider, GuidanceScaleHook):
            return kwargs
        scale = self._guider.on_guidance_scale(step, kwargs[name])
        return kwargs if scale == kwargs[name] else {**kwargs, name: scale}


def _scale_name(kwargs: Mapping[str, Any]) -> str | None:
    numbers = (name for name in SCALE_NAMES if isinstance(kwargs.get(name), (int, float)))
    return next(numbers, None)


def _sigma_data(model: Any) -> float | None:
    """The data's standard deviation where the denoiser, or the model inside it, tells it."""
    for _ in range(4):
        value = getattr(model, "sigma_data", None)
        if isinstance(value, (int, float)) and value > 0:
            return float(value)
        model = getattr(model, "inner_model", None)
    return None


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
