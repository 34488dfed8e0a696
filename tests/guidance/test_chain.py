"""Several guiders as one."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from torch import Tensor, nn

import sparke
from sparke.errors import ArgumentError, GuidanceWarning
from sparke.guidance import DiversityGuider, GuiderChain, SharedMemory, having, members
from sparke.guidance._hooks import HOOKS
from sparke.guidance.dpp import DPP
from sparke.guidance.eddy import EDDY
from sparke.guidance.particle import Particle
from sparke.guidance.spell import SPELL
from sparke.memory import RingMemory
from sparke.memory.reference import ReferenceMemory
from sparke.protocols import (
    ConditionHook,
    EncoderHook,
    Evaluation,
    EvaluationHook,
    Features,
    GuidanceScaleHook,
    Guider,
    ModelHook,
    NoiseHook,
    Run,
    State,
    Step,
)
from tests.samplers import MIXTURE, run

STEP = Step(0, 5.0, 4.0, 10)
RUN = Run(torch.Size((4, 2)), torch.device("cpu"), torch.float32)


class Shift:
    """Adds a number and remembers what it was shown."""

    def __init__(self, by: float = 0.0, log: list[str] | None = None) -> None:
        self.by = by
        self.log: list[str] = [] if log is None else log
        self.seen: list[Tensor] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.by})"

    def begin(self, run: Run) -> None:
        self.log.append("begin")

    def __call__(self, state: State) -> Tensor:
        self.seen.append(state.denoised)
        return torch.full_like(state.denoised, self.by)

    def finish(self, x: Tensor) -> None:
        self.log.append("finish")
        self.seen.append(x)


class Scaling(Shift):
    def on_guidance_scale(self, step: Step, guidance_scale: float) -> float:
        return guidance_scale * self.by


class Start(Shift):
    def on_noise(self, x: Tensor) -> Tensor:
        return x * self.by


class Condition(Shift):
    mask: Tensor | None = None

    def on_condition(self, prompt_embeds: Tensor, step: Step, mask: Tensor | None = None) -> Tensor:
        self.mask = mask
        return prompt_embeds * step.sigma + self.by


class Listens(Shift):
    def on_evaluation(self, evaluation: Evaluation) -> None:
        self.log.append(f"{self.by} {evaluation.branches}")


class Holds(Shift):
    """Its `by` is entered and left; `fails` where asked to."""

    fails = ""

    @contextmanager
    def on_model(self, model: Any) -> Iterator[None]:
        if self.fails == "enter":
            raise ValueError("enter")
        self.log.append(f"in {self.by}")
        try:
            yield
        finally:
            self.log.append(f"out {self.by}")
            if self.fails == "exit":
                raise ValueError("exit")


class Encodes(Holds):
    @contextmanager
    def on_encoder(self, encoder: Any) -> Iterator[None]:
        with super().on_model(encoder):
            yield


class Claims(Scaling, Start):
    """Claims, yields or idles as told."""

    def __init__(self, by: float = 0.0, *, claims: str = "", yields: str = "", idle: str = ""):
        super().__init__(by)
        self.exclusive = frozenset(claims.split())
        self.yields = frozenset(yields.split())
        self.idle = frozenset(idle.split())


def test_displacements_add_up_and_each_sees_the_estimate_before_it() -> None:
    guiders = Shift(1.0), Shift(0.25), Shift(-3.0)
    chain = GuiderChain(guiders)
    denoised = torch.randn(4, 2, dtype=torch.float64)
    state = State(torch.zeros(4, 2), denoised, STEP)
    delta = chain(state)
    torch.testing.assert_close(delta, torch.full_like(denoised, -1.75))
    shown = [guider.seen[0] - denoised for guider in guiders]
    for found, expected in zip(shown, (0.0, 1.0, 1.25), strict=True):
        torch.testing.assert_close(found, torch.full_like(denoised, expected))
    assert torch.equal(state.denoised, denoised)


def test_the_rest_of_the_state_is_passed_on() -> None:
    seen: list[State] = []

    class Look(Shift):
        def __call__(self, state: State) -> Tensor:
            seen.append(state)
            return super().__call__(state)

    def value(x: Tensor | None = None) -> Tensor:
        return torch.zeros(4, 2)

    x, cond = torch.randn(4, 2), torch.randn(4, 3)
    given = State(x, x, STEP, cond, value, value, value)
    GuiderChain([Shift(1.0), Look(1.0)])(given)
    (state,) = seen
    assert torch.equal(state.denoised, x + 1)
    assert replace(state, denoised=x) == given


def test_all_begin_and_all_finish() -> None:
    guiders = Shift(0.5), Shift(-0.5)
    x = run(sparke.wrap(sampling.sample_euler, guider=guiders))
    for guider in guiders:
        assert guider.log == ["begin", "finish"]
        assert torch.equal(guider.seen[-1], x)


# Hooks.


def test_what_values_hooks_return_is_what_the_next_is_given() -> None:
    chain: Any = GuiderChain([Scaling(2.0), Start(3.0), Shift(1.0), Scaling(0.25), Start(-1.0)])
    assert chain.on_guidance_scale(STEP, 6.0) == 3.0
    assert torch.equal(chain.on_noise(torch.ones(2)), torch.full((2,), -3.0))

    first, second = Condition(1.0), Condition(2.0)
    chain = GuiderChain([first, second])
    mask = torch.ones(2, dtype=torch.bool)
    assert chain.on_condition(torch.ones(2), STEP, mask).tolist() == [32.0, 32.0]
    assert first.mask is mask
    assert second.mask is mask
    chain.on_condition(torch.ones(2), STEP)
    assert first.mask is None


def test_each_is_told_of_an_evaluation() -> None:
    log: list[str] = []
    chain: Any = GuiderChain([Listens(1.0, log), Shift(), Listens(2.0, log)])
    assert chain.on_evaluation(Evaluation(STEP, ("cond",), 3)) is None
    assert log == ["1.0 ('cond',)", "2.0 ('cond',)"]


@pytest.mark.parametrize("hook", ["on_model", "on_encoder"])
def test_networks_are_held_in_order_and_let_go_in_the_reverse_one(hook: str) -> None:
    log: list[str] = []
    chain: Any = GuiderChain([Encodes(1.0, log), Shift(), Encodes(2.0, log)])
    inside, left = ["in 1.0", "in 2.0"], ["out 2.0", "out 1.0"]
    with getattr(chain, hook)(nn.Identity()):
        assert log == inside
    assert log == inside + left
    for error in (RuntimeError(), KeyboardInterrupt()):
        log.clear()
        with pytest.raises(type(error)), getattr(chain, hook)(nn.Identity()):
            raise error
        assert log == inside + left


@pytest.mark.parametrize(
    ("fails", "left"), [("enter", ["out 1.0"]), ("exit", ["in 2.0", "out 2.0", "out 1.0"])]
)
@pytest.mark.parametrize("hook", ["on_model", "on_encoder"])
def test_the_others_let_go_of_a_network_where_one_fails(
    hook: str, fails: str, left: list[str]
) -> None:
    log: list[str] = []
    chain: Any = GuiderChain([Encodes(1.0, log), Encodes(2.0, log)])
    chain.guiders[1].fails = fails
    with pytest.raises(ValueError, match=fails), getattr(chain, hook)(nn.Identity()):
        pass
    assert log == ["in 1.0", *left]


OFFERS: dict[type[Any], Callable[[], Guider]] = {
    GuidanceScaleHook: Scaling,
    NoiseHook: Start,
    ConditionHook: Condition,
    ModelHook: Holds,
    EvaluationHook: Listens,
    EncoderHook: Encodes,
}


@pytest.mark.parametrize("hook", OFFERS)
def test_a_chain_offers_what_one_of_its_guiders_does(hook: type[Any]) -> None:
    one = OFFERS[hook]()
    chain = GuiderChain([Shift(), one])
    assert isinstance(chain, hook)
    assert having(chain, hook) == [one]
    bare = GuiderChain([Shift(), Shift()])
    assert not isinstance(bare, hook)
    assert having(bare, hook) == []
    others = [other for other in OFFERS if isinstance(one, other)]
    assert [other for other in OFFERS if isinstance(chain, other)] == others


def test_every_hook_there_is_goes_through_a_chain() -> None:
    assert set(HOOKS.values()) == set(OFFERS)
    assert set(HOOKS) == {
        name.removeprefix("on_") for hook in OFFERS for name in vars(hook) if name.startswith("on_")
    }


def test_a_chain_within_a_chain_counts_as_the_guiders_in_it() -> None:
    a, b, c = Shift(1.0), Start(2.0), Shift(3.0)
    chain = GuiderChain([GuiderChain([a, GuiderChain([b])]), c])
    assert chain.guiders == members(chain) == (a, b, c)
    assert members(a) == (a,)
    assert having(a, NoiseHook) == []
    assert having(b, NoiseHook) == [b]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_of_a_chain_calls_its_own_guiders(copied: Callable[[Any], Any]) -> None:
    chain: Any = GuiderChain([Scaling(2.0), Shift()])
    other = copied(chain)
    other.guiders[0].by = 3.0
    assert (chain.on_guidance_scale(STEP, 1.0), other.on_guidance_scale(STEP, 1.0)) == (2.0, 3.0)


# What does nothing does nothing in a chain.


def test_a_chain_of_one_is_that_one() -> None:
    alone = sparke.wrap(sampling.sample_euler, guider=DiversityGuider())
    chained = sparke.wrap(sampling.sample_euler, guider=[DiversityGuider()])
    for seed in range(2):
        ours = run(chained, seed=seed, cond_scale=3.0)
        assert torch.equal(ours, run(alone, seed=seed, cond_scale=3.0))


def test_guiders_of_scale_0_leave_the_sampler_bit_identical() -> None:
    everywhere = sparke.guidance.guider("interval", lo=0, hi=float("inf"))
    guiders = [DiversityGuider("rke", scale=0), DiversityGuider(scale=0), everywhere]
    wrapped = sparke.wrap(sampling.sample_dpmpp_2m, guider=guiders)
    for seed in range(2):
        plain = run(sampling.sample_dpmpp_2m, seed=seed, cond_scale=3.0)
        assert torch.equal(run(wrapped, seed=seed, cond_scale=3.0), plain)
    # One that is on acts as if the others were not there.
    mixed = sparke.wrap(sampling.sample_euler, guider=[*guiders, DiversityGuider("vendi")])
    alone = sparke.wrap(sampling.sample_euler, guider="vendi")
    for seed in range(2):
        assert torch.equal(run(mixed, seed=seed), run(alone, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_zeros_stay_zeros_where_denoised_is_not_finite(dtype: torch.dtype) -> None:
    denoised = torch.tensor([[torch.inf, torch.nan, -0.0, 1.0]], dtype=dtype)
    delta = GuiderChain([Shift(), Shift()])(State(denoised, denoised, STEP))
    assert delta.dtype == dtype
    assert torch.equal(delta, torch.zeros_like(denoised))


# Failures.


def test_a_begin_that_fails_commits_nothing_and_can_be_tried_again() -> None:
    class Demands(Shift):
        def begin(self, run: Run) -> None:
            if self.by:
                raise ArgumentError("no")

    guider, demands = DiversityGuider("rke"), Demands(1.0)
    wrapped = sparke.wrap(sampling.sample_euler, guider=[guider, demands])
    with pytest.raises(ArgumentError, match="no"):
        run(wrapped)
    assert len(guider.memory) == 0
    assert demands.log == []
    demands.by = 0.0
    assert torch.equal(run(wrapped), run(sparke.wrap(sampling.sample_euler, guider="rke")))
    assert len(guider.memory) == 8


def test_all_get_the_finished_samples_even_if_one_fails() -> None:
    class Fails(Shift):
        def finish(self, x: Tensor) -> None:
            raise RuntimeError("disk full")

    first, last = Shift(), Shift()
    chain = GuiderChain([first, Fails(), last])
    chain.begin(RUN)
    with pytest.raises(RuntimeError, match="disk full"):
        chain.finish(torch.zeros(4, 2))
    assert first.log == last.log == ["begin", "finish"]


# Conflicts.


def test_two_that_claim_the_same_are_an_error_naming_both() -> None:
    first, second = Claims(1.0, claims="guidance_scale noise"), Claims(2.0, claims="guidance_scale")
    with pytest.raises(ArgumentError, match=r"Claims\(1.0\) and Claims\(2.0\).*guidance"):
        GuiderChain([first, Shift(), second])
    with pytest.raises(ArgumentError, match="initial noise"):
        GuiderChain([first, Claims(claims="noise")])
    GuiderChain([Claims(claims="guidance_scale"), Claims(claims="noise")])


def test_a_claim_made_later_is_an_error_before_the_next_run() -> None:
    first, second = Claims(claims="noise"), Claims()
    chain = GuiderChain([first, second])
    chain.begin(RUN)
    second.exclusive = frozenset({"noise"})
    with pytest.raises(ArgumentError, match="initial noise"):
        chain.begin(RUN)
    assert first.log == ["begin"]


def test_who_yields_is_not_asked_where_another_claims() -> None:
    holds, steps_back = Claims(2.0, claims="guidance_scale"), Claims(10.0, yields="guidance_scale")
    for order in ([holds, steps_back], [steps_back, holds]):
        chain: Any = GuiderChain(order)
        assert having(chain, GuidanceScaleHook) == [holds]
        assert chain.on_guidance_scale(STEP, 1.0) == 2.0
        assert set(having(chain, NoiseHook)) == {holds, steps_back}
    chain = GuiderChain([steps_back, Claims(3.0)])
    assert chain.on_guidance_scale(STEP, 1.0) == 30.0
    # To yield to oneself would be to have no hook at all.
    both = Claims(3.0, claims="noise", yields="noise")
    assert having(GuiderChain([both, Shift()]), NoiseHook) == [both]


def test_an_idle_hook_is_not_asked() -> None:
    idle = Claims(3.0, idle="noise")
    chain: Any = GuiderChain([idle, Claims(2.0)])
    assert torch.equal(chain.on_noise(torch.ones(1)), torch.full((1,), 2.0))
    assert having(idle, NoiseHook) == []
    assert having(idle, GuidanceScaleHook) == [idle]
    idle.idle = frozenset()
    assert torch.equal(chain.on_noise(torch.ones(1)), torch.full((1,), 6.0))


def test_diversity_steps_back_from_the_guidance_scale_unless_told_where() -> None:
    interval = sparke.guidance.guider("interval", lo=0.5, hi=2.0)
    chain: Any = GuiderChain([DiversityGuider(), interval])
    chain.begin(replace(RUN, cond=torch.ones(4, 3), sigma_data=1.0))
    # Its own interval is (0, 1.6].
    scales = [chain.on_guidance_scale(replace(STEP, sigma=s), 6.0) for s in (0.2, 1.0, 1.8, 3.0)]
    assert scales == [1.0, 6.0, 6.0, 1.0]
    explicit = DiversityGuider(cfg_interval=(0.5, 2.0))
    with pytest.raises(ArgumentError, match=r"DiversityGuider\(.*Interval\(.*cfg_interval=None"):
        GuiderChain([explicit, interval])
    GuiderChain([DiversityGuider(cfg_interval=None), interval])
    GuiderChain([DiversityGuider(cfg_interval=(0.5, 2.0), scale=0), interval])
    GuiderChain([explicit, DiversityGuider("rke")])


def test_the_same_guider_twice_is_an_error() -> None:
    guider = Shift(1.0)
    with pytest.raises(ArgumentError, match=r"twice: Shift\(1.0\)"):
        GuiderChain([guider, GuiderChain([Shift(), guider])])


def test_a_memory_in_two_guiders_is_an_error_that_says_how_to_share_it() -> None:
    memory = RingMemory()
    guiders = [DiversityGuider("rke", memory), DiversityGuider("vendi", memory)]
    with pytest.raises(ArgumentError, match="SharedMemory"):
        GuiderChain(guiders)

    shared = SharedMemory(memory)
    guiders = [DiversityGuider("rke", shared), DiversityGuider("vendi", shared)]
    wrapped = sparke.wrap(sampling.sample_euler, guider=guiders)
    assert wrapped.memory is memory
    made = [run(wrapped, seed=seed) for seed in range(2)]
    assert torch.equal(memory.features.x, torch.cat(made))
    assert memory.features.cond is not None


def test_a_memory_behind_another_is_found_too() -> None:
    reference, memory = Features(torch.ones(3, 2)), RingMemory()

    def chain(first: Any, second: Any) -> GuiderChain:
        behind = ReferenceMemory(reference, history=first)
        return GuiderChain([DiversityGuider("rke", behind), DiversityGuider("vendi", second)])

    with pytest.raises(ArgumentError, match="twice"):
        chain(memory, memory)
    with pytest.raises(ArgumentError, match="twice"):
        chain(memory, SharedMemory(memory))
    shared = SharedMemory(memory)
    made = chain(shared, shared)
    made.begin(RUN)
    made.finish(torch.zeros(4, 2))
    assert len(memory) == 4
    # A reference alone keeps nothing, so two may read it.
    alone = ReferenceMemory(reference)
    GuiderChain([DiversityGuider("rke", alone), DiversityGuider("vendi", alone)])


def test_a_shared_memory_is_its_memory() -> None:
    memory = RingMemory(4)
    shared = SharedMemory(memory)
    rows = Features(torch.eye(3), torch.ones(3, 2))
    shared.commit(rows)
    shared.commit(rows)  # of two runs: one guider that uses it alone is not restrained
    assert len(shared) == len(memory) == 4
    assert shared.capacity == 4
    assert torch.equal(shared.select().x, memory.select().x)
    assert repr(memory) in repr(shared)
    copied = copy.deepcopy(shared)
    assert copied.memory is not memory
    assert len(copied) == 4


@pytest.mark.parametrize(
    "other",
    [
        Features(torch.ones(3, 3), torch.ones(3, 2)),
        Features(torch.eye(3)),
        Features(torch.eye(3)[:2], torch.ones(2, 2)),
    ],
)
def test_other_rows_of_the_same_samples_are_an_error(other: Features) -> None:
    memory = RingMemory()
    shared = SharedMemory(memory)
    with shared.one_run():
        shared.commit(Features(torch.eye(3), torch.ones(3, 2)))
        shared.commit(Features(torch.eye(3), torch.ones(3, 2)))
        with pytest.raises(ArgumentError, match="memory of its own"):
            shared.commit(other)
    assert len(memory) == 3
    shared.commit(Features(torch.eye(3), torch.ones(3, 2)))
    assert len(memory) == 6


# The rest.


def test_a_chain_is_a_guider() -> None:
    assert isinstance(GuiderChain([Shift(1.0)]), Guider)
    assert GuiderChain([Shift(1.0)]).memory is None


def test_its_repr_tells_the_order_and_which_hooks_run() -> None:
    chain = GuiderChain(
        [
            Shift(1.0),
            Claims(2.0, claims="guidance_scale", idle="noise"),
            Claims(3.0, yields="guidance_scale"),
        ]
    )
    assert repr(chain).splitlines() == [
        "GuiderChain(",
        "  1. Shift(1.0) runs __call__",
        "  2. Claims(2.0) runs __call__, on_guidance_scale, on_noise (idle)",
        "  3. Claims(3.0) runs __call__, on_guidance_scale (left to another), on_noise",
        ")",
    ]
    long = repr(GuiderChain([DiversityGuider()])).splitlines()
    assert long[1].startswith("  1. DiversityGuider(")
    assert long[2] == "     runs __call__, on_guidance_scale"


def test_a_chain_of_nothing_or_of_something_else_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        GuiderChain([])
    with pytest.raises(ArgumentError, match="no Guider"):
        GuiderChain([Shift(1.0), MIXTURE])  # type: ignore[list-item]


# What is not finite.


def broken_at(rows: list[int]) -> State:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    x[rows] = torch.nan
    return State(x, x.clone(), STEP)


def told(act: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if issubclass(w.category, GuidanceWarning)]


def test_a_chain_warns_of_each_sample_once_in_a_run() -> None:
    kinds: list[Callable[[], Guider]] = [
        lambda: DiversityGuider("rke"),
        SPELL,
        Particle,
        DPP,
        lambda: EDDY(divergence=False),
    ]
    for kind in kinds:  # each alone does warn, or the chain would prove nothing
        alone = kind()
        alone.begin(RUN)
        assert len(told(lambda alone=alone: alone(broken_at([1])))) == 1, alone  # type: ignore[misc]
    chain = GuiderChain([kind() for kind in kinds])
    for _ in range(2):
        chain.begin(RUN)
        (message,) = told(lambda: chain(broken_at([1])))
        assert "for 1 of 4 samples; they go on unguided" in message
        assert told(lambda: chain(broken_at([1]))) == []
        assert len(told(lambda: chain(broken_at([1, 2])))) == 1
        assert told(lambda: chain(broken_at([2]))) == []


def test_a_chain_warns_once_of_samples_that_nobody_keeps() -> None:
    guiders: list[Any] = [DiversityGuider("rke"), SPELL()]
    chain = GuiderChain(guiders)
    x = broken_at([3]).denoised
    for kept in (3, 6):
        chain.begin(RUN)
        (message,) = told(lambda: chain.finish(x))
        assert "1 of 4 finished samples are not finite" in message
        assert [len(g.memory) for g in guiders] == [kept, kept]
    assert len(told(lambda: [guider.finish(x) for guider in guiders])) == 2


def test_what_one_chain_told_another_tells_too() -> None:
    first, second = (GuiderChain([DiversityGuider("rke"), SPELL()]) for _ in range(2))
    for chain in (first, second):
        chain.begin(RUN)
    for chain in (first, second):
        assert len(told(lambda chain=chain: chain(broken_at([0])))) == 1  # type: ignore[misc]
