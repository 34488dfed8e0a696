"""Files that appear whole or not at all, and never in the place of another."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from sparke.errors import SparkeError

LONGEST_STEM = 80

Stamp = tuple[int, int, int, int]


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
        if path.is_symlink() and not path.exists():
            raise OutputError(f"{path} is a symbolic link that leads nowhere.")
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
    create_all({path: data}, replace=replace)


def create_all(contents: Mapping[Path, bytes], *, replace: bool = False) -> None:
    """Write new files, all of them or none.

    Args:
        contents: where and what; the folders are there.
        replace: whether files that are there may be replaced.

    Raises:
        FileExistsError: one is there, and `replace` is False.
        OutputError: one cannot be written.
    """
    waiting: dict[Path, Path] = {}
    with contextlib.ExitStack() as leftovers:
        made = leftovers.enter_context(all_or_none())
        for path, data in contents.items():
            # A name nobody can have made a link of, and a new file even so.
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            leftovers.callback(_remove, temporary)
            waiting[temporary] = path
            with _reported(path), temporary.open("xb") as file:
                file.write(data)
        for temporary, path in waiting.items():
            with _reported(path):
                if replace:
                    temporary.replace(path)
                else:
                    _claim(temporary, path)
                    made.append(path)


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}.") from error


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


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def all_or_none() -> Iterator[list[Path]]:
    """A list for the files made in the block; they are removed if the block does not finish."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for path in made:
            _remove(path)
        raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Ctrl-C and other signals that stop a command wait for the function given, or for good.

    Between a file's appearance and the note of it, and while files are removed, an interruption
    would leave some behind.
    """
    waiting: list[tuple[int, Any]] = []

    def wait(number: int, frame: Any) -> None:
        waiting.append((number, frame))

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and callable(signal.getsignal(number)):
                before[number] = signal.signal(number, wait)

    def let_through() -> None:
        if waiting:
            number, frame = waiting.pop(0)
            before[number](number, frame)

    try:
        yield let_through
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def stamp(path: Path) -> Stamp | None:
    """What changes when another process writes the file; None where there is none."""
    try:
        told = path.stat()
    except FileNotFoundError:
        return None
    return told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns


def shown(path: Path) -> str:
    """A path as it can be printed: what would move a terminal's cursor is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def stem_of(prompt: str) -> str:
    """A file name for a prompt, without suffix: ``woman-health-worker``."""
    stem = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return stem[:LONGEST_STEM].rstrip("-") or "picture"


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
