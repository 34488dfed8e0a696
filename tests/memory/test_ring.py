"""The ring: what it keeps, what it refuses, and what its files survive."""

import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sparke.errors import ArgumentError, MemoryFileError, MissingPrompts, ShapeError
from sparke.memory import RingMemory
from sparke.protocols import Features, Memory, Selection
from tests import oracles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def items(n: int, start: int = 0, width: int = 3, prompts: int | None = 4) -> Features:
    """Rows that tell their number in every dtype; row i of any call is the i-th of all."""
    number = torch.arange(start, start + n).float()[:, None]
    cond = None if prompts is None else torch.cos(number + torch.arange(prompts))
    return Features(number.repeat(1, width), cond)


def numbers(memory: RingMemory) -> list[int]:
    return [int(v) for v in memory.features.x[:, 0]] if len(memory) else []


def contents(memory: RingMemory) -> tuple[int, Tensor, Tensor | None]:
    found = memory.features
    return len(memory), found.x, found.cond


def assert_same(a: tuple[int, Tensor, Tensor | None], b: tuple[int, Tensor, Tensor | None]) -> None:
    assert a[0] == b[0]
    assert torch.equal(a[1], b[1])
    assert (a[2] is None) == (b[2] is None)
    assert a[2] is None or b[2] is None or torch.equal(a[2], b[2])


def test_it_is_a_memory() -> None:
    assert isinstance(RingMemory(), Memory)


# Keeping.


@given(capacity=st.integers(1, 9), sizes=st.lists(st.integers(0, 12), max_size=8))
def test_the_newest_rows_are_kept_oldest_first(capacity: int, sizes: list[int]) -> None:
    memory, done = RingMemory(capacity), 0
    for size in sizes:
        memory.commit(items(size, done))
        done += size
        assert numbers(memory) == list(range(max(0, done - capacity), done))
        assert len(memory) == min(done, capacity)
        cond = memory.features.cond
        if done:
            expected = items(len(memory), done - len(memory)).cond
            assert cond is not None
            assert expected is not None
            assert torch.equal(cond, expected)


def storage(memory: RingMemory) -> tuple[int, int]:
    x, cond = memory._x, memory._cond
    assert x is not None
    assert cond is not None
    return x.data_ptr(), cond.data_ptr()


def test_storage_grows_by_doubling_and_then_stays() -> None:
    memory, places = RingMemory(8), []
    for start in range(40):
        memory.commit(items(1, start))
        places.append(storage(memory))
    # At 1, 2, 3, 5 rows it grows; before the first row is overwritten it moves a last time.
    moves = [i + 1 for i in range(1, 40) if places[i] != places[i - 1]]
    assert set(moves) <= {2, 3, 5, 9}
    assert memory._x is not None
    assert len(memory._x) == 8


def test_a_large_capacity_takes_no_room_in_advance() -> None:
    memory = RingMemory(10**12)
    memory.commit(items(3))
    assert memory._x is not None
    assert len(memory._x) == 3
    assert numbers(memory) == [0, 1, 2]


def test_rows_are_not_copied_to_be_read_before_the_ring_wraps() -> None:
    memory = RingMemory(8)
    memory.commit(items(5))
    assert memory.select().x.data_ptr() == storage(memory)[0]


@each_dtype
def test_rows_are_kept_in_their_dtype_and_read_in_single(dtype: torch.dtype) -> None:
    memory = RingMemory(4, dtype)
    x, cond = torch.randn(6, 5), torch.randn(6, 3)
    memory.commit(Features(x, cond))
    found = memory.select()
    assert found.x.dtype == torch.float32
    assert torch.equal(found.x, x[2:].to(dtype).float())
    assert found.cond is not None
    assert torch.equal(found.cond, cond[2:])
    assert memory._x is not None
    assert memory._x.dtype == dtype


