"""Bars for what takes more than seconds: on stderr, on a terminal only, beside what is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
Job = TypeVar("Job")
Found = TypeVar("Found")


def shown(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """The items, and a bar of how many have been taken.

    It is drawn twice a second, so that what is timed meanwhile is left in peace.
    """
    console = Console(stderr=True)
    return track(
        items,
        what,
        total=total,
        console=console,
        refresh_per_second=2,
        transient=True,
        disable=not console.is_terminal,
    )


def in_processes(
    run: Callable[[Job], Found], todo: Sequence[Job], processes: int, chunksize: int = 2
) -> dict[Job, Found]:
    """What `run` makes of each job, some at a time."""
    with ProcessPoolExecutor(processes) as pool:
        found = shown(pool.map(run, todo, chunksize=chunksize), "running", len(todo))
        return dict(zip(todo, found, strict=True))
