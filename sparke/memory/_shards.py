"""Sealed shards of a memory folder: safetensors files that never change."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file

from sparke import _tensor_file
from sparke.errors import MemoryFileError
from sparke.memory._layout import NUMPY, SAFETENSORS, Arrays, Layout

NAME = re.compile(r"rows-(\d{16})-(\d{16})\.safetensors")
PARTIAL = ".partial"
"""Ending of files that are being written; such a file holds nothing committed."""
CURE = "Restore it from a copy, or delete it to go on without its rows."


@dataclass(frozen=True)
class Shard:
    """Rows `first` to ``first + rows``, in one file, mapped only while they are read."""

    path: Path
    first: int
    rows: int
    layout: Layout
    offsets: dict[str, int]

    def arrays(self, places: NDArray[np.int64] | None = None, only: str | None = None) -> Arrays:
        """Views of the rows on disk, mapped while they are held.

        Args:
            places: of the rows that will be read, if not all of them will be.
            only: name of the one column that will be, if not all of them.

        Raises:
            MemoryFileError: the file is gone or shorter than it was.
        """
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            found = {
                name: np.frombuffer(
                    mapped,
                    NUMPY[dtype],
                    self.rows * self.layout.columns[name],
                    self.offsets[name],
                ).reshape(self.rows, -1)
                for name, dtype in self.layout.dtypes.items()
                if only in (None, name)
            }
        except (OSError, ValueError) as error:
            raise MemoryFileError(f"{self.path} is damaged or gone: {error}. {CURE}") from error
        if places is not None and hasattr(mmap, "MADV_WILLNEED"):
            self._announce(mapped, places, only)
        return found

    def _announce(self, mapped: mmap.mmap, places: NDArray[np.int64], only: str | None) -> None:
        """Ask the system for these rows, all at once, and for nothing around them."""
        mapped.madvise(mmap.MADV_RANDOM)
        for name, dtype in self.layout.dtypes.items():
            if only not in (None, name):
                continue
            size = self.layout.columns[name] * dtype.itemsize
            starts = self.offsets[name] + places * size
            for start in (starts // mmap.PAGESIZE * mmap.PAGESIZE).tolist():
                mapped.madvise(
                    mmap.MADV_WILLNEED, start, min(size + mmap.PAGESIZE, len(mapped) - start)
                )


def name(first: int, stop: int) -> str:
    """The file of rows `first` to `stop`."""
    return f"rows-{first:016d}-{stop:016d}.safetensors"


def open_shard(path: Path, layout: Layout) -> Shard:
    """A shard, its header checked; no row is read.

    Raises:
        MemoryFileError: not readable, damaged, or not of this folder.
    """
    match = NAME.fullmatch(path.name)
    assert match is not None
    first, stop = (int(group) for group in match.groups())
    expected = {
        key: (SAFETENSORS[dtype], (stop - first, layout.columns[key]))
        for key, dtype in layout.dtypes.items()
    }
    try:
        header = _tensor_file.read(path)  # checks offsets against the file's size
    except (OSError, ValueError) as error:
        raise MemoryFileError(f"{path} cannot be read or is damaged: {error}. {CURE}") from error
    told = header.meta
    found = {key: (stored.dtype, stored.shape) for key, stored in header.tensors.items()}
    if told.get("format") != "sparke-memory" or told.get("kind") != "shard":
        raise MemoryFileError(
            f"{path} is safetensors but no shard of a sparke memory. Move it out of the folder."
        )
    if stop <= first or found != expected or told.get("first") != str(first):
        raise MemoryFileError(
            f"{path} does not belong here: it holds {found} from row {told.get('first')}, expected "
            f"{expected} from row {first}. {CURE}"
        )
    offsets = {key: stored.start for key, stored in header.tensors.items()}
    return Shard(path, first, stop - first, layout, offsets)


def write(folder: Path, layout: Layout, arrays: Arrays, first: int) -> None:
    """Seal rows into a shard: written beside, flushed, renamed, so it is there whole or not at all.

    Raises:
        MemoryFileError: it could not be written; the folder is left as it was.
    """
    rows = len(arrays["x"])
    tensors = {key: layout.tensor(key, array) for key, array in arrays.items()}
    meta = {"format": "sparke-memory", "kind": "shard", "version": "1", "first": str(first)}
    with replacing(folder / name(first, first + rows)) as partial:
        save_file(tensors, partial, meta)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to; on success it is flushed to disk and renamed to `target`.

    Raises:
        MemoryFileError: it could not be written, and is removed.
    """
    partial = target.with_name(f".{target.name}{PARTIAL}")
    try:
        # Never written through: a folder may come from others, with a symbolic link in this place.
        partial.unlink(missing_ok=True)
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(target)
        flush_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, (OSError, SafetensorError)):
            raise MemoryFileError(f"cannot write {target}: {error}") from error
        raise


def flush_folder(folder: Path) -> None:
    """Make names that were created or replaced in a folder last through a power cut."""
    if os.name != "posix":
        return  # elsewhere folders cannot be opened; the file system sees to it
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
