"""What the checks share: what they expect, and values to show."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from sparke.protocols import Features, Selection

COND_WIDTH = 5
WIDTH = 6
QUERIES, ROWS = 3, 7
CLOSE = 1e-3
"""Largest relative difference between float32 results that should be equal."""
HIDDEN = -math.inf


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"{message}.")


def shape(value: Tensor, expected: tuple[int, ...], what: str) -> None:
    expect(
        tuple(value.shape) == expected,
        f"{what} must have shape {expected}, got {tuple(value.shape)}",
    )
    expect(bool(value.isfinite().all()), f"{what} must be finite, got {value.tolist()}")


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    expect(ours.shape == theirs.shape, f"{what}; shapes {ours.shape} and {theirs.shape}")
    off = (ours.detach() - theirs.detach()).abs()
    allowed = CLOSE * theirs.detach().abs().max().clamp_min(1e-3) if theirs.numel() else 0.0
    expect(bool((off <= allowed).all()), f"{what}; got {ours.tolist()}, not {theirs.tolist()}")


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def features(n: int, width: int, cond_width: int | None, seed: int) -> Features:
    cond = None if cond_width is None else normal((n, cond_width), 100 + seed)
    return Features(normal((n, width), seed), cond)


def mates_of(query: Features) -> Selection:
    weight = torch.zeros(len(query), len(query)).fill_diagonal_(HIDDEN)
    return Selection(query.x, query.cond, weight, mates=True)


def weight(bank: Features) -> Tensor | None:
    return bank.log_weight if isinstance(bank, Selection) else None


def picked(cond: Tensor | None, index: Tensor | slice) -> Tensor | None:
    return None if cond is None else cond[index]


def take(bank: Features, index: Tensor | slice) -> Features:
    if not isinstance(bank, Selection) or bank.log_weight is None:
        return replace(bank, x=bank.x[index], cond=picked(bank.cond, index))
    return Selection(bank.x[index], picked(bank.cond, index), bank.log_weight[:, index], bank.mates)


def of(features: Features) -> Tensor:
    """Prompts that are known to be there."""
    if features.cond is None:
        raise AssertionError("prompts are missing.")
    return features.cond


def contains(given: Tensor, found: Tensor) -> bool:
    """Whether every row found is one of those given, up to storage in half precision."""
    off = (found[:, None] - given[None]).abs() - 0.01 * given.abs()
    return bool((off.amax(-1).amin(-1) <= 1e-3).all())


def copied(selection: Selection) -> list[Tensor | None]:
    parts = (selection.x, selection.cond, selection.log_weight)
    return [None if part is None else part.clone() for part in parts]


def alike(selection: Selection, copy: list[Tensor | None]) -> bool:
    return all(
        then is None if now is None else then is not None and torch.equal(now, then)
        for now, then in zip(copied(selection), copy, strict=True)
    )
