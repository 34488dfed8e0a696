"""One memory for several guiders of a chain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, equal

from sparke.errors import ArgumentError
from sparke.protocols import Features, Guider, Memory, Selection, Weigh

__all__ = ["SharedMemory", "stores"]


class SharedMemory:
    """A memory that several guiders of one chain read, and that takes each sample once.

    All of them commit the samples of a run; the first commit of a run is written, the others are
    found to be the same and dropped. Everything else is the memory's own. `sparke.wrap` makes one
    where its ``memory=`` goes to several guiders given by name.

    Args:
        memory: where the samples are kept.

    Raises:
        ArgumentError: while a run finishes: two guiders keep different rows of the same samples,
            which no one memory can hold side by side.

    Example:
        ```python
        memory = SharedMemory(RingMemory())
        first, second = DiversityGuider("rke", memory), DiversityGuider("vendi", memory)
        sampler = sparke.wrap(sample_euler, guider=[first, second])
        ```
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._taken: list[Features] | None = None

    def __repr__(self) -> str:
        return f"SharedMemory({self.memory!r})"

    def __len__(self) -> int:
        return len(self.memory)

    def __getattr__(self, name: str) -> Any:
        if name == "memory":  # asked for before it is set, as copy does
            raise AttributeError(name)
        return getattr(self.memory, name)

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        """The memory's own rows."""
        return self.memory.select(cond, weigh)

    def commit(self, items: Features) -> None:
        """Write `items`, unless the same run's were written already."""
        if self._taken is None:
            self.memory.commit(items)
        elif not self._taken:
            self.memory.commit(items)
            self._taken.append(items)
        elif not _same(self._taken[0], items):
            raise ArgumentError(
                "two guiders that share a memory keep different rows of the same samples "
                f"({tuple(self._taken[0].x.shape)} and {tuple(items.x.shape)}; other features, or "
                "prompts in one only). Give each a memory of its own."
            )

    @contextmanager
    def one_run(self) -> Iterator[None]:
        """While several guiders finish one run."""
        self._taken = []
        try:
            yield
        finally:
            self._taken = None


def stores(guider: Guider) -> list[Memory]:
    """The memories that a guider's finished samples go through, the last one keeps them.

    A memory with an attribute ``history`` hands them on to it, if it is not None.
    """
    found: list[Memory] = []
    memory = getattr(guider, "memory", None)
    while isinstance(memory, Memory):
        if isinstance(memory, SharedMemory):
            found.append(memory)
            memory = memory.memory
        elif hasattr(memory, "history"):
            memory = memory.history
        else:
            return [*found, memory]
    return found


def _same(first: Features, second: Features) -> bool:
    pairs = (first.x, second.x), (first.cond, second.cond)
    return all(
        a is b or (a is not None and b is not None and a.shape == b.shape and equal(a, b))
        for a, b in pairs
    )
