"""The operation where it is used: by the scores, and by a run that froze its bank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparke import ops
from sparke.guidance import _banks
from sparke.memory import RingMemory
from sparke.protocols import Features, Run, Selection
from sparke.scores import RKE, CondRKE

SCORES: list[RKE | CondRKE] = [RKE(bandwidth=30.0), CondRKE(bandwidth=30.0), RKE(), CondRKE()]
each = pytest.mark.parametrize("score", SCORES, ids=str)


def bank(n: int = 200, d: int = 1024, offset: float = 0.0) -> tuple[Features, Selection]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator) + offset
    cond = torch.randn(n, 8, generator=generator)
    query = Features(x[:3] + torch.randn(3, d, generator=generator), cond[:3])
    return query, Selection(x, cond, CondRKE().log_weight(cond[:3], cond))


def with_norms(selection: Selection) -> Selection:
    norms, center = ops.squared_norms(selection.x)
    return Selection(selection.x, selection.cond, selection.log_weight, norms=norms, center=center)


@each
def test_norms_change_nothing_but_the_work(score: RKE | CondRKE) -> None:
    query, plain = bank()
    expected = score.direction_and_crowding(query, plain)
    found = score.direction_and_crowding(query, with_norms(plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(score.crowding(query, with_norms(plain)), expected[1])


@each
def test_norms_of_other_rows_are_refused(score: RKE | CondRKE) -> None:
    query, plain = bank()
    known = with_norms(plain)
    stale = Selection(plain.x, plain.cond, plain.log_weight, norms=known.norms[1:],  # type: ignore[index]
                      center=known.center)  # fmt: skip
    with pytest.raises(ValueError, match="norms"):
        score.direction(query, stale)


@each
def test_directions_far_from_the_origin_are_those_near_it(score: RKE | CondRKE) -> None:
    query, near = bank()
    away = 2.0**12
    far = Selection((near.x + away).contiguous(), near.cond, near.log_weight)
    moved = Features(query.x + away, query.cond)
    # What rows lost by moving there they have lost; the score is to lose nothing more.
    near = Selection(far.x - away, near.cond, near.log_weight)
    query = Features(moved.x - away, query.cond)
    expected = score.direction(query, near)
    found = score.direction(moved, far)
    similarity = torch.nn.functional.cosine_similarity(found, expected)
    assert float(similarity.min()) > 1 - 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_run_computes_norms_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    query, selection = bank()
    memory = RingMemory(500, dtype)
    memory.commit(Features(selection.x, selection.cond))
    run = Run(torch.Size((3, 1024)), torch.device("cpu"), torch.float32, cond=query.cond)
    score = CondRKE(bandwidth=30.0)
    banks = _banks.freeze(score, memory, run, in_batch=False, flat=True)
    assert banks.bank is not None
    assert banks.bank.norms is not None
    expected = (banks.bank.x.double() - banks.bank.center.double()).square().sum(1)  # type: ignore[union-attr]
    torch.testing.assert_close(banks.bank.norms.double(), expected, rtol=1e-5, atol=0)

    def forbidden(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("norms were computed again")

    monkeypatch.setattr(torch.linalg, "vector_norm", forbidden)
    ((reader, frozen),) = banks.sources(query.x)
    assert reader.direction(query, frozen).shape == (3, 1024)  # type: ignore[attr-defined]


def test_norms_a_memory_knows_are_taken_from_it() -> None:
    class Knowing(RingMemory):
        def select(self, cond: Tensor | None = None, weigh: Any = None) -> Selection:
            found = super().select(cond, weigh)
            return Selection(
                found.x, found.cond, found.log_weight,
                norms=torch.arange(200.0), center=torch.ones(1024),
            )  # fmt: skip

    query, selection = bank()
    memory = Knowing(500)
    memory.commit(Features(selection.x, selection.cond))
    run = Run(torch.Size((3, 1024)), torch.device("cpu"), torch.float32, cond=query.cond)
    frozen = _banks.freeze(RKE(), memory, run, in_batch=False, flat=True).bank
    assert frozen is not None
    assert torch.equal(frozen.norms, torch.arange(200.0))  # type: ignore[arg-type]
    assert torch.equal(frozen.center, torch.ones(1024))  # type: ignore[arg-type]
