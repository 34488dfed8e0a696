"""The gate: what it leaves out, what that changes, and what it never touches."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparke.errors import ArgumentError
from sparke.kernels import RELEVANT, SAMPLED_ROWS, QuantileRule
from sparke.memory import RingMemory, _gate
from sparke.protocols import Features, Selection
from sparke.scores import CondRKE

WIDTH, PROMPTS = 24, 48


def bank(n: int, relevant: float = 0.01, seed: int = 0) -> tuple[Features, Tensor]:
    """n rows, a share of them of the query's prompt, and the (1, c) query prompt."""
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(n, PROMPTS, generator=generator)
    query = torch.randn(1, PROMPTS, generator=generator)
    ours = torch.randperm(n, generator=generator)[: max(1, int(n * relevant))]
    cond[ours] = query + 0.02 * torch.randn(len(ours), PROMPTS, generator=generator)
    return Features(torch.randn(n, WIDTH, generator=generator), cond), query


def filled(items: Features, tolerance: float, wrapped: int = 0) -> RingMemory:
    memory = RingMemory(len(items), tolerance=tolerance)
    if wrapped:
        assert items.cond is not None
        memory.commit(Features(torch.zeros(wrapped, WIDTH), torch.zeros(wrapped, PROMPTS)))
    memory.commit(items)
    return memory


def pull(x: Tensor, weight: Tensor, query: Tensor, bandwidth: float) -> Tensor:
    """2S/(1+2S) (q - m), written out."""
    terms = weight * torch.exp(-(x - query).square().sum(1) / bandwidth**2)
    s = terms.sum()
    return 2 * s / (1 + 2 * s) * (query - terms @ x / s)


