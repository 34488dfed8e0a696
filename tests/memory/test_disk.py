"""The memory on disk: what it keeps, who may write, and what its files survive."""

import json
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparke.errors import ArgumentError, MemoryFileError, MissingPrompts, ShapeError
from sparke.memory import DiskMemory, MemoryFileWarning, RingMemory, _journal, _layout, _rules
from sparke.protocols import Features, Memory
from sparke.scores import CondRKE
from sparke.testing import check_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXACT: dict[str, Any] = {"dtype": torch.float32, "cond_dtype": torch.float32}
posix = pytest.mark.skipif(os.name != "posix", reason="forks and signals")


def items(n: int, start: int = 0, width: int = 3, prompts: int | None = 4) -> Features:
    number = torch.arange(start, start + n).float()[:, None]
    cond = None if prompts is None else torch.cos(number + torch.arange(prompts))
    return Features(number.repeat(1, width), cond)


def numbers(memory: DiskMemory) -> list[int]:
    return [int(v) for v in memory.rows().x[:, 0]] if len(memory) else []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("lock",))


def filled(folder: Path, batches: int = 5, **options: Any) -> DiskMemory:
    """Five batches of three rows: a shard of 6, another of 6, and a journal of 3."""
    record = _layout.Layout(torch.float32, _rules.Widths(3, 4), torch.float32).record.itemsize
    memory = DiskMemory(folder, **EXACT, **options, shard_bytes=5 * record)
    for batch in range(batches):
        memory.commit(items(3, 3 * batch))
    return memory


# Keeping.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [1, 300, 1 << 20])
@pytest.mark.parametrize("cache_bytes", [0, 100, 1 << 20])
def test_it_is_a_memory(
    dtype: torch.dtype, shard_bytes: int, cache_bytes: int, tmp_path: Path
) -> None:
    folders = iter(range(99))

    def make() -> DiskMemory:
        options: dict[str, Any] = {"shard_bytes": shard_bytes, "cache_bytes": cache_bytes}
        return DiskMemory(tmp_path / str(next(folders)), dtype=dtype, **options)

    assert isinstance(make(), Memory)
    check_memory(make)