def test_rows_are_detached_and_not_shared_with_who_commits() -> None:
    memory = RingMemory(4)
    x, cond = torch.ones(2, 3, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    memory.commit(Features(x, cond))
    with torch.no_grad():
        x.zero_()
        cond.zero_()
    found = memory.select()
    assert not found.x.requires_grad
    assert found.cond is not None
    assert not found.cond.requires_grad
    assert float(found.x.min()) == float(found.cond.min()) == 1.0


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_selection_handed_out_stays_as_it_is(wrapped: bool, dtype: torch.dtype) -> None:
    memory, done = RingMemory(5, dtype), 0
    for _ in range(7 if wrapped else 3):
        memory.commit(items(1, done))
        done += 1
    query = items(2).cond
    for _ in range(12):  # until the ring has come round more than once
        selection = memory.select(query)
        assert selection.cond is not None
        assert selection.log_weight is not None
        before = selection.x.clone(), selection.cond.clone(), selection.log_weight.clone()
        for size in (1, 2, 7):
            memory.commit(items(size, done))
            done += size
        after = selection.x, selection.cond, selection.log_weight
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_copy_of_the_features_is_ones_own() -> None:
    memory = RingMemory(4)
    memory.commit(items(3))
    found = memory.features
    found.x.zero_()
    assert found.cond is not None
    found.cond.zero_()
    assert numbers(memory) == [0, 1, 2]
    assert float(memory.select().cond.abs().max()) > 0  # type: ignore[union-attr]


def test_clearing_forgets_the_width_too() -> None:
    memory = RingMemory(4)
    memory.commit(items(3))
    memory.clear()
    assert len(memory) == 0
    memory.commit(items(2, width=7, prompts=None))
    assert memory.select().x.shape == (2, 7)


def test_repr_tells_how_full_it_is() -> None:
    memory = RingMemory(4)
    memory.commit(items(3))
    assert "3 of 4 rows, width 3" in repr(memory)


# Selecting.


def test_an_empty_memory_selects_nothing() -> None:
    for cond in (None, torch.ones(2, 4)):
        found = RingMemory().select(cond)
        assert isinstance(found, Selection)
        assert len(found) == 0
        assert found.log_weight is None


def test_without_prompts_asked_rows_are_not_weighted() -> None:
    memory = RingMemory()
    memory.commit(items(3))
    assert memory.select().log_weight is None


def test_weights_are_the_published_kernel_squared() -> None:
    memory = RingMemory(4)
    memory.commit(items(6))
    query = torch.randn(3, 4)
    found = memory.select(query)
    assert found.log_weight is not None
    assert found.cond is not None
    expected = [
        [
            2 * math.log(oracles.prompt_similarity(t, p, 0.35))
            for t in oracles.lists(items(4, 2).cond)
        ]
        for p in oracles.lists(query)
    ]
    torch.testing.assert_close(found.log_weight, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_weights_are_those_of_the_score_that_reads() -> None:
    memory = RingMemory(4)
    memory.commit(items(6))
    seen: list[tuple[Tensor, Tensor]] = []

    def weigh(query: Tensor, rows: Tensor) -> Tensor:
        seen.append((query, rows))
        return -(query @ rows.mT).square()

    query = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    found = memory.select(query, weigh)
    ((asked, rows),) = seen
    assert torch.equal(asked, query.detach().float())
    assert torch.equal(rows, items(4, 2).cond)  # type: ignore[arg-type]
    assert found.log_weight is not None
    assert not found.log_weight.requires_grad
    assert torch.equal(found.log_weight, -(asked @ rows.mT).square())


def test_a_weigher_of_another_shape_is_refused() -> None:
    memory = RingMemory()
    memory.commit(items(3))
    with pytest.raises(ShapeError, match="weigh"):
        memory.select(torch.ones(2, 4), lambda query, rows: torch.zeros(3, 2))


@pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 4, 4)])
def test_prompts_of_another_width_cannot_be_asked_for(shape: tuple[int, ...]) -> None:
    memory = RingMemory()
    memory.commit(items(3))
    with pytest.raises(ShapeError, match="prompt_embeds"):
        memory.select(torch.ones(shape))


def test_rows_without_prompts_cannot_be_asked_for_by_prompt() -> None:
    memory = RingMemory()
    memory.commit(items(3, prompts=None))
    with pytest.raises(MissingPrompts):
        memory.select(torch.ones(2, 4))


# Refusing. Whatever is refused leaves the memory as it was.


def with_value(value: float, where: str) -> Features:
    bad = items(2)
    assert bad.cond is not None
    (bad.x if where == "x" else bad.cond)[1, 1] = value
    return bad


REFUSED: list[tuple[Features, type[Exception]]] = [
    (items(2, width=4), ShapeError),
    (items(2, prompts=5), ShapeError),
    (items(2, prompts=None), MissingPrompts),
    (Features(torch.ones(3), None), ShapeError),
    (Features(torch.ones(2, 3, 1), torch.ones(2, 4)), ShapeError),
    (Features(torch.ones(2, 3), torch.ones(3, 4)), ShapeError),
    (Features(torch.ones(2, 3), torch.ones(4)), ShapeError),
    *((with_value(v, "x"), ArgumentError) for v in (math.nan, math.inf, -math.inf)),
    *((with_value(v, "cond"), ArgumentError) for v in (math.nan, math.inf)),
    (Features(torch.full((1, 3), 1e39, dtype=torch.float64), torch.ones(1, 4)), ArgumentError),
    (Features(torch.ones(1, 3), torch.full((1, 4), 1e300, dtype=torch.float64)), ArgumentError),
]


