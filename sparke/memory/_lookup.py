r"""Prompts of a very large folder, looked up instead of weighed one by one.

An index of nearest neighbours (usearch's HNSW graph over 8-bit prompts) names the rows whose
prompts are nearest to the queries; only these are weighed by the prompt kernel. The index is
approximate and knows nothing of the kernel, so what it misses is estimated: of the rows it did not
name, an even sample is weighed as well, and its mean times their number stands for their weight
$W^{rest}_i$. Where for some query

$$W^{rest}_i > \tfrac{\epsilon}{4} \max(1, W_i),$$

half of what the gate may leave out, every prompt is weighed as without an index. The gate then
spends the other half. The estimate sees many rows of small weight, which is what a kernel with
another metric than the index's would leave behind; a few heavy rows that the graph missed it may
not see, and the recall of the index is the only word on those.

The index lies in the folder as ``prompts.lookup``, a safetensors file with a checksum. What usearch
wrote into it is checked in full before usearch reads it again (``sparke/memory/_graph.py``). It can
always be made again from the rows: a file that is damaged, hostile or of another folder is reported
and replaced.
"""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparke import _tensor_file, checks
from sparke.errors import MemoryFileError
from sparke.kernels import SAMPLED_ROWS
from sparke.memory import _gate, _graph, _shards
from sparke.memory._folder import Folder, MemoryFileWarning
from sparke.memory._layout import Layout
from sparke.protocols import Weigh

NAME = "prompts.lookup"
NEAREST = 8192
"""Rows asked of the index for each query."""
SAMPLE = 4096
"""Rows weighed for those that the index did not name."""
EFFORT = 64
"""Neighbours looked at for each row added: half of usearch's own, and half the time."""
SAVE_SHARE = 0.05
"""The file is written anew once the index has grown by this share."""


