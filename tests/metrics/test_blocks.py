"""Read in blocks, from disk, in chunks: the same number, and nothing whole in memory."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional import pairwise_cosine_similarity

from sparke import kernels, metrics
from sparke.errors import ArgumentError, ShapeError
from tests.metrics.common import S, each_kernel, every, prompts, rows

Y, T = rows(21, 4, 1) + 0.5, prompts(33)
# Of samples alone, each with what it needs beside them.
MEASURES: dict[str, Callable[..., Any]] = {
    "vendi": partial(metrics.vendi, bandwidth=S),
    "vendi, order 2": partial(metrics.vendi, bandwidth=S, order=2),
    "vendi, cosine": partial(metrics.vendi, kernel="cosine"),
    "vendi, random": partial(metrics.vendi, bandwidth=S, random_features=6),
    "rke": partial(metrics.rke, bandwidth=S),
    "rke, cosine": partial(metrics.rke, kernel="cosine"),
    "cond_vendi": partial(metrics.cond_vendi, prompt_embeds=T, bandwidth=S),
    "cond_vendi, order 2": partial(metrics.cond_vendi, prompt_embeds=T, bandwidth=S, order=2),
    "cond_rke": partial(metrics.cond_rke, prompt_embeds=T, bandwidth=S),
    "in_batch_similarity": metrics.in_batch_similarity,
    "in_batch_similarity, prompts": partial(metrics.in_batch_similarity, prompt_embeds=T),
    "ken": partial(metrics.ken, reference=Y, bandwidth=S),
    "ken, cosine": partial(metrics.ken, reference=Y, kernel="cosine"),
    "ken, random": partial(metrics.ken, reference=Y, bandwidth=S, random_features=6),
    "relative_rke": partial(metrics.relative_rke, reference=Y, bandwidth=S),
    "relative_rke, cosine": partial(metrics.relative_rke, reference=Y, kernel="cosine"),
    "prdc": partial(metrics.prdc, reference=Y),
}
ADDING = [
    name
    for name in MEASURES
    if name.endswith(("cosine", "random")) or name.startswith("in_batch_similarity")
]
each = pytest.mark.parametrize("name", MEASURES)
adding = pytest.mark.parametrize("name", ADDING)
comparing = pytest.mark.parametrize("name", [name for name in MEASURES if name not in ADDING])


def samples() -> Tensor:
    return rows(33, 4)


def chunks(x: Tensor) -> Iterator[Tensor]:
    yield from x.split([1, 12, 20])


@each
@pytest.mark.parametrize("block", [1, 8, 33])
def test_blocks_give_what_one_gives(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MEASURES[name](samples())
    monkeypatch.setattr(metrics._rows, "BLOCK", block)
    assert MEASURES[name](samples()) == pytest.approx(whole, rel=1e-7)


@each
def test_a_file_is_read_a_block_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "x.npy", samples().numpy().astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = MEASURES[name](samples().float())
    most, read = 0, metrics._rows.Table.read

    def watched(table: metrics._rows.Table, which: slice | Tensor) -> Tensor:
        nonlocal most
        found = read(table, which)
        most = max(most, len(found))
        return found

    monkeypatch.setattr(metrics._rows, "BLOCK", 8)
    monkeypatch.setattr(metrics._rows.Table, "read", watched)
    assert MEASURES[name](mapped) == pytest.approx(expected, rel=1e-7)
    assert most == 8


def test_wide_rows_are_read_fewer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._rows, "NUMBERS", 12)
    table = metrics._rows.Table("x", samples())
    assert {len(block) for block in table.blocks()} == {3}
    assert metrics._rows.Table("x", rows(2, 50)).block == 1


@adding
@pytest.mark.parametrize("as_type", [list, tuple, iter, lambda c: (v.numpy() for v in c)])
def test_what_adds_up_takes_chunks(name: str, as_type: Callable[..., Any]) -> None:
    x = samples()
    assert MEASURES[name](as_type(chunks(x))) == pytest.approx(MEASURES[name](x), rel=1e-9)


@comparing
def test_what_compares_pairs_takes_none(name: str) -> None:
    with pytest.raises(ArgumentError, match="reads features more than once, but it was given in"):
        MEASURES[name](chunks(samples()))


def test_prompts_and_sets_for_a_bandwidth_come_whole() -> None:
    with pytest.raises(ArgumentError, match="reads prompt_embeds more than once"):
        metrics.cond_rke(samples(), chunks(T))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="reads set 0 more than once"):
        metrics.shared_bandwidth(chunks(samples()))  # type: ignore[arg-type]


def test_chunks_are_too_late_for_a_bandwidth() -> None:
    with pytest.raises(ArgumentError, match=r"Give bandwidth=shared_bandwidth"):
        metrics.vendi(chunks(samples()), random_features=8)
    with pytest.raises(ArgumentError, match="ken was given chunks"):
        metrics.ken(samples(), chunks(Y), random_features=8)


def test_both_sets_may_come_in_chunks() -> None:
    x = samples()
    for measure in (metrics.ken, metrics.relative_rke):
        found = measure(chunks(x), iter([Y[:5], Y[5:]]), kernel="cosine")
        assert found == pytest.approx(measure(x, Y, kernel="cosine"), rel=1e-9)


def test_an_error_names_the_chunk() -> None:
    x = samples()
    x[20, 2] = np.nan
    with pytest.raises(ArgumentError, match="chunk 2 of features must be finite; row 7 of 20"):
        metrics.rke(chunks(x), kernel="cosine")
    uneven = iter([rows(3, 4), rows(3, 5)])
    with pytest.raises(ShapeError, match="chunk 1 of features has rows of width 5 and chunk 0"):
        metrics.rke(uneven, kernel="cosine")
    with pytest.raises(ArgumentError, match="features is empty: it yielded no chunk"):
        metrics.rke(iter([]), kernel="cosine")
    with pytest.raises(ShapeError, match="chunk 0 of features must be"):
        metrics.rke(iter([rows(3, 4)[0]]), kernel="cosine")


@pytest.mark.parametrize("given", [30, 36])
def test_prompts_must_match_chunks(given: int) -> None:
    with pytest.raises(ShapeError, match=f"it has {given} rows, and features 33"):
        metrics.in_batch_similarity(chunks(samples()), prompts(given))


@every
def test_a_list_of_rows_is_a_matrix(metric: Callable[..., float]) -> None:
    x, t = samples(), T
    expected = metric(x, t)
    assert metric(x.tolist(), t) == pytest.approx(expected, rel=1e-12)
    assert metric(list(x.numpy()), t.tolist()) == pytest.approx(expected, rel=1e-12)


@every
@pytest.mark.parametrize("x", ["abc", b"abc", None, 3, [[1.0], [1.0, 2.0]], {"a": 1}])
def test_other_things_are_not_features(metric: Callable[..., float], x: Any) -> None:
    with pytest.raises((ArgumentError, ShapeError), match="features"):
        metric(x, T)


@each_kernel
@pytest.mark.parametrize("metric", [metrics.rke, metrics.cond_rke])
def test_no_matrix_is_larger_than_a_tile(
    metric: Callable[..., float], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest, original = 0, kernels.kernel_matrix

    def watched(a: Tensor, b: Tensor, *options: Any) -> Tensor:
        nonlocal largest
        k = original(a, b, *options)
        largest = max(largest, k.numel())
        return k

    monkeypatch.setattr(metrics._rows, "BLOCK", 8)
    monkeypatch.setattr(metrics._pairs, "kernel_matrix", watched)
    metric(rows(50, 60), prompts(50), kernel=kernel, bandwidth=S)
    assert 0 < largest <= 64


def test_the_cosines_of_a_batch_are_those_of_torchmetrics() -> None:
    x = samples()
    theirs = pairwise_cosine_similarity(x)  # of a row with itself it is 0 there
    expected = float(theirs.sum() / (len(x) * (len(x) - 1)))
    assert metrics.in_batch_similarity(x) == pytest.approx(expected, rel=1e-9)
    squares = float(pairwise_cosine_similarity(x, zero_diagonal=False).square().sum())
    assert metrics.rke(x, kernel="cosine") == pytest.approx(len(x) ** 2 / squares, rel=1e-9)


@each
def test_progress_goes_to_its_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._rows, "BLOCK", 8)
    told: list[tuple[int, int]] = []
    MEASURES[name](samples(), progress=lambda done, total: told.append((done, total)))
    assert len({total for _, total in told}) == 1
    assert [done for done, _ in told] == list(range(1, told[0][1] + 1))
    assert len(told) > 3


@adding
def test_progress_of_an_iterator_has_no_total(name: str) -> None:
    told: list[tuple[int, int]] = []
    MEASURES[name](chunks(samples()), progress=lambda *step: told.append(step))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert {total for _, total in told} == {0}
    MEASURES[name](list(chunks(samples())), progress=lambda *step: told.append(step))
    assert told[-1][0] == told[-1][1]


@each
def test_progress_must_be_a_function(name: str) -> None:
    with pytest.raises(ArgumentError, match="progress must be a function"):
        MEASURES[name](samples(), progress=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each
def test_a_gpu_gives_the_same(name: str) -> None:
    found = MEASURES[name](samples().cuda())
    assert found == pytest.approx(MEASURES[name](samples()), rel=1e-7)
