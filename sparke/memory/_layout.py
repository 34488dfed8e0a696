"""How a row lies in a memory folder: dtypes, widths, the record of the journal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparke import _tensor_file
from sparke.errors import MemoryFileError
from sparke.memory import _rules

FORMAT = "sparke-memory-folder"
VERSION = 1
HEADER = "memory.json"
DTYPES = (*_rules.DTYPES, torch.int8)
WIDEST = 1 << 28
"""Numbers in a row at most; a header that tells more is damaged."""
# bfloat16 travels through numpy as the integers of its bits.
NUMPY = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2", torch.int8: "|i1"}
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
SAFETENSORS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """What all rows of a folder have in common; written once, into ``memory.json``."""

    dtype: torch.dtype
    widths: _rules.Widths
    cond_dtype: torch.dtype

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The tensors of a shard and their dtypes."""
        found = {"x": self.dtype}
        if self.dtype == torch.int8:
            found["scale"] = torch.float32
        if self.widths.cond is not None:
            found["cond"] = self.cond_dtype
        return found

    @property
    def columns(self) -> dict[str, int]:
        """The tensors of a shard and their widths."""
        every = {"x": self.widths.x, "scale": 1, "cond": self.widths.cond or 0}
        return {name: every[name] for name in self.dtypes}

    @property
    def record(self) -> np.dtype[np.void]:
        """One row in the journal; `crc` is that of all that follows it in the record."""
        head = [("magic", "S4"), ("crc", "<u4"), ("row", "<u8"), ("batch", "<u8"), ("rows", "<u8")]
        tail = [(n, NUMPY[t], (self.columns[n],)) for n, t in self.dtypes.items()]
        return np.dtype([*head, *tail])

    def arrays(self, x: Tensor, cond: Tensor | None) -> Arrays:
        """Rows as they are stored."""
        tensors: dict[str, Tensor | None] = {"x": x, "cond": cond}
        if self.dtype == torch.int8:
            x = x.float()
            scale = x.abs().amax(1, keepdim=True) / 127
            scale = torch.where(scale > 0, scale, 1.0)
            tensors |= {"x": (x / scale).round().clamp(-127, 127), "scale": scale}
        found = {}
        for name, dtype in self.dtypes.items():
            tensor = tensors[name]
            assert tensor is not None
            tensor = tensor.to("cpu", dtype).contiguous()
            bits = tensor.view(torch.int16) if dtype == torch.bfloat16 else tensor
            found[name] = bits.numpy()
        return found

    def tensor(self, name: str, array: NDArray[Any]) -> Tensor:
        """A stored array, writable and contiguous, as the tensor it is."""
        tensor = torch.from_numpy(array)
        bits = self.dtypes[name] == torch.bfloat16
        return tensor.view(torch.bfloat16) if bits else tensor

    def write(self) -> bytes:
        """The text of ``memory.json``."""
        told = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": str(self.dtype).removeprefix("torch."),
            "width": self.widths.x,
            "cond_dtype": str(self.cond_dtype).removeprefix("torch."),
            "cond_width": self.widths.cond,
        }
        return (json.dumps(told, indent=1) + "\n").encode()


def read(path: Path) -> Layout:
    """The layout told by a ``memory.json``.

    Raises:
        MemoryFileError: it cannot be read, is damaged, or belongs to something else.
        FileNotFoundError: it is not there.
    """
    try:
        _tensor_file.regular(path)
        with path.open("rb") as file:
            text = file.read(4097)
        told = json.loads(text)
        return _checked(path, told if isinstance(told, dict) and len(text) <= 4096 else {})
    except (FileNotFoundError, MemoryFileError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise MemoryFileError(
            f"{path} cannot be read or is damaged: {error}. It is written once and never changed: "
            "restore it from a copy, or from another memory of the same model and dtype."
        ) from error


def _checked(path: Path, told: dict[str, Any]) -> Layout:
    if told.get("format") != FORMAT:
        raise MemoryFileError(
            f"{path} does not tell of a sparke memory (format={told.get('format')!r}, expected "
            f"{FORMAT!r}). Give the folder of a DiskMemory, or one that is not there yet."
        )
    if told.get("version") != VERSION:
        raise MemoryFileError(
            f"{path} was written as version {told.get('version')!r}; this sparke reads version "
            f"{VERSION}."
        )
    x, cond = told.get("width"), told.get("cond_width")
    dtype, cond_dtype = told.get("dtype"), told.get("cond_dtype")
    if not (
        _whole(x)
        and (cond is None or _whole(cond))
        and isinstance(dtype, str)
        and isinstance(cond_dtype, str)
        and dtype in NAMES
        and NAMES.get(cond_dtype) in _rules.DTYPES
    ):
        raise MemoryFileError(
            f"{path} is damaged: it tells of rows {dtype!r} of width {x!r} and prompts "
            f"{cond_dtype!r} of width {cond!r}. Restore it from a copy."
        )
    assert isinstance(x, int)
    return Layout(NAMES[dtype], _rules.Widths(x, cond), NAMES[cond_dtype])


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= WIDEST
