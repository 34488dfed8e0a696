"""What a callback learns of the pipeline that calls it, and changes in it."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparke.backends import _encodings
from sparke.errors import GuidanceWarning

__all__ = ["HeldScale", "default", "encoding", "origin", "takes_latents", "total_steps"]

HAIR = 1e-6
"""Above the scale of no guidance, so that the pipeline goes on evaluating both prompts."""
GUIDED = re.compile(
    r"(\w+)\s*\+\s*(self\._?guidance_scale|current_guidance_scale)\s*\*\s*"
    r"\(\s*(\w+)\s*-\s*(\w+)\s*\)"
)
"""One prediction plus the scale, as the instance has it now, times the difference of two."""
LOCAL = re.compile(r"current_guidance_scale = guidance_scale")
IGNORED = re.compile(r"^\s*callback_on_step_end\(", re.MULTILINE)
CONDITIONAL_FIRST = re.compile(r"cat\(\[\s*prompt_embeds, negative_prompt_embeds")


@functools.lru_cache(maxsize=64)
def _source_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def _source(pipeline: Any, *names: str) -> str:
    """The text of the pipeline's methods, empty where there is none to read."""
    found = (getattr(type(pipeline), name, None) for name in names)
    return "".join(_source_of(function) for function in found if callable(function))


def total_steps(pipeline: Any, scheduler: Any) -> int:
    """Steps of the call that is running, by the pipeline's own count."""
    return int(getattr(pipeline, "num_timesteps", None) or len(scheduler.timesteps))


def default(pipeline: Any, name: str) -> Any:
    """What the pipeline's call takes an argument for when it is not given; None if it has none."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get(name)
    known = parameter is not None and parameter.default is not inspect.Parameter.empty
    return parameter.default if parameter is not None and known else None


def takes_latents(pipeline: Any) -> bool:
    """Whether the pipeline looks at what a callback returns; some call it for its own sake."""
    source = _source(pipeline, "__call__")
    return IGNORED.search(source) is None


def encoding(pipeline: Any, embeds: Any, batch: int) -> _encodings.Encoding | None:
    """The prompts in the callback's ``prompt_embeds``; None if they are no embeddings.

    Rows of negative prompts beside them are dropped. A mask is not among a callback's tensors:
    where the encoder has one, tokens of zeros are padding.
    """
    if len(embeds) in (2 * batch, 3 * batch):
        source = _source(pipeline, "__call__", "encode_prompt", "_encode_prompt")
        first = CONDITIONAL_FIRST.search(source) is not None
        embeds = embeds[:batch] if first else embeds[-batch:]
    found = _encodings.Encoding.of((embeds,))
    encode = getattr(pipeline, "encode_prompt", None)
    if found is None or encode is None or isinstance(embeds, list) or embeds.ndim != 3:
        return found
    if any(name.endswith("mask") for name in inspect.signature(encode).parameters):
        found.mask = embeds.ne(0).any(-1)
    return found


def origin(pipeline: Any, embeds: Any) -> Tensor | None:
    """(c,) what the pipeline's encoder says of any prompt; None where it cannot be asked.

    It costs an encoding of a few short prompts.

    Args:
        pipeline: whose ``encode_prompt`` made them.
        embeds: (b, tokens, c) or a list, the prompts of a call, for the length they are padded to.
    """
    encode = getattr(pipeline, "encode_prompt", None)
    heard = None if encode is None else _as_called(pipeline, encode)
    if encode is None or heard is None:
        return None
    if hasattr(getattr(pipeline, "text_encoder", None), "_hf_hook"):
        warnings.warn(
            "the text encoder is offloaded, so no reference prompts were encoded in the middle of "
            "the call; prompts are compared as they are. Give prompt_embeds= to sparke.callback, "
            "or use sparke.wrap.",
            GuidanceWarning,
            stacklevel=5,
        )
        return None
    if isinstance(embeds, Tensor) and embeds.ndim == 3:
        heard = _of_length(encode, heard, embeds.shape[1])
    reference = getattr(pipeline, "reference_prompts", _encodings.REFERENCE)
    return _encodings.origin(encode, heard, reference)


def _as_called(pipeline: Any, encode: Callable[..., Any]) -> inspect.BoundArguments | None:
    """Arguments like those the pipeline's call gives, or None if some are unknown."""
    signature = inspect.signature(encode)
    known = {
        "prompt": [""],
        "device": getattr(pipeline, "_execution_device", None),
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": False,
        "prompt_2": None,
        "prompt_3": None,
    }
    found = {}
    for name, parameter in signature.parameters.items():
        if name in known:
            found[name] = known[name]
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        elif (value := default(pipeline, name)) is not None:
            found[name] = value
        elif parameter.default is not parameter.empty:
            found[name] = parameter.default
        else:
            return None
    return inspect.BoundArguments(signature, found) if "prompt" in found else None


