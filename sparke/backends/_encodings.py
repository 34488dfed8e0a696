"""A pipeline's prompts as it encoded them, one row per sample, and the origin to compare them from.

Mean-pooled outputs of T5 and of language models point nearly the same way whatever the prompt
says, and so do CLIP's where most tokens are padding: from the origin, unrelated prompts look alike.
Seen from the mean of some unrelated prompts they are about at right angles, in every encoder, and
one bandwidth of the prompt kernel means the same everywhere.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparke.backends import _prompts
from sparke.errors import GuidanceWarning, ShapeError

__all__ = ["REFERENCE", "Encoding", "encoded", "listened", "origin", "repeated", "rows_of"]

Hear: TypeAlias = Callable[[Callable[..., Any], inspect.BoundArguments, Any], Any]

REFERENCE = (
    "a red fox asleep in the snow",
    "portrait of an old fisherman, oil on canvas",
    "the skyline of a city at night",
    "a bowl of ramen on a wooden table",
    "blueprint of a steam engine",
    "two children playing football in the rain",
    "macro photograph of a beetle",
    "a medieval map of an island",
    "abstract shapes in blue and gold",
    "an astronaut riding a horse on the moon",
    "the interior of a baroque library",
    "a cartoon robot waving hello",
    "waves breaking on black cliffs",
    "vintage poster for a jazz concert",
    "a field of tulips in the morning mist",
    "a glass chess piece, studio light",
)
"""Prompts that have nothing to do with one another; their mean is the origin."""


class Encoding:
    """What ``encode_prompt`` returned for the prompts of one call.

    Args:
        embeds: (b, tokens, c), (b, c), or a list of (tokens, c), of the conditional prompts.
        mask: (b, tokens), which tokens say something; None if the encoder does not tell.
    """

    def __init__(self, embeds: Any, mask: Tensor | None = None) -> None:
        self.embeds, self.mask = embeds, mask

    @classmethod
    def of(cls, result: Any, images: int = 1) -> Encoding | None:
        """From the result of an ``encode_prompt``: embeddings of the prompt come first.

        Args:
            result: of the call.
            images: rows for each prompt.
        """
        parts = list(result) if isinstance(result, tuple) else [result]
        embeds = parts[0] if parts else None
        if isinstance(embeds, list) and embeds and all(isinstance(e, Tensor) for e in embeds):
            return cls(embeds)
        if not isinstance(embeds, Tensor) or not embeds.is_floating_point() or embeds.ndim < 2:
            return None
        masks = (p for p in parts[1:] if isinstance(p, Tensor) and p.shape == embeds.shape[:2])
        mask = next((m for m in masks if embeds.ndim == 3 and not _real(m)), None)
        return cls(embeds, None if mask is None else _in_order(mask, images))

    def pooled(self) -> Tensor:
        """(n, c) float32, the mean of each prompt's tokens."""
        if isinstance(self.embeds, list):
            return torch.stack(
                [e.detach().float().reshape(-1, e.shape[-1]).mean(0) for e in self.embeds]
            )
        embeds = self.embeds if self.embeds.ndim == 2 else self.embeds.flatten(1, -2)
        given = embeds if self.mask is None else (embeds, self.mask)
        return _prompts.pool(given, len(embeds), embeds.device)


