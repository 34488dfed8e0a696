"""The rows of a memory folder across its files, by place and by number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparke.memory._journal import Journal
from sparke.memory._layout import Arrays
from sparke.memory._shards import Shard

Segment: TypeAlias = Shard | Journal


class Segments:
    """Sealed shards in order, then the journal.

    Rows have numbers for good, counted from the first ever committed; places are counted among the
    rows that are there.
    """

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self.journal: Journal | None = None

    def __len__(self) -> int:
        return sum(segment.rows for segment in self.segments)

    @property
    def segments(self) -> list[Segment]:
        """Everything that holds rows, oldest first."""
        return [*self.shards, *([] if self.journal is None else [self.journal])]

    def gather(
        self, places: NDArray[np.int64], most: int, only: str | None = None
    ) -> Iterator[tuple[slice, Arrays, bool]]:
        """The rows at ascending places, at most `most` at a time, until the next are asked for.

        With where they go, and whether they are sealed for good. `only` names the one column read.
        """
        buffers: Arrays = {}  # one for all parts: blocks of changing sizes would litter the heap
        start = 0
        for segment in self.segments:
            low, high = np.searchsorted(places, [start, start + segment.rows]).tolist()
            for at in range(low, high, most):
                part = slice(at, min(at + most, high))
                local = places[part] - start
                rows = {}
                for name, view in segment.arrays(local, only).items():
                    if name not in buffers:
                        buffers[name] = np.empty((most, view.shape[1]), view.dtype)
                    rows[name] = buffers[name][: len(local)]
                    if view.flags.c_contiguous:
                        np.take(view, local, 0, rows[name], "clip")  # "raise" would buffer it all
                    else:
                        rows[name][...] = view[local]
                yield part, rows, isinstance(segment, Shard)
            start += segment.rows

    def column(self, name: str, rows: int) -> Iterator[NDArray[Any]]:
        """Copies of one column, oldest first, at most `rows` rows at a time."""
        for segment in self.segments:
            for low in range(0, segment.rows, rows):
                # Mapped anew for each part: pages read are given back with the mapping.
                yield np.array(segment.arrays()[name][low : low + rows])

    def numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the rows at these places."""
        segments = self.segments
        ends = np.cumsum([segment.rows for segment in segments])
        shift = np.array([s.first - (end - s.rows) for s, end in zip(segments, ends, strict=True)])
        numbers: NDArray[np.int64] = places + shift[np.searchsorted(ends, places, side="right")]
        return numbers

    def places(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of the rows of these numbers, ascending; of those that are still there."""
        found = [np.empty(0, np.int64)]
        start = 0
        for segment in self.segments:
            here = numbers[(numbers >= segment.first) & (numbers < segment.first + segment.rows)]
            found.append(here - segment.first + start)
            start += segment.rows
        return np.sort(np.concatenate(found))

    def name_of(self, place: int) -> Path:
        """The file of the row at a place."""
        for segment in self.segments:
            if place < segment.rows:
                return segment.path
            place -= segment.rows
        raise IndexError(place)
