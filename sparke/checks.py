"""Every rule on shapes, numbers and what is installed, in one wording."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparke.errors import ArgumentError, MissingHost, ShapeError
from sparke.protocols import Features, Memory

__all__ = [
    "choice",
    "features",
    "finite",
    "host",
    "memory",
    "number",
    "pair",
    "positive",
    "positives",
    "rows_of",
    "shape",
    "whole",
]


def number(value: object) -> float | None:
    """`value` as a float if it is a number or holds just one, else None.

    Text and truth values are no numbers, though Python would make one of either.
    """
    if isinstance(value, (str, bytes, bytearray)) or type(value).__name__ in ("bool", "bool_"):
        return None
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return None


def positive(name: str, value: float, *, zero: bool = False) -> float:
    """`value` as a float, finite and above zero (or at least zero)."""
    rule = "at least 0" if zero else "above 0"
    found = number(value)
    if found is None:
        raise ArgumentError(f"{name} must be a number {rule}, got {_shown(value)}.")
    if not math.isfinite(found) or found < 0 or (found == 0 and not zero):
        raise ArgumentError(f"{name} must be finite and {rule}, got {_shown(value)}.")
    return found


def positives(name: str, value: Tensor) -> Tensor:
    """`value` if it is one real number above 0, or a column (b, 1) of them, one for each query."""
    if value.ndim not in (0, 2) or value.shape[1:] not in ((), (1,)):
        raise ShapeError(
            f"{name} must be a single number or (b, 1), one for each query; got shape "
            f"{tuple(value.shape)}."
        )
    numeric = value.dtype != torch.bool and not value.is_complex()
    if not numeric or not bool((value.isfinite() & (value > 0)).all()):
        raise ArgumentError(f"{name} must be finite and above 0 throughout, got {value.tolist()}.")
    return value


def whole(name: str, value: int) -> int:
    """`value` if it is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be a whole number above 0, got {value!r}.")
    return value


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value` if it is one of `allowed`."""
    if value not in allowed:
        raise ArgumentError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")
    return value


def features(name: str, value: Features) -> Features:
    """`value` if its rows are 2-D and its prompts match them."""
    if value.x.ndim != 2:
        raise ShapeError(
            f"{name}.x must be (rows, width), got shape {tuple(value.x.shape)}. "
            "Flatten each sample into one row first."
        )
    if value.cond is not None:
        rows_of(f"{name}.cond", value.cond, value.x.shape[0])
    return value


def rows_of(name: str, value: Tensor, rows: int) -> Tensor:
    """`value` if it is a (rows, width) matrix."""
    if value.ndim != 2 or value.shape[0] != rows:
        raise ShapeError(
            f"{name} must be ({rows}, width), one row per sample; got shape {tuple(value.shape)}."
        )
    return value


def memory(name: str, value: Memory) -> Memory:
    """`value` if it has a Memory's methods."""
    if isinstance(value, type):  # a class has them too
        raise ArgumentError(
            f"{name}={value.__name__} is a class, so it is no Memory: give one, "
            f"{value.__name__}(...)."
        )
    if not isinstance(value, Memory):
        raise ArgumentError(
            f"{name}={value!r} is no Memory: it needs __len__, commit(items) and select(cond)."
        )
    return value


def pair(query: Features, bank: Features) -> None:
    """Raise unless query and bank rows can be compared."""
    features("query", query)
    features("bank", bank)
    if len(bank) and query.x.shape[1] != bank.x.shape[1]:
        raise ShapeError(
            f"query rows have width {query.x.shape[1]} and bank rows {bank.x.shape[1]}; both must "
            "come from the same features of latents of the same size."
        )
    if (
        len(bank)
        and query.cond is not None
        and bank.cond is not None
        and query.cond.shape[1] != bank.cond.shape[1]
    ):
        raise ShapeError(
            f"query prompts have width {query.cond.shape[1]} and bank prompts "
            f"{bank.cond.shape[1]}; both must come from the same text encoder."
        )


def finite(name: str, value: Tensor) -> Tensor:
    """`value` if it holds neither NaN nor infinity."""
    good = torch.isfinite(value)
    if not bool(good.all()):
        row = int((~good).reshape(value.shape[0], -1).any(1).nonzero()[0])
        raise ArgumentError(
            f"{name} must be finite; row {row} of {value.shape[0]} holds NaN or infinity. "
            "Drop that sample before handing it on."
        )
    return value


def shape(name: str, value: Tensor, expected: tuple[int, ...]) -> Tensor:
    """`value` if it has exactly the expected shape."""
    if tuple(value.shape) != expected:
        raise ShapeError(f"{name} must have shape {expected}, got {tuple(value.shape)}.")
    return value


def _shown(value: object) -> str:
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


@contextmanager
def host(name: str, use: str, extra: str) -> Iterator[None]:
    """Around the import of an optional package: a failure names what to install.

    Args:
        name: of the package.
        use: what it does here, to follow its name.
        extra: of sparke, that installs it.
    """
    try:
        yield
    except ImportError as error:
        raise MissingHost(
            f'{name} {use} and cannot be imported ({error}): pip install "sparke[{extra}]", or '
            f'".[{extra}]" in a checkout'
        ) from error