def rows_of(pooled: Tensor, batch: int) -> Tensor:
    """(n, c) prompts -> (batch, c), each repeated for its images, as pipelines order them.

    Raises:
        ShapeError: the batch is no multiple of the prompts.
    """
    pooled = conditional(pooled, batch)
    if batch % len(pooled):
        raise ShapeError(
            f"the prompt embeddings have {len(pooled)} rows for a batch of {batch}. Give "
            "prompt_embeds= or prompt_encoder= with one row per sample or per prompt."
        )
    return pooled.repeat_interleave(batch // len(pooled), 0)


def conditional(embeds: Any, batch: int) -> Any:
    """The prompts' own rows where an encoder returned them with those to guide away from.

    Twice the batch is [negative; prompt], as AudioLDM 2 and its like concatenate them; three times
    is InstructPix2Pix's [prompt; negative; negative].
    """
    if batch and len(embeds) == 2 * batch:
        return embeds[batch:]
    return embeds[:batch] if batch and len(embeds) == 3 * batch else embeds


def repeated(embeds: Any, batch: int) -> Any:
    """Prompts, in a tensor or a list, as denoisers get them, one for each sample."""
    times = batch // len(embeds)
    if isinstance(embeds, Tensor):
        return embeds if times == 1 else embeds.repeat_interleave(times, 0)
    return [e for e in embeds for _ in range(times)]


@contextmanager
def listened(pipeline: Any, name: str, hear: Hear) -> Iterator[None]:
    """Let `hear` have (the method, its arguments, its result) of each call of a pipeline's method.

    What it returns is the result from then on, unless that is None. It is heard of on the instance;
    a pipeline without that method is left alone.
    """
    held = vars(pipeline)
    method = getattr(pipeline, name, None)
    if not callable(method):
        yield
        return
    signature = inspect.signature(method)

    @functools.wraps(method)
    def listening(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        # Some encoders write into the list of prompts they are given.
        before = {k: list(v) if isinstance(v, list) else v for k, v in bound.arguments.items()}
        result = method(*args, **kwargs)
        other = hear(method, inspect.BoundArguments(signature, before), result)
        return result if other is None else other

    own = held.get(name)
    held[name] = listening
    try:
        yield
    finally:
        if own is None:
            held.pop(name, None)
        else:
            held[name] = own


def origin(
    encode: Callable[..., Any],
    heard: inspect.BoundArguments,
    reference: Sequence[str] = REFERENCE,
) -> Tensor | None:
    """(c,) mean of the reference prompts, encoded as the prompts of a call were; None if it fails.

    Args:
        encode: the pipeline's ``encode_prompt``.
        heard: the arguments it was called with.
        reference: unrelated prompts.
    """
    if "prompt" not in heard.arguments:
        return None
    changes: Mapping[str, Any] = {
        "prompt": list(reference),
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    emptied = ("negative_", "prompt_2", "prompt_3", "prompt_embeds", "pooled_", "prompt_attention")
    arguments = dict(heard.arguments)
    for name in heard.signature.parameters:
        if name in changes:
            arguments[name] = changes[name]
        elif name.startswith(emptied) and name in arguments:
            arguments[name] = None
    bound = inspect.BoundArguments(heard.signature, arguments)
    try:
        with torch.no_grad():
            encoding = Encoding.of(encode(*bound.args, **bound.kwargs))
        return None if encoding is None else encoding.pooled().mean(0)
    except Exception as error:  # noqa: BLE001  the host's code, called with prompts of ours
        warnings.warn(
            f"the reference prompts could not be encoded ({type(error).__name__}: {error}); "
            "prompts are compared as they are. Give prompt_encoder= for a comparison of your own.",
            GuidanceWarning,
            stacklevel=2,
        )
        return None


def encoded(encoder: Callable[[list[str]], Any], prompts: Sequence[str]) -> Tensor:
    """(n, c) from a callable the user gave.

    Raises:
        ShapeError: it returns something else than one row per prompt.
    """
    embeds = encoder(list(prompts))
    if not isinstance(embeds, Tensor):
        embeds = torch.as_tensor(embeds)
    return _prompts.pool(embeds, len(prompts), embeds.device)


def _in_order(mask: Tensor, images: int) -> Tensor:
    """A mask with the rows of each prompt together, as those of its embeddings are.

    Some hosts repeat it as a whole: m0, m1, m0, m1 beside e0, e0, e1, e1.
    """
    if images < 2 or len(mask) % images or len(mask) == images:
        return mask
    together = mask.unflatten(0, (-1, images))
    if bool((together == together[:, :1]).all()):
        return mask
    return mask[: len(mask) // images].repeat_interleave(images, 0)


def _real(mask: Tensor) -> bool:
    """Whether a tensor of the shape of a mask holds more than zeros and ones."""
    return mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all())
