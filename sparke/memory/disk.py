"""Samples in a folder on disk, for histories that outgrow the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, MemoryFileError
from sparke.kernels import SAMPLED_ROWS
from sparke.memory import _gate, _layout, _rules
from sparke.memory._folder import Folder
from sparke.memory._layout import Layout
from sparke.memory._lookup import PromptLookup
from sparke.memory._reading import RowReader
from sparke.protocols import Features, Selection, Weigh

__all__ = ["DiskMemory"]

SELECT_BYTES = 1 << 30
SHARD_BYTES = 64 << 20


class DiskMemory:
    """Keeps every sample ever committed, in a folder that several processes may append to.

    Asked by prompt, it weighs the prompts of all rows and reads from disk only the rows that can
    matter, by the rule of [RingMemory][sparke.memory.RingMemory]; in addition, a selection holds at
    most `select_bytes` of float32 rows: the heaviest by prompt, or without prompts the newest. What
    this leaves out is told in `left_out`.

    The folder, all of it plain files:

    - ``memory.json``: format, version, dtypes and widths. Written once, with the first commit.
    - ``rows-FIRST-STOP.safetensors``: sealed shards of the rows with these numbers (STOP excluded):
      ``x``, ``cond`` where there are prompts, ``scale`` for int8. Never changed. Their names are
      the index: renaming a finished file into place commits all its rows at once.
    - ``tail-FIRST.journal``: the newest rows, in records of one size with a CRC-32 and the extent
      of their batch. Small commits go there in one write; at `shard_bytes` it is sealed into a
      shard and the next one begins where it ended.
    - ``lock``: held while a process writes (a lock of the operating system, freed when its holder
      dies). ``*.partial``: a file being written.

    A commit returns after its rows were flushed to disk. A writer killed at any moment loses at
    most the batch it was about to commit, never part of one and never earlier rows; the next writer
    removes what it left, with a warning that names the file. Readers take no lock: they see whole
    batches, all up to some moment, and look again at each ``len()`` and `select`. File locks and
    renames must work as on a local file system; some network file systems do not keep that promise.

    It does not forget, and one object is not thread-safe. Shards carry no checksum of their own.

    Args:
        path: the folder; made if it is not there, in a folder that is.
        dtype: of the stored rows: float32, float16, bfloat16, or int8 with one scale per row. None:
            that of the folder, float16 for a new one.
        cond_dtype: of the stored prompts: float32, float16 or bfloat16; None as above.
        device: where rows are handed out when no prompts are asked for, and where rows read are
            kept; the prompts' if None.
        cache_bytes: of rows kept on the device between selections, in the stored dtype. None: 1 GiB
            on an accelerator, and 0 on the CPU, where the system's file cache does the same.
        select_bytes: of float32 rows that one selection holds at most, but at least 256 rows.
        tolerance: as for RingMemory.
        lookup_from: number of rows from which on prompts are looked up in an index
            (``pip install 'sparke[lookup]'``) instead of weighed one by one; None: never. It saves
            the reading of all prompts at each selection, costs half a millisecond or more for
            each row once, and is approximate; see ``sparke/memory/_lookup.py``.
        shard_bytes: size of the journal at which it is sealed.
        timeout: seconds to wait for other writers.

    Raises:
        ArgumentError: an option has a forbidden value, or the folder holds another dtype.
        MemoryFileError: the folder cannot be made or read, is another program's, or is damaged.
        MissingHost: `lookup_from` is given and usearch is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        cond_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        cache_bytes: int | None = None,
        select_bytes: int = SELECT_BYTES,
        tolerance: float = _gate.TOLERANCE,
        lookup_from: int | None = None,
        shard_bytes: int = SHARD_BYTES,
        timeout: float = 60.0,
    ) -> None:
        self._dtype = dtype and _rules.check_dtype("dtype", dtype, _layout.DTYPES)
        self._cond_dtype = cond_dtype and _rules.check_dtype(
            "cond_dtype", cond_dtype, _rules.DTYPES
        )
        self.device = None if device is None else torch.device(device)
        self.tolerance = _gate.check_tolerance(tolerance)
        self.select_bytes = int(checks.positive("select_bytes", select_bytes))
        self.shard_bytes = int(checks.positive("shard_bytes", shard_bytes))
        if cache_bytes is not None:
            checks.positive("cache_bytes", cache_bytes, zero=True)
        self.cache_bytes = cache_bytes
        self.left_out: Tensor | None = None
        """(b,) summed weight of the rows the last selection by prompt left out: the pull of an
        order-2 score is off by at most twice this times the diameter of the bank."""
        self._folder = Folder(Path(path), checks.positive("timeout", timeout, zero=True))
        self._reader = RowReader(self._folder, cache_bytes)
        if lookup_from is not None:
            checks.positive("lookup_from", lookup_from)
        self.lookup_from = lookup_from
        self._lookup = None if lookup_from is None else PromptLookup(self._folder)
        self.refresh()
        self._recover()

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder.path

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored rows."""
        layout = self._folder.layout
        return layout.dtype if layout else self._dtype or torch.float16

    def __len__(self) -> int:
        return self.refresh()

    def __repr__(self) -> str:
        layout = self._folder.layout
        width = None if layout is None else layout.widths.x
        return (
            f"DiskMemory({str(self.path)!r}, {len(self._folder)} rows, width {width}, {self.dtype})"
        )

    def refresh(self) -> int:
        """Look what this and other processes have committed; the number of rows.

        Raises:
            MemoryFileError: a file of the folder is damaged.
            ArgumentError: the folder holds rows of another dtype than asked for.
        """
        new = self._folder.layout is None
        self._folder.refresh()
        layout = self._folder.layout
        if new and layout is not None:
            for name, asked, found in (
                ("dtype", self._dtype, layout.dtype),
                ("cond_dtype", self._cond_dtype, layout.cond_dtype),
            ):
                if asked not in (None, found):
                    raise ArgumentError(
                        f"{name}={asked}, but {self.path} holds {found}. Leave it out, or give "
                        "another folder."
                    )
        return len(self._folder)

    def commit(self, items: Features) -> None:
        """Append finished samples, (n, d) rows with (n, c) prompts or none, as one batch.

        Raises:
            ShapeError: rows or prompts of another width than those here, or not 2-D.
            ArgumentError: a row is not finite, or too large for the storage dtype.
            MissingPrompts: rows here have prompts and these do not, or the other way round.
            MemoryFileError: the rows could not be written.

        Nothing is written when an error is raised.
        """
        folder = self._folder
        with folder.locked():
            self.refresh()
            layout = folder.layout
            cond_dtype = layout.cond_dtype if layout else self._cond_dtype or torch.float16
            widths = layout.widths if layout else None
            x, cond = _rules.admit(items, widths, self.dtype, cond_dtype)
            if not len(x):
                return
            folder.recover()
            if layout is None:
                widths = _rules.Widths(x.shape[1], None if cond is None else cond.shape[1])
                layout = Layout(self.dtype, widths, cond_dtype)
                folder.start(layout)
            folder.append(layout.arrays(x, cond), self.shard_bytes)

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        """The rows that matter for these prompts in float32, oldest first, with log weights.

        Args:
            cond: (b, c) prompts of the samples to come; None hands out the newest rows, unweighted.
            weigh: prompt kernel, (b, c), (n, c) -> (b, n) log weights; the published one
                (Gaussian, bandwidth 0.35, squared) if None. It is called on a part of the rows at
                a time.

        Raises:
            MissingPrompts: `cond` is given and the rows here were committed without prompts.
            ShapeError: `cond` has another width than the prompts here.
            MemoryFileError: a file of the folder is damaged.
        """
        rows = self.refresh()
        device = cond.device if cond is not None else self.device or torch.device("cpu")
        layout = self._folder.layout
        if layout is None or not rows:
            return Selection(torch.zeros(0, 0, device=device), None, None)
        most = max(self.select_bytes // (4 * layout.widths.x), SAMPLED_ROWS)
        if cond is None:
            self.left_out = None
            places = np.arange(max(0, rows - most), rows)
            x, rows_cond = self._reader.read(layout, places, device)
            return Selection(x, rows_cond)
        query = _rules.asked(cond, layout.widths.cond)
        found = None
        if self._lookup is not None and rows >= (self.lookup_from or 0):
            found = self._lookup.weigh(query, layout, weigh, self.tolerance)
        if found is None:
            weight, tolerance = _gate.log_weights(query, self._prompts(layout), weigh, rows), 1.0
            places, rest = np.arange(rows), weight.new_zeros(len(weight), dtype=torch.float64)
        else:
            (weight, places, rest), tolerance = found, 0.5
        index = _gate.keep(weight, tolerance * self.tolerance, most)
        self.left_out = _gate.left_out(weight, index) + rest
        if index is not None:
            weight, places = weight[:, index], places[index.cpu().numpy()]
        x, rows_cond = self._reader.read(layout, places, device)
        return Selection(x, rows_cond, weight)

    def rows(self, start: int = 0, stop: int | None = None) -> Features:
        """Rows `start` to `stop` in the order of their commits, in float32, to look at or copy."""
        total = self.refresh()
        layout = self._folder.layout
        if layout is None:
            return Features(torch.zeros(0, 0))
        places = np.arange(*slice(start, stop).indices(total)[:2])
        return Features(*self._reader.read(layout, places, self.device or torch.device("cpu")))

    def _recover(self) -> None:
        """Report at opening what a killed writer left, unless one is at work."""
        try:
            with self._folder.locked(timeout=0):
                self.refresh()
                self._folder.recover()
        except MemoryFileError:
            # At work, or a folder that can only be read; damage is found by `refresh` above.
            self.refresh()

    def _prompts(self, layout: Layout) -> Iterator[Tensor]:
        rows = _gate.chunk_rows(layout.widths.cond or 1)
        for chunk in self._folder.column("cond", rows):
            yield layout.tensor("cond", chunk)
