"""Refusing calls of the emoji model's pipeline that could not be meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparke.errors import ArgumentError, ShapeError

__all__ = ["check_offered", "check_prompts"]


def check_prompts(
    width: int, texts: Mapping[str, Any], embeds: Mapping[str, Tensor | None]
) -> None:
    """Check that prompts are given once, and what they are.

    Args:
        width: dimensions of an embedding.
        texts: the prompts and the negative prompts, by the argument's name.
        embeds: their embeddings, in the same order.

    Raises:
        ArgumentError: there are no prompts, they are given twice, or they are no strings.
        ShapeError: embeddings have not the model's width, or not as many rows as the prompts.
    """
    for (name, said), (other, given) in zip(texts.items(), embeds.items(), strict=True):
        if said is not None and given is not None:
            raise ArgumentError(f"{name} and {other} must not both be given; leave one out.")
        listed = isinstance(said, list) and said and all(isinstance(text, str) for text in said)
        if said is not None and not isinstance(said, str) and not listed:
            raise ArgumentError(
                f"{name} must be a string or a list of strings, of one at least; got {said!r}."
            )
    (name, said), (other, given) = next(zip(texts.items(), embeds.items(), strict=True))
    if said is None and given is None:
        raise ArgumentError(f"{name} or {other} must be given; got neither.")
    rows = len(said) if isinstance(said, list) else 1
    rows = rows if given is None else len(given)
    for name, found in embeds.items():
        if found is not None and tuple(found.shape) != (rows, width):
            raise ShapeError(f"{name} must have shape ({rows}, {width}); got {tuple(found.shape)}.")


def check_offered(name: str, values: Sequence[str], among: Sequence[str]) -> None:
    """Check that values are offered.

    Raises:
        ArgumentError: one is not.
    """
    unknown = [value for value in values if value not in among]
    if unknown:
        raise ArgumentError(f"{name} must be among {', '.join(among)}; got {', '.join(unknown)}.")
