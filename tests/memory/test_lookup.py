"""Looking prompts up in an index: what it finds, when it is not believed, its file."""

import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparke.errors import ArgumentError
from sparke.memory import DiskMemory, MemoryFileWarning, _folder, _lookup
from sparke.protocols import Features, Memory
from sparke.scores import CondRKE
from sparke.testing import check_memory

pytest.importorskip("usearch")

GROUPS, EACH, WIDTH, COND = 40, 30, 8, 64
OPTIONS: dict[str, Any] = {"dtype": torch.float32, "cond_dtype": torch.float32}


def prompts(groups: int = GROUPS, each: int = EACH, seed: int = 0) -> Tensor:
    """Paraphrases of `groups` unrelated prompts, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(groups, COND, generator=generator)
    near = words.repeat_interleave(each, 0)
    near = near + 0.03 * torch.randn(len(near), COND, generator=generator)
    return torch.nn.functional.normalize(near, dim=1)[torch.randperm(len(near))]


def filled(folder: Path, cond: Tensor, **options: Any) -> DiskMemory:
    memory = DiskMemory(folder, **OPTIONS, shard_bytes=1 << 16, **options)
    x = torch.randn(len(cond), WIDTH, generator=torch.Generator().manual_seed(1))
    for start in range(0, len(cond), 100):
        memory.commit(Features(x[start : start + 100], cond[start : start + 100]))
    return memory


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lookup, "NEAREST", 100)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each selection was answered by the index."""
    answers: list[bool] = []
    weigh = _lookup.PromptLookup.weigh

    def noted(self: _lookup.PromptLookup, *args: Any) -> Any:
        found = weigh(self, *args)
        answers.append(found is not None)
        return found

    monkeypatch.setattr(_lookup.PromptLookup, "weigh", noted)
    return answers


def test_it_is_a_memory(tmp_path: Path) -> None:
    def make() -> Memory:
        return DiskMemory(tmp_path / str(len(list(tmp_path.iterdir()))), **OPTIONS, lookup_from=1)

    check_memory(make)


def test_a_step_changes_by_no_more_than_the_tolerance(tmp_path: Path, asked: list[bool]) -> None:
    cond = prompts()
    memory = filled(tmp_path / "m", cond, lookup_from=1000, tolerance=0.02)
    exact = DiskMemory(tmp_path / "m", tolerance=0)
    score = CondRKE(bandwidth=2.0)
    query = Features(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(2)), cond[:2])
    found = memory.select(query.cond, score.log_weight)
    whole = exact.select(query.cond, score.log_weight)
    assert asked == [True]
    assert len(found) < len(whole) == GROUPS * EACH
    (pull, crowding), (pulls, crowdings) = (
        score.direction_and_crowding(query, bank) for bank in (found, whole)
    )
    diameter = float(torch.cdist(whole.x, whole.x).max())
    off = (crowding[:, None] * pull - crowdings[:, None] * pulls).norm(dim=1)
    assert float(off.max()) <= 0.02 * diameter
    assert memory.left_out is not None
    relevant = whole.log_weight
    assert relevant is not None
    assert found.log_weight is not None
    left = relevant.double().exp().sum(1) - found.log_weight.double().exp().sum(1)
    torch.testing.assert_close(memory.left_out, left, rtol=0.5, atol=1e-4)


def test_every_prompt_is_weighed_where_the_rest_may_matter(
    tmp_path: Path, asked: list[bool]
) -> None:
    """One prompt for all: the index names 100 rows, and 1100 like them are left."""
    cond = prompts(1, GROUPS * EACH)
    memory = filled(tmp_path / "m", cond, lookup_from=1000)
    exact = DiskMemory(tmp_path / "m")
    found, whole = (m.select(cond[:1]) for m in (memory, exact))
    assert asked == [False]
    assert torch.equal(found.x, whole.x)


def test_a_kernel_with_another_metric_is_noticed(tmp_path: Path, asked: list[bool]) -> None:
    def opposite(query: Tensor, rows: Tensor) -> Tensor:
        return -8 * (1 + query @ rows.T)  # most for the rows farthest from the query

    cond = prompts()
    memory = filled(tmp_path / "m", cond, lookup_from=1000)
    found = memory.select(cond[:1], opposite)
    assert asked == [False]
    assert torch.equal(found.x, DiskMemory(tmp_path / "m").select(cond[:1], opposite).x)


def test_below_its_size_prompts_are_weighed_one_by_one(tmp_path: Path, asked: list[bool]) -> None:
    cond = prompts()
    memory = filled(tmp_path / "m", cond, lookup_from=len(cond) + 1)
    memory.select(cond[:1])
    assert asked == []
    memory.commit(Features(torch.zeros(1, WIDTH), cond[:1]))
    memory.select(cond[:1])
    assert asked == [True]


def test_the_newest_rows_are_among_those_selected(tmp_path: Path, asked: list[bool]) -> None:
    cond = prompts()
    memory = filled(tmp_path / "m", cond, lookup_from=1000, tolerance=0.02)
    found = memory.select(cond[:1])
    assert asked == [True]
    assert torch.equal(found.x[-256:], memory.rows(len(cond) - 256).x)


