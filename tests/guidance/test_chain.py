"""Several guiders as one."""

from __future__ import annotations

import pytest
import torch
from k_diffusion import sampling
from torch import Tensor

import sparke
from sparke.errors import ArgumentError
from sparke.guidance import DiversityGuider, GuiderChain
from sparke.protocols import Guider, Run, State, Step
from tests.samplers import MIXTURE, run

STEP = Step(0, 5.0, 4.0, 10)


class Shift:
    """Adds a number and remembers what it was shown."""

    def __init__(self, by: float) -> None:
        self.by = by
        self.log: list[str] = []
        self.seen: list[Tensor] = []

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

    def evaluate(x: Tensor) -> Tensor:
        return x

    def conditional() -> Tensor:
        return torch.zeros(4, 2)

    x, cond = torch.randn(4, 2), torch.randn(4, 3)
    GuiderChain([Shift(1.0), Look(1.0)])(State(x, x, STEP, cond, conditional, evaluate))
    (state,) = seen
    assert state.x is x
    assert state.cond is cond
    assert state.step is STEP
    assert state.conditional is conditional
    assert state.evaluate is evaluate


def test_all_begin_and_all_finish() -> None:
    guiders = Shift(0.5), Shift(-0.5)
    x = run(sparke.wrap(sampling.sample_euler, guider=guiders))
    for guider in guiders:
        assert guider.log == ["begin", "finish"]
        assert torch.equal(guider.seen[-1], x)


def test_who_has_a_say_in_the_guidance_scale_has_it_in_turn() -> None:
    chain = GuiderChain([Scaling(2.0), Shift(1.0), Scaling(0.25)])
    assert chain.on_guidance_scale(STEP, 6.0) == 3.0


def test_a_chain_of_one_is_that_one() -> None:
    alone = sparke.wrap(sampling.sample_euler, guider=DiversityGuider())
    chained = sparke.wrap(sampling.sample_euler, guider=[DiversityGuider()])
    for seed in range(2):
        ours = run(chained, seed=seed, cond_scale=3.0)
        torch.testing.assert_close(ours, run(alone, seed=seed, cond_scale=3.0), rtol=0, atol=2e-3)


def test_a_chain_is_a_guider() -> None:
    assert isinstance(GuiderChain([Shift(1.0)]), Guider)
    assert repr(GuiderChain([Shift(1.0)])).startswith("GuiderChain(")


def test_a_chain_of_nothing_or_of_something_else_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="at least one"):
        GuiderChain([])
    with pytest.raises(ArgumentError, match="no Guider"):
        GuiderChain([Shift(1.0), MIXTURE])  # type: ignore[list-item]
