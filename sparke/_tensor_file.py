"""The header of a safetensors file, read strictly before anything is believed or allocated.

The reader of the package ``safetensors`` guards its own memory. This one runs first and says what
is wrong with a file in terms that can be told, and is stricter: names occur once, tensors lie one
after another without gaps in the order of the header, and the file ends where the last one ends.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_HEADER = 1 << 20
"""Bytes of a header at most; those of ours take some hundred, or some ten thousand with words."""
SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Bytes of one number."""
MOST_DIMENSIONS = 8


class BadHeader(ValueError):
    """A file is no regular file, no safetensors, or damaged; says how, and not which file."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a file; `start` is where its bytes begin, counted from the file's."""

    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Header:
    """What a file tells of itself."""

    meta: dict[str, str]
    tensors: dict[str, Stored]


def read(path: str | os.PathLike[str]) -> Header:
    """The header of a file whose sizes all agree with the file's own.

    Raises:
        BadHeader: it is no such file.
        OSError: it cannot be read.
    """
    regular(path)
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise BadHeader(f"it has {size} bytes, and a safetensors file at least 8")
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_HEADER, size - 8):
            raise BadHeader(
                f"its header claims {length} bytes; it has {size}, and a header takes at most "
                f"{MOST_HEADER}"
            )
        text = file.read(length)
    try:
        told = json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise BadHeader(f"its header is damaged: {error}") from error
    if not isinstance(told, dict):
        raise BadHeader("its header is no table of tensors")
    meta = told.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise BadHeader("its metadata are no table of texts")
    return Header(meta, _laid_out(told, 8 + length, size))


def regular(path: str | os.PathLike[str], *, link: bool = True) -> None:
    """Raise unless a file is there to be read: a pipe would block, a device would never end.

    Args:
        path: of the file.
        link: whether it may be a symbolic link to one.

    Raises:
        BadHeader: it is something else.
        OSError: it is not there, or cannot be reached.
    """
    kind = (os.stat if link else os.lstat)(path).st_mode
    if not stat.S_ISREG(kind):
        names = {
            stat.S_IFDIR: "a folder",
            stat.S_IFIFO: "a pipe",
            stat.S_IFSOCK: "a socket",
            stat.S_IFLNK: "a symbolic link",
        }
        raise BadHeader(f"it is {names.get(stat.S_IFMT(kind), 'a device')}, not a file")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _laid_out(told: dict[str, Any], begin: int, size: int) -> dict[str, Stored]:
    """The tensors of the header, which must fill the file from `begin` to its end."""
    found = {}
    for name, entry in told.items():
        dtype, shape, start, stop = _entry(name, entry)
        needed = math.prod(shape) * SIZES[dtype]
        if stop - start != needed:
            raise BadHeader(
                f"{name!r} claims the shape {list(shape)} of {dtype}, {needed} bytes, and has "
                f"{stop - start}"
            )
        found[name] = (start, stop, Stored(dtype, shape, begin + start))
    at = 0
    for name, (start, stop, _) in sorted(found.items(), key=lambda item: item[1][:2]):
        if start != at:
            raise BadHeader(f"{name!r} begins at byte {start} where {at} is expected")
        at = stop
    if begin + at != size:
        raise BadHeader(f"its tensors end at byte {begin + at}, and it has {size}")
    return {name: stored for name, (*_, stored) in found.items()}


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadHeader(f"{name!r} is described by something else than dtype, shape and offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise BadHeader(f"{name!r} is of an unknown dtype, {str(dtype)[:40]!r}")
    if not _whole(shape) or len(shape) > MOST_DIMENSIONS:
        raise BadHeader(f"{name!r} has the shape {str(shape)[:80]}")
    if not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadHeader(f"{name!r} has the offsets {str(offsets)[:80]}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _whole(values: Any) -> bool:
    """Whether it is a list of numbers that count something."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)
