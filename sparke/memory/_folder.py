"""A memory folder: which files there are, what they add up to, and how rows are appended."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparke import _tensor_file
from sparke.errors import MemoryFileError
from sparke.memory import _journal, _layout, _shards
from sparke.memory._journal import Journal
from sparke.memory._layout import Arrays, Layout
from sparke.memory._segments import Segment, Segments
from sparke.memory._shards import Shard

if TYPE_CHECKING:
    from filelock import FileLock

TAIL = re.compile(r"tail-(\d{16})\.journal")
LOCK = "lock"
ATTEMPTS = 8
"""A look at the folder is repeated when a writer seals a shard in the middle of it."""


class MemoryFileWarning(UserWarning):
    """A memory folder held remains of a killed writer, or lacks rows it once had."""


class Folder(Segments):
    """The rows of a folder as last looked at: shards in order, then the journal."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__()
        self.path, self.timeout = path, timeout
        self.layout: Layout | None = None
        self._gaps: set[tuple[int, int]] = set()
        try:
            path.mkdir(exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise MemoryFileError(
                f"cannot make the folder {path}: {error}. Give one that is there, or a new name in "
                "one that is."
            ) from error
        self._own(path)
        self._lock = _file_lock(path / LOCK)

    @contextlib.contextmanager
    def locked(self, timeout: float | None = None) -> Iterator[None]:
        """Hold the folder's lock; it is freed by the system when its holder is killed."""
        from filelock import Timeout

        lock = self.path / LOCK
        try:
            # Opening a lock empties the file: not one that a symbolic link of others leads to.
            if os.path.lexists(lock):
                _tensor_file.regular(lock, link=False)
            self._lock.acquire(self.timeout if timeout is None else timeout)
        except Timeout as error:
            raise MemoryFileError(
                f"another process has held {lock} for {self.timeout:g} s. Wait for it, "
                "or give a longer timeout="
            ) from error
        except (OSError, ValueError) as error:
            raise MemoryFileError(
                f"cannot lock {lock}: {error}. Delete it if nobody writes here now."
            ) from error
        try:
            yield
        finally:
            self._lock.release()

    def refresh(self) -> None:
        """See what was committed since, here or by other processes.

        Raises:
            MemoryFileError: a file is damaged.
        """
        for left in reversed(range(ATTEMPTS)):
            with contextlib.suppress(*([FileNotFoundError] if left else [])):
                if self._look(last=not left):
                    return

    def recover(self) -> None:
        """Remove and report what killed writers left behind; the lock must be held."""
        for name in self._names():
            path = self.path / name
            if name.endswith(_shards.PARTIAL):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise MemoryFileError(f"cannot remove {path}: {error}") from error
                _warn(f"{path} was left half-written by a killed writer, and was removed.")
            elif (match := TAIL.fullmatch(name)) and int(match[1]) < self._stop(self.shards):
                with contextlib.suppress(OSError):  # open elsewhere; the next writer tries again
                    path.unlink()
        journal = self.journal
        if journal is not None and journal.torn:
            torn = journal.torn
            try:
                os.truncate(journal.path, journal.end)
            except OSError as error:
                raise MemoryFileError(f"cannot mend {journal.path}: {error}") from error
            _warn(
                f"{journal.path} ended in {torn} bytes of a batch half-written by a killed writer; "
                "they were cut off."
            )

    def start(self, layout: Layout) -> None:
        """Write the header of a new folder; the lock must be held."""
        with _shards.replacing(self.path / _layout.HEADER) as partial:
            partial.write_bytes(layout.write())
        self.layout = layout

    def append(self, arrays: Arrays, shard_bytes: int) -> None:
        """Commit one batch, whole or not at all; the lock must be held and the view fresh.

        Raises:
            MemoryFileError: it could not be written; nothing was.
        """
        layout, journal = self.layout, self.journal
        assert layout is not None
        tail = 0 if journal is None else journal.rows
        first = self._stop(self.segments)
        rows = len(arrays["x"])
        if (
            tail + rows < _journal.MOST_ROWS
            and (tail + rows) * layout.record.itemsize < shard_bytes
        ):
            path = self.path / f"tail-{first - tail:016d}.journal"
            end = 0 if journal is None else journal.end
            _journal.append(path, _journal.pack(layout, arrays, first), end)
        else:
            if journal is not None and tail:
                old = journal.arrays()
                arrays = {key: np.concatenate([old[key], arrays[key]]) for key in arrays}
            _shards.write(self.path, layout, arrays, first - tail)
            if journal is not None:
                with contextlib.suppress(OSError):  # superseded by the shard in any case
                    journal.path.unlink()
        self.refresh()

    def _look(self, *, last: bool) -> bool:
        """One look; False if a writer was seen at work in the middle of it."""
        names = self._names()
        if self.layout is None:
            if _layout.HEADER not in names:
                if any(_shards.NAME.fullmatch(n) or TAIL.fullmatch(n) for n in names):
                    raise MemoryFileError(
                        f"{self.path / _layout.HEADER} is gone. Restore it from a copy, or from "
                        "another memory of the same model and dtype."
                    )
                return True
            self.layout = _layout.read(self.path / _layout.HEADER)
        known = {shard.path.name: shard for shard in self.shards}
        shards = [
            known.get(name) or _shards.open_shard(self.path / name, self.layout)
            for name in sorted(filter(_shards.NAME.fullmatch, names))
        ]
        tails = [int(match[1]) for match in map(TAIL.fullmatch, names) if match]
        stop = self._stop(shards)
        first = max([stop, *tails])
        gaps = self._gaps_of(shards, first)
        if gaps - self._gaps and not last:
            return False  # a shard may have been sealed between two entries of the listing
        self._follow(first if first in tails else None)
        self.shards = shards
        for low, high in sorted(gaps - self._gaps):
            _warn(f"{self.path} lacks rows {low} to {high - 1}; going on without them.")
        self._gaps = gaps
        return True

    def _follow(self, first: int | None) -> None:
        """Bring the journal up to date, or turn to another, or to none."""
        journal = self.journal
        if journal is None or journal.first != first:
            journal = None
            if first is not None and self.layout is not None:
                path = self.path / f"tail-{first:016d}.journal"
                journal = Journal(path, first, self.layout)
        if journal is not None:
            journal.extend()
        if self.journal is not None and self.journal is not journal:
            self.journal.close()
        self.journal = journal

    def _gaps_of(self, shards: list[Shard], stop: int) -> set[tuple[int, int]]:
        gaps, at = set(), 0
        for shard in shards:
            if shard.first < at:
                raise MemoryFileError(
                    f"{shard.path} holds rows that another shard of the folder holds too. Move out "
                    "the one that does not belong there."
                )
            if shard.first > at:
                gaps.add((at, shard.first))
            at = shard.first + shard.rows
        return gaps | {(at, stop)} if stop > at else gaps

    @staticmethod
    def _stop(segments: list[Shard] | list[Segment]) -> int:
        return segments[-1].first + segments[-1].rows if segments else 0

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.path)  # noqa: PTH208  names are all that is needed
        except OSError as error:
            raise MemoryFileError(f"cannot read the folder {self.path}: {error}") from error

    def _own(self, path: Path) -> None:
        names = self._names()
        ours = (_layout.HEADER, LOCK)
        strange = [n for n in names if n not in ours and not n.endswith(_shards.PARTIAL)]
        rows = [n for n in strange if _shards.NAME.fullmatch(n) or TAIL.fullmatch(n)]
        if strange and not rows and _layout.HEADER not in names:
            raise MemoryFileError(
                f"{path} is no memory folder and holds other files, such as {strange[0]!r}. Give a "
                "folder of its own."
            )


def _warn(message: str) -> None:
    warnings.warn(message, MemoryFileWarning, stacklevel=4)


def _file_lock(path: Path) -> FileLock:
    from filelock import FileLock

    return FileLock(path)
