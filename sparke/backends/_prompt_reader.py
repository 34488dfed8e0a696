"""The prompts of one call of a pipeline, from wherever they can be read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from sparke.backends import _encodings, _prompts
from sparke.errors import ArgumentError

__all__ = ["MASK_NAMES", "PromptReader", "PromptSource", "Prompts"]

PromptSource: TypeAlias = "_prompts.Prompts | Callable[[Mapping[str, Any]], _prompts.Prompts]"
MASK_NAMES = ("prompt_embeds_mask", "prompt_attention_mask", "prompt_embeds_attention_mask")


@dataclass
class Prompts:
    """Where the prompts of a pipeline's calls are read.

    Attributes:
        embeds: rows, or a function of the call's arguments, in place of the pipeline's own.
        encoder: list of strings -> (n, c), in place of the pipeline's own.
        origins: origin of the embeddings, by the encoder they come from and how it was called.
        asked: those encoders, kept so that none comes in the place of another.
    """

    embeds: PromptSource | None = None
    encoder: Callable[[list[str]], Any] | None = None
    origins: dict[Hashable, Tensor | None] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)

    @property
    def own(self) -> bool:
        """Whether the pipeline's own encoding is what counts."""
        return self.embeds is None and self.encoder is None

    def origin(
        self, encoder: object, find: Callable[[], Tensor | None], *ways: Hashable
    ) -> Tensor | None:
        """The origin of an encoder's embeddings, found once for each way of calling it."""
        key = (id(encoder), *ways)
        if key not in self.origins:
            self.origins[key] = find()
            self.asked.append(encoder)
        return self.origins[key]


class PromptReader:
    """Prompt embeddings of one call, one row per sample.

    In order of precedence: the rows given to sparke, its encoder's, what the pipeline's own
    ``encode_prompt`` returned, embeddings among the call's arguments, its class labels.

    Args:
        pipeline: the pipeline called.
        prompts: what was given to sparke.

    Attributes:
        arguments: of the call, by name.
        origin: (c,) from where the embeddings are to be compared, None for zero.
    """

    def __init__(self, pipeline: Any, prompts: Prompts, arguments: Mapping[str, Any]) -> None:
        self._pipeline, self._prompts, self.arguments = pipeline, prompts, arguments
        self._encoding: _encodings.Encoding | None = None
        self._heard = False
        self.origin: Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether `rows` can tell all it will."""
        if self._heard or not self._prompts.own or self.given() is not None:
            return True
        encode = ("encode_prompt", "_encode_prompt")
        return not any(callable(getattr(self._pipeline, name, None)) for name in encode)

    def hear(self, encode: Callable[..., Any], heard: inspect.BoundArguments, result: Any) -> None:
        """Note what ``encode_prompt`` returned; the first call is for the prompts themselves."""
        self._heard = True
        if self._encoding is not None:
            return
        images = heard.arguments.get("num_images_per_prompt")
        self._encoding = _encodings.Encoding.of(result, images if isinstance(images, int) else 1)
        if self._encoding is not None and self._prompts.own:
            self._find_origin(encode, heard)

    def rows(self, batch: int, device: torch.device) -> Tensor | None:
        """(batch, c) embeddings to compare, None where the call has no prompts.

        Raises:
            ShapeError: they do not match the batch.
            ArgumentError: there is an encoder, and the call has no strings for it.
        """
        source = self._prompts.embeds
        if source is not None:
            given = source(self.arguments) if callable(source) else source
            return _prompts.pool(given, batch, device)
        if self._prompts.encoder is not None:
            return self._by_encoder(self._prompts.encoder, batch, device)
        encoding = self._encoding or self.given()
        encode = getattr(self._pipeline, "encode_prompt", None)
        if self._encoding is None and encoding is not None and callable(encode):
            # The call's own embeddings went past the encoder; it can still tell their origin. They
            # are noted first, as what it says to the reference prompts is heard too.
            self._encoding = encoding
            signature = inspect.signature(encode)
            if "prompt" in signature.parameters:
                self._find_origin(encode, signature.bind_partial(prompt=[]))
        if encoding is not None:
            return _encodings.rows_of(encoding.pooled().to(device), batch)
        labels = self.arguments.get("class_labels")
        if labels is None:
            return None
        found = torch.as_tensor(labels, device=device).long().reshape(-1)
        # Classes are either the same or unrelated.
        return F.one_hot(found, max(1001, int(found.max()) + 1)).float()

    def as_given(self, batch: int, device: torch.device) -> Any:
        """The conditional prompts as the pipeline hands them to its denoiser, None if unknown."""
        labels = self.arguments.get("class_labels")
        if labels is not None:
            return torch.as_tensor(labels, device=device)
        encoding = self._encoding or self.given()
        if encoding is None:
            return None
        return _encodings.repeated(_encodings.conditional(encoding.embeds, batch), batch)

    def given(self) -> _encodings.Encoding | None:
        """Embeddings the caller handed to the pipeline itself."""
        embeds = self.arguments.get("prompt_embeds")
        if embeds is None:
            return None
        masks = (self.arguments.get(name) for name in MASK_NAMES)
        return _encodings.Encoding.of((embeds, next((m for m in masks if m is not None), None)))

    def _find_origin(self, encode: Callable[..., Any], heard: inspect.BoundArguments) -> None:
        encoder = getattr(self._pipeline, "text_encoder", None)
        if encoder is None and hasattr(self._pipeline, "text_encoder"):
            return  # unloaded: there is nothing to ask
        ways = (
            (name, value)
            for name, value in heard.arguments.items()
            if isinstance(value, (bool, int, float)) and not name.startswith(("num_", "do_"))
        )
        reference = getattr(self._pipeline, "reference_prompts", _encodings.REFERENCE)
        self.origin = self._prompts.origin(
            encoder, lambda: _encodings.origin(encode, heard, reference), *ways
        )

    def _by_encoder(
        self, encoder: Callable[[list[str]], Any], batch: int, device: torch.device
    ) -> Tensor:
        prompt = self.arguments.get("prompt")
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
            raise ArgumentError(
                f"prompt_encoder= encodes the call's prompt, a string or a list of them, got "
                f"{type(prompt).__name__}. Give prompt_embeds= instead."
            )
        self.origin = self._prompts.origin(
            encoder, lambda: _encodings.encoded(encoder, _encodings.REFERENCE).mean(0)
        )
        return _encodings.rows_of(_encodings.encoded(encoder, texts).to(device), batch)
