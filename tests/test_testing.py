"""The public conformance checks: ours pass, and objects broken in one way each do not."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import sparke
from sparke.guidance import GuiderChain
from sparke.memory import RingMemory
from sparke.protocols import Features, Requires, Run, Score, Selection, State, Step, Weigh
from sparke.scores import RKE, CondRKE
from sparke.testing import check_guider, check_memory, check_score

# Ours.


@pytest.mark.parametrize("name", sparke.scores())
def test_every_score_of_ours_conforms(name: str) -> None:
    check_score(sparke.score(name))
    check_score(sparke.score(name), cond_width=4, width=11)


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
@pytest.mark.parametrize("name", ["rke", "cond-rke", "vendi", "cond-vendi"])
def test_scores_conform_with_other_kernels(name: str, kernel: str) -> None:
    check_score(sparke.score(name, kernel=kernel))
    check_score(sparke.score(name, kernel=kernel, bandwidth=0.9), cond_width=4, width=11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capacity", [8, 1024])
def test_every_memory_of_ours_conforms(dtype: torch.dtype, capacity: int) -> None:
    check_memory(lambda: RingMemory(capacity, dtype))


@pytest.mark.parametrize(
    "guider",
    [
        *(sparke.DiversityGuider(name) for name in sparke.scores()),
        sparke.DiversityGuider("rke", direction="raw", keep_residual=True),
        sparke.DiversityGuider("rke", reads="conditional"),
        sparke.DiversityGuider("rke", jacobian=True),
        sparke.DiversityGuider("rke", in_batch=False, memory=RingMemory(4, torch.float16)),
        sparke.DiversityGuider(scale=0),
        sparke.DiversityGuider.published(),
        GuiderChain([sparke.DiversityGuider("rke"), sparke.DiversityGuider("cond-rke")]),
    ],
    ids=repr,
)
def test_every_guider_of_ours_conforms(guider: sparke.Guider) -> None:
    check_guider(guider)


NEEDS: dict[str, dict[str, Any]] = {
    "cvsg": {"exemplars": Features(torch.eye(5, 64))},
    "novelty": {"reference": Features(torch.eye(5, 64), torch.eye(5))},
}
"""What guiders must be given, for latents of 64 numbers and prompts of 5."""


def named(name: str) -> sparke.Guider:
    return sparke.guidance.guider(name, **NEEDS.get(name, {}))


@pytest.mark.parametrize("name", sparke.guidance.names())
def test_every_guider_with_a_name_conforms(name: str) -> None:
    check_guider(named(name))
    check_guider(named(name), shape=(2, 4, 16, 1))


def test_a_chain_of_them_all_conforms() -> None:
    names = sparke.guidance.names()
    assert len(names) > 5
    check_guider(GuiderChain([named(name) for name in names]))


def test_a_guider_conforms_without_prompts_and_with_other_shapes() -> None:
    check_guider(sparke.DiversityGuider("rke"), cond_width=None)
    check_guider(sparke.DiversityGuider("rke"), shape=(1, 7))
    check_guider(sparke.DiversityGuider("rke"), shape=(2, 3, 2, 4, 4))


# Somebody else's, with nothing but what the protocol demands.


class Distance:
    """Mean logarithm of the distance to the rows it may see."""

    requires = Requires()

    def __call__(self, query: Features, bank: Features) -> Tensor:
        if not len(bank):
            return query.x.sum(-1) * 0
        off = (query.x[:, None] - bank.x[None]).square().sum(-1)
        seen = torch.ones_like(off)
        if isinstance(bank, Selection) and bank.log_weight is not None:
            seen = bank.log_weight.isfinite().to(off)
        return (off.log1p() * seen).sum(-1) / seen.sum(-1).clamp_min(1)


class Nudge:
    """Moves everything by a little of itself."""

    def begin(self, run: Run) -> None:
        pass

    def __call__(self, state: State) -> Tensor:
        return 0.1 * state.denoised

    def finish(self, x: Tensor) -> None:
        pass


def test_the_least_that_conforms_conforms() -> None:
    check_score(Distance())
    check_score(Distance(), cond_width=3)
    check_guider(Nudge())


def test_nobody_elses_random_numbers_are_moved() -> None:
    before = torch.get_rng_state()
    check_score(Distance())
    check_memory(RingMemory)
    check_guider(Nudge())
    assert torch.equal(torch.get_rng_state(), before)


# Broken scores.


class NoRequires:
    def __call__(self, query: Features, bank: Features) -> Tensor:
        return query.x.sum(-1)


class OneForAll(Distance):
    def __call__(self, query: Features, bank: Features) -> Tensor:
        return super().__call__(query, bank).mean()


class Detached(Distance):
    def __call__(self, query: Features, bank: Features) -> Tensor:
        return super().__call__(query, bank).detach()


class Indifferent(Distance):
    def __call__(self, query: Features, bank: Features) -> Tensor:
        return torch.zeros(len(query), requires_grad=True) * 1


class RootAtZero(Distance):
    def __call__(self, query: Features, bank: Features) -> Tensor:
        if not len(bank):
            return query.x.sum(-1) * 0
        return (query.x[:, None] - bank.x[None]).square().sum(-1).sqrt().mean(-1)


class MeanOfNothing(Distance):
    def __call__(self, query: Features, bank: Features) -> Tensor:
        return (query.x[:, None] - bank.x.reshape(1, -1, 6)).square().sum(-1).mean(-1)


class FirstRowOnly(Distance):
    def __call__(self, query: Features, bank: Features) -> Tensor:
        return super().__call__(query, replace(bank, x=bank.x[:1].expand_as(bank.x)))


class JointBatch(Distance):
    def __call__(self, query: Features, bank: Features) -> Tensor:
        return super().__call__(replace(query, x=query.x - query.x.mean(0)), bank)


class SeesHidden(Distance):
    def __call__(self, query: Features, bank: Features) -> Tensor:
        return super().__call__(query, Features(bank.x))


class SeesItself(Distance):
    def __call__(self, query: Features, bank: Features) -> Tensor:
        if isinstance(bank, Selection) and bank.mates:
            bank = Features(bank.x)
        return super().__call__(query, bank)


class InPlace(Distance):
    def __call__(self, query: Features, bank: Features) -> Tensor:
        bank.x.mul_(0.5)
        return super().__call__(query, bank)


class Random(Distance):
    def __call__(self, query: Features, bank: Features) -> Tensor:
        return super().__call__(query, bank) * (1 + torch.rand(()))


class Downhill(RKE):
    def direction(self, query: Features, bank: Features) -> Tensor:
        return -super().direction(query, bank)


class FlatDirection(RKE):
    def direction(self, query: Features, bank: Features) -> Tensor:
        return super().direction(query, bank).flatten()


class OtherPass(RKE):
    def crowding(self, query: Features, bank: Features) -> Tensor:
        return super().crowding(query, bank) / 2


class Overcrowded(RKE):
    def crowding(self, query: Features, bank: Features) -> Tensor:
        return 2 * super().crowding(query, bank) + 1


class CrowdedByNobody(RKE):
    def crowding(self, query: Features, bank: Features) -> Tensor:
        found = super().crowding(query, bank)
        return found if len(bank) else found + 0.5


class Miscalibrated(RKE):
    def calibrate(self, bank: Features) -> RKE:  # type: ignore[override]
        return RKE(bandwidth=0.123)


@dataclass(frozen=True)
class HeavyPrompts(CondRKE):
    def log_weight(self, query_cond: Tensor, bank_cond: Tensor) -> Tensor:
        return super().log_weight(query_cond, bank_cond) + 1


@dataclass(frozen=True)
class TurnedPrompts(CondRKE):
    def log_weight(self, query_cond: Tensor, bank_cond: Tensor) -> Tensor:
        found = super().log_weight(query_cond, bank_cond)
        return found.mT if len(bank_cond) == 10 else found


BROKEN_SCORES: list[tuple[Any, str]] = [
    (NoRequires(), "no Score"),
    (OneForAll(), "shape"),
    (Detached(), "differentiable"),
    (Indifferent(), "does not depend on query"),
    (RootAtZero(), "finite|as if it were not there"),
    (MeanOfNothing(), "finite|as if it were not there"),
    (FirstRowOnly(), "order of the bank"),
    (JointBatch(), "one by one"),
    (SeesHidden(), "as if it were not there"),
    (SeesItself(), "itself among its mates"),
    (InPlace(), "in place|same call twice"),
    (Random(), "same call twice"),
    (Downhill(), r"direction\(\) must be the gradient"),
    (FlatDirection(), r"direction\(\) .* must have shape"),
    (OtherPass(), r"direction_and_crowding\(\) must agree with both"),
    (Overcrowded(), "must lie in"),
    (CrowdedByNobody(), "empty bank"),
    (Miscalibrated(), "calibrated"),
    (HeavyPrompts(), "at most 0"),
    (TurnedPrompts(), r"log_weight\(\) must be"),
]


@pytest.mark.parametrize(("score", "why"), BROKEN_SCORES, ids=lambda v: type(v).__name__)
def test_a_broken_score_fails(score: Score, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        check_score(score)


def test_a_root_and_a_mean_fail_for_what_is_wrong_with_them() -> None:
    # With hidden rows heeded, what is left is the slope of a root and the mean of nothing.
    class Root(Distance):
        def __call__(self, query: Features, bank: Features) -> Tensor:
            return super().__call__(query, bank).sqrt()

    class Mean(Distance):
        def __call__(self, query: Features, bank: Features) -> Tensor:
            return super().__call__(query, bank) if len(bank) else query.x.sum(-1) / 0

    for score in (Root(), Mean()):
        with pytest.raises(AssertionError, match="must be finite"):
            check_score(score)


# Broken memories.


class Aliasing(RingMemory):
    """Keeps the tensors it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Features] = []

    def __len__(self) -> int:
        return sum(map(len, self.given)) if hasattr(self, "given") else 0

    def commit(self, items: Features) -> None:
        self.given.append(items)

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        if not self.given:
            return super().select(cond, weigh)
        rows = torch.cat([g.x for g in self.given]).detach()
        return Selection(rows, torch.cat([g.cond for g in self.given]))  # type: ignore[misc]


