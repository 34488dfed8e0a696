"""What memories admit and what they may be asked, in one wording."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, MissingPrompts, ShapeError
from sparke.protocols import Features

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Widths:
    """Widths of the rows and of their prompts (None: rows without prompts) in a memory."""

    x: int
    cond: int | None


def check_dtype(name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> torch.dtype:
    """`dtype` if it is one of `allowed`."""
    if dtype not in allowed:
        raise ArgumentError(f"{name} must be one of {allowed}, got {dtype!r}.")
    return dtype


def admit(
    items: Features,
    kept: Widths | None,
    dtype: torch.dtype,
    cond_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """Detached rows and prompts that may enter a memory of these widths and dtypes.

    Raises:
        ShapeError: rows or prompts of another width than those kept, or not 2-D.
        ArgumentError: a row is not finite, or too large for the storage dtype.
        MissingPrompts: rows kept have prompts and these do not, or the other way round.
    """
    checks.features("items", items)
    x, cond = items.x.detach(), items.cond
    cond = None if cond is None else cond.detach()
    if kept is not None:
        if x.shape[1] != kept.x:
            raise ShapeError(
                f"items.x has width {x.shape[1]}, this memory holds rows of width {kept.x}. "
                "Latents of another size or model need their own memory."
            )
        if (cond is None) != (kept.cond is None):
            raise MissingPrompts(
                f"this memory holds samples {'with' if cond is None else 'without'} prompts "
                f"and these come {'without' if cond is None else 'with'}. Keep them apart, in "
                "two memories."
            )
        if cond is not None and cond.shape[1] != kept.cond:
            raise ShapeError(
                f"items.cond has width {cond.shape[1]}, this memory holds prompts of width "
                f"{kept.cond}. One memory serves one text encoder."
            )
    # Integers are scaled row by row, so what float32 can hold they can.
    _check_finite("items.x", x, dtype if dtype.is_floating_point else torch.float32)
    if cond is not None:
        _check_finite("items.cond", cond, cond_dtype)
    return x, cond


def all_finite(value: Tensor, stored: torch.dtype | None = None) -> bool:
    """Whether `value`, and `value` stored in a dtype, hold neither NaN nor infinity.

    From the extremes, which is one quick pass without a temporary: NaN passes through both, and
    rounding to another dtype keeps the order.
    """
    if not value.numel():
        return True
    extremes = torch.stack(torch.aminmax(value))
    return all(map(math.isfinite, (extremes if stored is None else extremes.to(stored)).tolist()))


def _check_finite(name: str, value: Tensor, stored: torch.dtype) -> None:
    if not all_finite(value, stored):
        checks.finite(name, value)  # says which row
        checks.finite(f"{name} stored as {stored}", value.to(stored))


def asked(cond: Tensor, width: int | None) -> Tensor:
    """Prompts to select by, detached, in float32.

    Raises:
        MissingPrompts: the rows were committed without prompts.
        ShapeError: `cond` is not (b, width).
    """
    if width is None:
        raise MissingPrompts(
            "this memory holds samples without prompts, so it cannot be read by prompt. Use an "
            "unconditional score, or a memory filled with prompt_embeds."
        )
    if cond.ndim != 2 or cond.shape[1] != width:
        raise ShapeError(
            f"prompt_embeds must be (batch, {width}) as those in memory, got "
            f"{tuple(cond.shape)}. One memory serves one text encoder."
        )
    return cond.detach().float()
