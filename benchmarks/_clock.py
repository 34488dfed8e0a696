"""Where the time of a run goes, and how much memory it takes."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Clock:
    """Splits time among parts; a part that runs inside another does not count for the outer one.

    On a CPU it is the time this process computed, which other processes cannot stretch; all threads
    count, waiting ones too, so one thread tells the most. On CUDA it is wall time between waits.
    """

    def __init__(self, device: str, *, on: bool = True) -> None:
        self.spent: list[tuple[str, float]] = []
        self.on, self._cuda = on, device.startswith("cuda")
        self._open: list[tuple[str, float]] = []
        self._last = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        self._turn()
        self._open.append((name, 0.0))
        try:
            yield
        finally:
            self._turn()
            self.spent.append(self._open.pop())

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def of(self, name: str) -> list[float]:
        return [seconds for part, seconds in self.spent if part == name]

    def _turn(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter() if self._cuda else time.process_time()
        if self._open:
            name, seconds = self._open[-1]
            self._open[-1] = (name, seconds + now - self._last)
        self._last = now


def reset_peak(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what the run before has freed counts no more
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int | None:
    """Bytes: allocated tensors on CUDA, the resident set (VmHWM) on Linux, else unknown."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
