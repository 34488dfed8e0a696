"""What is measured: folders of pictures, or files of features."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparke.backends._pictures import SUFFIXES
from sparke.errors import ArgumentError, ShapeError

MOST_SETS = 6
FEATURES = (".safetensors", ".npy")


@dataclass(frozen=True)
class Set:
    """One of the sets, before it is encoded.

    Attributes:
        label: heads its column.
        path: as it was given.
        names: of the pictures, relative to the folder; row numbers for a file of features.
        files: of the pictures; None for a file of features.
        rows: (n, d) of a file of features; None for a folder.
    """

    label: str
    path: Path
    names: tuple[str, ...]
    files: tuple[Path, ...] | None = None
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def only(self, kept: Sequence[int]) -> Set:
        """The set with some of its pictures."""
        files = None if self.files is None else tuple(self.files[i] for i in kept)
        rows = None if self.rows is None else self.rows[list(kept)]
        return Set(self.label, self.path, tuple(self.names[i] for i in kept), files, rows)


def found(paths: Sequence[Path]) -> list[Set]:
    """The sets of the command line, each under a label of its own.

    Raises:
        ArgumentError: there are too many, one is not there, or has nothing to measure.
        ShapeError: a file of features holds no matrix.
    """
    if len(paths) > MOST_SETS:
        raise ArgumentError(f"{len(paths)} sets are given; at most {MOST_SETS} fit in one report.")
    return [one(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def one(path: Path, label: str, least: int = 2) -> Set:
    """A folder of pictures, or a file of features, of at least so many.

    Raises:
        ArgumentError: it is not there, cannot be read, or holds fewer.
        ShapeError: a file of features holds no matrix.
    """
    try:
        kind = "folder" if path.is_dir() else "file" if path.is_file() else ""
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise ArgumentError(f"a set cannot be looked for ({said}): {str(path)!r}") from error
    if not kind:
        raise ArgumentError(f"{str(path)!r} is not there; give a folder of pictures.")
    if kind == "folder":
        files = _pictures_below(path)
        names = tuple(f.relative_to(path).as_posix() for f in files)
        made = Set(label, path, names, tuple(files))
    elif path.suffix.lower() in FEATURES:
        rows = _rows(path)
        made = Set(label, path, tuple(map(str, range(len(rows)))), rows=rows)
    else:
        raise ArgumentError(
            f"{str(path)!r} is a file; give a folder of pictures, or features in a file that ends "
            f"in {' or '.join(FEATURES)}."
        )
    if len(made) < least:
        what = f"{len(made)} picture{'s' * (len(made) != 1)}"
        raise ArgumentError(
            f"{str(path)!r} holds {what} and diversity needs at least {least}. Names of pictures "
            f"end in {', '.join(SUFFIXES)}."
        )
    return made


def _labels(paths: Sequence[Path]) -> list[str]:
    """Last parts of the paths, as many as tell them apart."""
    parts = [Path(os.path.normpath(path.absolute())).parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ArgumentError("the same set is given twice; every set is measured once.")
    count = 1
    while len({p[-count:] for p in parts}) < len(parts):
        count += 1
    return [printable("/".join(p[-count:])) for p in parts]


def printable(text: str) -> str:
    """`text` without control and format characters, which could hide or turn what is shown."""
    kept = (c if unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(kept)


def _pictures_below(folder: Path) -> list[Path]:
    def stop(error: OSError) -> None:
        raise ArgumentError(f"{error.filename!r} cannot be read: {error.strerror}.") from error

    files = []
    for where, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = (Path(where) / name for name in names if not name.startswith("."))
        files += [f for f in shown if f.suffix.lower() in SUFFIXES and f.is_file()]
    return sorted(files)


def _rows(path: Path) -> Tensor:
    """(n, d) float32 of a file of features, its shape looked at before it is read."""
    try:
        rows = _safetensors(path) if path.suffix.lower() == ".safetensors" else _npy(path)
    except (ArgumentError, ShapeError):
        raise
    # safetensors and numpy raise what they like on damaged files.
    except Exception as error:
        raise ArgumentError(
            f"{str(path)!r} cannot be read as features ({type(error).__name__}: {error})."
        ) from error
    bad = (~torch.isfinite(rows)).any(1)
    if bool(bad.any()):
        raise ArgumentError(
            f"{str(path)!r} holds NaN or infinity, first in row {int(bad.nonzero()[0])}; features "
            "must be finite in float32."
        )
    return rows


def _safetensors(path: Path) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        key = "features" if "features" in keys else keys[0] if len(keys) == 1 else None
        if key is None:
            raise ArgumentError(
                f"{str(path)!r} holds {len(keys)} tensors; features are a tensor named 'features', "
                "or the only one."
            )
        _check_shape(path, tuple(file.get_slice(key).get_shape()))
        tensor: Tensor = file.get_tensor(key)
    _check_kind(path, "c" if tensor.is_complex() else "f", tensor.dtype)
    return tensor.float()


def _npy(path: Path) -> Tensor:
    # Mapped: a header that claims more than the file has is refused, pickles are too.
    array: Any = np.lib.format.open_memmap(path, mode="r")  # type: ignore[no-untyped-call]
    _check_shape(path, array.shape)
    _check_kind(path, array.dtype.kind, array.dtype)
    with np.errstate(over="ignore"):  # infinite rows are refused in a moment
        return torch.from_numpy(np.array(array, dtype=np.float32))


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or not all(shape):
        raise ShapeError(
            f"{str(path)!r} holds a tensor of shape {shape}; features are (pictures, width)."
        )


def _check_kind(path: Path, kind: str, dtype: Any) -> None:
    if kind not in "fiub":
        raise ArgumentError(f"{str(path)!r} holds {dtype}; features are real numbers.")
