"""Times taken side by side, and the limit they are compared with: reading the rows once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks._progress import shown

Name = TypeVar("Name")


def side_by_side(runs: Mapping[Name, Callable[[], object]], repeats: int) -> dict[Name, float]:
    """Least seconds of each of `runs`, taken in turns so that a busy machine delays all alike."""
    best: dict[Name, float] = {}
    for _ in shown(range(repeats + 1), "timing"):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            took = time.perf_counter() - start
            best[name] = min(best.get(name, took), took)
    return best


def reading(bank: Tensor) -> Callable[[], Tensor]:
    """The limit: a plain sum over the bank."""
    return lambda: bank.sum()


def multiply_rate(repeats: int = 5) -> float:
    """Floating-point operations a second of a large float32 product."""
    a = torch.randn(1536, 1536)
    return 2 * 1536**3 / side_by_side({"": lambda: a @ a}, repeats)[""]


def bank_of(rows: int, width: int, seed: int = 0) -> Tensor:
    """(rows, width) made from a thousand normal rows, rolled, since memory is what is measured."""
    base = torch.randn(min(rows, 1000), width, generator=torch.Generator().manual_seed(seed))
    bank = torch.empty(rows, width)
    for number, part in enumerate(bank.split(len(base))):
        part.copy_(base[: len(part)].roll(number, 1))
    return bank