@given(
    sizes=st.lists(st.integers(0, 9), max_size=8),
    shard_bytes=st.sampled_from([1, 400, 1000, 1 << 20]),
    prompts=st.sampled_from([None, 4]),
)
def test_rows_come_back_in_the_order_of_their_commits(
    sizes: list[int],
    shard_bytes: int,
    prompts: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, done = tmp_path_factory.mktemp("m"), 0
    memory = DiskMemory(folder, **EXACT, shard_bytes=shard_bytes)
    for size in sizes:
        memory.commit(items(size, done, prompts=prompts))
        done += size
        assert len(memory) == done
    for found in (memory, DiskMemory(folder)):
        assert numbers(found) == list(range(done))
        kept, expected = found.rows().cond, items(done, prompts=prompts).cond
        if done and expected is not None:
            assert kept is not None
            assert torch.equal(kept, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cond_dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_rows_are_stored_to_the_bit(
    dtype: torch.dtype, cond_dtype: torch.dtype, shard_bytes: int, tmp_path: Path
) -> None:
    x, cond = torch.randn(9, 5), torch.randn(9, 3)
    memory = DiskMemory(tmp_path, dtype=dtype, cond_dtype=cond_dtype, shard_bytes=shard_bytes)
    memory.commit(Features(x, cond))
    for found in (memory.rows(), DiskMemory(tmp_path).select()):
        assert torch.equal(found.x, x.to(dtype).float())
        assert found.cond is not None
        assert torch.equal(found.cond, cond.to(cond_dtype).float())


@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_whole_numbers_keep_direction_and_scale(shard_bytes: int, tmp_path: Path) -> None:
    x = torch.randn(20, 4096) * torch.logspace(-6, 6, 20)[:, None]
    x[3] = 0
    memory = DiskMemory(tmp_path, dtype=torch.int8, shard_bytes=shard_bytes)
    memory.commit(Features(x))
    found = DiskMemory(tmp_path).rows().x
    assert bool((found[3] == 0).all())
    assert bool(((found - x).abs().amax(1) <= x.abs().amax(1) / 127 * 0.501).all())
    cosine = torch.cosine_similarity(found, x)[x.any(1)]
    assert float(cosine.min()) > 0.9999


def test_small_commits_do_not_make_many_files(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path, **EXACT)
    for number in range(200):
        memory.commit(items(1, number))
    assert names(tmp_path) == ["memory.json", "tail-0000000000000000.journal"]
    memory = DiskMemory(tmp_path, shard_bytes=200 * 30)
    memory.commit(items(1, 200))
    assert names(tmp_path) == [
        "memory.json",
        "rows-0000000000000000-0000000000000201.safetensors",
    ]
    assert numbers(memory) == list(range(201))


def test_a_folder_is_what_its_docstring_says(tmp_path: Path) -> None:
    filled(tmp_path)
    assert names(tmp_path) == [
        "memory.json",
        "rows-0000000000000000-0000000000000006.safetensors",
        "rows-0000000000000006-0000000000000012.safetensors",
        "tail-0000000000000012.journal",
    ]


def test_it_selects_what_a_ring_selects(tmp_path: Path) -> None:
    x, cond = torch.randn(3000, 8), torch.randn(3000, 64)
    cond[::100] = cond[0] + 0.01 * torch.randn(30, 64)
    disk, ring = DiskMemory(tmp_path, **EXACT, shard_bytes=40_000), RingMemory(3000)
    for memory in (disk, ring):
        for low in range(0, 3000, 250):
            memory.commit(Features(x[low : low + 250], cond[low : low + 250]))
    for weigh in (CondRKE(cond_bandwidth=0.3).log_weight, CondRKE(cond_bandwidth=0.25).log_weight):
        ours, theirs = disk.select(cond[:2], weigh), ring.select(cond[:2], weigh)
        assert len(ours) < 1000
        assert torch.equal(ours.x, theirs.x)
        assert ours.cond is not None
        assert theirs.cond is not None
        assert torch.equal(ours.cond, theirs.cond)
        torch.testing.assert_close(ours.log_weight, theirs.log_weight, rtol=1e-5, atol=1e-5)


def test_a_selection_stays_under_its_budget_and_tells_what_it_left_out(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path, **EXACT, select_bytes=300 * 4 * 3)
    memory.commit(Features(items(1000).x, torch.ones(1000, 4)))
    found = memory.select(torch.ones(1, 4))
    assert found.x[:, 0].tolist() == list(range(700, 1000))
    assert memory.left_out is not None
    assert memory.left_out.tolist() == [700.0]
    assert memory.select().x[:, 0].tolist() == list(range(700, 1000))
    assert memory.left_out is None


@pytest.mark.parametrize("budget", [0, 40, 400, 1 << 20])
def test_rows_cached_are_the_rows_on_disk(budget: int, tmp_path: Path) -> None:
    cond = torch.nn.functional.one_hot(torch.arange(900) % 9, 9).float()
    memory = DiskMemory(tmp_path, **EXACT, cache_bytes=budget, shard_bytes=3000)
    plain = DiskMemory(tmp_path, cache_bytes=0)
    for low in range(0, 900, 90):
        memory.commit(Features(items(90, low).x, cond[low : low + 90]))
        for prompt in (0, 3, 0, 5):
            query = cond[prompt : prompt + 1]
            ours, theirs = memory.select(query), plain.select(query)
            assert torch.equal(ours.x, theirs.x)
            assert ours.cond is not None
            assert theirs.cond is not None
            assert torch.equal(ours.cond, theirs.cond)
    assert memory._reader._cache is not None
    assert memory._reader._cache.nbytes <= budget
    assert (len(memory._reader._cache) > 0) == (budget > 48)


def test_a_cached_row_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = filled(tmp_path, 4, cache_bytes=1 << 20)
    first = memory.select(items(1).cond)
    read: list[int] = []
    gather = type(memory._folder).gather

    def counted(folder: Any, places: Any, most: int) -> Any:
        read.extend(places.tolist())
        return gather(folder, places, most)

    monkeypatch.setattr(type(memory._folder), "gather", counted)
    assert torch.equal(memory.select(items(1).cond).x, first.x)
    assert read == []
    memory.commit(items(3, 12))
    memory.select(items(1).cond)
    assert read == [12, 13, 14]


def test_a_hosts_inference_mode_leaves_no_trace(tmp_path: Path) -> None:
    with torch.inference_mode():
        memory = filled(tmp_path, 4, cache_bytes=1 << 20)
        memory.select(items(1).cond)
    memory.commit(items(3, 12))
    memory.commit(items(3, 15))
    assert memory.select(items(1).cond).x[:, 0].tolist() == list(range(18))


# Refusing: the rules of every memory, and those of a folder.


REFUSED: list[tuple[Features, type[Exception]]] = [
    (items(2, width=4), ShapeError),
    (items(2, prompts=5), ShapeError),
    (items(2, prompts=None), MissingPrompts),
    (Features(torch.full((1, 3), math.nan), torch.ones(1, 4)), ArgumentError),
    (Features(torch.full((1, 3), 65520.0), torch.ones(1, 4)), ArgumentError),
    (Features(torch.ones(1, 3), torch.full((1, 4), 65520.0)), ArgumentError),
]


@pytest.mark.parametrize(("bad", "error"), REFUSED)
def test_what_does_not_belong_is_refused(
    bad: Features, error: type[Exception], tmp_path: Path
) -> None:
    memory = DiskMemory(tmp_path)
    memory.commit(items(2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error):
        memory.commit(bad)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    memory.commit(items(1, 2))
    assert numbers(memory) == [0, 1, 2]


def test_prompts_are_asked_for_by_the_rules_of_the_ring(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path / "a")
    memory.commit(items(2))
    with pytest.raises(ShapeError, match="prompt_embeds"):
        memory.select(torch.ones(1, 5))
    bare = DiskMemory(tmp_path / "b")
    bare.commit(items(2, prompts=None))
    with pytest.raises(MissingPrompts):
        bare.select(torch.ones(1, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float64},
        {"cond_dtype": torch.int8},
        {"select_bytes": 0},
        {"shard_bytes": -1},
        {"cache_bytes": -1},
        {"tolerance": 1.5},
        {"timeout": math.nan},
    ],
)
def test_an_option_out_of_bounds_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        DiskMemory(tmp_path, **options)


def test_a_folder_of_another_dtype_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(ArgumentError, match="dtype"):
        DiskMemory(tmp_path, dtype=torch.int8)
    assert DiskMemory(tmp_path).dtype == torch.float32


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(MemoryFileError, match=r"thesis\.tex"):
        DiskMemory(tmp_path)
    with pytest.raises(MemoryFileError, match="folder"):
        DiskMemory(tmp_path / "nowhere" / "m")
    with pytest.raises(MemoryFileError, match="folder"):
        DiskMemory(tmp_path / "thesis.tex")


# Several at once.

APPEND = """
import sys, torch
from sparke.memory import DiskMemory
from sparke.protocols import Features
memory = DiskMemory(sys.argv[1], dtype=torch.float32, shard_bytes=900)
writer = float(sys.argv[2])
for number in range(30):
    x = torch.tensor([[writer, number, i] for i in range(1 + number % 4)])
    memory.commit(Features(x, x))
"""


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def test_two_processes_append_and_a_reader_sees_whole_batches(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    writers = [
        subprocess.Popen([sys.executable, "-c", APPEND, folder, str(n)], env=environment())
        for n in range(2)
    ]
    reader, looks, before = DiskMemory(folder), 0, torch.zeros(0, 3)
    while any(writer.poll() is None for writer in writers):
        x = reader.select().x
        if len(x):
            assert torch.equal(x[: len(before)], before)  # what was seen stays
            for writer in range(2):
                batches = x[x[:, 0] == writer][:, 1:].tolist()
                expected = [[b, i] for b in range(30) for i in range(1 + b % 4)]
                assert batches == expected[: len(batches)]
                assert len(batches) == len(expected) or expected[len(batches)][1] == 0
            looks, before = looks + (len(x) > len(before)), x
        time.sleep(0.005)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(reader) == 2 * sum(1 + b % 4 for b in range(30))
    assert looks > 3


def test_a_second_object_sees_the_commits_of_the_first(tmp_path: Path) -> None:
    one, other = DiskMemory(tmp_path, **EXACT), DiskMemory(tmp_path)
    for batch in range(30):
        (one, other)[batch % 2].commit(items(2, 2 * batch))
        assert numbers(one) == numbers(other) == list(range(2 * batch + 2))


def test_rows_seen_can_be_read_after_another_sealed_them(tmp_path: Path) -> None:
    one = filled(tmp_path, 1)
    other = DiskMemory(tmp_path, shard_bytes=1)
    layout = one._folder.layout
    assert layout is not None
    other.commit(items(1, 3))
    assert names(tmp_path)[1:] == ["rows-0000000000000000-0000000000000004.safetensors"]
    x, _ = one._reader.read(layout, np.arange(3), torch.device("cpu"))
    assert x[:, 0].tolist() == [0, 1, 2]


def test_who_waits_too_long_for_a_lock_is_told(tmp_path: Path) -> None:
    holder, waiter = DiskMemory(tmp_path), DiskMemory(tmp_path, timeout=0.01)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with holder._folder.locked():
            held.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(10)
        with pytest.raises(MemoryFileError, match="lock"):
            waiter.commit(items(1))
        assert len(DiskMemory(tmp_path)) == 0  # readers do not wait
    finally:
        done.set()
        thread.join()


# Killed writers.


def run_kills(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.memory.kills", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@posix
def test_nothing_committed_is_lost_when_writers_are_killed(tmp_path: Path) -> None:
    found = run_kills(tmp_path / "m", "--kills", 20)
    assert found["kills"] == 20
    assert found["rows"] > 20


@posix
def test_no_line_is_a_bad_one_to_die_at(tmp_path: Path) -> None:
    found = run_kills(tmp_path / "m", "--lines", 7)
    assert found["kills"] > 10
    assert any(".partial" in warning for warning in found["reported"])


def test_every_cut_of_a_journal_leaves_whole_batches(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path, **EXACT)
    for start, size in ((0, 1), (1, 3), (4, 2)):
        memory.commit(items(size, start))
    path = tmp_path / "tail-0000000000000000.journal"
    whole, record = path.read_bytes(), len(path.read_bytes()) // 6
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = max(n for n in (0, 1, 4, 6) if n * record <= size)
        if size == kept * record:
            found = DiskMemory(tmp_path)
        else:
            with pytest.warns(MemoryFileWarning, match=path.name):
                found = DiskMemory(tmp_path)
        assert numbers(found) == list(range(kept))
        assert path.stat().st_size == kept * record
    found.commit(items(1, 4))
    assert numbers(DiskMemory(tmp_path)) == [0, 1, 2, 3, 4]


def test_a_half_written_shard_is_ignored_and_reported(tmp_path: Path) -> None:
    filled(tmp_path)
    partial = tmp_path / ".rows-0000000000000015-0000000000000021.safetensors.partial"
    partial.write_bytes(b"half a shard")
    with pytest.warns(MemoryFileWarning, match=partial.name):
        memory = DiskMemory(tmp_path)
    assert not partial.exists()
    assert numbers(memory) == list(range(15))


def test_a_journal_sealed_already_is_not_read_twice(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    journal = (tmp_path / "tail-0000000000000000.journal").read_bytes()
    filled(tmp_path, 0).commit(items(3, 3))
    (tmp_path / "tail-0000000000000000.journal").write_bytes(journal)  # killed before its removal
    memory = DiskMemory(tmp_path)
    assert numbers(memory) == list(range(6))
    memory.commit(items(2, 6))
    assert numbers(memory) == list(range(8))
    assert "tail-0000000000000000.journal" not in names(tmp_path)


@pytest.mark.parametrize("at", ["os.fsync", "sparke.memory._shards.save_file"])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_a_full_disk_leaves_what_was_there(
    at: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = DiskMemory(tmp_path, **EXACT, shard_bytes=shard_bytes)
    memory.commit(items(2))
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if at == "os.fsync" or shard_bytes == 1:
        with monkeypatch.context() as patch:
            patch.setattr(at, fail)
            with pytest.raises(MemoryFileError, match="No space"):
                memory.commit(items(1, 2))
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    memory.commit(items(1, 2))
    assert numbers(memory) == numbers(DiskMemory(tmp_path)) == [0, 1, 2]


def test_rows_taken_back_by_a_failed_write_are_forgotten(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path, **EXACT)
    memory.commit(items(2))
    path = tmp_path / "tail-0000000000000000.journal"
    before = path.read_bytes()
    memory.commit(items(2, 50))
    reader = DiskMemory(tmp_path)
    assert numbers(reader) == [0, 1, 50, 51]
    path.write_bytes(before)
    DiskMemory(tmp_path).commit(items(2, 2))
    assert numbers(reader) == [0, 1, 2, 3]


# Damage.

SHARD = "rows-0000000000000006-0000000000000012.safetensors"
TAIL = "tail-0000000000000012.journal"


def other_shard(**changes: Any) -> Callable[[Path], object]:
    meta = {"format": "sparke-memory", "kind": "shard", "version": "1", "first": "6"}
    tensors = {"x": torch.ones(6, 3), "cond": torch.ones(6, 4)}
    meta |= {k: v for k, v in changes.items() if isinstance(v, str)}
    tensors |= {k: v for k, v in changes.items() if not isinstance(v, str)}
    return lambda folder: save_file(tensors, folder / SHARD, meta)


def header(**changes: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        told = json.loads((folder / "memory.json").read_text())
        (folder / "memory.json").write_text(json.dumps(told | changes))

    return write


def text(content: bytes, name: str = "memory.json") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def flipped(name: str, at: int) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1
        (folder / name).write_bytes(data)

    return write


DAMAGED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty shard": (SHARD, text(b"", SHARD)),
    "noise for a shard": (SHARD, text(bytes(range(256)), SHARD)),
    "shard cut short": (SHARD, lambda folder: os.truncate(folder / SHARD, 200)),
    "shard a byte short": (
        SHARD,
        lambda folder: os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1),
    ),
    "shard of another format": (SHARD, other_shard(format="pt")),
    "shard of another first row": (SHARD, other_shard(first="7")),
    "shard of other rows": (SHARD, other_shard(x=torch.ones(5, 3))),
    "shard of another width": (SHARD, other_shard(x=torch.ones(6, 4))),
    "shard of another dtype": (SHARD, other_shard(x=torch.ones(6, 3).double())),
    "shard of other tensors": (SHARD, other_shard(y=torch.ones(1))),
    "shard of NaN": (SHARD, other_shard(x=torch.full((6, 3), math.nan))),
    "shard twice": (
        "rows-0000000000000006-0000000000000009",
        lambda folder: os.link(
            folder / SHARD, folder / "rows-0000000000000006-0000000000000009.safetensors"
        ),
    ),
    "header of nothing": ("memory.json", text(b"")),
    "header of a list": ("memory.json", text(b"[1]")),
    "header of depths": ("memory.json", text(b"[" * 4000)),
    "header without end": ("memory.json", text(b"{}" + b" " * 5000)),
    "header of another format": ("memory.json", header(format="x")),
    "header of a later version": ("memory.json", header(version=2)),
    "header of endless rows": ("memory.json", header(width=10**12)),
    "header of no width": ("memory.json", header(width=0)),
    "header of width true": ("memory.json", header(width=True)),
    "header of strange prompts": ("memory.json", header(cond_width="4")),
    "header of another dtype": ("memory.json", header(dtype="float64")),
    "header of int8 prompts": ("memory.json", header(cond_dtype="int8")),
    "header gone": ("memory.json", lambda folder: (folder / "memory.json").unlink()),
    "journal damaged before its end": (TAIL, flipped(TAIL, 70)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    filled(tmp_path).commit(items(1, 15))
    name, harm = DAMAGED[damage]
    harm(tmp_path)
    with pytest.raises(MemoryFileError, match=name):
        DiskMemory(tmp_path).rows()


def test_the_shard_above_would_be_read_if_it_were_not_damaged(tmp_path: Path) -> None:
    filled(tmp_path)
    other_shard()(tmp_path)
    assert numbers(DiskMemory(tmp_path))[6:12] == [1] * 6


@pytest.mark.parametrize(
    "name", [SHARD, TAIL, "rows-0000000000000000-0000000000000006.safetensors"]
)
def test_without_a_deleted_file_the_memory_goes_on(name: str, tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / name).unlink()
    if name == TAIL:
        memory = DiskMemory(tmp_path)  # the newest rows leave no trace
    else:
        with pytest.warns(MemoryFileWarning, match="lacks rows"):
            memory = DiskMemory(tmp_path)
    left = {SHARD: [*range(6), 12, 13, 14], TAIL: list(range(12))}.get(name, list(range(6, 15)))
    assert numbers(memory) == left
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        memory.commit(items(1, 99))
        assert numbers(memory) == [*left, 99]


LAYOUT = _layout.Layout(torch.float16, _rules.Widths(2, 1), torch.float32)
BATCHES = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def journal(sizes: list[int], first: int) -> bytes:
    data, at = b"", first
    for size in sizes:
        arrays = LAYOUT.arrays(torch.ones(size, 2), torch.ones(size, 1))
        data += _journal.pack(LAYOUT, arrays, at)
        at += size
    return data


@given(sizes=BATCHES, first=st.integers(0, 2**40), cut=st.integers(0, 2000))
def test_a_journal_cut_anywhere_tells_its_whole_batches(
    sizes: list[int], first: int, cut: int
) -> None:
    data = journal(sizes, first)[:cut]
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    expected = max(end for end in ends if end * LAYOUT.record.itemsize <= len(data))
    assert _journal.parse(LAYOUT, data, first) == expected


@given(sizes=BATCHES, at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_never_passes_for_a_row(sizes: list[int], at: int, bit: int) -> None:
    data = bytearray(journal(sizes, 5))
    at %= len(data)
    data[at] ^= 1 << bit
    row = at // LAYOUT.record.itemsize
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    hit = max(i for i in range(len(sizes)) if ends[i] <= row)
    expected = ends[hit] if hit == len(sizes) - 1 else None
    assert _journal.parse(LAYOUT, bytes(data), 5) == expected


@given(noise=st.binary(max_size=400), sizes=BATCHES)
def test_noise_is_no_row(noise: bytes, sizes: list[int]) -> None:
    assert _journal.parse(LAYOUT, noise, 0) == 0
    assert _journal.parse(LAYOUT, journal(sizes, 3) + noise, 3) == sum(sizes)
