"""The newest samples, in a ring."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, MemoryFileError, MissingPrompts, ShapeError
from sparke.kernels import prompt_log_weight
from sparke.memory import _file
from sparke.protocols import Features, Selection, Weigh

__all__ = ["RingMemory"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COND_BANDWIDTH = 0.35


class RingMemory:
    """Keeps the newest `capacity` samples with their prompts; older ones make room.

    Storage grows with the rows, by doubling up to the capacity: a row of a video's latents takes
    megabytes, and most runs keep a few. Rows may be stored in half precision; whoever reads them
    gets float32.

    It is not shared between processes and not thread-safe.

    Args:
        capacity: rows kept, at least 1.
        dtype: of the stored rows: float32, float16 or bfloat16. Prompts are kept in float32.
        device: where rows are kept; that of the first commit if None.

    Raises:
        ArgumentError: capacity below 1 or another dtype.
    """

    def __init__(
        self,
        capacity: int = 1024,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ArgumentError(f"capacity must be a whole number above 0, got {capacity!r}.")
        if dtype not in DTYPES:
            raise ArgumentError(f"dtype must be one of {DTYPES}, got {dtype!r}.")
        self.capacity = capacity
        self.dtype = dtype
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
        x, cond = self._admit(items)
        if len(x):
            # Storage made under a host's inference mode could not be written to outside it.
            with torch.inference_mode(False):
                self._append(x, cond)

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        """All rows in float32, oldest first, weighted by their prompts.

        Args:
            cond: (b, c) prompts of the samples to come; None leaves rows unweighted.
            weigh: prompt kernel, (b, c), (n, c) -> (b, n) log weights; the published one
                (Gaussian, bandwidth 0.35, squared) if None.

        Raises:
            MissingPrompts: `cond` is given and the rows here were committed without prompts.
            ShapeError: `cond` has another width than the prompts here.
        """
        device = cond.device if cond is not None else self.device
        if self._x is None:
            return Selection(torch.zeros(0, 0, device=device), None, None)
        x, rows_cond = self._in_order(self._x).float(), None
        if self._cond is not None:
            rows_cond = self._in_order(self._cond)
        if cond is None:
            return Selection(x, rows_cond)
        if rows_cond is None:
            raise MissingPrompts(
                "this memory holds samples without prompts, so it cannot be read by prompt. Use an "
                "unconditional score, or a memory filled with prompt_embeds."
            )
        if cond.ndim != 2 or cond.shape[1] != rows_cond.shape[1]:
            raise ShapeError(
                f"prompt_embeds must be (batch, {rows_cond.shape[1]}) as those in memory, got "
                f"{tuple(cond.shape)}. One memory serves one text encoder."
            )
        x, rows_cond = x.to(cond.device), rows_cond.to(cond.device)
        query = cond.detach().float()
        if weigh is None:
            weight = prompt_log_weight(query, rows_cond, COND_BANDWIDTH)
        else:
            weight = weigh(query, rows_cond)
        return Selection(x, rows_cond, checks.shape("weigh()", weight, (len(query), len(x))))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to a safetensors file, atomically.

        Raises:
            MemoryFileError: the file cannot be written; an older one is left as it was.
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
        memory = cls(kept, dtype or (torch.float32 if x is None else x.dtype), device)
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

    def _in_order(self, ring: Tensor) -> Tensor:
        start = self._seen % self.capacity
        if self._seen <= self.capacity:
            return ring[: self._seen]
        return torch.cat([ring[start:], ring[:start]])

    def _admit(self, items: Features) -> tuple[Tensor, Tensor | None]:
        checks.features("items", items)
        x, cond = items.x.detach(), items.cond
        cond = None if cond is None else cond.detach()
        if self._x is not None:
            if x.shape[1] != self._x.shape[1]:
                raise ShapeError(
                    f"items.x has width {x.shape[1]}, this memory holds rows of width "
                    f"{self._x.shape[1]}. Latents of another size or model need their own memory."
                )
            if (cond is None) != (self._cond is None):
                raise MissingPrompts(
                    f"this memory holds samples {'with' if cond is None else 'without'} prompts "
                    f"and these come {'without' if cond is None else 'with'}. Keep them apart, in "
                    "two memories."
                )
            kept = self._cond
            if cond is not None and kept is not None and cond.shape[1] != kept.shape[1]:
                raise ShapeError(
                    f"items.cond has width {cond.shape[1]}, this memory holds prompts of width "
                    f"{kept.shape[1]}. One memory serves one text encoder."
                )
        checks.finite("items.x", x)
        checks.finite(f"items.x stored as {self.dtype}", x.to(self.dtype))
        if cond is not None:
            checks.finite("items.cond", cond.float())
        return x, cond


def _grown(rows: Tensor, size: int) -> Tensor:
    """The same rows at the head of a larger storage."""
    larger = rows.new_zeros(size, rows.shape[1])
    larger[: len(rows)] = rows
    return larger
