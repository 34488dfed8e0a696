"""Kernels over all pairs of rows, a tile at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import MissingPrompts
from sparke.kernels import KERNELS, gaussian, kernel_matrix, normalize
from sparke.metrics._bandwidth import of_tables
from sparke.metrics._progress import Steps
from sparke.metrics._rows import Rows, Table, table


class Tile(NamedTuple):
    """Some rows of one table against some of another, or of its own."""

    rows: slice
    columns: slice
    times: int
    """How often it counts: twice where its mirror image is left out."""
    a: Tensor
    b: Tensor


def tiles(x: Table, y: Table | None = None) -> Iterator[Tile]:
    """All pairs of x and y; without y, the upper triangle of x with itself."""
    for i, rows in enumerate(x.slices()):
        a = x.read(rows)
        if y is not None:
            for columns in y.slices():
                yield Tile(rows, columns, 1, a, y.read(columns).to(a.device))
            continue
        yield Tile(rows, rows, 1, a, a)
        for columns in x.slices()[i + 1 :]:
            yield Tile(rows, columns, 2, a, x.read(columns))


def count(x: Table, y: Table | None = None) -> int:
    """How many tiles that makes."""
    n = len(x.slices())
    return n * (n + 1) // 2 if y is None else n * len(y.slices())


def fill(
    out: Tensor, x: Table, y: Table | None, value: Callable[[Tile], Tensor], steps: Steps
) -> None:
    """Write the (n, m) values of all pairs into `out`, a step a tile."""
    for tile in tiles(x, y):
        block = value(tile)
        out[tile.rows, tile.columns] = block
        if tile.times == 2:
            out[tile.columns, tile.rows] = block.mT
        steps.advance()


def square_sums(
    x: Table, values: Callable[[Tile], tuple[Tensor, ...]], steps: Steps
) -> list[float]:
    """Over all pairs, the sum of the square of each value; a step a tile."""
    total: Tensor | float = 0.0
    for tile in tiles(x):
        total = total + tile.times * torch.stack([v.square().sum() for v in values(tile)])
        steps.advance()
    return torch.as_tensor(total).tolist()


def check_kernel(kernel: str, bandwidth: float | None) -> None:
    """Raise unless both are allowed."""
    checks.choice("kernel", kernel, KERNELS)
    if bandwidth is not None:
        checks.positive("bandwidth", bandwidth)


class Kernel:
    """The kernel between rows of tables, which are checked and prepared for it.

    Args:
        name: gaussian or cosine.
        bandwidth: of the Gaussian; None: by the rule, of all tables together.
        tables: what is compared. For the Gaussian their common mean is taken off.
    """

    def __init__(self, name: str, bandwidth: float | None, *tables: Table) -> None:
        check_kernel(name, bandwidth)
        self.name, self.bandwidth = name, 1.0
        if name == "cosine":
            for each in tables:
                each.checked(zeros=False)
            return
        device, rows = tables[0].device, sum(each.n for each in tables)
        means = [each.mean().to(device) * (each.n / rows) for each in tables]
        for each in tables:
            each.less(sum(means[1:], means[0]))
        self.bandwidth = of_tables(*tables) if bandwidth is None else float(bandwidth)

    def __call__(self, tile: Tile) -> Tensor:
        return kernel_matrix(tile.a, tile.b, self.name, self.bandwidth)


class PromptKernel:
    """The Gaussian kernel between L2-normalised prompts, one for each row of a table."""

    def __init__(self, measure: str, value: Rows | None, x: Table, bandwidth: float) -> None:
        self.bandwidth = checks.positive("cond_bandwidth", bandwidth)
        if value is None:
            raise MissingPrompts(
                f"{measure} compares samples at equal prompts, but prompt_embeds is None. Give one "
                f"row per sample, or use {measure.removeprefix('cond_')}."
            )
        self._prompts = table("prompt_embeds", value, measure, x.n, x.device).checked()

    def __call__(self, tile: Tile) -> Tensor:
        a, b = (normalize(self._prompts.read(rows)) for rows in (tile.rows, tile.columns))
        return gaussian(a, b, self.bandwidth)

    def with_joint(self, tile: Tile, compare: Kernel) -> tuple[Tensor, Tensor]:
        """The kernel of prompts, and times that of samples."""
        k_t = self(tile)
        return k_t, k_t * compare(tile)