def _of_length(
    encode: Callable[..., Any], heard: inspect.BoundArguments, length: int
) -> inspect.BoundArguments:
    """The same, with prompts padded to this length where the encoder can be told to."""
    longest = heard.arguments.get("max_sequence_length")
    if not isinstance(longest, int):
        return heard
    try:
        for value in (longest, longest + length - _tokens(encode, heard)):
            heard.arguments["max_sequence_length"] = value
            if _tokens(encode, heard) == length:
                return heard
    except Exception:  # noqa: BLE001  the host's code; it is asked again, and heard, as it was
        pass
    heard.arguments["max_sequence_length"] = longest
    return heard


def _tokens(encode: Callable[..., Any], heard: inspect.BoundArguments) -> int:
    arguments = {**heard.arguments, "prompt": [_encodings.REFERENCE[0]]}
    bound = inspect.BoundArguments(heard.signature, arguments)
    with torch.no_grad():
        encoding = _encodings.Encoding.of(encode(*bound.args, **bound.kwargs))
    embeds = None if encoding is None else encoding.embeds
    return embeds.shape[1] if isinstance(embeds, Tensor) and embeds.ndim == 3 else 0


class HeldScale:
    """A pipeline's guidance scale, where its loop reads it from the pipeline at each step.

    Scales that were handed to the denoiser before the loop (distilled models), or copied to a local
    name, are out of reach and left alone.

    Args:
        pipeline: in a call.
    """

    def __init__(self, pipeline: Any) -> None:
        self._users = self._set = vars(pipeline).get("_guidance_scale")
        self._neutral = _neutral(_source(pipeline, "__call__"))

    def choose(self, pipeline: Any, scale: Callable[[float], float]) -> None:
        """Set the scale of the next evaluation.

        Args:
            pipeline: in a call.
            scale: the user's scale -> the one wanted; 1 is no guidance.
        """
        now = vars(pipeline).get("_guidance_scale")
        if now != self._set:
            self._users = now  # somebody else's callback has had its say
        if self._neutral is None or not isinstance(self._users, (int, float)):
            return
        if self._users <= self._neutral:
            return
        wanted = scale(float(self._users))
        if wanted == self._users:
            self._put(pipeline, self._users)
            return
        self._put(pipeline, self._neutral + HAIR if wanted == 1 else wanted)
        if not getattr(pipeline, "do_classifier_free_guidance", True):
            self._put(pipeline, self._users)
            self._neutral = None

    def release(self, pipeline: Any) -> None:
        """Put the user's scale back."""
        if vars(pipeline).get("_guidance_scale") == self._set:
            self._put(pipeline, self._users)

    def _put(self, pipeline: Any, value: Any) -> None:
        if self._set != value:
            pipeline._guidance_scale = value
        self._set = value


def _neutral(source: str) -> float | None:
    """The scale at which a loop's formula gives the conditional prediction; None if not read.

    u + w (c - u) does at 1, c + w (c - u) at 0.
    """
    found = set()
    for base, scale, first, second in GUIDED.findall(source):
        if scale.startswith("current") and LOCAL.search(source):
            continue
        found.add(1.0 if base == second else 0.0 if base == first else None)
    return found.pop() if len(found) == 1 else None
