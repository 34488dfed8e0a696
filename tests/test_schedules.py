"""Schedules, value by value."""

import math
from collections.abc import Callable

import pytest

from sparke.errors import ArgumentError
from sparke.protocols import Step
from sparke.schedules import Constant, EveryNth, NoiseLevel, RemainingNoise, Schedule


def step(sigma: float, sigma_next: float = 0.0, index: int = 0) -> Step:
    return Step(index, sigma, sigma_next, 10)


def test_remaining_noise_is_the_next_level() -> None:
    assert RemainingNoise()(step(4.0, 3.0)) == 3.0


def test_remaining_noise_spares_few_steps_by_its_power() -> None:
    assert RemainingNoise(power=1)(step(4.0, 3.0)) == pytest.approx(3 * 0.75)
    assert RemainingNoise(power=2)(step(4.0, 1.0)) == pytest.approx(1 / 16)


def test_no_noise_will_absorb_a_push_at_the_last_step() -> None:
    for power in (0.0, 0.5, 2.0):
        assert RemainingNoise(power=power)(step(0.1, 0.0)) == 0.0


def test_remaining_noise_at_no_noise_is_nothing() -> None:
    assert RemainingNoise(power=1)(step(0.0, 0.0)) == 0.0


def test_the_noise_level_is_itself() -> None:
    assert NoiseLevel()(step(4.0, 3.0)) == 4.0


def test_a_constant_is_constant() -> None:
    assert [Constant(2.5)(step(s, s / 2)) for s in (0.1, 1.0, 99.0)] == [2.5] * 3


WINDOWED = pytest.mark.parametrize(
    "windowed", [RemainingNoise, NoiseLevel, lambda lo, hi: Constant(1.0, lo, hi)]
)


@WINDOWED
def test_a_window_holds_its_ends_and_nothing_beyond(
    windowed: Callable[[float, float], Schedule],
) -> None:
    schedule = windowed(1.0, 5.0)
    inside = [schedule(step(sigma, sigma / 2)) for sigma in (1.0, 2.0, 5.0)]
    outside = [schedule(step(sigma, sigma / 2)) for sigma in (0.0, 0.999, 5.001, math.inf)]
    assert all(value > 0 for value in inside)
    assert outside == [0.0] * 4


@WINDOWED
@pytest.mark.parametrize(("lo", "hi"), [(-1.0, 2.0), (3.0, 2.0), (math.nan, 2.0), (0.0, math.nan)])
def test_an_impossible_window_is_refused(
    windowed: Callable[[float, float], Schedule], lo: float, hi: float
) -> None:
    with pytest.raises(ArgumentError, match="0 <= lo <= hi"):
        windowed(lo, hi)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_forbidden_numbers_are_refused(value: float) -> None:
    with pytest.raises(ArgumentError, match="value"):
        Constant(value)
    with pytest.raises(ArgumentError, match="power"):
        RemainingNoise(power=value)


def test_every_nth_counts_from_the_first() -> None:
    schedule = EveryNth(3, Constant(2.0))
    assert [schedule(step(1.0, index=i)) for i in range(7)] == [2, 0, 0, 2, 0, 0, 2]


def test_every_step_is_every_first() -> None:
    assert [EveryNth(1)(step(1.0, index=i)) for i in range(3)] == [1, 1, 1]


def test_every_nth_keeps_its_schedules_window() -> None:
    schedule = EveryNth(2, NoiseLevel(lo=1.0))
    assert [schedule(step(s, index=i)) for i, s in enumerate((3.0, 2.0, 1.0, 0.7, 0.5))] == [
        3.0,
        0.0,
        1.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize("n", [0, -2])
def test_counting_needs_a_positive_number(n: int) -> None:
    with pytest.raises(ArgumentError, match="n must be at least 1"):
        EveryNth(n)
