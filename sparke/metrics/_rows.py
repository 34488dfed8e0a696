"""Features read a block at a time: nothing is ever copied whole to float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, ShapeError

Array: TypeAlias = "Tensor | np.ndarray[Any, Any]"
"""A matrix with a row for each sample: a tensor, or an array such as `np.memmap`."""
Rows: TypeAlias = "Array | Iterable[Array]"
"""A matrix, or chunks of one, read once and in turn."""

BLOCK = 512
"""Rows read at once; sums over pairs are taken in tiles of this many rows squared."""
_NONE = torch.zeros((), dtype=torch.float64)
NUMBERS = 1 << 24
"""Wide rows are read fewer at once, so that a block stays below this many numbers."""


class Table:
    """(n, width) real numbers, checked, of which any rows can be read at any time.

    Args:
        name: of the argument, for errors.
        value: the matrix.
        rows: how many there must be, where another argument says so.
        device: on which blocks are wanted; by default that of the matrix.
    """

    def __init__(
        self, name: str, value: Array, rows: int | None = None, device: torch.device | None = None
    ) -> None:
        array = value.detach() if isinstance(value, Tensor) else _array(name, value)
        shape = tuple(array.shape)
        if rows is not None:
            checks.rows_of(name, torch.empty(shape, device="meta"), rows)
        if len(shape) != 2:
            raise ShapeError(
                f"{name} must be (rows, width), got shape {shape}. "
                "Flatten each sample into one row first."
            )
        if not shape[0] * shape[1]:
            raise ArgumentError(f"{name} is empty, got shape {shape}.")
        if array.is_complex() if isinstance(array, Tensor) else array.dtype.kind not in "fiub":
            raise ArgumentError(f"{name} must hold real numbers, got dtype {array.dtype}.")
        self.name, self._array, self._offset = name, array, _NONE
        self.n, self.width = shape
        self.device = device or _device(array)
        self.block = max(1, min(BLOCK, NUMBERS // self.width))

    def read(self, rows: slice | Tensor) -> Tensor:
        """Rows by a slice or by their indices, in float64."""
        if isinstance(self._array, Tensor):
            where = rows.to(self._array.device) if isinstance(rows, Tensor) else rows
            found = self._array[where].to(self.device).double()
        else:
            index = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
            copy = np.array(self._array[index], dtype=np.float64)
            found = torch.from_numpy(copy).to(self.device)
        return found - self._offset

    def slices(self) -> list[slice]:
        """All rows, in blocks."""
        return [slice(i, min(i + self.block, self.n)) for i in range(0, self.n, self.block)]

    def blocks(self, *, zeros: bool = True) -> Iterator[Tensor]:
        """All rows in turn, each checked: finite, and unless `zeros` not a row of zeros."""
        for rows in self.slices():
            numbers = range(rows.start, rows.stop)
            yield _checked(self.name, self.read(rows), numbers, self.n, zeros)

    def strided(self, most: int) -> Tensor:
        """At most so many rows at even strides, each checked; no others are read."""
        if self.n <= most:
            return _checked(self.name, self.read(slice(None)), range(self.n), self.n, True)
        numbers = torch.arange(most) * self.n // most
        return _checked(self.name, self.read(numbers), numbers.tolist(), self.n, True)

    def checked(self, *, zeros: bool = True) -> Table:
        """This table, of which every row was looked at once."""
        for _ in self.blocks(zeros=zeros):
            pass
        return self

    def mean(self) -> Tensor:
        """(width,) mean of the rows, each checked."""
        return sum((block.sum(0) for block in self.blocks()), _NONE) / self.n

    def less(self, offset: Tensor) -> None:
        """From now on read rows less this: distances stay, and lose fewer digits."""
        self._offset = offset.to(self.device)


def table(
    name: str,
    value: Rows,
    measure: str,
    rows: int | None = None,
    device: torch.device | None = None,
) -> Table:
    """A matrix whose rows `measure` reads more than once."""
    if in_chunks(value):
        raise ArgumentError(
            f"{measure} compares pairs of rows and reads {name} more than once, but it was given "
            "in chunks, which are read once. Put them in one tensor or array (np.memmap where "
            'memory is short), or use a measure that adds up: kernel="cosine" or random_features, '
            "where there are such options."
        )
    return Table(name, value, rows, device)  # type: ignore[arg-type]


def same_width(first: Table, second: Table) -> None:
    """Raise unless the rows of both can be compared."""
    if first.width != second.width:
        raise widths(first.name, first.width, second.name, second.width)


def stream(name: str, value: Rows, *, zeros: bool) -> Iterator[Tensor]:
    """Blocks of a matrix, or of its chunks in turn, in float64, each row checked."""
    if not in_chunks(value):
        yield from Table(name, value).blocks(zeros=zeros)  # type: ignore[arg-type]
        return
    width = None
    for number, chunk in enumerate(value):
        part = _chunk(name, number, chunk)
        width = width or part.width
        if part.width != width:
            raise widths(f"chunk 0 of {name}", width, part.name, part.width)
        yield from part.blocks(zeros=zeros)
    if width is None:
        raise ArgumentError(f"{name} is empty: it yielded no chunk.")


def count_blocks(sets: dict[str, Rows], further: int = 0) -> int:
    """How many blocks `stream` will yield, and further steps; 0 where only the end will tell."""
    total = further
    for name, value in sets.items():
        if not in_chunks(value):
            total += len(Table(name, value).slices())  # type: ignore[arg-type]
            continue
        if not isinstance(value, (list, tuple)):
            return 0
        total += sum(len(_chunk(name, i, part).slices()) for i, part in enumerate(value))
    return total


def by_covariance(sets: dict[str, Rows]) -> bool:
    """Whether the covariance of the rows is smaller than the matrix of all pairs.

    It is the only way for rows that come in chunks.
    """
    if any(map(in_chunks, sets.values())):
        return True
    tables = [Table(name, value) for name, value in sets.items()]  # type: ignore[arg-type]
    return tables[0].width < sum(each.n for each in tables)


def in_chunks(value: object) -> bool:
    """Whether rows come in chunks, to be read once, and not as one matrix."""
    if isinstance(value, (Tensor, np.ndarray, str, bytes)) or not isinstance(value, Iterable):
        return False
    if isinstance(value, (list, tuple)):  # of matrices, or of rows
        return bool(value) and all(getattr(item, "ndim", None) == 2 for item in value)
    return not hasattr(value, "__array__")


def _chunk(name: str, number: int, value: Array) -> Table:
    return Table(f"chunk {number} of {name}", value)


def _array(name: str, value: object) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{name} must hold real numbers in rows of one width: {error}"
        ) from None


def _device(array: Array) -> torch.device:
    if isinstance(array, Tensor) and array.device.type != "mps":  # which has no float64
        return array.device
    return torch.device("cpu")


def _checked(name: str, block: Tensor, numbers: Sequence[int], n: int, zeros: bool) -> Tensor:
    for what, good in (
        (name, torch.isfinite(block).all(1)),
        (f"squared length of the rows of {name}", torch.isfinite(block.square().sum(1))),
    ):
        if not bool(good.all()):
            raise ArgumentError(
                f"{what} must be finite; row {_first(~good, numbers)} of {n} holds NaN or "
                "infinity. Drop that sample before handing it on."
            )
    if not zeros and bool((zero := (block == 0).all(1)).any()):
        raise ArgumentError(
            f"{name} row {_first(zero, numbers)} of {n} is zero and has no cosine to anything. "
            "Drop that sample, or use the Gaussian kernel."
        )
    return block


def _first(wrong: Tensor, numbers: Sequence[int]) -> int:
    return numbers[int(wrong.nonzero()[0])]


def widths(name: str, width: int, other: str, other_width: int) -> ShapeError:
    """The error of two arguments whose rows cannot be compared."""
    return ShapeError(
        f"{other} has rows of width {other_width} and {name} of width {width}; both must come "
        "from the same encoder."
    )