@given(
    n=st.integers(257, 600),
    queries=st.integers(1, 4),
    spread=st.floats(0.5, 40),
    tolerance=st.sampled_from([1e-4, 1e-3, 0.1, 0.9]),
    seed=st.integers(0, 99),
)
def test_no_query_loses_more_weight_than_allowed(
    n: int, queries: int, spread: float, tolerance: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_weight = -spread * torch.rand(queries, n, generator=generator)
    index = _gate.keep(log_weight, tolerance)
    out = _gate.left_out(log_weight, index)
    total = log_weight.double().exp().sum(1)
    assert bool((out <= tolerance / 2 * total.clamp_min(1) * (1 + 1e-5)).all())
    if index is None:
        return
    assert bool((index.diff() > 0).all())
    kept = set(index.tolist())
    assert set(range(n - SAMPLED_ROWS, n)) <= kept
    assert set((log_weight > RELEVANT).any(0).nonzero().squeeze(1).tolist()) <= kept
    torch.testing.assert_close(total - log_weight[:, index].double().exp().sum(1), out)


def test_as_many_rows_are_left_out_as_the_rule_allows() -> None:
    # 400 rows of weight 1e-5 and 256 newest: half of 1e-3 allows 50 of them.
    log_weight = torch.full((1, 400 + SAMPLED_ROWS), math.log(1e-5))
    index = _gate.keep(log_weight, 1e-3)
    assert index is not None
    assert len(index) in (606, 607)  # the 50th stands on the edge


@pytest.mark.parametrize("where", ["anywhere", "all on the query"])
def test_the_pull_is_off_by_no_more_than_is_promised(where: str) -> None:
    items, query = bank(4000)
    z = torch.randn(WIDTH, dtype=torch.float64)
    weight = CondRKE().log_weight(query, items.cond)  # type: ignore[arg-type]
    for tolerance in (1e-3, 1e-2, 0.3):
        index = _gate.keep(weight, tolerance)
        assert index is not None
        out = torch.ones(len(items), dtype=torch.bool)
        out[index] = False
        x, w = items.x.double(), weight[0].double().exp()
        if where == "all on the query":  # the worst case for the rows left out
            x[out] = z
        dense, gated = pull(x, w, z, 4.0), pull(x[index], w[index], z, 4.0)
        diameter = max(float((x - z).norm(dim=1).max()), float(torch.pdist(x[:500]).max()))
        off = float((dense - gated).norm())
        assert off <= 2 * float(_gate.left_out(weight, index)) * diameter
        if where == "anywhere":
            assert off <= tolerance * diameter
        assert off > 0


@pytest.mark.parametrize("wrapped", [0, 137])
def test_one_percent_relevant_reads_few_rows_and_gives_the_same_direction(wrapped: int) -> None:
    items, prompt = bank(20000)
    score = CondRKE(bandwidth=6.0)
    dense = filled(items, 0.0, wrapped).select(prompt, score.log_weight)
    gated = filled(items, 1e-3, wrapped).select(prompt, score.log_weight)
    assert len(dense) == len(items)
    assert len(gated) <= 0.05 * len(items)
    query = Features(torch.randn(1, WIDTH), prompt)
    ours, theirs = (score.direction_and_crowding(query, s) for s in (gated, dense))
    assert float((ours[0] - theirs[0]).norm() / theirs[0].norm()) < 1e-3
    assert float((ours[1] - theirs[1]).abs()) < 1e-3


@pytest.mark.parametrize("relevant", [0.0001, 0.01, 0.2])
def test_calibrated_bandwidths_are_the_same(relevant: float) -> None:
    items, prompt = bank(5000, relevant)
    score = CondRKE()
    dense, gated = (
        score.calibrate(filled(items, t).select(prompt, score.log_weight)) for t in (0.0, 1e-3)
    )
    assert isinstance(score.bandwidth, QuantileRule)
    assert isinstance(dense.bandwidth, Tensor)
    assert isinstance(gated.bandwidth, Tensor)
    assert torch.equal(dense.bandwidth, gated.bandwidth)


def test_rows_of_every_query_of_a_batch_are_kept() -> None:
    items, first = bank(3000)
    assert items.cond is not None
    prompts = torch.cat([first, items.cond[5:6]])
    found = filled(items, 1e-3).select(prompts)
    assert found.cond is not None
    assert len(found) < 1000
    assert bool((found.cond == items.cond[5]).all(1).any())
    alone = filled(items, 1e-3).select(first)
    assert alone.cond is not None
    rows = {tuple(row) for row in found.cond.tolist()}
    assert {tuple(row) for row in alone.cond[:-SAMPLED_ROWS].tolist()} <= rows


@pytest.mark.parametrize("wrapped", [0, 100])
def test_rows_weights_and_prompts_stay_together_oldest_first(wrapped: int) -> None:
    items, prompt = bank(2000)
    weigh = CondRKE().log_weight
    found = filled(items, 1e-3, wrapped).select(prompt, weigh)
    assert found.cond is not None
    assert found.log_weight is not None
    torch.testing.assert_close(found.log_weight, weigh(prompt, found.cond), rtol=1e-5, atol=1e-4)
    places = [int((items.x == row).all(1).nonzero()) for row in found.x]
    assert places == sorted(places)
    assert items.cond is not None
    assert torch.equal(items.cond[places], found.cond)
    assert places[-SAMPLED_ROWS:] == list(range(2000 - SAMPLED_ROWS, 2000))


def test_a_gated_selection_stays_as_it_is() -> None:
    items, prompt = bank(1000)
    memory = filled(items, 1e-3)
    found = memory.select(prompt)
    before = found.x.clone()
    memory.commit(items)
    assert torch.equal(found.x, before)


def test_prompts_are_weighed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    items, prompt = bank(1000)
    whole = filled(items, 1e-3, 100).select(prompt)
    monkeypatch.setattr(_gate, "CHUNK_BYTES", 4 * PROMPTS * 64)
    sizes: list[int] = []

    def weigh(query: Tensor, rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return CondRKE().log_weight(query, rows)

    memory = filled(items, 1e-3, 100)
    found = memory.select(prompt, weigh)
    assert max(sizes) == 64
    assert sum(sizes) == 1000
    assert torch.equal(found.x, whole.x)
    torch.testing.assert_close(found.log_weight, whole.log_weight, rtol=1e-5, atol=1e-5)


def test_zero_tolerance_keeps_rows_of_no_weight_too() -> None:
    assert _gate.keep(torch.full((2, 999), -math.inf), 0.0) is None


def test_what_is_hidden_from_all_is_left_out() -> None:
    log_weight = torch.full((2, 999), -math.inf)
    log_weight[1, 3] = 0.0
    index = _gate.keep(log_weight, 1e-3)
    assert index is not None
    assert index.tolist() == [3, *range(999 - SAMPLED_ROWS, 999)]


def test_rows_of_unknown_weight_are_kept() -> None:
    log_weight = torch.full((2, 999), -40.0)
    log_weight[0, 3] = math.nan
    index = _gate.keep(log_weight, 1e-3, most=SAMPLED_ROWS + 1)
    assert index is None or 3 in index.tolist()


@pytest.mark.parametrize("most", [1, 300, 400])
def test_a_limit_keeps_the_heaviest_the_newest_among_equals(most: int) -> None:
    log_weight = torch.zeros(1, 1000)
    log_weight[0, :500] = -1.0
    log_weight[0, 7] = -0.5
    index = _gate.keep(log_weight, 1e-3, most)
    assert index is not None
    assert index.tolist() == list(range(1000 - max(most, SAMPLED_ROWS), 1000))
    index = _gate.keep(log_weight, 1e-3, 501)
    assert index is not None
    assert index.tolist() == [7, *range(500, 1000)]
    assert float(_gate.left_out(log_weight, index)) == pytest.approx(499 * math.exp(-1))


@pytest.mark.parametrize("tolerance", [-1e-3, 1.0, math.nan, "much"])
@pytest.mark.parametrize("make", [RingMemory, _gate.check_tolerance])
def test_a_tolerance_is_a_small_share(make: Callable[..., object], tolerance: float) -> None:
    with pytest.raises(ArgumentError, match="tolerance"):
        make(tolerance=tolerance) if make is RingMemory else make(tolerance)


def test_a_full_ring_in_order_is_not_handed_out_as_a_view() -> None:
    memory = RingMemory(4)
    memory.commit(Features(torch.zeros(5, 2)))
    memory.commit(Features(torch.zeros(3, 2)))  # twice round: the oldest row is in slot 0
    found = memory.select()
    memory.commit(Features(torch.ones(2, 2)))
    assert isinstance(found, Selection)
    assert float(found.x.abs().max()) == 0