class PromptLookup:
    """The index of one folder's prompts, as far as this process has brought it.

    Args:
        folder: whose prompts.

    Raises:
        MissingHost: usearch is not installed.
    """

    def __init__(self, folder: Folder) -> None:
        with checks.host("usearch", "looks up prompts", "lookup"):
            import usearch.index  # noqa: F401
        self._folder = folder
        self._index: Any = None
        self._covered = 0
        """The index holds rows of lower numbers than this, by their numbers."""
        self._saved = 0
        self._told = False

    def weigh(
        self, query: Tensor, layout: Layout, weigh: Weigh | None, tolerance: float
    ) -> tuple[Tensor, NDArray[np.int64], Tensor] | None:
        """(b, m) log weights of m rows, their places, and the (b,) weight of the others.

        None where the others may weigh too much for the tolerance.
        """
        self._extend(layout)
        rows = len(self._folder)
        unit = torch.nn.functional.normalize(query, dim=1).cpu().numpy()
        found = self._index.search(unit, min(NEAREST, max(1, len(self._index))))
        keys = np.unique(np.asarray(found.keys, dtype=np.int64))
        newest = np.arange(max(0, rows - SAMPLED_ROWS), rows)
        places = np.union1d(self._folder.places(keys), newest)
        named = np.zeros(rows, bool)
        named[places] = True
        others = np.flatnonzero(~named)
        weight = self._weights(query, layout, weigh, places)
        total = torch.stack([w.exp().sum(dtype=torch.float64) for w in weight])
        rest = torch.zeros_like(total)
        if len(others):
            sample = others[:: max(1, len(others) // SAMPLE)]
            sampled = self._weights(query, layout, weigh, sample)
            mean = torch.stack([w.exp().mean(dtype=torch.float64) for w in sampled])
            rest = mean * len(others)
        if bool((rest > tolerance / 4 * (total + rest).clamp_min(1)).any()):
            return None
        return weight, places, rest

    def _weights(
        self, query: Tensor, layout: Layout, weigh: Weigh | None, places: NDArray[np.int64]
    ) -> Tensor:
        most = _gate.chunk_rows(layout.widths.cond or 1)
        chunks = (
            layout.tensor("cond", arrays["cond"])
            for _, arrays, _ in self._folder.gather(places, most, only="cond")
        )
        return _gate.log_weights(query, chunks, weigh, len(places))

    def _extend(self, layout: Layout) -> None:
        """Bring the index up to the rows that are there."""
        if self._index is None:
            self._index, self._covered = self._load(layout)
            self._saved = len(self._index)
        new = self._uncovered()
        if not len(new):
            return
        most = _gate.chunk_rows(layout.widths.cond or 1)
        for part, arrays, _ in self._folder.gather(new, most, only="cond"):
            numbers = self._folder.numbers(new[part])
            prompts = layout.tensor("cond", arrays["cond"]).float()
            unit = torch.nn.functional.normalize(prompts, dim=1).numpy()
            # In one thread: the graph depends on the order, and results should not change.
            self._index.add(numbers, unit, threads=1)
            self._covered = int(numbers[-1]) + 1
        if len(self._index) > (1 + SAVE_SHARE) * self._saved:
            self._save()

    def _uncovered(self) -> NDArray[np.int64]:
        """Places of the rows that the index does not hold: numbers ascend, so they are the last."""
        place = rows = len(self._folder)
        for segment in reversed(self._folder.segments):
            new = min(segment.rows, segment.first + segment.rows - self._covered)
            if new <= 0:
                break
            place -= new
        return np.arange(place, rows)

    def _load(self, layout: Layout) -> tuple[Any, int]:
        from usearch.index import Index

        width = layout.widths.cond
        path = self._path
        if path.is_file():
            try:
                data, covered = _read(path)
                fresh = Index(ndim=width or 1, metric="cos", dtype="i8")
                keys = _graph.check(data, width or 1, fresh.connectivity)
                last = self._folder.segments[-1]
                if covered > last.first + last.rows or int(keys.max()) >= covered:
                    raise ValueError("it is of another folder, or of rows that are gone")
                index = Index.restore(data)
                if index is not None and index.ndim == width:
                    return index, covered
                reason = "it is of another folder"
            except (MemoryFileError, SafetensorError, OSError, ValueError, RuntimeError) as error:
                reason = str(error).rstrip(".")
            warnings.warn(
                f"{path} cannot be used and is made again: {reason}.",
                MemoryFileWarning,
                stacklevel=5,
            )
        return Index(ndim=width or 1, metric="cos", dtype="i8", expansion_add=EFFORT), 0

    def _save(self) -> None:
        """Write the index, if nobody else writes to the folder just now."""
        from filelock import Timeout

        try:
            with self._folder.locked(timeout=0):
                self._write()
        except MemoryFileError as error:
            # Another process is writing, or this one may not: the index is none the worse for it.
            if not isinstance(error.__cause__, Timeout) and not self._told:
                self._told = True
                warnings.warn(
                    f"the index of {self._folder.path} is not kept for the next time: {error}.",
                    MemoryFileWarning,
                    stacklevel=6,
                )

    def _write(self) -> None:
        data = bytes(self._index.save(None))
        meta = {
            "format": "sparke-memory",
            "kind": "lookup",
            "covered": str(self._covered),
            "crc32": str(zlib.crc32(data)),
        }
        with _shards.replacing(self._path) as partial:
            save_file(
                {"index": torch.frombuffer(bytearray(data), dtype=torch.uint8)}, partial, meta
            )
        self._saved = len(self._index)

    @property
    def _path(self) -> Path:
        return self._folder.path / NAME


def _read(path: Path) -> tuple[bytes, int]:
    """The index as usearch wrote it, and the rows it covers.

    Raises:
        MemoryFileError: the file holds something else, or not what was written.
    """
    header = _tensor_file.read(path)
    told = header.meta
    covered = told.get("covered", "")
    shapes = {name: (stored.dtype, len(stored.shape)) for name, stored in header.tensors.items()}
    if (
        told.get("kind") != "lookup"
        or not covered.isdecimal()
        or len(covered) > 18
        or shapes != {"index": ("U8", 1)}
    ):
        raise MemoryFileError(f"{path} is no index of prompts")
    with safe_open(path, framework="np") as file:
        data = file.get_tensor("index").tobytes()
    if told.get("crc32") != str(zlib.crc32(data)):
        raise MemoryFileError(f"{path} is damaged: its checksum does not match")
    return data, int(covered)
