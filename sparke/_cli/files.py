"""Files that appear whole or not at all, and never in the place of another."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from sparke.errors import SparkeError

LONGEST_STEM = 80


class OutputError(SparkeError, OSError):
    """A file or folder cannot be written."""


def folder(path: Path, *, make: bool = True) -> Path:
    """`path`, a folder that files can be written to; made with its parents where `make`.

    Raises:
        OutputError: it is no folder or cannot be written to.
    """
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file, a folder is needed there.")
        if make:
            path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to the folder {path}: {error.strerror}.") from error
    return path


def create(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Write a new file; complete from the moment it is seen.

    Args:
        path: where; its folder is there.
        data: all of it.
        replace: whether a file that is there may be replaced.

    Raises:
        FileExistsError: there is one, and `replace` is False.
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        if replace:
            temporary.replace(path)
        else:
            _claim(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _claim(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # No hard links on this file system.
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        temporary.rename(path)


@contextlib.contextmanager
def all_or_none() -> Iterator[list[Path]]:
    """A list for the files made in the block; they are removed if the block does not finish."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def create_next(where: Path, stem: str, data: bytes) -> Path:
    """Write ``stem-0001.png``, or the number after the greatest there; the file's path."""
    number = _greatest(where, stem) + 1
    while True:
        path = where / f"{stem}-{number:04d}.png"
        try:
            create(path, data)
        except FileExistsError:
            number += 1
        else:
            return path


def _greatest(where: Path, stem: str) -> int:
    pattern = re.compile(re.escape(stem) + r"-(\d{1,15})\.png", re.ASCII)
    found = (pattern.fullmatch(path.name) for path in where.iterdir())
    return max((int(match[1]) for match in found if match), default=0)


def stem_of(prompt: str) -> str:
    """A file name for a prompt, without suffix: ``woman-health-worker``."""
    stem = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return stem[:LONGEST_STEM].rstrip("-") or "picture"


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
