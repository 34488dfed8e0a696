"""Rows read from disk, kept on the device within a byte budget."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor


class RowCache:
    """The rows used last, by their numbers, in the dtype they are stored in.

    Its storage is allocated at the first row it keeps, and not beyond `budget` bytes. Rows used by
    the selection at hand do not push each other out: what does not fit is not kept.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._stored: dict[str, Tensor] = {}
        self._capacity = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of its storage."""
        return sum(tensor.nbytes for tensor in self._stored.values())

    def split(self, numbers: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Where in `numbers` the rows here stand, their slots, and where the others stand."""
        hits, slots, misses = [], [], []
        for at, number in enumerate(numbers):
            slot = self._slots.get(number)
            if slot is None:
                misses.append(at)
            else:
                self._slots.move_to_end(number)
                hits.append(at)
                slots.append(slot)
        return hits, slots, misses

    def read(self, slots: list[int]) -> dict[str, Tensor]:
        """Copies of the rows in these slots."""
        return {name: stored[slots] for name, stored in self._stored.items()}

    def put(self, numbers: list[int], rows: dict[str, Tensor], in_use: int) -> None:
        """Keep rows, as many as fit without those of the last `in_use` uses."""
        if not self._stored:
            self._allocate(rows)
        room = self._capacity - min(in_use, len(self._slots))
        if room <= 0:
            return
        numbers = numbers[:room]
        free = self._capacity - len(self._slots)
        slots = list(range(len(self._slots), len(self._slots) + min(free, len(numbers))))
        slots += [self._slots.popitem(last=False)[1] for _ in range(len(numbers) - len(slots))]
        for name, stored in self._stored.items():
            stored[slots] = rows[name][: len(slots)]
        self._slots.update(zip(numbers, slots, strict=True))

    def _allocate(self, rows: dict[str, Tensor]) -> None:
        per_row = sum(tensor[:1].nbytes for tensor in rows.values())
        self._capacity = self.budget // max(per_row, 1)
        if self._capacity:
            # Storage made under a host's inference mode could not be written to outside it.
            with torch.inference_mode(False):
                self._stored = {
                    name: torch.empty(
                        self._capacity, tensor.shape[1], dtype=tensor.dtype, device=tensor.device
                    )
                    for name, tensor in rows.items()
                }
