"""Memory files: safetensors, replaced whole or not at all, checked before they are believed."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from sparke.errors import MemoryFileError
from sparke.memory import _rules

FORMAT = "sparke-memory"
VERSION = "1"
DTYPES = {"x": ("F32", "F16", "BF16"), "cond": ("F32",)}


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    """Write beside `path`, flush to disk, then rename over it: readers see old or new, whole."""
    target = Path(path)
    data = serialize(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
        {"format": FORMAT, "version": VERSION, **meta},
    )
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise MemoryFileError(f"cannot write {target}: {error}. Does its folder exist?") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(_mode(target))
        Path(temporary).replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        if isinstance(error, OSError):
            raise MemoryFileError(f"cannot write {target}: {error}") from error
        raise


def _mode(target: Path) -> int:
    """The permissions of the file to be replaced, or those any new file would get."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a memory file.

    Raises:
        MemoryFileError: not there, not safetensors, damaged, or not a sparke memory.
    """
    target = Path(path)
    if not target.is_file():
        raise MemoryFileError(f"{target} is no file. Save a memory there first.")
    try:
        with safe_open(target, framework="pt") as file:
            meta = dict(file.metadata() or {})
            names = set(file.keys())
            _check(target, meta, names)
            # Shapes come from the header alone: nothing is allocated for a file that lies.
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            _check_shapes(target, shapes)
            _check_dtypes(target, {name: file.get_slice(name).get_dtype() for name in names})
            tensors = {name: file.get_tensor(name) for name in sorted(names)}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, MemoryFileError):
            raise
        raise MemoryFileError(
            f"{target} is not a readable safetensors file, or it is damaged: {error}"
        ) from error
    for name, tensor in tensors.items():
        if not _rules.all_finite(tensor):
            raise MemoryFileError(f"{target} is damaged: {name!r} holds NaN or infinity.")
    return tensors, meta


def _check(target: Path, meta: dict[str, str], names: set[str]) -> None:
    if meta.get("format") != FORMAT:
        raise MemoryFileError(
            f"{target} is safetensors but no sparke memory (format={meta.get('format')!r}, "
            f"expected {FORMAT!r})."
        )
    if meta.get("version") != VERSION:
        raise MemoryFileError(
            f"{target} was written as version {meta.get('version')!r}; this sparke reads "
            f"version {VERSION!r}."
        )
    if not names <= {"x", "cond"} or ("cond" in names and "x" not in names):
        raise MemoryFileError(f"{target} holds {sorted(names)}, expected 'x' and perhaps 'cond'.")


def _check_dtypes(target: Path, dtypes: dict[str, str]) -> None:
    for name, dtype in dtypes.items():
        if dtype not in DTYPES[name]:
            raise MemoryFileError(
                f"{target}: {name!r} is of dtype {dtype}, expected {' or '.join(DTYPES[name])}."
            )


def _check_shapes(target: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise MemoryFileError(f"{target}: {name!r} has shape {shape}, expected (rows, width).")
    if "cond" in shapes and shapes["cond"][0] != shapes["x"][0]:
        raise MemoryFileError(
            f"{target}: {shapes['x'][0]} samples but {shapes['cond'][0]} prompts."
        )
