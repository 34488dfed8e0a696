"""A denoiser in the shape of k-diffusion's, guided, and what can be learned of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparke.backends import _ladder
from sparke.backends._hooked import Hooks, named, warn
from sparke.backends._masks import present
from sparke.protocols import GuidanceScaleHook, Guider, Run, State, Step

__all__ = ["GuidedModel", "network_of", "told"]

SCALE_NAMES = ("cond_scale", "guidance_scale", "cfg_scale")
"""Keywords under which denoisers take their classifier-free guidance scale; 1 turns it off."""
MASK_NAMES = ("cond_mask", "mask")
INSIDE = ("_model", "inner_model", "model", "func", "__self__", "__wrapped__")
"""Names under which wrappers of denoisers, partial functions and methods hold what they wrap."""
DEEPEST = 8


class GuidedModel:
    """A denoiser ``model(x, sigma, **extra_args)`` that adds the guider's displacement.

    Attributes it does not have are the wrapped model's.
    """

    def __init__(
        self, model: Any, guider: Guider, run: Run, ladder: _ladder.Ladder, hooks: Hooks
    ) -> None:
        self._model, self._guider, self._run, self._ladder = model, guider, run, ladder
        self._hooks, self._warned = hooks, False

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # asked for before it is set, as copy does
            raise AttributeError(name)
        return getattr(self._model, name)

    def __call__(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        step = self._ladder(float(sigma.reshape(-1)[0]))
        kwargs = self._scaled(step, kwargs)
        seen = self._conditioned(step, kwargs)
        denoised = self._asked(step, x, sigma, seen)

        def evaluate(z: Tensor) -> Tensor:
            return self._asked(step, z, sigma, seen)

        def conditional() -> Tensor:
            if _scale_of(seen) == 1:
                return denoised
            return self._asked(step, x, sigma, _unguided(seen))

        def again() -> Tensor:
            return self._asked(step, x, sigma, _unguided(self._conditioned(step, kwargs)))

        state = State(x, denoised, step, self._run.cond, conditional, evaluate, again)
        return denoised + self._guider(state).to(denoised.dtype)

    def _asked(self, step: Step, x: Tensor, sigma: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The denoiser's answer; at any scale but 1 the rows its network gets are not known."""
        self._hooks.evaluating(step, ("cond",) if _scale_of(kwargs) == 1 else (), len(x))
        out: Tensor = self._model(x, sigma, **kwargs)
        return out

    def _scaled(self, step: Step, kwargs: dict[str, Any]) -> dict[str, Any]:
        name = _scale_name(kwargs)
        if name is None or not isinstance(self._guider, GuidanceScaleHook):
            return kwargs
        scale = self._guider.on_guidance_scale(step, kwargs[name])
        return kwargs if scale == kwargs[name] else {**kwargs, name: scale}

    def _conditioned(self, step: Step, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with the embeddings that the guider wants for the prompt."""
        if not self._hooks.conditions:
            return kwargs
        cond, batch, reached = kwargs.get("cond"), self._run.shape[0], []
        masks = [kwargs.get(name) for name in MASK_NAMES]

        def change(embeds: Tensor) -> Tensor:
            reached.append(embeds)
            mask = next((m for m in masks if _is_mask_of(embeds, m)), None)
            return self._hooks.condition(embeds, step, None if mask is None else present(mask))

        changed = _walked(cond, batch, change)
        if not reached and not self._warned:
            self._warned = True
            warn(
                f"{named(self._hooks.conditions)} changes prompt embeddings and finds none: "
                f"extra_args['cond'] is {_described(cond)}, not a floating point tensor "
                f"({batch}, width) or ({batch}, tokens, width), nor a dict or list that holds one. "
                "The run goes on without on_condition.",
                4,
            )
        return kwargs if changed is cond else {**kwargs, "cond": changed}


def told(model: Any, name: str) -> float | None:
    """A number above 0 that the denoiser, or the model inside it, tells by this name."""
    for _ in range(4):
        value = getattr(model, name, None)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = float(value)
        if isinstance(value, (int, float)) and value > 0:
            return float(value)
        model = getattr(model, "inner_model", None)
    return None


def network_of(model: Any) -> Any:
    """The outermost torch module in a denoiser, the denoiser itself if there is none in sight."""
    seen = model
    for _ in range(DEEPEST):
        if isinstance(seen, torch.nn.Module):
            return seen
        inner = (getattr(seen, name, None) for name in INSIDE)
        seen = next((value for value in inner if callable(value)), None)
    return model


def _scale_name(kwargs: Mapping[str, Any]) -> str | None:
    numbers = (name for name in SCALE_NAMES if isinstance(kwargs.get(name), (int, float)))
    return next(numbers, None)


def _scale_of(kwargs: Mapping[str, Any]) -> float:
    """The scale among the arguments; a denoiser that takes none does no guidance."""
    name = _scale_name(kwargs)
    return 1.0 if name is None else float(kwargs[name])


def _unguided(kwargs: dict[str, Any]) -> dict[str, Any]:
    name = _scale_name(kwargs)
    return kwargs if name is None else {**kwargs, name: 1.0}


def _walked(value: Any, batch: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Conditioning with each of its embeddings changed; the same object if none was.

    Embeddings are floating point with a row for each sample, alone or in dicts and lists.
    """
    if isinstance(value, Tensor):
        fits = value.is_floating_point() and value.ndim in (2, 3) and len(value) == batch
        return change(value) if fits else value
    if type(value) is dict:
        parts = {
            key: inner if "mask" in str(key) else _walked(inner, batch, change)
            for key, inner in value.items()
        }
        return parts if any(parts[key] is not value[key] for key in value) else value
    if type(value) in (list, tuple):
        items = [_walked(inner, batch, change) for inner in value]
        changed = any(a is not b for a, b in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    return value


def _is_mask_of(embeds: Tensor, mask: Any) -> bool:
    return isinstance(mask, Tensor) and embeds.ndim == 3 and mask.shape == embeds.shape[:2]


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return "missing" if value is None else f"a {type(value).__name__}"
