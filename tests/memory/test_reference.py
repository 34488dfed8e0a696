"""The reference: rows that are given once, beside a history or alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparke.errors import ArgumentError, MemoryFileError, MissingPrompts, ShapeError
from sparke.guidance import DiversityGuider
from sparke.memory import RingMemory
from sparke.memory.reference import ReferenceMemory
from sparke.protocols import Features, Memory, Run, Selection, State, Step, Weigh
from sparke.testing import check_memory

WIDTH, COND = 6, 5


def rows(n: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def given(n: int = 4, *, prompts: bool = True, seed: int = 0) -> Features:
    return Features(rows(n, seed=seed), rows(n, COND, 50 + seed) if prompts else None)


def of(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def weight_by_loops(query: Tensor, prompts: Tensor, s: float = 0.35) -> Tensor:
    """The published prompt kernel, squared, in float64."""

    def unit(v: list[float]) -> list[float]:
        return [a / math.sqrt(sum(b * b for b in v)) for a in v]

    found = [
        [
            -sum((a - b) ** 2 for a, b in zip(unit(p), unit(t), strict=True)) / s**2
            for t in prompts.double().tolist()
        ]
        for p in query.double().tolist()
    ]
    return torch.tensor(found)


# What it hands out.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_come_back_in_single_precision_weighed_by_prompt(dtype: torch.dtype) -> None:
    items, query = given(), rows(3, COND, 9)
    memory = ReferenceMemory(items, dtype=dtype)
    found = memory.select(query)
    assert found.x.dtype == torch.float32
    assert torch.equal(found.x, items.x.to(dtype).float())
    assert torch.equal(of(found.cond), of(items.cond))
    torch.testing.assert_close(of(found.log_weight), weight_by_loops(query, of(items.cond)))
    assert memory.select().log_weight is None
    assert torch.equal(of(memory.select().cond), of(items.cond))


def test_the_score_brings_its_own_kernel() -> None:
    def weigh(query: Tensor, prompts: Tensor) -> Tensor:
        return -(query[:, None] - prompts[None]).abs().sum(-1)

    items, query = given(), rows(2, COND, 9)
    found = ReferenceMemory(items).select(query, weigh)
    assert torch.equal(of(found.log_weight), weigh(query, of(items.cond)))


def test_without_prompts_every_row_counts_in_full_for_every_prompt() -> None:
    memory, query = ReferenceMemory(given(prompts=False)), rows(3, COND, 9)
    found = memory.select(query)
    assert torch.equal(of(found.log_weight), torch.zeros(3, 4))
    torch.testing.assert_close(of(found.cond), query.mean(0).expand(4, -1))
    assert memory.select().cond is None


def test_latents_of_any_shape_are_flattened() -> None:
    latents, prompts = torch.randn(3, 2, 4, 4), rows(3, COND)
    memory = ReferenceMemory(latents, prompts)
    assert torch.equal(memory.reference.x, latents.flatten(1))
    assert torch.equal(of(memory.reference.cond), prompts)


def test_features_make_rows_of_latents_a_few_at_a_time() -> None:
    latents, sizes = torch.randn(40, 2, 3), []

    def features(z: Tensor) -> Tensor:
        sizes.append(len(z))
        return z.sum(-1)

    assert torch.equal(ReferenceMemory(latents, features=features).reference.x, latents.sum(-1))
    assert sizes == [16, 16, 8]


def test_rows_that_cannot_matter_are_left_out() -> None:
    near, far = rows(1, COND, 1), rows(1, COND, 2)
    cond = torch.cat([far.repeat(500, 1), near.repeat(300, 1)])
    memory = ReferenceMemory(Features(rows(800), cond))
    assert len(memory.select(near)) == 300
    assert len(memory.select(torch.cat([near, far]))) == 800
    assert len(ReferenceMemory(Features(rows(800), cond), tolerance=0).select(near)) == 800


# What it keeps.


def test_what_was_given_is_not_shared() -> None:
    items = given()
    memory, before = ReferenceMemory(items), items.x.clone()
    items.x.zero_()
    of(items.cond).zero_()
    memory.reference.x.zero_()
    assert torch.equal(memory.select().x, before)
    assert bool(of(memory.select().cond).any())


def test_alone_it_keeps_no_finished_samples() -> None:
    memory = ReferenceMemory(given())
    before = memory.select().x.clone()
    memory.commit(given(7, seed=1))
    assert len(memory) == 4
    assert torch.equal(memory.select().x, before)


def test_beside_a_history_both_are_read_and_one_is_written() -> None:
    history, query = RingMemory(), rows(2, COND, 9)
    memory = ReferenceMemory(given(), history=history)
    later = given(3, seed=1)
    memory.commit(later)
    assert (len(memory), len(history), len(memory.reference)) == (7, 3, 4)
    found = memory.select(query)
    assert torch.equal(found.x, torch.cat([given().x, later.x]))
    both = torch.cat([of(given().cond), of(later.cond)])
    assert torch.equal(of(found.cond), both)
    torch.testing.assert_close(of(found.log_weight), weight_by_loops(query, both))


def test_a_reference_without_prompts_goes_with_a_history_that_has_some() -> None:
    memory, query = ReferenceMemory(given(prompts=False), history=RingMemory()), rows(2, COND, 9)
    later = given(3, seed=1)
    memory.commit(later)
    found = memory.select(query)
    assert torch.equal(of(found.log_weight)[:, :4], torch.zeros(2, 4))
    torch.testing.assert_close(of(found.log_weight)[:, 4:], weight_by_loops(query, of(later.cond)))
    assert torch.equal(of(memory.select().cond), torch.cat([torch.zeros(4, COND), of(later.cond)]))


def test_beside_shares_the_rows() -> None:
    memory = ReferenceMemory(given())
    history = RingMemory()
    both = memory.beside(history)
    both.commit(given(2, seed=1))
    assert (len(memory), len(both)) == (4, 6)
    assert both._x.data_ptr() == memory._x.data_ptr()


class HistoryOnly:
    """A reference with a history, of which only the history is seen."""

    def __init__(self) -> None:
        self.inner = ReferenceMemory(given(), history=RingMemory())

    def __len__(self) -> int:
        return len(self.inner) - 4

    def commit(self, items: Features) -> None:
        self.inner.commit(items)

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        found = self.inner.select(cond, weigh)
        prompts = None if found.cond is None else found.cond[4:]
        weight = None if found.log_weight is None else found.log_weight[:, 4:]
        return Selection(found.x[4:], prompts, weight)


def test_with_a_history_it_is_a_memory() -> None:
    """Alone it cannot pass: a memory keeps what is committed."""
    assert isinstance(ReferenceMemory(given()), Memory)
    check_memory(HistoryOnly, width=WIDTH)


# Files.


@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_brings_everything_back(tmp_path: Path, dtype: torch.dtype, prompts: bool) -> None:
    path, memory = tmp_path / "seen", ReferenceMemory(given(prompts=prompts), dtype=dtype)
    memory.save(path)
    history = RingMemory()
    loaded = ReferenceMemory.load(path, history=history)
    assert loaded.dtype == dtype
    assert loaded.history is history
    assert torch.equal(loaded.reference.x, memory.reference.x)
    assert loaded.has_prompts == prompts
    if prompts:
        assert torch.equal(of(loaded.reference.cond), of(memory.reference.cond))


def test_a_history_becomes_a_reference_and_the_other_way_round(tmp_path: Path) -> None:
    ring = RingMemory(10)
    ring.commit(given())
    ring.save(tmp_path / "ring")
    reference = ReferenceMemory.load(tmp_path / "ring")
    assert torch.equal(reference.reference.x, given().x)
    reference.save(tmp_path / "reference")
    assert torch.equal(RingMemory.load(tmp_path / "reference").features.x, given().x)


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    RingMemory().save(tmp_path / "empty")
    with pytest.raises(MemoryFileError, match="holds no rows"):
        ReferenceMemory.load(tmp_path / "empty")
    with pytest.raises(MemoryFileError, match="is no file"):
        ReferenceMemory.load(tmp_path / "nothing")


# What it refuses.


class Scattered(Selection):
    def across(self, read: Any, query: Tensor, width: Any) -> Any:
        raise AssertionError

    def witnesses(self) -> Selection:
        raise AssertionError


class OverRanks(RingMemory):
    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        return Scattered(rows(2))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(0, 3),), {}, ArgumentError, "no rows"),
        ((torch.zeros(3),), {}, ShapeError, "reference must be"),
        (([1.0, 2.0],), {}, ShapeError, "got list"),
        ((torch.full((2, 3), math.nan),), {}, ArgumentError, "finite"),
        ((torch.full((2, 3), 1e6),), {"dtype": torch.float16}, ArgumentError, "finite"),
        ((rows(2), rows(3)), {}, ShapeError, "prompt_embeds"),
        ((given(), rows(4, COND)), {}, ArgumentError, "go nowhere"),
        ((given(),), {"features": torch.abs}, ArgumentError, "go nowhere"),
        ((rows(4),), {"features": lambda z: z[:1]}, ShapeError, "features must return"),
        ((given(),), {"history": [1]}, ArgumentError, "is no Memory"),
        ((given(),), {"history": RingMemory}, ArgumentError, "is no Memory"),
        ((given(),), {"dtype": torch.int8}, ArgumentError, "dtype must be"),
        ((given(),), {"tolerance": 1.0}, ArgumentError, "tolerance"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ReferenceMemory(*arguments, **options)


def test_rows_that_do_not_fit_are_not_committed() -> None:
    memory = ReferenceMemory(given(), history=RingMemory())
    with pytest.raises(ShapeError, match="the reference has rows of width 6"):
        memory.commit(Features(rows(2, 7), rows(2, COND)))
    with pytest.raises(ShapeError, match="prompt_embeds must be"):
        memory.commit(Features(rows(2), rows(2, COND + 1)))
    assert len(memory) == 4


def test_prompts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="prompt_embeds must be"):
        ReferenceMemory(given()).select(rows(2, COND + 1))
    with pytest.raises(ShapeError, match="prompt_embeds must be"):
        ReferenceMemory(given(prompts=False)).select(rows(2, COND)[0])
    history = RingMemory()
    history.commit(given(prompts=False))
    with pytest.raises(MissingPrompts):
        ReferenceMemory(given(), history=history).select(rows(2, COND))


def test_a_history_over_ranks_is_refused() -> None:
    with pytest.raises(ArgumentError, match="keep='all'"):
        ReferenceMemory(given(), history=OverRanks()).select()


# In a guider.


def begun(guider: DiversityGuider, cond: Tensor | None) -> Tensor:
    """The displacement of three samples."""
    x, denoised = rows(3, seed=7), rows(3, seed=8)
    guider.begin(Run(x.shape, x.device, x.dtype, cond, sigma_data=1.0))
    return guider(State(x, denoised, Step(0, 5.0, 3.0), cond))


def test_scores_that_compare_prompts_read_rows_without() -> None:
    """All count in full, so it is as if nobody compared prompts."""
    options: dict[str, Any] = {"in_batch": False, "bandwidth": 2.0}
    memory = ReferenceMemory(given(prompts=False))
    plain = begun(DiversityGuider("rke", memory, **options), None)
    aware = begun(DiversityGuider("cond-rke", memory, **options), rows(3, COND, 9))
    assert bool(plain.any())
    torch.testing.assert_close(plain, aware)
    same = rows(1, COND, 9).expand(3, -1)
    assert bool(begun(DiversityGuider("cond-vendi", memory, **options), same).any())


@pytest.mark.parametrize("prompts", [True, False])
def test_the_history_keeps_the_prompts_of_the_run(prompts: bool) -> None:
    memory = ReferenceMemory(given(prompts=prompts), history=RingMemory())
    guider, cond = DiversityGuider("cond-rke", memory), rows(3, COND, 9)
    begun(guider, cond)
    guider.finish(rows(3, seed=8))
    assert isinstance(memory.history, RingMemory)
    assert torch.equal(of(memory.history.features.cond), cond)
    begun(guider, cond)