@pytest.mark.parametrize("filled", [2, 5, 9])
@pytest.mark.parametrize(("bad", "error"), REFUSED)
def test_what_does_not_belong_is_refused_whole(
    bad: Features, error: type[Exception], filled: int
) -> None:
    memory = RingMemory(5)
    memory.commit(items(filled))
    before, place = contents(memory), storage(memory)
    with pytest.raises(error):
        memory.commit(bad)
    assert_same(contents(memory), before)
    assert storage(memory) == place
    memory.commit(items(1, filled))
    assert numbers(memory)[-1] == filled


@pytest.mark.parametrize("bad", [pair[0] for pair in REFUSED[3:]])
def test_a_refusal_does_not_settle_an_empty_memory(bad: Features) -> None:
    memory = RingMemory(5)
    with pytest.raises((ShapeError, ArgumentError)):
        memory.commit(bad)
    assert len(memory) == 0
    memory.commit(items(2, width=9, prompts=None))
    assert len(memory) == 2


def test_prompts_are_refused_where_rows_have_none() -> None:
    memory = RingMemory()
    memory.commit(items(2, prompts=None))
    with pytest.raises(MissingPrompts, match="without prompts"):
        memory.commit(items(2))
    assert numbers(memory) == [0, 1]


def test_what_half_precision_cannot_hold_is_refused() -> None:
    memory = RingMemory(4, torch.float16)
    memory.commit(items(2, prompts=None))
    with pytest.raises(ArgumentError, match="float16"):
        memory.commit(Features(torch.full((1, 3), 65520.0)))
    memory.commit(Features(torch.full((1, 3), 65504.0)))
    assert numbers(memory) == [0, 1, 65504]


def test_no_rows_are_no_offence() -> None:
    memory = RingMemory()
    memory.commit(items(0))
    assert len(memory) == 0
    memory.commit(items(2))
    memory.commit(items(0))
    assert numbers(memory) == [0, 1]


@pytest.mark.parametrize("capacity", [0, -1, 2.0, "8", True, None])
def test_a_capacity_is_a_whole_number(capacity: Any) -> None:
    with pytest.raises(ArgumentError, match="capacity"):
        RingMemory(capacity)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, None])
def test_a_dtype_is_one_of_three(dtype: Any) -> None:
    with pytest.raises(ArgumentError, match="dtype"):
        RingMemory(8, dtype)


# Files.


@each_dtype
@pytest.mark.parametrize("prompts", [None, 4])
@pytest.mark.parametrize("filled", [3, 6, 10])
def test_a_file_gives_back_every_bit(
    dtype: torch.dtype, prompts: int | None, filled: int, tmp_path: Path
) -> None:
    memory = RingMemory(6, dtype)
    cond = None if prompts is None else torch.randn(filled, prompts)
    memory.commit(Features(torch.randn(filled, 5), cond))
    memory.save(tmp_path / "m.safetensors")
    loaded = RingMemory.load(tmp_path / "m.safetensors")
    assert_same(contents(loaded), contents(memory))
    assert (loaded.capacity, loaded.dtype) == (6, dtype)
    # Both go on alike.
    more = items(4, width=5, prompts=prompts)
    memory.commit(more)
    loaded.commit(more)
    assert_same(contents(loaded), contents(memory))


def test_an_empty_memory_can_be_kept_too(tmp_path: Path) -> None:
    RingMemory(6).save(tmp_path / "m")
    loaded = RingMemory.load(tmp_path / "m")
    assert (len(loaded), loaded.capacity) == (0, 6)


def test_a_smaller_capacity_keeps_the_newest(tmp_path: Path) -> None:
    memory = RingMemory(6)
    memory.commit(items(9))
    memory.save(tmp_path / "m")
    loaded = RingMemory.load(tmp_path / "m", capacity=2, dtype=torch.float16)
    assert numbers(loaded) == [7, 8]
    assert (loaded.capacity, loaded.dtype) == (2, torch.float16)


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    memory = RingMemory(6)
    for start in range(3):
        memory.commit(items(1, start))
        memory.save(tmp_path / "m")
        assert numbers(RingMemory.load(tmp_path / "m")) == list(range(start + 1))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


