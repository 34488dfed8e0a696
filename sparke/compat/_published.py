"""A pipeline whose call takes the published keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sparke._wrap import wrap
from sparke.compat import _keywords
from sparke.compat._guiders import UNSQUARED_FROM, guider
from sparke.compat._history import History, RKEGuidedSampling
from sparke.compat._keywords import Asked
from sparke.errors import ArgumentError
from sparke.memory import RingMemory

__all__ = ["published"]

UNLISTED = ("callback", "callback_steps")
"""What pipelines of diffusers still take through ``**kwargs``."""


def published(target: Any, exact: bool, prompt_encoder: Callable[[list[str]], Any] | None) -> Any:
    """The pipeline with their keywords: same class, same components, shared attributes.

    Raises:
        UnsupportedTarget: its scheduler cannot be guided.
    """
    wrap(target)  # raises now what it would raise at the first call
    kind = type(target)
    held = {
        "_calls": _Calls(target, exact, prompt_encoder),
        "__wrapped__": target,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    pipe: Any = object.__new__(type(kind.__name__, (_Published, kind), held))
    object.__setattr__(pipe, "__dict__", vars(target))
    return pipe


class _Published:
    """What the pipeline gains."""

    _calls: _Calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call, with the published keywords as well."""
        return self._calls.run(args, kwargs)

    @property
    def memory(self) -> RingMemory:
        """Samples of earlier calls; those with ``rke_guided_sampler=`` are in that object."""
        return self._calls.history.memory

    @memory.setter
    def memory(self, memory: RingMemory) -> None:
        self._calls.history.give(memory)

    def reset(self) -> None:
        """Forget the samples of earlier calls."""
        self._calls.history.reset()


class _Calls:
    """Runs the calls of one pipeline, each with the guider it asks for."""

    def __init__(
        self, target: Any, exact: bool, prompt_encoder: Callable[[list[str]], Any] | None
    ) -> None:
        self.history = History()
        self._target, self._exact, self._encoder = target, exact, prompt_encoder
        self._made: tuple[tuple[Any, ...], Any] = ((), None)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call."""
        signature = inspect.signature(type(self._target).__call__)
        parameters = signature.parameters.values()
        taken = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        if len(taken) < len(parameters):
            taken += UNLISTED
        if self._by_class:
            taken += ["prompt"]
        _keywords.unknown(kwargs, taken, type(self._target).__name__)
        ours = {name: value for name, value in kwargs.items() if name in _keywords.KEYWORDS}
        rest = self._labelled({n: v for n, v in kwargs.items() if n not in ours})
        asked = _keywords.read(ours, exact=self._exact)
        if asked is None:
            return self._target(*args, **rest)
        sampler: RKEGuidedSampling | None = ours.get("rke_guided_sampler")
        if sampler is None and ours.get("max_bank_size") is not None:
            self.history.resize(ours["max_bank_size"])
        history = self.history if sampler is None else sampler
        history.claim(asked.rows)
        return self._guided(asked, history.memory)(*args, **rest)

    @property
    def _by_class(self) -> bool:
        return callable(getattr(self._target, "get_label_ids", None))

    def _labelled(self, call: dict[str, Any]) -> dict[str, Any]:
        """Names of classes in place of prompts, for pipelines that know classes only."""
        if not self._by_class or "prompt" not in call:
            return call
        prompt = call.pop("prompt")
        # What follows a comma describes the picture, which such a model cannot hear.
        names = [prompt.split(",")[0].strip()] if isinstance(prompt, str) else list(prompt)
        try:
            labels = self._target.get_label_ids(names)
        except ValueError as error:
            known = len(self._target.labels)
            raise ArgumentError(
                f"prompt={prompt!r} must name classes of this model, such as 'golden retriever'; "
                f"it knows {known} of them, in pipe.labels, and not this one."
            ) from error
        return {"class_labels": labels, **call}

    def _guided(self, asked: Asked, memory: RingMemory) -> Any:
        """The pipeline under the guider asked for, the last one again if nothing changed."""
        long = len(memory) >= UNSQUARED_FROM.get(asked.algorithm, 0)
        key = (asked, memory, self._exact and long)
        if self._made[0] != key:
            timesteps = (lambda: self._target.scheduler.timesteps) if self._exact else None
            made = guider(asked, memory, getattr(self._target, "vae", None), timesteps)
            self._made = key, wrap(self._target, guider=made, **self._prompts())
        return self._made[1]

    def _prompts(self) -> dict[str, Any]:
        encoder = self._encoder
        if encoder is None or not self._exact:
            return {"prompt_encoder": encoder}

        def embeds(call: Mapping[str, Any]) -> Any:
            prompts = [call["prompt"]] if isinstance(call["prompt"], str) else list(call["prompt"])
            found = encoder(prompts)
            return found.repeat_interleave(call.get("num_images_per_prompt") or 1, 0)

        return {"prompt_embeds": embeds}
