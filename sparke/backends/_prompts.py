"""Prompt embeddings as people have them, to one row per sample."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from sparke.errors import ShapeError

Prompts: TypeAlias = Tensor | tuple[Tensor, Tensor]


def pool(prompt_embeds: Prompts, batch: int, device: torch.device) -> Tensor:
    """(b, c), (b, tokens, c), or a pair of the latter with a (b, tokens) mask -> (b, c) float32.

    Tokens are averaged, over the mask where there is one. One row serves the whole batch.

    Raises:
        ShapeError: other shapes, or rows that do not match the batch.
    """
    embeds, mask = prompt_embeds if isinstance(prompt_embeds, tuple) else (prompt_embeds, None)
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        raise ShapeError(
            f"prompt_embeds must be a floating point tensor, got {_described(embeds)}."
        )
    embeds = embeds.detach().to(device, torch.float32)
    if embeds.ndim == 3:
        embeds = embeds.mean(1) if mask is None else _masked_mean(embeds, mask.to(device))
    if embeds.ndim != 2:
        raise ShapeError(
            "prompt_embeds must be (batch, width) or (batch, tokens, width), got shape "
            f"{tuple(embeds.shape)}."
        )
    if embeds.shape[0] == 1 and batch > 1:
        embeds = embeds.expand(batch, -1)
    if embeds.shape[0] != batch:
        raise ShapeError(
            f"prompt_embeds has {embeds.shape[0]} rows for a batch of {batch}. Give one row per "
            "sample, or a single row for all."
        )
    if not bool(torch.isfinite(embeds).all()):
        raise ShapeError("prompt_embeds must be finite; it holds NaN or infinity.")
    return embeds


def _masked_mean(embeds: Tensor, mask: Tensor) -> Tensor:
    if mask.shape != embeds.shape[:2]:
        raise ShapeError(
            f"the mask of prompt_embeds must be {tuple(embeds.shape[:2])}, got {tuple(mask.shape)}."
        )
    weight = mask.to(embeds)[..., None]
    return (embeds * weight).sum(1) / weight.sum(1).clamp_min(1)


def _described(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
