"""The tail of a memory folder: small commits as fixed-size, checksummed records of one file."""

from __future__ import annotations

import contextlib
import os
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparke import _tensor_file
from sparke.errors import MemoryFileError
from sparke.memory._layout import Arrays, Layout
from sparke.memory._shards import flush_folder

MAGIC = b"SPK1"
MOST_ROWS = 8192
"""A journal of this many rows is sealed, however small they are: it is read row by row."""
CHECKED_FROM = 8
"""Bytes of a record before what its checksum covers: the magic and the checksum itself."""


def pack(layout: Layout, arrays: Arrays, first: int) -> bytes:
    """The records of one batch whose first row has the number `first`."""
    rows = len(arrays["x"])
    records = np.zeros(rows, layout.record)
    records["magic"] = MAGIC
    records["row"] = np.arange(first, first + rows)
    records["batch"], records["rows"] = first, rows
    for name, array in arrays.items():
        records[name] = array
    size, data = layout.record.itemsize, records.view(np.uint8)
    for i in range(rows):
        records["crc"][i] = zlib.crc32(data[i * size + CHECKED_FROM : (i + 1) * size].data)
    return records.tobytes()


def parse(layout: Layout, data: bytes, first: int) -> int | None:
    """How many records at the start of `data` are whole batches, the first one's number `first`.

    What follows them is a batch half written, by a writer that was killed or is still at it. None:
    a later batch is whole, and batches are written only after the ones before are on disk, so what
    lies before it was damaged.
    """
    record = layout.record
    found = np.frombuffer(data, record, len(data) // record.itemsize)
    good = [_sound(data, found, i, first) for i in range(len(found))]
    done = 0
    while done < len(found) and good[done]:
        batch, rows = int(found["batch"][done]), int(found["rows"][done])
        whole = slice(done, done + rows)
        if (
            batch != first + done
            or not 0 < rows <= len(found) - done
            or not all(good[whole])
            or not bool((found["batch"][whole] == batch).all())
            or not bool((found["rows"][whole] == rows).all())
        ):
            break
        done += rows
    later = (i for i in range(done, len(found)) if good[i])
    return None if any(int(found["batch"][i]) > first + done for i in later) else done


def _sound(data: bytes, found: NDArray[Any], i: int, first: int) -> bool:
    size = found.dtype.itemsize
    return bool(
        found["magic"][i] == MAGIC
        and int(found["row"][i]) == first + i
        and int(found["crc"][i])
        == zlib.crc32(memoryview(data)[i * size + CHECKED_FROM : (i + 1) * size])
    )


class Journal:
    """An open journal: the whole batches seen in it so far.

    The file stays open, so that rows seen can be read after another process has sealed them into a
    shard and removed the journal.

    Raises:
        FileNotFoundError: it is not there.
        MemoryFileError: it is no file. It is written to, so a symbolic link, which may lead out of
            a folder that came from others, is none either.
    """

    def __init__(self, path: Path, first: int, layout: Layout) -> None:
        self.path, self.first, self.layout = path, first, layout
        self.rows = 0
        self._crc: bytes = b""
        try:
            _tensor_file.regular(path, link=False)
        except ValueError as error:
            raise MemoryFileError(
                f"{path} cannot be used: {error}. Put the file itself there, or delete it to go on "
                "without its rows."
            ) from error
        self._file = path.open("rb")
        self.close = weakref.finalize(self, self._file.close)

    @property
    def end(self) -> int:
        """Bytes of the whole batches."""
        return self.rows * self.layout.record.itemsize

    @property
    def torn(self) -> int:
        """Bytes after the whole batches."""
        return os.fstat(self._file.fileno()).st_size - self.end

    def extend(self) -> None:
        """See what was appended since the last look.

        Raises:
            MemoryFileError: damaged in the middle.
        """
        size = self.layout.record.itemsize
        if self.rows and self._at(self.end - size, CHECKED_FROM) != self._crc:
            self.rows = 0  # what was seen had not reached the disk, and was taken back
        if self.end + self.torn > MOST_ROWS * size:
            raise MemoryFileError(
                f"{self.path} has {self.end + self.torn} bytes and a journal of such rows at most "
                f"{MOST_ROWS * size}: it is damaged. Restore it from a copy, or delete it to go on "
                "without its rows."
            )
        data = self._at(self.end, max(self.torn, 0))
        found = parse(self.layout, data, self.first + self.rows)
        if found is None:
            raise MemoryFileError(
                f"{self.path} is damaged after its first {self.rows} rows: later ones are whole. "
                f"Restore it from a copy, or cut it to {self.end} bytes to go on without the rest."
            )
        if found:
            self._crc = data[(found - 1) * size : (found - 1) * size + CHECKED_FROM]
            self.rows += found

    def arrays(self, places: NDArray[np.int64] | None = None, only: str | None = None) -> Arrays:
        """Views of the rows on disk, mapped while they are held."""
        names = [name for name in self.layout.dtypes if only in (None, name)]
        if not self.rows:
            empty = np.zeros(0, self.layout.record)
            return {name: empty[name] for name in names}
        records = np.memmap(self._file, self.layout.record, "r", shape=(self.rows,))
        return {name: records[name] for name in names}

    def _at(self, offset: int, count: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(count)


def append(path: Path, data: bytes, end: int) -> None:
    """Write `data` at `end`, cutting off what a killed writer left there, and flush it to disk.

    Raises:
        MemoryFileError: it could not be written; the journal is left as it was.
    """
    try:
        new = not path.exists()
        if not new:
            _tensor_file.regular(path, link=False)
        # Unbuffered: what a failing write leaves behind must not come back when the file closes.
        with path.open("x+b" if new else "r+b", buffering=0) as file:
            file.truncate(end)
            file.seek(end)
            try:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
                if new:
                    flush_folder(path.parent)
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
    except (OSError, ValueError) as error:
        raise MemoryFileError(f"cannot append to {path}: {error}") from error
