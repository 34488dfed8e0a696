"""What an encoder is, whoever made it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparke.errors import ArgumentError, ShapeError

__all__ = ["ImageEncoder", "rows_from"]


@dataclass(frozen=True)
class ImageEncoder:
    """Pictures to rows, with the preparation that the encoder was made for.

    Calling it takes (b, 3, h, w) prepared pictures to (b, d) rows: float32, on the CPU, all finite.

    Attributes:
        name: as it was asked for.
        encode: (b, 3, h, w) prepared pictures, on `device` -> (b, d).
        compares: what two rows that are near each other have in common, in one sentence.
        image_size: (height, width) that pictures are scaled to cover and cut to, when `prepare` is
            None: `encode` then gets RGB in [0, 1].
        prepare: an RGB picture of Pillow -> (3, h, w), the model's own preparation.
        device: where pictures are taken to.
    """

    name: str
    encode: Callable[[Tensor], Any]
    compares: str
    image_size: tuple[int, int] | None = None
    prepare: Callable[[Any], Tensor] | None = None
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(b, 3, h, w) prepared pictures -> (b, d) rows, float32, on the CPU.

        Raises:
            ShapeError: what came back is not one row for each picture.
            ArgumentError: the encoder failed, or a row is not finite.
        """
        return rows_from(self.encode, pictures.to(self.device), len(pictures), self.name)


def rows_from(encode: Callable[[Any], Any], given: Any, count: int, name: str) -> Tensor:
    """What an encoder returns, checked: (count, d), float32, on the CPU.

    Raises:
        ShapeError: it is not one row for each of `count` things.
        ArgumentError: the encoder failed, or a row is not finite.
    """
    try:
        rows = encode(given)
    # Code of others; whatever it raises, the user must learn that it was the encoder.
    except Exception as error:
        raise ArgumentError(
            f"the encoder {name!r} failed on a batch of {count}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != count or not rows.shape[1]:
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ShapeError(
            f"the encoder {name!r} must return a tensor ({count}, width), one row for each of "
            f"{count}; got {got}."
        )
    if rows.is_complex():
        raise ArgumentError(f"the encoder {name!r} must return real numbers, got {rows.dtype}.")
    rows = rows.detach().float().cpu()
    if not bool(torch.isfinite(rows).all()):
        raise ArgumentError(
            f"the encoder {name!r} returned NaN or infinity. In half precision it may overflow; "
            "load it in float32."
        )
    return rows
