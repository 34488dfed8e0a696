"""Everything of sparke that reads files, each with a whole file and what is done with it.

A loader does its worst with what it was given: it reads, and where it read, it uses what it made.
It may raise an error of sparke and nothing else.
"""

from __future__ import annotations

import functools
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import _mutations
from benchmarks._mutations import of_bytes, of_safetensors, of_text
from sparke.backends import _pictures
from sparke.memory import DiskMemory, MemoryFileWarning, ReferenceMemory, RingMemory, _lookup
from sparke.memory import _layout as layouts
from sparke.models import emoji
from sparke.models.emoji import _file
from sparke.protocols import Features

Change = Callable[[random.Random, bytes], bytes]
ROWS, WIDTH, COND = 12, 3, 4


@dataclass(frozen=True)
class Loader:
    """One reader of files.

    Args:
        name: in the table.
        make: writes the whole files into a folder; the path of the one that is damaged.
        change: what damages it.
        use: reads the folder or the file and uses what it made; raises errors of sparke only.
        weight: inputs, compared with the other loaders'.
        cuts: whether a torn end may be cut off the file, as documented.
    """

    name: str
    make: Callable[[Path], Path]
    change: Change
    use: Callable[[Path], None]
    weight: int
    cuts: bool = False


def rows(count: int = ROWS, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(count, WIDTH, generator=generator),
        torch.randn(count, COND, generator=generator),
    )


def checked(memory: Any) -> None:
    """What every memory does, with what was read."""
    repr(memory)
    count = len(memory)
    every = memory.select()
    assert len(every) == count
    assert bool(torch.isfinite(every.x).all())
    cond = every.cond
    if count and cond is not None:
        assert bool(torch.isfinite(cond).all())
        found = memory.select(torch.ones(2, cond.shape[1]))
        assert 0 < len(found) <= count
    if count and every.x.shape[1] < 10_000:
        memory.commit(Features(every.x[-1:].clone(), None if cond is None else cond[-1:].clone()))


def use_ring(path: Path) -> None:
    memory = RingMemory.load(path)
    copy = path.with_name("copy")
    memory.save(copy)
    assert torch.equal(RingMemory.load(copy).select().x, memory.select().x)
    checked(memory)


def use_reference(path: Path) -> None:
    memory = ReferenceMemory.load(path)
    copy = path.with_name("copy")
    memory.save(copy)
    assert len(ReferenceMemory.load(copy)) == len(memory) > 0
    checked(memory)


def make_file(kind: type[RingMemory] | type[ReferenceMemory], folder: Path) -> Path:
    if kind is RingMemory:
        memory = RingMemory(ROWS)
        memory.commit(rows())
        memory.save(folder / "memory")
    else:
        ReferenceMemory(rows(), dtype=torch.float16).save(folder / "memory")
    return folder / "memory"


def make_folder(name: str, dtype: torch.dtype, folder: Path) -> Path:
    """Two shards and a journal of two batches; the path of the file named by a pattern."""
    memory = DiskMemory(folder / "memory", dtype=dtype, cond_dtype=torch.float32, shard_bytes=200)
    for start in range(3):
        memory.commit(rows(9, start))
    memory.shard_bytes = 1 << 20
    memory.commit(rows(2, 8))
    memory.commit(rows(3, 9))
    (found,) = sorted((folder / "memory").glob(name))[:1]
    return found


def use_folder(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MemoryFileWarning)
        memory = DiskMemory(path.parent)
        count = len(memory)
        assert len(memory.rows(0, 2)) == min(2, count)
        checked(memory)


def make_lookup(folder: Path) -> Path:
    memory = DiskMemory(folder / "memory", cond_dtype=torch.float32, lookup_from=1)
    memory.commit(rows(300))
    memory.select(rows(1).cond)
    return folder / "memory" / _lookup.NAME


def use_lookup(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MemoryFileWarning)
        memory = DiskMemory(path.parent, lookup_from=1)
        memory._lookup._save = lambda: None  # type: ignore[union-attr, method-assign]
        assert 0 < len(memory.select(rows(2, 5).cond)) <= 300


def make_weights(folder: Path) -> Path:
    """The emoji model's header and names, with a network of a few channels."""
    about, _ = _file.read("weights.safetensors")
    about["arch"] = {
        **dict.fromkeys(about["arch"], 4),
        "blocks": 1,
        "latent": 2,
    }
    shapes = emoji.model._shapes(about, {})
    tensors = {key: torch.full(shape, 0.1, dtype=torch.float16) for key, shape in shapes.items()}
    save_file(tensors, folder / "weights", {"emoji": json.dumps(about)})
    return folder / "weights"


def use_weights(path: Path) -> None:
    model = emoji.load(weights=path)
    assert model.encode(["", *model.prompts[:1]]).ndim == 2


def make_judge(folder: Path) -> Path:
    about, tensors = _file.read("judge.safetensors")
    tensors["reference.images"] = tensors["reference.images"][:8].clone()
    tensors["reference.labels"] = tensors["reference.labels"][:, :8].clone()
    save_file(tensors, folder / "judge", {"emoji": json.dumps(about)})
    return folder / "judge"


