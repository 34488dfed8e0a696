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

from sparke import _tensor_file
from sparke._tensor_file import BadHeader, Header
from sparke.errors import MemoryFileError
from sparke.memory import _rules

FORMAT = "sparke-memory"
VERSION = "1"
KINDS = ("ring", "reference")
DTYPES = {"x": ("F32", "F16", "BF16"), "cond": ("F32",)}


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    """Write beside `path`, flush to disk, then rename over it: readers see old or new, whole.

    An older memory file is replaced, where a symbolic link leads as well; anything else that is
    there is left alone.

    Raises:
        MemoryFileError: it cannot be written, or is no memory file; what was there still is.
    """
    try:
        target = _target(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, MemoryFileError):
            raise
        raise MemoryFileError(f"cannot write {os.fspath(path)}: {error}") from error
    data = serialize(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
        {"format": FORMAT, "version": VERSION, **meta},
    )
    try:
        # Cut, for the name may be as long as names can be.
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
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


def _target(path: str | os.PathLike[str]) -> Path:
    """The file to write: where a link leads, so that the link goes on leading there."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise MemoryFileError(f"cannot write {target}: it is a symbolic link that leads to itself.")
    if not os.path.lexists(target):
        return target
    try:
        _tensor_file.regular(target)
        is_ours = (
            not target.stat().st_size or _tensor_file.read(target).meta.get("format") == FORMAT
        )
    except BadHeader:
        is_ours = False
    if not is_ours:
        raise MemoryFileError(
            f"{target} is there and is no sparke memory, so it is not replaced. Give another name, "
            "or move it away."
        )
    return target


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
    try:
        header = _tensor_file.read(target)
        _check(target, header)
        # Shapes come from the header alone: nothing is allocated for a file that lies.
        _check_tensors(target, header)
        with safe_open(target, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(header.tensors)}
    except FileNotFoundError as error:
        raise MemoryFileError(f"{target} is no file. Save a memory there first.") from error
    # RuntimeError: torch's, of no rows of an impossible width.
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, MemoryFileError):
            raise
        raise MemoryFileError(
            f"{target} is not a readable safetensors file, or it is damaged: {error}. Give a file "
            "that a memory's save() wrote, or restore it from a copy."
        ) from error
    for name, tensor in tensors.items():
        if not _rules.all_finite(tensor):
            raise MemoryFileError(
                f"{target} is damaged: {name!r} holds NaN or infinity. Restore it from a copy."
            )
    return tensors, header.meta


def _check(target: Path, header: Header) -> None:
    meta, names = header.meta, set(header.tensors)
    if meta.get("format") != FORMAT:
        raise MemoryFileError(
            f"{target} is safetensors but no sparke memory (format={meta.get('format')!r}, "
            f"expected {FORMAT!r})."
        )
    kind = meta.get("kind", "ring")
    if kind not in KINDS:
        raise MemoryFileError(
            f"{target} is a part of a memory folder (kind={kind!r}). Give the folder to DiskMemory."
        )
    if meta.get("version") != VERSION:
        raise MemoryFileError(
            f"{target} was written as version {meta.get('version')!r}; this sparke reads "
            f"version {VERSION!r}. Install the sparke that wrote it, or start a new file."
        )
    if not names <= {"x", "cond"} or ("cond" in names and "x" not in names):
        raise MemoryFileError(f"{target} holds {sorted(names)}, expected 'x' and perhaps 'cond'.")


def _check_tensors(target: Path, header: Header) -> None:
    found = header.tensors
    for name, stored in found.items():
        if stored.dtype not in DTYPES[name]:
            raise MemoryFileError(
                f"{target}: {name!r} is of dtype {stored.dtype}, expected "
                f"{' or '.join(DTYPES[name])}."
            )
        if len(stored.shape) != 2:
            raise MemoryFileError(
                f"{target}: {name!r} has shape {stored.shape}, expected (rows, width)."
            )
        # Rows of no width take no room in the file, however many it claims.
        if stored.shape[0] and not stored.shape[1]:
            raise MemoryFileError(
                f"{target}: {name!r} has shape {stored.shape}, and a row needs at least one number."
            )
    if "cond" in found and found["cond"].shape[0] != found["x"].shape[0]:
        raise MemoryFileError(
            f"{target}: {found['x'].shape[0]} samples but {found['cond'].shape[0]} prompts."
        )
