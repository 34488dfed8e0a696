"""DiverseFlow's point process against likelihoods written out and differences of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from scipy.stats import chi2
from torch import Tensor

import sparke
from sparke.errors import ArgumentError, GuidanceWarning, NonFiniteGuidance, ShapeError
from sparke.guidance import dpp
from sparke.guidance.dpp import DPP
from sparke.models.mixture import GaussianMixture
from sparke.protocols import Features, Selection, State, Step
from sparke.scores.dpp import DPP as Volume
from sparke.testing import check_guider
from tests import float64, samplers
from tests.float64 import F64, Rows, log_det, rows
from tests.guidance import states
from tests.guidance.states import STEP, pushed
from tests.samplers import MIXTURE, PROMPTS, run

JITTER = 1e-4


def close(ours: Tensor, expected: Any, tolerance: float = 1e-6) -> None:
    float64.close(ours, expected, tolerance)


def state(n: int = 4, d: int = 3, step: Step = STEP) -> State:
    return states.state(n, d, step)


def squared(u: list[float], v: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(u, v, strict=True))


def log_likelihood(f: Rows, quality: list[float], h: float, median: float) -> float:
    n = len(f)
    low = [
        [quality[i] * quality[j] * math.exp(-h * squared(f[i], f[j]) / median) for j in range(n)]
        for i in range(n)
    ]
    high = [list(row) for row in low]
    for i in range(n):
        low[i][i] += JITTER
        high[i][i] += 1 + JITTER
    return log_det(low) - log_det(high)


def median_of(f: Rows) -> float:
    pairs = sorted(squared(u, v) for i, u in enumerate(f) for v in f[:i])
    return pairs[(len(pairs) - 1) // 2]


def differences(value: Callable[[Rows], float], x: Rows, step: float = 1e-5) -> Rows:
    """Gradient by central differences."""
    gradient = []
    for i in range(len(x)):
        row = []
        for k in range(len(x[i])):
            ends = []
            for sign in (1, -1):
                moved = [list(r) for r in x]
                moved[i][k] += sign * step
                ends.append(value(moved))
            row.append((ends[0] - ends[1]) / (2 * step))
        gradient.append(row)
    return gradient


def displacement(gradient: Rows, scale: float, sigma: float, d: int) -> Rows:
    mean = math.sqrt(sum(v * v for row in gradient for v in row) / len(gradient))
    length = scale * math.sqrt(d) * (sigma / (1 + sigma)) ** 2
    return [[length * v / mean for v in row] for row in gradient]


@pytest.mark.parametrize("n", [2, 4, 5])
@pytest.mark.parametrize("sigma", [0.2, 3.0, 80.0])
def test_it_is_the_gradient_of_the_likelihood_at_the_length_of_the_path(
    n: int, sigma: float
) -> None:
    at = state(n, 3, replace(STEP, sigma=sigma))
    f = at.denoised.tolist()
    median, ones = median_of(f), [1.0] * n
    gradient = differences(lambda x: log_likelihood(x, ones, 0.7, median), f)
    expected = displacement(gradient, 0.8, sigma, 3)
    close(pushed(DPP(0.8, spread=0.7), at), expected)
    # Along it the likelihood rises, whatever the sign in print.
    small = [
        [a + 1e-3 * b for a, b in zip(u, v, strict=True)] for u, v in zip(f, expected, strict=True)
    ]
    before, after = (log_likelihood(x, ones, 0.7, median) for x in (f, small))
    assert after > before


def test_an_eulers_step_of_a_flow_moves_by_what_the_paper_adds_to_the_velocity() -> None:
    at = state()
    sigma, later = STEP.sigma, STEP.sigma_next
    ours = pushed(DPP(0.5), at)
    # Flow time runs from noise (0) to data (1): x_t = (1 - t) noise + t data, sigma = (1 - t)/t.
    t, t_next = 1 / (1 + sigma), 1 / (1 + later)
    f = at.denoised.tolist()
    median = median_of(f)
    gradient = differences(lambda x: log_likelihood(x, [1.0] * 4, 1.0, median), f)
    mean = math.sqrt(sum(v * v for row in gradient for v in row) / 4)
    added = torch.tensor(gradient, dtype=F64) * 0.5 * math.sqrt(3) * (1 - t) / mean

    def euler(denoised: Tensor, extra: Tensor | float = 0.0) -> Tensor:
        x_t = t * at.x  # the host's x is at signal scale 1
        velocity = (denoised - x_t) / (1 - t)
        return x_t + (t_next - t) * (velocity + extra)

    close(euler(at.denoised + ours), euler(at.denoised, added))


def test_it_is_the_direction_of_the_score_of_the_same_name() -> None:
    at = state(5)
    median = median_of(at.denoised.tolist())
    mates = torch.zeros(5, 5).double().fill_diagonal_(-math.inf)
    score = Volume(bandwidth=math.sqrt(median / 2), jitter=JITTER)
    selection = Selection(at.denoised, None, mates, mates=True)
    gradient = score.direction(Features(at.denoised), selection)
    close(pushed(DPP(0.5), at), displacement(gradient.tolist(), 0.5, STEP.sigma, 3), 1e-8)


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_quality_holds_samples_back_on_the_shell_of_true_noise(share: float) -> None:
    at = state()
    # Noise estimates just outside the shell, inside it, and far outside.
    radius2 = dpp._chi_squared(share, 3)
    lengths = torch.tensor([[radius2 + 0.7], [0.5 * radius2], [radius2 + 2.0], [radius2 + 50]])
    noise = torch.nn.functional.normalize(rows(4, 3, 5), dim=1) * lengths.sqrt()
    at = replace(at, x=at.denoised + STEP.sigma * noise)
    f, x = at.denoised.tolist(), at.x.tolist()
    median = median_of(f)

    def quality(denoised: Rows) -> list[float]:
        found = []
        for a, b in zip(x, denoised, strict=True):
            excess = squared(a, b) / STEP.sigma**2 - radius2
            found.append(max(0.01, math.exp(min(0.0, -excess))))
        return found

    gradient = differences(lambda z: log_likelihood(z, quality(z), 1.0, median), f)
    close(pushed(DPP(0.5, quality=share), at), displacement(gradient, 0.5, STEP.sigma, 3), 1e-5)
    assert quality(f)[1] == 1.0
    assert quality(f)[3] == 0.01


def test_quality_may_be_any_function_of_the_estimates() -> None:
    at = state()
    f = at.denoised.tolist()
    median = median_of(f)

    def loops(z: Rows) -> list[float]:
        return [1 / (1 + sum(v * v for v in row)) for row in z]

    gradient = differences(lambda z: log_likelihood(z, loops(z), 1.0, median), f)
    guider = DPP(0.5, quality=lambda z: 1 / (1 + z.flatten(1).square().sum(1)))
    close(pushed(guider, at), displacement(gradient, 0.5, STEP.sigma, 3), 1e-5)
    with pytest.raises(ShapeError, match="quality"):
        pushed(DPP(quality=lambda z: z.sum()), at)


@pytest.mark.parametrize("d", [2, 320, 16384])
@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_the_shell_is_that_of_a_chi_squared_variable(d: int, share: float) -> None:
    assert dpp._chi_squared(share, d) == pytest.approx(float(chi2.ppf(share, d)), rel=0.02)


def test_features_are_compared_and_their_gradient_brought_back() -> None:
    at, matrix = state(), rows(3, 2, 6)
    median = median_of((at.denoised @ matrix).tolist())

    def value(z: Rows) -> float:
        f = (torch.tensor(z, dtype=F64) @ matrix).tolist()
        return log_likelihood(f, [1.0] * 4, 1.0, median)

    gradient = differences(value, at.denoised.tolist())
    ours = pushed(DPP(0.5, features=lambda z: z.flatten(1) @ matrix), at)
    close(ours, displacement(gradient, 0.5, STEP.sigma, 3))
    with pytest.raises(ShapeError, match="features must return"):
        pushed(DPP(features=lambda z: z.sum(1)), at)


def test_the_jacobian_is_that_of_the_denoiser() -> None:
    mixture = GaussianMixture.planar(dtype=F64)
    cond, x = mixture.encode(PROMPTS[:1] * 4), 3 * rows(4, 2, 0)

    def evaluate(z: Tensor) -> Tensor:
        return mixture(z, STEP.sigma, cond=cond)

    at = State(x, evaluate(x), STEP, evaluate=evaluate)
    median = median_of(at.denoised.tolist())

    def value(z: Rows) -> float:
        denoised = evaluate(torch.tensor(z, dtype=F64)).tolist()
        return log_likelihood(denoised, [1.0] * 4, 1.0, median)

    gradient = differences(value, x.tolist())
    with torch.inference_mode():
        ours = pushed(DPP(0.5, jacobian=True), at).clone()
    close(ours, displacement(gradient, 0.5, STEP.sigma, 2), 1e-5)
    with pytest.raises(ArgumentError, match="evaluated again"):
        pushed(DPP(jacobian=True), replace(at, evaluate=None))


def test_data_in_other_units_are_pushed_the_same() -> None:
    at, unit = state(), 2.5
    scaled = State(unit * at.x, unit * at.denoised, replace(STEP, sigma=unit * STEP.sigma))
    for quality in (None, 0.9):
        plain = pushed(DPP(quality=quality), at)
        close(pushed(DPP(quality=quality), scaled, sigma_data=unit), unit * plain)
        told = DPP(quality=quality, sigma_data=unit)
        close(pushed(told, scaled, sigma_data=None), unit * plain)


@pytest.mark.parametrize("same", [2, 3, 4])
@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_samples_that_nearly_coincide_stay_finite(
    same: int, gap: float, dtype: torch.dtype
) -> None:
    at = state()
    denoised = at.denoised.clone()
    denoised[:same] = denoised[0] + gap * rows(same, 3, 7)
    delta = pushed(DPP(), replace(at, x=at.x.to(dtype), denoised=denoised.to(dtype)))
    assert bool(delta.isfinite().all())
    assert float(delta.norm(dim=1).max()) <= 2 * 0.5 * math.sqrt(3)
    if gap == 0 and same == 4:
        assert not bool(delta.any())


def test_a_batch_of_one_is_an_error_unless_nothing_is_asked_for() -> None:
    with pytest.raises(ArgumentError, match="at least 2, got 1"):
        pushed(DPP(), state(1))
    assert not bool(pushed(DPP(0), state(1)).any())


def test_the_order_of_the_batch_does_not_matter() -> None:
    at, order = state(5), torch.tensor([3, 0, 4, 1, 2])
    ours = pushed(DPP(), replace(at, x=at.x[order], denoised=at.denoised[order]))
    close(ours, pushed(DPP(), at)[order])


def test_each_prompt_has_a_set_of_its_own() -> None:
    at, cond = state(6), torch.eye(3)[[0, 1, 0, 0, 1, 2]]
    ours = pushed(DPP(), at, cond=cond)
    for group in ([0, 2, 3], [1, 4]):
        alone = replace(at, x=at.x[group], denoised=at.denoised[group])
        close(ours[group], pushed(DPP(), alone))
    assert not bool(ours[5].any())
    close(pushed(DPP(prompt_aware=False), at, cond=cond), pushed(DPP(), at))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_half_precision_it_is_the_same_up_to_rounding(dtype: torch.dtype) -> None:
    at = state()
    half = replace(at, x=at.x.to(dtype), denoised=at.denoised.to(dtype))
    ours, exact = pushed(DPP(), half), pushed(DPP(), at)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=0.05, atol=0.05 * float(exact.max()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"quality": 0.9}])
def test_a_sample_that_breaks_goes_on_unguided_and_the_others_guided(
    value: float, options: dict[str, Any]
) -> None:
    at = state(5)
    at.denoised[1] = value
    with pytest.warns(GuidanceWarning, match=r"step 2 \(sigma 3\) for 1 of 5"):
        delta = pushed(DPP(**options), at)
    rest = [0, 2, 3, 4]
    alone = replace(at, x=at.x[rest], denoised=at.denoised[rest])
    assert not bool(delta[1].any())
    close(delta[rest], pushed(DPP(**options), alone))
    with pytest.raises(NonFiniteGuidance, match="step 2"):
        pushed(DPP(nonfinite="raise"), at)


def test_outside_a_run_it_pushes_nothing() -> None:
    guider, at = DPP(), state()
    assert not bool(guider(at).any())
    pushed(guider, at)
    guider.finish(at.denoised)
    assert not bool(guider(at).any())


@pytest.mark.parametrize("name", ["sample_dpmpp_2m", "sample_heun", "sample_euler_ancestral"])
def test_no_strength_is_bit_identical(name: str) -> None:
    bare = samplers.of(name)
    wrapped = sparke.wrap(bare, guider=DPP(0))
    for prompts in (PROMPTS, PROMPTS[:1]):
        options: dict[str, Any] = {"cond_scale": 3.0, "prompts": prompts}
        assert torch.equal(run(wrapped, **options), run(bare, **options))


def test_it_conforms() -> None:
    check_guider(DPP())
    check_guider(DPP(quality=0.95), cond_width=None)
    check_guider(DPP(jacobian=True, features=lambda z: z.flatten(1)[:, ::2].square()))
    check_guider(DPP(), shape=(2, 3, 2, 4, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": -1},
        {"spread": 0},
        {"quality": 1.0},
        {"quality": "good"},
        {"jitter": 0},
        {"sigma_data": 0},
        {"nonfinite": "hide"},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        DPP(**options)


def modes_of_sixteen(guider: DPP | None, cfg: float = 1.0) -> tuple[float, float]:
    """Effective modes and fidelity over four prompts, 32 samples each, 16 at once."""
    sampler: Any = sampling.sample_dpmpp_2m
    if guider is not None:
        sampler = sparke.wrap(sampler, guider=guider)
    made, told = [], []
    for seed, prompt in enumerate([*PROMPTS[::2], *PROMPTS[::2]]):
        made.append(run(sampler, prompts=[prompt] * 16, cond_scale=cfg, steps=30, seed=seed))
        told += [prompt] * 16
    verdict = MIXTURE.judge(torch.cat(made), told)
    return MIXTURE.effective_modes(verdict, told), float(verdict.faithful.double().mean())


def test_sixteen_at_once_reach_more_modes_and_stay_faithful() -> None:
    plain, guided = modes_of_sixteen(None), modes_of_sixteen(DPP())
    assert guided[0] > plain[0] + 0.3
    assert guided[1] > plain[1] - 0.05