def use_judge(path: Path) -> None:
    judge = emoji.load_judge(weights=path)
    assert judge(torch.zeros(1, 3, 32, 32)).name.shape == (1,)


def of_weights(rng: random.Random, data: bytes) -> bytes:
    """Also what the header says of the network, which is a text inside the header."""
    if rng.random() < 0.5:
        return of_safetensors(rng, data)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header["__metadata__"]["emoji"] = of_text(
        rng, header["__metadata__"]["emoji"].encode()
    ).decode()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def make_picture(kind: str, folder: Path) -> Path:
    from PIL import Image

    path = folder / f"picture.{kind}"
    Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 50).convert("RGB").save(path)
    return path


def use_picture(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = _pictures.read(path, 8, 8)
    assert picture.shape == (3, 8, 8)
    assert bool(torch.isfinite(picture).all())


def make_captions(folder: Path) -> Path:
    (folder / "captions.csv").write_text('file,caption\na.png,"a dog, sitting"\nb.png,café\n')
    return folder / "captions.csv"


def use_captions(path: Path) -> None:
    files = [path.with_name("a.png"), path.with_name("b.png")]
    found = _pictures.captions_of(files, path.parent, "auto")
    assert found is not None
    assert len(found) == 2
    assert all(found)


def _layout(dtype: torch.dtype) -> layouts.Layout:
    from sparke.memory import _rules

    return layouts.Layout(dtype, _rules.Widths(WIDTH, COND), torch.float32)


def _folder(name: str, dtype: torch.dtype = torch.float32) -> Callable[[Path], Path]:
    return functools.partial(make_folder, name, dtype)


def _json(rng: random.Random, data: bytes) -> bytes:
    return rng.choice((of_bytes, of_text, of_text))(rng, data)


LOADERS = (
    Loader(
        "RingMemory.load", functools.partial(make_file, RingMemory), of_safetensors, use_ring, 25
    ),
    Loader(
        "ReferenceMemory.load",
        functools.partial(make_file, ReferenceMemory),
        of_safetensors,
        use_reference,
        12,
    ),
    Loader("DiskMemory: memory.json", _folder("memory.json"), _json, use_folder, 8),
    Loader("DiskMemory: a shard", _folder("rows-*"), of_safetensors, use_folder, 6),
    Loader(
        "DiskMemory: a shard, int8", _folder("rows-*", torch.int8), of_safetensors, use_folder, 3
    ),
    Loader(
        "DiskMemory: the journal",
        _folder("tail-*"),
        _mutations.of_journal(_layout(torch.float32)),
        use_folder,
        5,
        cuts=True,
    ),
    Loader("DiskMemory: prompts.lookup", make_lookup, _mutations.of_lookup, use_lookup, 1),
    Loader("emoji.load", make_weights, of_weights, use_weights, 8),
    Loader("emoji.load_judge", make_judge, of_weights, use_judge, 1),
    Loader("a picture, png", functools.partial(make_picture, "png"), of_bytes, use_picture, 11),
    Loader("a picture, jpeg", functools.partial(make_picture, "jpg"), of_bytes, use_picture, 10),
    Loader("captions.csv", make_captions, of_bytes, use_captions, 10),
)


class Bench:
    """A folder with a loader's whole files, into which damaged ones are put one after another."""

    def __init__(self, loader: Loader, folder: Path) -> None:
        self.loader = loader
        self.path = loader.make(folder)
        self.data = self.path.read_bytes()
        self._folder = folder
        self._whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self._stamps: dict[Path, tuple[int, int]] = {}

    def damaged(self, rng: random.Random) -> bytes:
        """A damaged file; now and then a whole one, which must be read."""
        return self.data if rng.random() < 0.01 else self.loader.change(rng, self.data)

    def tried(self, data: bytes) -> BaseException | None:
        """The error with which the loader refused these bytes; None where it took them.

        Raises:
            AssertionError: the file was changed, or what was read does not behave.
        """
        self._restore()
        self.path.write_bytes(data)
        refused: BaseException | None = None
        watched = _Watched(self.path, data, cuts=self.loader.cuts)
        try:
            self.loader.use(self.path)
        except Exception as error:  # noqa: BLE001  the caller judges it
            refused = error
        if refused is not None:
            watched.check()
        if refused is not None and "there is no room for" in str(refused):
            raise AssertionError(f"room was asked for that the file does not fill: {refused}")
        return refused

    def _restore(self) -> None:
        """Every file as it was made; most were not touched and are left alone."""
        for path in [path for path in self._folder.rglob("*") if path not in self._whole]:
            if path.is_file():
                path.unlink()
        for path, data in self._whole.items():
            if path != self.path and (not path.exists() or _stamp(path) != self._stamps.get(path)):
                path.write_bytes(data)
                self._stamps[path] = _stamp(path)


def _stamp(path: Path) -> tuple[int, int]:
    told = path.stat()
    return told.st_size, told.st_mtime_ns


@dataclass(frozen=True)
class _Watched:
    """A file that nobody may change, unless a torn end is cut off."""

    path: Path
    data: bytes
    cuts: bool

    def check(self) -> None:
        found = self.path.read_bytes()
        if found != self.data:
            assert self.cuts, "the file was changed"
            assert self.data.startswith(found), "the file was changed, and not cut"
