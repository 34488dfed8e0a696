"""Rows of a memory folder as float32 on a device, those used last from a cache there."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparke.errors import MemoryFileError
from sparke.memory import _rules
from sparke.memory._cache import RowCache
from sparke.memory._layout import Arrays, Layout
from sparke.memory._segments import Segments

CACHE_BYTES = 1 << 30
READ_BYTES = 32 << 20
"""Rows are read in parts of at most this many bytes in float32."""

ROWS_AT_ONCE = 32
"""Rows that do not lie together are converted to float32 so many at a time."""


class RowReader:
    """Reads rows by place.

    Args:
        folder: whose rows.
        cache_bytes: of rows kept on the device, in the stored dtype. None: 1 GiB on an
            accelerator, and 0 on the CPU.
    """

    def __init__(self, folder: Segments, cache_bytes: int | None) -> None:
        self._folder, self._cache_bytes = folder, cache_bytes
        self._cache: RowCache | None = None

    def read(
        self, layout: Layout, places: NDArray[np.int64], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Rows and prompts at ascending places, on the device, in float32."""
        x = torch.empty(len(places), layout.widths.x, device=device)
        width = layout.widths.cond
        cond = None if width is None else torch.empty(len(places), width, device=device)
        cache = self._cache_on(device)
        numbers: list[int] = self._folder.numbers(places).tolist()
        hits, slots, misses = cache.split(numbers)
        if hits:
            self._put(hits, cache.read(slots), x, cond)
        most = max(1, min(len(misses), READ_BYTES // (4 * layout.widths.x)))
        for part, arrays, sealed in self._folder.gather(places[misses], most):
            where = misses[part]
            stored = self._stored(layout, arrays, places[where], device)
            self._put(where, stored, x, cond)
            if sealed:  # a journal's rows may yet be taken back, if the disk refuses them
                used = len(hits) + part.start
                cache.put([numbers[i] for i in where], stored, in_use=used)
        return x, cond

    def _stored(
        self, layout: Layout, arrays: Arrays, places: NDArray[np.int64], device: torch.device
    ) -> dict[str, Tensor]:
        stored = {name: layout.tensor(name, a).to(device) for name, a in arrays.items()}
        for name, tensor in stored.items():
            # A scale that is finite itself may still take its row beyond float32.
            largest = tensor * 127 if name == "scale" else tensor
            if tensor.is_floating_point() and not _rules.all_finite(largest):
                raise MemoryFileError(
                    f"{self._folder.name_of(int(places[0]))} is damaged: {name!r} holds NaN or "
                    "infinity. Restore it from a copy, or delete it to go on without its rows."
                )
        return stored

    @staticmethod
    def _put(at: list[int], stored: dict[str, Tensor], x: Tensor, cond: Tensor | None) -> None:
        """Write rows to ascending places of the selection."""
        run = at[-1] - at[0] + 1 == len(at)
        step = len(at) if run else ROWS_AT_ONCE
        for low in range(0, len(at), step):
            rows = {name: part[low : low + step].to(x.device) for name, part in stored.items()}
            part = at[low : low + step]
            where = slice(part[0], part[-1] + 1) if run else torch.tensor(part, device=x.device)
            x[where] = rows["x"] if run else rows["x"].float()
            if cond is not None:
                cond[where] = rows["cond"].float()
            if "scale" in rows:
                x[where] *= rows["scale"]

    def _cache_on(self, device: torch.device) -> RowCache:
        if self._cache is None:
            budget = self._cache_bytes
            if budget is None:
                budget = 0 if device.type == "cpu" else CACHE_BYTES
            self._cache = RowCache(budget)
        return self._cache