class Views(RingMemory):
    """Overwrites what it handed out."""

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        found = super().select(cond, weigh)
        self.out = replace(found, x=found.x.clone())
        return self.out

    def commit(self, items: Features) -> None:
        super().commit(items)
        if hasattr(self, "out"):
            self.out.x.mul_(0.0)


class Selects(RingMemory):
    """Changes each non-empty selection in one way."""

    def __init__(self, change: Callable[[Selection], Any], capacity: int = 64) -> None:
        self.change = change
        super().__init__(capacity)

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Any:
        found = super().select(cond, weigh)
        return self.change(found) if len(found) else found


class Tolerant(RingMemory):
    """Admits anything; what it cannot keep, it drops."""

    def commit(self, items: Features) -> None:
        try:
            super().commit(items)
        except sparke.SparkeError:
            return


class HalfWay(RingMemory):
    """Writes one row before it refuses the rest."""

    def commit(self, items: Features) -> None:
        try:
            super().commit(items)
        except sparke.SparkeError:
            kept = self.features
            super().commit(Features(kept.x[:1], None if kept.cond is None else kept.cond[:1]))
            raise


class Counting(RingMemory):
    def __len__(self) -> int:
        return 2 * super().__len__()


class NotEmpty(RingMemory):
    def __len__(self) -> int:
        return super().__len__() + 1