class Interrupted(BaseException):
    """Stands for a pressed Ctrl-C."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupted()])
@pytest.mark.parametrize("at", ["os.fsync", "os.replace"])
def test_a_failed_save_leaves_the_old_file_and_no_other(
    at: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = RingMemory(6)
    memory.commit(items(2))
    memory.save(tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    memory.commit(items(1, 2))

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(at, fail)
        if at == "os.replace":
            patch.setattr(Path, "replace", fail)
        with pytest.raises(MemoryFileError if isinstance(error, OSError) else Interrupted):
            memory.save(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    memory.save(tmp_path / "m")
    assert numbers(RingMemory.load(tmp_path / "m")) == [0, 1, 2]


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(MemoryFileError, match="folder"):
        RingMemory().save(tmp_path / "nowhere" / "m")


GOOD = {"format": "sparke-memory", "version": "1", "capacity": "8", "kind": "ring"}
X, COND = torch.ones(3, 2), torch.ones(3, 4)


def saved(tensors: dict[str, Tensor], **meta: str | None) -> Callable[[Path], object]:
    """Writes a file whose metadata differs from a good one's; None leaves an entry out."""
    full = {k: v for k, v in {**GOOD, **meta}.items() if v is not None}
    return lambda path: save_file(tensors, path, full)


def crafted(header: dict[str, Any], data: bytes = b"") -> Callable[[Path], object]:
    def write(path: Path) -> None:
        text = json.dumps({"__metadata__": GOOD, **header}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return write


def cut(left_off: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        memory = RingMemory(6)
        memory.commit(items(5))
        memory.save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-left_off])

    return write


TERABYTES = 10**12
DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(os.urandom(999)),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"x": [1.0]})),
    "torch.save": lambda path: torch.save({"x": X}, path),
    "a folder": lambda path: path.mkdir(),
    "a byte short": cut(1),
    "half of it": cut(80),
    "no metadata": lambda path: save_file({"x": X}, path),
    "another format": saved({"x": X}, format="pt"),
    "no format": saved({"x": X}, format=None),
    "a later version": saved({"x": X}, version="2"),
    "no version": saved({"x": X}, version=None),
    "no capacity": saved({"x": X}, capacity=None),
    "capacity in words": saved({"x": X}, capacity="many"),
    "capacity 0": saved({"x": X}, capacity="0"),
    "capacity -4": saved({"x": X}, capacity="-4"),
    "capacity below its rows": saved({"x": X}, capacity="2"),
    "capacity beyond integers": saved({"x": X}, capacity="9" * 30),
    "capacity of endless digits": saved({"x": X}, capacity="9" * 9000),
    "other tensors": saved({"x": X, "y": X.clone()}),
    "prompts alone": saved({"cond": COND}),
    "more prompts than rows": saved({"x": X, "cond": torch.ones(4, 4)}),
    "rows of one dimension": saved({"x": torch.ones(3)}),
    "rows of three": saved({"x": torch.ones(3, 2, 2)}),
    "whole numbers": saved({"x": X.int()}),
    "double": saved({"x": X.double()}),
    "quarter": saved({"x": X.to(torch.float8_e4m3fn)}),
    "half precision prompts": saved({"x": X, "cond": COND.half()}),
    "NaN": saved({"x": X * math.nan}),
    "infinite prompts": saved({"x": X, "cond": COND * math.inf}),
    "rows of terabytes": crafted(
        {"x": {"dtype": "F32", "shape": [TERABYTES, 4], "data_offsets": [0, 16 * TERABYTES]}},
        bytes(64),
    ),
    "rows of terabytes in few bytes": crafted(
        {"x": {"dtype": "F32", "shape": [TERABYTES, 4], "data_offsets": [0, 64]}}, bytes(64)
    ),
    "a header of terabytes": lambda path: path.write_bytes(
        struct.pack("<Q", TERABYTES) + b"{}" + bytes(64)
    ),
    "offsets that run back": crafted(
        {"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]}}, bytes(16)
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_file_that_is_damaged_or_another_is_refused(damage: str, tmp_path: Path) -> None:
    DAMAGED[damage](tmp_path / "m")
    with pytest.raises(MemoryFileError, match="m"):
        RingMemory.load(tmp_path / "m")


def test_the_files_above_would_load_if_they_were_not_damaged(tmp_path: Path) -> None:
    saved({"x": X, "cond": COND})(tmp_path / "m")
    assert len(RingMemory.load(tmp_path / "m")) == 3
    crafted({"x": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}, bytes(64))(
        tmp_path / "m"
    )
    assert len(RingMemory.load(tmp_path / "m")) == 4


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(MemoryFileError, match="Save a memory there first"):
        RingMemory.load(tmp_path / "m")
    with pytest.raises(OSError, match="m"):
        RingMemory.load(tmp_path / "m")
