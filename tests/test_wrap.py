"""`wrap`: its arguments reach the guider, and what cannot be right is refused at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from torch import Tensor

import sparke
from sparke.errors import ArgumentError, SparkeError, UnknownName
from sparke.guidance import DiversityGuider, GuiderChain
from sparke.memory import RingMemory
from sparke.protocols import Features
from sparke.schedules import Constant, Schedule
from tests.samplers import MIXTURE, PROMPTS, run


def guider_of(*args: Any, **options: Any) -> DiversityGuider:
    found = sparke.wrap(sampling.sample_euler, *args, **options).guider
    assert isinstance(found, DiversityGuider)
    return found


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def test_its_arguments_are_the_guiders() -> None:
    memory, schedule = RingMemory(7), Constant(0.5)
    given: dict[str, Any] = {
        "memory": memory,
        "scale": 0.3,
        "features": flat,
        "schedule": schedule,
        "in_batch": False,
        "cfg_interval": (0.5, 2.0),
    }
    guider = guider_of("rke", bandwidth=0.9, **given)
    assert {name: getattr(guider, name) for name in given} == given
    assert guider.score == sparke.score("rke", bandwidth=0.9)


def test_its_defaults_are_the_guiders() -> None:
    ours, theirs = guider_of(), DiversityGuider()
    assert ours.score == theirs.score == sparke.score("cond-rke")
    for name in ("scale", "schedule", "features", "in_batch", "cfg_interval", "reads"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert isinstance(ours.memory, RingMemory)


def test_each_wrapped_sampler_has_a_memory_of_its_own() -> None:
    first, second = sparke.wrap(sampling.sample_euler), sparke.wrap(sampling.sample_euler)
    run(first)
    assert (len(first.memory), len(second.memory)) == (8, 0)


def test_an_empty_memory_that_is_given_is_used() -> None:
    # An empty memory has length 0; it must not be taken for none.
    memory = RingMemory(7)
    wrapped = sparke.wrap(sampling.sample_euler, memory=memory)
    run(wrapped)
    assert len(memory) == 7
    assert wrapped.memory is memory


def test_the_bare_sampler_is_not_touched() -> None:
    before = run(sampling.sample_euler)
    sparke.wrap(sampling.sample_euler)
    assert torch.equal(run(sampling.sample_euler), before)
    assert not hasattr(sampling.sample_euler, "guider")


def test_guider_and_memory_are_attributes() -> None:
    guider = DiversityGuider("rke")
    wrapped = sparke.wrap(sampling.sample_euler, guider=guider)
    assert wrapped.guider is guider
    assert wrapped.memory is guider.memory


def test_a_guider_may_be_a_scores_name() -> None:
    guider = guider_of(guider="vendi")
    assert guider.score == sparke.score("vendi")
    memory = RingMemory()
    assert guider_of(guider="rke", memory=memory).memory is memory


def test_a_guider_may_be_several() -> None:
    inner, memory = DiversityGuider("rke"), RingMemory()
    wrapped = sparke.wrap(sampling.sample_euler, guider=[inner, "vendi"], memory=memory)
    chain = wrapped.guider
    assert isinstance(chain, GuiderChain)
    first, second = chain.guiders
    assert first is inner
    assert isinstance(second, DiversityGuider)
    assert second.score == sparke.score("vendi")
    assert second.memory is memory
    run(wrapped)
    assert (len(inner.memory), len(memory)) == (8, 8)


@pytest.mark.parametrize(
    "given",
    [
        {"bandwidth": 2.0},
        {"scale": 0.3},
        {"features": flat},
        {"schedule": Constant(2.0)},
        {"in_batch": False},
        {"cfg_interval": None},
        {"memory": RingMemory()},
        {"score": "rke"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_options_that_would_go_nowhere_are_an_error(given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(given))):
        sparke.wrap(sampling.sample_euler, guider=DiversityGuider(), **given)


@pytest.mark.parametrize("given", [3, object(), [3], [], {"a": 1}])
def test_a_guider_that_is_none_is_an_error(given: Any) -> None:
    with pytest.raises(SparkeError):
        sparke.wrap(sampling.sample_euler, guider=given)


@pytest.mark.parametrize(
    ("name", "near"), [("cond_rk", "cond-rke"), ("Vendy", "vendi"), ("conditional-rke", "cond-rke")]
)
def test_an_unknown_score_comes_with_a_near_match(name: str, near: str) -> None:
    with pytest.raises(UnknownName, match=f"Did you mean .*{near}"):
        sparke.wrap(sampling.sample_euler, name)


def test_names_are_taken_in_any_spelling() -> None:
    assert guider_of("Cond_RKE").score == sparke.score("cond-rke")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bandwidth": -1}, "bandwidth"),
        ({"bandwidth": math.nan}, "bandwidth"),
        ({"cond_bandwidth": 0}, "cond_bandwidth"),
        ({"bandwith": 1.0}, "bandwith"),
        ({"scale": -0.1}, "scale"),
        ({"scale": math.inf}, "scale"),
        ({"memory": {}}, "memory"),
        ({"cfg_interval": (3, 1)}, "cfg_interval"),
        ({"cfg_interval": 3.0}, "cfg_interval"),
    ],
)
def test_a_forbidden_option_is_an_error_when_wrapping(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        sparke.wrap(sampling.sample_euler, **options)


def test_a_score_that_is_an_object_takes_no_options() -> None:
    score = sparke.score("rke", bandwidth=2.0)
    assert guider_of(score).score is score
    with pytest.raises(ArgumentError, match="bandwidth"):
        sparke.wrap(sampling.sample_euler, score, bandwidth=1.0)
    with pytest.raises(ArgumentError, match="no Score"):
        sparke.wrap(sampling.sample_euler, 3)  # type: ignore[arg-type]


def test_scores_and_memories_of_ones_own() -> None:
    class Away:
        requires = sparke.Requires()

        def __call__(self, query: Features, bank: Features) -> Tensor:
            return (query.x - bank.x.to(query.x).mean(0)).square().sum(1)

    class Log:
        def __init__(self) -> None:
            self.inner = RingMemory()
            self.calls: list[str] = []

        def __len__(self) -> int:
            return len(self.inner)

        def commit(self, items: Features) -> None:
            self.calls.append("commit")
            self.inner.commit(items)

        def select(self, cond: Tensor | None = None, weigh: Any = None) -> Any:
            self.calls.append("select")
            return self.inner.select(cond, weigh)

    memory = Log()
    wrapped = sparke.wrap(sampling.sample_euler, Away(), memory=memory)
    first = run(wrapped)
    second = run(wrapped, seed=1)
    # Read once a generation, written once a generation.
    assert memory.calls == ["commit", "select", "commit"]
    assert torch.equal(memory.inner.features.x, torch.cat([first, second]))
    assert not torch.allclose(second, run(sampling.sample_euler, seed=1), atol=1e-2)


@pytest.mark.parametrize("score", ["rke", "vendi", "cond-rke", "cond-vendi"])
def test_every_score_by_name_changes_samples(score: str) -> None:
    assert score in sparke.scores()
    wrapped = sparke.wrap(sampling.sample_dpmpp_2m, score)
    made = [run(wrapped, seed=seed) for seed in range(2)]
    assert bool(torch.isfinite(torch.cat(made)).all())
    assert not torch.allclose(made[1], run(sampling.sample_dpmpp_2m, seed=1), atol=1e-2)


def test_a_schedule_decides_when() -> None:
    def never(step: sparke.Step) -> float:
        return 0.0

    schedule: Schedule = never
    wrapped = sparke.wrap(sampling.sample_euler, schedule=schedule)
    for seed in range(2):
        assert torch.equal(run(wrapped, seed=seed), run(sampling.sample_euler, seed=seed))


def test_memory_outlives_its_process(tmp_path: Any) -> None:
    wrapped = sparke.wrap(sampling.sample_euler)
    run(wrapped)
    wrapped.memory.save(tmp_path / "memory.safetensors")
    loaded = RingMemory.load(tmp_path / "memory.safetensors")
    resumed = sparke.wrap(sampling.sample_euler, memory=loaded)
    assert torch.equal(run(resumed, seed=1), run(wrapped, seed=1))
    assert loaded.features.cond is not None
    assert torch.equal(loaded.features.cond, MIXTURE.encode(PROMPTS * 2))