def changed(**parts: Callable[[Selection], Any]) -> Callable[[], RingMemory]:
    return lambda: Selects(lambda s: replace(s, **{k: f(s) for k, f in parts.items()}))


def where(weight: Tensor | None, f: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if weight is None else f(weight)


BROKEN_MEMORIES: list[tuple[Callable[[], Any], str]] = [
    (lambda: object(), "no Memory"),
    (NotEmpty, "must be empty"),
    (Counting, "4 rows were committed"),
    (lambda: RingMemory(7), "8 rows were committed"),
    (Aliasing, "detached|nobody committed"),
    (Views, "later commit changed"),
    (Tolerant, "must refuse rows of another width"),
    (HalfWay, "changed the memory all the same"),
    (lambda: Selects(lambda s: Features(s.x, s.cond)), "must return a Selection"),
    (lambda: Selects(lambda s: Selection(s.x[:0])), "found no rows"),
    (changed(x=lambda s: s.x.double()), "must be float32"),
    (changed(x=lambda s: s.x + 1), "nobody committed"),
    (changed(x=lambda s: s.x.flip(0)), "nobody committed"),
    (changed(x=lambda s: s.x.clone().requires_grad_()), "detached"),
    (changed(cond=lambda s: None), "came back without"),
    (changed(log_weight=lambda s: None), "must weigh the rows"),
    (changed(log_weight=lambda s: where(s.log_weight, lambda w: w.mT)), "log weights must be"),
    (changed(log_weight=lambda s: where(s.log_weight, lambda w: w + 9)), "at most 0"),
    (changed(log_weight=lambda s: where(s.log_weight, lambda w: w * math.nan)), "no NaN"),
    (changed(log_weight=lambda s: where(s.log_weight, lambda w: w.flip(1))), "row for row"),
]


@pytest.mark.parametrize(("factory", "why"), BROKEN_MEMORIES)
def test_a_broken_memory_fails(factory: Callable[[], Any], why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        check_memory(factory)


def test_the_memories_above_are_broken_by_their_change_only() -> None:
    check_memory(changed(x=lambda s: s.x.clone()))


# Broken guiders.


class Changed(Nudge):
    """Changes each displacement in one way."""

    def __init__(self, change: Callable[[State, Tensor], Any]) -> None:
        self.change = change

    def __call__(self, state: State) -> Any:
        return self.change(state, super().__call__(state))


class CountsCalls(Nudge):
    calls = 0

    def __call__(self, state: State) -> Tensor:
        self.calls += 1
        return state.denoised * self.calls


class CountsRuns(Nudge):
    runs = 0

    def begin(self, run: Run) -> None:
        self.runs += 1

    def __call__(self, state: State) -> Tensor:
        return state.denoised * self.runs


class Remembers(Nudge):
    last: Tensor | None = None

    def __call__(self, state: State) -> Tensor:
        moved = state.denoised * 0 if self.last is None else state.denoised - self.last
        self.last = state.denoised.clone()
        return moved


class SpoilsTheEnd(Nudge):
    def finish(self, x: Tensor) -> None:
        x.zero_()


class SpoilsTheStart(Nudge):
    def __call__(self, state: State) -> Tensor:
        return state.x.mul_(0.5)


class NeedsGradients(Nudge):
    def __call__(self, state: State) -> Tensor:
        if torch.is_inference_mode_enabled():
            return torch.zeros_like(state.denoised)
        return super().__call__(state)


class NoScale(Nudge):
    def on_guidance_scale(self, step: Step, guidance_scale: float) -> Any:
        return None


class OtherNoise(Nudge):
    def on_noise(self, x: Tensor) -> Tensor:
        return x[:1]


class OtherCondition(Nudge):
    def on_condition(self, prompt_embeds: Tensor, step: Step) -> Tensor:
        return prompt_embeds / step.sigma_next


def at_the_end(state: State, delta: Tensor) -> Tensor:
    return delta / state.step.sigma_next * 0


BROKEN_GUIDERS: list[tuple[Any, str]] = [
    (object(), "no Guider"),
    (Changed(lambda s, d: None), "must be a tensor"),
    (Changed(lambda s, d: d[:1]), "must have shape"),
    (Changed(lambda s, d: d.flatten(1)), "must have shape"),
    (Changed(lambda s, d: d.float()), "bfloat16 as denoised"),
    (Changed(lambda s, d: d.double()), "float32 as denoised"),
    (Changed(lambda s, d: d.clone().requires_grad_()), "detached"),
    (Changed(at_the_end), "must be finite"),
    (Changed(lambda s, d: d * torch.rand(())), "whatever came between"),
    (CountsCalls(), "whatever came between"),
    (Remembers(), "whatever came between"),
    (CountsRuns(), "leave nothing behind"),
    (NeedsGradients(), "inference mode"),
    (SpoilsTheStart(), "changed the state in place"),
    (SpoilsTheEnd(), "changed the finished samples"),
    (NoScale(), "on_guidance_scale"),
    (OtherNoise(), "on_noise"),
    (OtherCondition(), "on_condition"),
]


@pytest.mark.parametrize(("guider", "why"), BROKEN_GUIDERS)
def test_a_broken_guider_fails(guider: Any, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        check_guider(guider)
