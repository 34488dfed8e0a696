"""Pictures in files, with their captions, as tensors of one size."""

from __future__ import annotations

import csv
import math
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError

__all__ = ["Captions", "Source", "captions_of", "covering", "files_of", "opened", "read"]

Source: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"
Captions: TypeAlias = "str | Sequence[str] | Mapping[str, str] | None"

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TABLE = "captions.csv"
FILE_COLUMNS = ("file", "file_name", "filename", "image", "path")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description")
NAMED = 5
"""At most this many files are named in a message."""


def files_of(source: Source) -> list[Path]:
    """The pictures of a folder by name, those of its folders not; or the files given.

    Raises:
        ArgumentError: there is no such folder or file, or no picture in it.
    """
    if not isinstance(source, (str, os.PathLike)):
        files = [Path(one) for one in source]
        if not files:
            raise ArgumentError("source names no file; give a folder or at least one picture.")
        for file in files:
            if not file.is_file():
                raise ArgumentError(f"source names {str(file)!r}, which is no file.")
        return files
    folder = Path(source)
    if not folder.is_dir():
        raise ArgumentError(f"source={str(folder)!r} is no folder; give one with pictures in it.")
    hidden = (file for file in folder.iterdir() if not file.name.startswith("."))
    found = sorted(f for f in hidden if f.suffix.lower() in SUFFIXES and f.is_file())
    if not found:
        raise ArgumentError(
            f"source={str(folder)!r} has no pictures in it; their names end in "
            f"{', '.join(SUFFIXES)}. Folders inside it are not searched."
        )
    return found


def opened(file: Path) -> Any:
    """The picture of a file: a PIL image in RGB.

    Turned as its EXIF data say; what is transparent becomes white.

    Raises:
        MissingHost: Pillow is not installed.
        ArgumentError: the file is no picture, damaged, or of more pixels than Pillow takes.
    """
    with checks.host("Pillow", "reads pictures", "diffusers"):
        from PIL import Image, ImageOps
    try:
        with Image.open(file) as found:
            picture: Any = ImageOps.exif_transpose(found)
            clear = "A" in picture.getbands() or "transparency" in picture.info
            picture = picture.convert("RGBA" if clear else "RGB")
    # Pillow's decoders raise what they like: OSError, ValueError, SyntaxError, struct.error.
    except Exception as error:
        raise ArgumentError(
            f"{str(file)!r} cannot be read as a picture ({type(error).__name__}: {error}). Repair "
            "it, or take it away."
        ) from error
    if clear:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    return picture


def covering(picture: Any, height: int, width: int) -> Any:
    """(height, width, 3) pixels, 0 to 255: scaled until it covers the size, the middle cut out."""
    factor = max(height / picture.height, width / picture.width)
    across = max(width, math.ceil(picture.width * factor - 1e-6))
    down = max(height, math.ceil(picture.height * factor - 1e-6))
    if (across, down) != picture.size:
        from PIL import Image

        picture = picture.resize((across, down), Image.Resampling.LANCZOS)
    left, top = (across - width) // 2, (down - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height)), dtype=np.float32)


def read(file: Path, height: int, width: int) -> Tensor:
    """(3, height, width) in [-1, 1]: scaled until it covers the size, and the middle cut out.

    Raises:
        MissingHost: Pillow is not installed.
        ArgumentError: the file is no picture, or damaged.
    """
    pixels = covering(opened(file), height, width)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def captions_of(files: Sequence[Path], source: Source, captions: Captions) -> list[str] | None:
    """One caption for each file; None where there are none.

    Args:
        files: as `files_of` found them.
        source: where they were looked for.
        captions: given; or ``"auto"`` for those beside the pictures, or None for none.

    Raises:
        ArgumentError: some pictures have a caption and some have none; a table that is none.
    """
    if captions is None:
        return None
    if isinstance(captions, Mapping):
        return _each(files, captions, "captions")
    if not isinstance(captions, str):
        if len(captions) != len(files) or not all(isinstance(text, str) for text in captions):
            raise ArgumentError(
                f"captions must be one string for each of {len(files)} pictures, got "
                f"{len(captions)}."
            )
        return list(captions)
    if captions != "auto":
        raise ArgumentError(
            f"captions must be 'auto', None, strings or strings by file name, got {captions!r}."
        )
    table = Path(source) / TABLE if isinstance(source, (str, os.PathLike)) else None
    if table is not None and table.is_file():
        return _each(files, _table(table, files), str(table))
    beside = {f.name: f.with_suffix(".txt") for f in files if f.with_suffix(".txt").is_file()}
    if not beside:
        return None
    texts = {}
    for name, text in beside.items():
        with _readable(text):
            texts[name] = text.read_text(encoding="utf-8").strip()
    return _each(files, texts, "the .txt files beside the pictures")


def _table(table: Path, files: Sequence[Path]) -> dict[str, str]:
    """Captions by file name, from a table with a line of titles or without."""
    with _readable(table), table.open(encoding="utf-8-sig", newline="") as file:
        lines = [line for line in csv.reader(file) if any(cell.strip() for cell in line)]
    of_file, of_caption = 0, 1
    titles = [cell.strip().lower() for cell in lines[0]] if lines else []
    if titles and Path(titles[0]).name not in {f.name.lower() for f in files}:
        of_file = next((titles.index(t) for t in FILE_COLUMNS if t in titles), 0)
        of_caption = next((titles.index(t) for t in CAPTION_COLUMNS if t in titles), 1)
        lines = lines[1:]
    for number, line in enumerate(lines):
        if len(line) <= max(of_file, of_caption):
            raise ArgumentError(
                f"{table} needs two columns, file and caption; its entry {number + 1} is "
                f"{reprlib.repr(line)}."
            )
    return {Path(line[of_file].strip()).name: line[of_caption].strip() for line in lines}


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError, csv.Error) as error:
        raise ArgumentError(
            f"{str(file)!r} cannot be read ({error}). Captions are text in UTF-8; save it as such, "
            "or give captions=None to do without."
        ) from error


def _each(files: Sequence[Path], captions: Mapping[str, str], where: str) -> list[str]:
    missing = [f.name for f in files if not captions.get(f.name)]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise ArgumentError(
            f"{where} has no caption for {', '.join(missing[:NAMED])}{more}. Give every picture "
            "one, or captions=None to do without."
        )
    return [captions[f.name] for f in files]
