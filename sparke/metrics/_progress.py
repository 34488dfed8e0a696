"""How far a measure is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from sparke.errors import ArgumentError

Progress: TypeAlias = "Callable[[int, int], None]"
"""Called with the steps done and their total, which is 0 where only the end will tell it."""


class Steps:
    """Steps of one measure, each told to the function the caller gave, if any."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        if progress is not None and not callable(progress):
            raise ArgumentError(
                f"progress must be a function of (done, total) or None, got {progress!r}."
            )
        self._tell, self._total, self._done = progress, total, 0

    def advance(self) -> None:
        """One step more is done."""
        self._done += 1
        if self._tell is not None:
            self._tell(self._done, self._total)
