"""The newest samples, in a ring."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import MemoryFileError
from sparke.memory import _file, _gate, _rules
from sparke.protocols import Features, Selection, Weigh

__all__ = ["RingMemory"]


class RingMemory:
    """Keeps the newest `capacity` samples with their prompts; older ones make room.

    Storage grows with the rows, by doubling up to the capacity: a row of a video's latents takes
    megabytes, and most runs keep a few. Rows may be stored in half precision; whoever reads them
    gets float32.

    Asked by prompt, it hands out the rows that can matter: rows are left out, smallest prompt
    weights first, as long as for every query their weights sum to at most ``tolerance/2`` of all
    its weights together (of one row, where these are fewer). The pull of an order-2 score, crowding
    times distance to the weighted mean, then changes by at most `tolerance` times the diameter of
    the bank, provided that rows of other prompts are on average no nearer than the rest; the
    derivation is in ``sparke/memory/_gate.py``. The newest 256 rows and those of the same prompt
    are always kept, so calibrated bandwidths do not change.

    It is not shared between processes and not thread-safe.

    Args:
        capacity: rows kept, at least 1.
        dtype: of the stored rows: float32, float16 or bfloat16. Prompts are kept in float32.
        device: where rows are kept; that of the first commit if None.
        tolerance: share of the prompt weights that may be left out, twice; 0 hands out every row.

    Raises:
        ArgumentError: capacity below 1, another dtype, tolerance not in [0, 1).
    """

    def __init__(
        self,
        capacity: int = 1024,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        tolerance: float = _gate.TOLERANCE,
    ) -> None:
        self.capacity = checks.whole("capacity", capacity)
        self.dtype = _rules.check_dtype("dtype", dtype, _rules.DTYPES)
        self.tolerance = _gate.check_tolerance(tolerance)
        self.device = None if device is None else torch.device(device)
        self.clear()

    def clear(self) -> None:
        """Forget everything, the width of the rows included."""
        self._x: Tensor | None = None
        self._cond: Tensor | None = None
        self._seen = 0

    def __len__(self) -> int:
        return min(self._seen, self.capacity)

    def __repr__(self) -> str:
        width = None if self._x is None else self._x.shape[1]
        return (
            f"RingMemory({len(self)} of {self.capacity} rows, width {width}, {self.dtype}, "
            f"device={self.device})"
        )

    @property
    def features(self) -> Features:
        """A float32 copy of all rows, oldest first."""
        selection = self.select()
        cond = selection.cond
        return Features(selection.x.clone(), None if cond is None else cond.clone())

    def commit(self, items: Features) -> None:
        """Append finished samples, (n, d) rows with (n, c) prompts or none.

        Raises:
            ShapeError: rows or prompts of another width than those here, or not 2-D.
            ArgumentError: a row is not finite, or too large for the storage dtype.
            MissingPrompts: rows here have prompts and these do not, or the other way round.

        Nothing is written when an error is raised.
        """
        x, cond = _rules.admit(items, self._widths, self.dtype)
        if len(x):
            # Storage made under a host's inference mode could not be written to outside it.
            with torch.inference_mode(False):
                self._append(x, cond)

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        """The rows that matter for these prompts in float32, oldest first, with log weights.

        Args:
            cond: (b, c) prompts of the samples to come; None hands out every row, unweighted.
            weigh: prompt kernel, (b, c), (n, c) -> (b, n) log weights; the published one
                (Gaussian, bandwidth 0.35, squared) if None. It may be called on a part of the rows
                at a time.

        Raises:
            MissingPrompts: `cond` is given and the rows here were committed without prompts.
            ShapeError: `cond` has another width than the prompts here.
        """
        device = cond.device if cond is not None else self.device
        if self._x is None:
            return Selection(torch.zeros(0, 0, device=device), None, None)
        kept = self._cond
        if cond is None:
            rows_cond = None if kept is None else self._in_order(kept)
            return Selection(self._in_order(self._x).float(), rows_cond)
        query = _rules.asked(cond, None if kept is None else kept.shape[1])
        assert kept is not None
        weight = _gate.log_weights(query, self._prompts(kept), weigh, len(self))
        index = _gate.keep(weight, self.tolerance)
        if index is None:
            x, rows_cond = self._in_order(self._x), self._in_order(kept)
        else:
            slots = ((index + self._oldest) % self.capacity).to(self._x.device)
            x, rows_cond = self._x[slots], kept[slots]
            weight = weight[:, index]
        return Selection(x.to(cond.device).float(), rows_cond.to(cond.device), weight)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to a safetensors file, atomically.

        An older memory file is replaced, where a symbolic link leads to one as well; any other
        file is not.

        Raises:
            MemoryFileError: the file cannot be written, or is no memory; what was there still is.
        """
        tensors = {}
        if self._x is not None:
            tensors["x"] = self._in_order(self._x)
        if self._cond is not None:
            tensors["cond"] = self._in_order(self._cond)
        _file.write(path, tensors, {"capacity": str(self.capacity), "kind": "ring"})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tolerance: float = _gate.TOLERANCE,
    ) -> RingMemory:
        """A new memory with the rows of a file, by default as it was saved.

        With a smaller `capacity` the newest rows are kept.

        Raises:
            MemoryFileError: not there, damaged, or no sparke memory.
        """
        tensors, meta = _file.read(path)
        x = tensors.get("x")
        rows = 0 if x is None else len(x)
        kept = capacity
        if kept is None:
            told = meta.get("capacity", "")
            if not told.isdecimal() or len(told) > 18 or int(told) < max(rows, 1):
                raise MemoryFileError(
                    f"{path} is damaged: it holds {rows} rows and its header tells a capacity of "
                    f"{told!r}. Give capacity= to load the rows all the same."
                )
            kept = int(told)
        stored = torch.float32 if x is None else x.dtype
        memory = cls(kept, dtype or stored, device, tolerance=tolerance)
        if x is not None:
            try:
                memory.commit(Features(x, tensors.get("cond")))
            except (RuntimeError, OverflowError, TypeError) as error:  # torch's, out of memory
                raise MemoryFileError(
                    f"{path} holds {rows} rows of width {x.shape[1]}, and there is no room for "
                    f"them: {error}. Give a smaller capacity=."
                ) from error
        return memory

    def _append(self, x: Tensor, cond: Tensor | None) -> None:
        needed = min(self._seen + len(x), self.capacity)
        if self._x is None:
            self.device = self.device or x.device
            self._x = torch.zeros(0, x.shape[1], dtype=self.dtype, device=self.device)
            if cond is not None:
                self._cond = torch.zeros(0, cond.shape[1], device=self.device)
        if needed > len(self._x):
            rows = min(self.capacity, max(needed, 2 * len(self._x)))
            self._x = _grown(self._x, rows)
            self._cond = None if self._cond is None else _grown(self._cond, rows)
        elif self._seen <= self.capacity < self._seen + len(x):
            # From here on rows are overwritten: selections handed out as views keep the old copy.
            self._x = self._x.clone()
            self._cond = None if self._cond is None else self._cond.clone()
        slots = torch.arange(self._seen, self._seen + len(x), device=self.device)
        slots = slots[-self.capacity :] % self.capacity
        self._x[slots] = x[-self.capacity :].to(self._x)
        if self._cond is not None and cond is not None:
            self._cond[slots] = cond[-self.capacity :].to(self._cond)
        self._seen += len(x)

    @property
    def _widths(self) -> _rules.Widths | None:
        if self._x is None:
            return None
        return _rules.Widths(self._x.shape[1], None if self._cond is None else self._cond.shape[1])

    @property
    def _oldest(self) -> int:
        """The slot of the oldest row."""
        return 0 if self._seen <= self.capacity else self._seen % self.capacity

    def _prompts(self, cond: Tensor) -> Iterator[Tensor]:
        """Prompts in chunks, oldest first, without a copy of all of them."""
        rows = _gate.chunk_rows(cond.shape[1])
        if len(self) <= rows:
            yield self._in_order(cond)
            return
        ends = [(self._oldest, min(self._seen, self.capacity)), (0, self._oldest)]
        for start, stop in ends:
            for low in range(start, stop, rows):
                yield cond[low : min(low + rows, stop)]

    def _in_order(self, ring: Tensor) -> Tensor:
        if self._seen <= self.capacity:
            return ring[: self._seen]
        # A copy even where they lie in order: from now on slots are written over.
        return torch.cat([ring[self._oldest :], ring[: self._oldest]])


def _grown(rows: Tensor, size: int) -> Tensor:
    """The same rows at the head of a larger storage."""
    larger = rows.new_zeros(size, rows.shape[1])
    larger[: len(rows)] = rows
    return larger