def test_the_index_is_kept_and_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cond = prompts()
    filled(tmp_path / "m", cond, lookup_from=1000).select(cond[:1])
    index = tmp_path / "m" / _lookup.NAME
    assert index.is_file()
    added: list[int] = []
    extend = _folder.Folder.gather

    def noted(self: Any, places: Any, most: int, only: str | None = None) -> Any:
        added.append(len(places))
        return extend(self, places, most, only)

    again = DiskMemory(tmp_path / "m", lookup_from=1000, tolerance=0.02)
    again.commit(Features(torch.zeros(3, WIDTH), cond[:3]))
    monkeypatch.setattr(_folder.Folder, "gather", noted)
    found = again.select(cond[:1])
    assert added[0] == 3  # the rows that are new to the index, and no other
    assert torch.equal(found.x[-3:], torch.zeros(3, WIDTH))


def test_a_lost_shard_is_no_loss_to_the_others(tmp_path: Path, asked: list[bool]) -> None:
    cond = prompts()
    filled(tmp_path / "m", cond, lookup_from=1000).select(cond[:1])
    sorted((tmp_path / "m").glob("rows-*"))[0].unlink()
    with pytest.warns(MemoryFileWarning, match="lacks rows"):
        memory = DiskMemory(tmp_path / "m", lookup_from=500, tolerance=0.02)
    with pytest.warns(MemoryFileWarning, match="lacks rows"):
        exact = DiskMemory(tmp_path / "m", tolerance=0)
    found, whole = memory.select(cond[:1]), exact.select(cond[:1])
    assert asked[-1]
    weight, weights = found.log_weight, whole.log_weight
    assert weight is not None
    assert weights is not None
    heavy = whole.x[(weights > np.log(0.1)).squeeze(0)]
    assert len(heavy) > 10
    assert torch.equal(found.x[(weight > np.log(0.1)).squeeze(0)], heavy)


def rewritten(path: Path, change: Any) -> None:
    with safe_open(path, framework="pt") as file:
        data, told = file.get_tensor("index"), dict(file.metadata())
    data, told = change(data.clone(), told)
    save_file({"index": data}, path, told)


def flipped(data: Tensor, told: dict[str, str]) -> tuple[Tensor, dict[str, str]]:
    data[len(data) // 2] ^= 255
    return data, told


def shortened(data: Tensor, told: dict[str, str]) -> tuple[Tensor, dict[str, str]]:
    return data[:100], {**told, "crc32": str(zlib.crc32(bytes(data[:100].numpy())))}


def another_kind(data: Tensor, told: dict[str, str]) -> tuple[Tensor, dict[str, str]]:
    return data, {**told, "kind": "ring"}


@pytest.mark.parametrize("change", [flipped, shortened, another_kind, None])
def test_a_damaged_index_is_reported_and_made_again(tmp_path: Path, change: Any) -> None:
    cond = prompts()
    first = filled(tmp_path / "m", cond, lookup_from=1000).select(cond[:1])
    path = tmp_path / "m" / _lookup.NAME
    if change is None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        rewritten(path, change)
    memory = DiskMemory(tmp_path / "m", lookup_from=1000)
    with pytest.warns(MemoryFileWarning, match="made again"):
        again = memory.select(cond[:1])
    assert torch.equal(first.x, again.x)
    DiskMemory(tmp_path / "m", lookup_from=1000).select(cond[:1])  # and is whole now


def test_the_same_rows_give_the_same_selection(tmp_path: Path) -> None:
    cond = prompts()
    found = [
        filled(tmp_path / name, cond, lookup_from=1000, tolerance=0.02).select(cond[:2])
        for name in "ab"
    ]
    assert torch.equal(found[0].x, found[1].x)


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_size_is_a_size(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ArgumentError, match="lookup_from"):
        DiskMemory(tmp_path / "m", lookup_from=value)


@pytest.mark.parametrize(
    "segments", [[], [(0, 5)], [(0, 5), (5, 3)], [(2, 5), (9, 3), (20, 1)], [(4, 1), (5, 9)]]
)
def test_rows_new_to_the_index_are_found_from_the_end(segments: list[tuple[int, int]]) -> None:
    lookup = object.__new__(_lookup.PromptLookup)
    lookup._folder = FakeFolder([SimpleNamespace(first=f, rows=r) for f, r in segments])  # type: ignore[assignment]
    numbers = np.array([n for first, rows in segments for n in range(first, first + rows)])
    for covered in range(25):
        lookup._covered = covered
        expected = [place for place, number in enumerate(numbers) if number >= covered]
        assert lookup._uncovered().tolist() == expected


class FakeFolder:
    def __init__(self, segments: list[SimpleNamespace]) -> None:
        self.segments = segments

    def __len__(self) -> int:
        return sum(segment.rows for segment in self.segments)


def test_a_selection_numbers_no_more_rows_than_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[bool]
) -> None:
    cond = prompts()
    memory = filled(tmp_path / "m", cond, lookup_from=1000, tolerance=0.02)
    memory.select(cond[:1])
    counted: list[int] = []
    numbers = _folder.Folder.numbers

    def noted(self: Any, places: Any) -> Any:
        counted.append(len(places))
        return numbers(self, places)

    monkeypatch.setattr(_folder.Folder, "numbers", noted)
    found = memory.select(cond[:1])
    assert asked == [True, True]
    assert max(counted) == len(found) < len(memory)
