"""Memory files and folders made by somebody else: what they name is not touched."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sparke.errors import ArgumentError, MemoryFileError
from sparke.memory import DiskMemory, MemoryFileWarning, ReferenceMemory, RingMemory, _lookup
from sparke.memory import _graph as graph
from sparke.models import emoji
from sparke.models.emoji import _file
from sparke.protocols import Features

GOOD = {"format": "sparke-memory", "version": "1", "capacity": "8", "kind": "ring"}
TAIL = "tail-0000000000000000.journal"
links = pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")


def rows(count: int = 3) -> Features:
    return Features(torch.ones(count, 2), torch.ones(count, 4))


def crafted(path: Path, header: str, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)


def entry(shape: list[Any], stop: int, start: int = 0, dtype: str = "F32") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, stop]})


META = f'"__metadata__": {json.dumps(GOOD)}'
HEADERS = {
    "rows of no width without end": (f'{{{META}, "x": {entry([10**12, 0], 0)}}}', 0, "one number"),
    "a name twice": (
        f'{{{META}, "x": {entry([2, 2], 16)}, "x": {entry([1, 4], 16)}}}',
        16,
        "twice",
    ),
    "metadata twice": (f'{{{META}, {META}, "x": {entry([2, 2], 16)}}}', 16, "twice"),
    "overlapping": (
        f'{{{META}, "x": {entry([2, 2], 16)}, "cond": {entry([2, 2], 24, 8)}}}',
        24,
        "begins at byte 8",
    ),
    "a gap": (f'{{{META}, "x": {entry([2, 2], 24, 8)}}}', 24, "begins at byte 8"),
    "more than it tells": (f'{{{META}, "x": {entry([2, 2], 16)}}}', 20, "end at byte"),
    "a product beyond 64 bits": (
        f'{{{META}, "x": {entry([2**32, 2**32, 2**32], 16)}}}',
        16,
        "claims the shape",
    ),
    "a negative size": (f'{{{META}, "x": {entry([-2, -2], 16)}}}', 16, "has the shape"),
    "a size that is true": (f'{{{META}, "x": {entry([True, 4], 16)}}}', 16, "has the shape"),
    "a size in parts": (f'{{{META}, "x": {entry([2.0, 2], 16)}}}', 16, "has the shape"),
    "numbers of numbers": (f'{{{META}, "x": {entry([2, 2], 16, dtype="F31")}}}', 16, "dtype"),
    "a list": ("[1]", 0, "no table"),
    "depths": ("[" * 100_000, 0, "damaged"),
    "metadata of numbers": ('{"__metadata__": {"format": 1}}', 0, "no table of texts"),
}


@pytest.mark.parametrize("load", [RingMemory.load, ReferenceMemory.load])
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_told_how(
    name: str, load: Callable[[Path], object], tmp_path: Path
) -> None:
    header, size, said = HEADERS[name]
    crafted(tmp_path / "m", header, bytes(size))
    with pytest.raises(MemoryFileError, match=f"m.*{said}"):
        load(tmp_path / "m")


def test_a_part_of_a_folder_is_no_file_of_its_own(tmp_path: Path) -> None:
    DiskMemory(tmp_path / "m", dtype=torch.float32, shard_bytes=1).commit(rows())
    (shard,) = (tmp_path / "m").glob("rows-*")
    with pytest.raises(MemoryFileError, match="DiskMemory"):
        RingMemory.load(shard)


# Saving.


@pytest.mark.parametrize(
    "there", [b"a thesis", b"", None], ids=["a thesis", "an empty file", "other tensors"]
)
def test_saving_replaces_memories_only(there: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "m"
    if there is None:
        save_file({"x": torch.zeros(2, 2)}, path)
    else:
        path.write_bytes(there)
    before = path.read_bytes()
    memory = RingMemory()
    memory.commit(rows())
    if there == b"":
        memory.save(path)
        assert len(RingMemory.load(path)) == 3
        return
    for save in (memory.save, ReferenceMemory(rows()).save):
        with pytest.raises(MemoryFileError, match="is no sparke memory, so it is not replaced"):
            save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@links
def test_saving_follows_links_to_memories(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("m")
    RingMemory().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(RingMemory.load(tmp_path / "m")) == 0
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(MemoryFileError, match="leads to itself"):
        RingMemory().save(tmp_path / "loop")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_are_neither_written_nor_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m")
    with pytest.raises(MemoryFileError, match="not replaced"):
        RingMemory().save(tmp_path / "m")
    with pytest.raises(MemoryFileError, match="a pipe"):
        RingMemory.load(tmp_path / "m")


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\0b", "long" * 100):
        with pytest.raises(MemoryFileError):
            RingMemory().save(tmp_path / name)
        with pytest.raises(MemoryFileError):
            RingMemory.load(tmp_path / name)
        with pytest.raises(MemoryFileError):
            DiskMemory(tmp_path / name)
    RingMemory().save(tmp_path / ("n" * 250))
    assert len(RingMemory.load(tmp_path / ("n" * 250))) == 0


# Folders.


def folder(tmp_path: Path) -> Path:
    memory = DiskMemory(tmp_path / "m", dtype=torch.float32)
    memory.commit(rows())
    return tmp_path / "m"


@links
@pytest.mark.parametrize("name", [TAIL, "lock"])
def test_a_link_in_a_folder_is_not_written_through(name: str, tmp_path: Path) -> None:
    """A journal is cut where a batch is torn, and a lock is emptied: of the file it leads to."""
    memory = folder(tmp_path)
    (tmp_path / "thesis").write_text("mine")
    (memory / name).unlink(missing_ok=True)
    (memory / name).symlink_to(tmp_path / "thesis")
    with pytest.raises(MemoryFileError, match=f"{name}.* a symbolic link"):
        DiskMemory(memory).commit(rows())
    assert (tmp_path / "thesis").read_text() == "mine"


@links
def test_a_link_for_a_file_being_written_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "thesis").write_text("mine")
    for name in (".memory.json.partial", f".{_lookup.NAME}.partial"):
        (tmp_path / "m" / name).symlink_to(tmp_path / "thesis")
    with pytest.warns(MemoryFileWarning, match="half-written"):
        DiskMemory(tmp_path / "m").commit(rows())
    assert (tmp_path / "thesis").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    "name", ["memory.json", TAIL, "lock", f"rows-{0:016d}-{3:016d}.safetensors"]
)
def test_a_pipe_in_a_folder_is_not_waited_for(name: str, tmp_path: Path) -> None:
    memory = folder(tmp_path)
    (memory / name).unlink(missing_ok=True)
    os.mkfifo(memory / name)
    with pytest.raises(MemoryFileError, match=f"{name}.* a pipe"):
        DiskMemory(memory).commit(rows())


def test_a_journal_without_end_is_not_read(tmp_path: Path) -> None:
    path = folder(tmp_path) / TAIL
    os.truncate(path, 1 << 40)  # of holes, where the file system has them
    with pytest.raises(MemoryFileError, match=f"{TAIL} has {1 << 40} bytes"):
        DiskMemory(path.parent)


def test_folders_in_the_place_of_files(tmp_path: Path) -> None:
    memory = folder(tmp_path)
    (memory / "x.partial").mkdir()
    with pytest.raises(MemoryFileError, match="cannot remove"):
        DiskMemory(memory).commit(rows())


def test_a_scale_that_takes_its_row_beyond_float32_is_damage(tmp_path: Path) -> None:
    DiskMemory(tmp_path / "m", dtype=torch.int8, shard_bytes=1).commit(rows())
    (shard,) = (tmp_path / "m").glob("rows-*")
    tensors = {
        "x": torch.full((3, 2), 127, dtype=torch.int8),
        "scale": torch.full((3, 1), 3e38),
        "cond": torch.ones(3, 4, dtype=torch.float16),
    }
    save_file(
        tensors,
        shard,
        {"format": "sparke-memory", "kind": "shard", "version": "1", "first": "0"},
    )
    with pytest.raises(MemoryFileError, match="'scale' holds NaN or infinity"):
        DiskMemory(tmp_path / "m").select()


# The index of prompts: native code reads it.


def index_of(count: int = 3000, width: int = 4) -> tuple[Any, bytes]:
    usearch = pytest.importorskip("usearch.index")
    index = usearch.Index(ndim=width, metric="cos", dtype="i8")
    vectors = np.random.default_rng(0).standard_normal((count, width)).astype("f4")
    index.add(np.arange(count), vectors, threads=1)
    return index, bytes(index.save(None))


def test_an_index_that_usearch_wrote_is_believed() -> None:
    index, data = index_of()
    assert np.array_equal(graph.check(data, 4, index.connectivity), np.arange(3000))


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def test_every_reference_of_an_index_is_looked_at() -> None:
    """Where one leads out, or to a node that is not on its level, usearch never reads it."""
    index, data = index_of()
    head = 8 + 3000 * 4
    nodes = head + 64 + 40 + 2 * 3000
    levels = np.frombuffer(data, "<i2", 3000, head + 64 + 40).astype(int)
    ground, above = 4 + 8 * index.connectivity, 4 + 4 * index.connectivity
    starts = nodes + np.cumsum(10 + ground + levels * above) - (10 + ground + levels * above)
    tall, low = int(levels.argmax()), int(levels.argmin())
    upper = int(starts[tall]) + 10 + ground
    last = int(starts[-1])
    cases = {
        "leads nowhere": [
            changed(data, last + 14, struct.pack("<I", 3000)),
            changed(data, upper + 4, struct.pack("<I", 2**32 - 1)),
            changed(data, upper + 4, struct.pack("<I", low)),  # on the ground level only
        ],
        "room for": [
            changed(data, last + 10, struct.pack("<I", 2 * index.connectivity + 1)),
            changed(data, upper, struct.pack("<I", index.connectivity + 1)),
        ],
        "in two ways": [
            changed(data, last + 8, struct.pack("<h", levels[-1] + 1)),
            changed(data, head + 17, struct.pack("<Q", 2999)),
            changed(data, head + 64 + 8, struct.pack("<Q", 2**40)),
        ],
        "no way in": [
            changed(data, head + 64 + 32, struct.pack("<Q", 3000)),
            changed(data, head + 64 + 32, struct.pack("<Q", low)),
            changed(data, head + 64 + 40, struct.pack("<h", -1)),
        ],
        "twice": [changed(data, last, struct.pack("<Q", 0))],
        "another kind": [changed(data, head + 13, b"e"), changed(data, head + 41, b"\1")],
        "expected": [changed(data, 0, struct.pack("<I", 2**32 - 1)), changed(data, 4, b"\5")],
        "its size": [data[:-1], data + b"\0"],
        "too short": [b"", data[:7]],
    }
    for said, files in cases.items():
        for file in files:
            with pytest.raises(ValueError, match=said):
                graph.check(file, 4, index.connectivity)


def test_a_hostile_index_with_a_good_checksum_is_made_again(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    cond = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    memory = DiskMemory(tmp_path / "m", lookup_from=1)
    memory.commit(Features(torch.ones(300, 2), cond))
    first = memory.select(cond[:1])
    path = tmp_path / "m" / _lookup.NAME
    data, covered = _lookup._read(path)
    assert covered == 300
    data = changed(data, len(data) - 4, b"\xff\xff\xff\xff")
    data = changed(data, 8 + 300 * 4 + 64 + 40 + 600 + 14, b"\xff\xff\xff\xff")
    meta = {
        "format": "sparke-memory",
        "kind": "lookup",
        "covered": "300",
        "crc32": str(zlib.crc32(data)),
    }
    save_file({"index": torch.frombuffer(bytearray(data), dtype=torch.uint8)}, path, meta)
    with pytest.warns(MemoryFileWarning, match="leads nowhere"):
        again = DiskMemory(tmp_path / "m", lookup_from=1).select(cond[:1])
    assert torch.equal(first.x, again.x)


def test_an_index_of_rows_that_are_gone_is_made_again(tmp_path: Path) -> None:
    """New rows get the numbers of the lost ones, which the index knows by other prompts."""
    pytest.importorskip("usearch")
    cond = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    memory = DiskMemory(tmp_path / "m", lookup_from=1)
    memory.commit(Features(torch.ones(300, 2), cond))
    memory.select(cond[:1])
    (tmp_path / "m" / TAIL).unlink()
    fresh = DiskMemory(tmp_path / "m", lookup_from=1)
    fresh.commit(Features(torch.ones(200, 2), cond[:200]))
    with pytest.warns(MemoryFileWarning, match="rows that are gone"):
        fresh.select(cond[:1])


def test_a_folder_another_is_writing_to_is_still_looked_up(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    memory = DiskMemory(tmp_path / "m", lookup_from=1)
    memory.commit(rows())
    other = DiskMemory(tmp_path / "m")
    with other._folder.locked():
        assert len(memory.select(rows(1).cond)) == 3
    assert not (tmp_path / "m" / _lookup.NAME).exists()


# Weights.


def weights(path: Path, **changes: Any) -> Path:
    about, tensors = _file.read("weights.safetensors")
    save_file(tensors, path, {"emoji": json.dumps(about | changes)})
    return path


ARCH = {"latent": 320, "width": 384, "hidden": 480, "blocks": 4, "cond": 128, "word": 64}
ARCH["attribute"] = 32


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arch": ARCH | {"width": 10**9}}, "width=1000000000"),
        ({"arch": ARCH | {"width": 16384}}, "asks for"),
        ({"arch": ARCH | {"blocks": 16384}}, "at most 256"),
        ({"arch": ARCH | {"blocks": 5}}, "missing tensors"),
        ({"arch": ARCH | {"blocks": 3}}, "extra tensors"),
        ({"arch": ARCH | {"depth": 1}}, "sizes of the network"),
        ({"arch": None}, "sizes of the network"),
        ({"vocabulary": [1]}, "list of texts 'vocabulary'"),
        ({"vocabulary": ["a"] * 9}, "asks for"),
        ({"sigma_min": -1.0}, "sigma_min=-1.0"),
        ({"sigma_max": 10**400}, "sigma_max=1000"),
        ({"sigma_min": 100.0}, "not below"),
    ],
)
def test_weights_that_lie_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = weights(tmp_path / "w", **changes)
    with pytest.raises(ArgumentError, match=f"weights='.*w' cannot be used: .*{said}"):
        emoji.load(weights=path)


def test_weights_are_refused_before_they_are_read(tmp_path: Path) -> None:
    assert emoji.load(weights=weights(tmp_path / "w")).latent_shape == (320,)
    crafted(tmp_path / "w", '{"__metadata__": {"emoji": "{}"}}')
    for load in (emoji.load, emoji.load_judge):
        with pytest.raises(ArgumentError, match="cannot be used"):
            load(weights=tmp_path / "w")
        with pytest.raises(ArgumentError, match="No such file"):
            load(weights=tmp_path / "nothing")
        with pytest.raises(ArgumentError, match="a folder, not a file"):
            load(weights=tmp_path)
    about, tensors = _file.read("weights.safetensors")
    tensors["latent.mean"][0] = torch.nan
    save_file(tensors, tmp_path / "w", {"emoji": json.dumps(about)})
    with pytest.raises(ArgumentError, match=r"'latent\.mean' holds NaN"):
        emoji.load(weights=tmp_path / "w")


def test_labels_of_a_judge_name_something(tmp_path: Path) -> None:
    about, tensors = _file.read("judge.safetensors")
    tensors["reference.labels"][1, 7] = 200
    save_file(tensors, tmp_path / "j", {"emoji": json.dumps(about)})
    with pytest.raises(ArgumentError, match="a label is 200, and there are 5 names"):
        emoji.load_judge(weights=tmp_path / "j")
