"""Small folders of pictures to measure, and the command run on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sparke.cli import main

Run = Callable[..., tuple[int, str, str]]
Done = tuple[int, str, str]


def picture(path: Path, seed: int, size: tuple[int, int] = (24, 16)) -> None:
    """Blocks of colours drawn by lot."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path)


def folder(path: Path, stems: Sequence[str], each: int, *, first: int = 0, copies: int = 1) -> Path:
    """Pictures ``stem-0001.png`` and so on; every `copies` of them are equal."""
    for s, stem in enumerate(stems):
        for i in range(each):
            picture(path / f"{stem}-{i + 1:04d}.png", first + 1000 * s + i // copies)
    return path


def tree(where: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        path.relative_to(where).as_posix(): path.read_bytes()
        for path in where.rglob("*")
        if path.is_file()
    }


def refused(done: Done, *said: str) -> None:
    """One readable line on stderr, a bad exit code, nothing else."""
    status, out, err = done
    assert status in (1, 2), done
    assert out == ""
    assert err.startswith("sparke: ")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert len(err) < 500
    assert "Traceback" not in err
    assert "SPARKE_TRACEBACK" not in err
    for words in said:
        assert words in err


def command(*argv: str) -> int:
    """`sparke eval`, its exit code."""
    return main(["eval", *argv])
