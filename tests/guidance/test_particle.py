"""Particle Guidance against the published update, written as loops on the noise estimate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from k_diffusion import sampling

import sparke
from sparke.errors import ArgumentError, GuidanceWarning, NonFiniteGuidance, ShapeError
from sparke.guidance.particle import Particle
from sparke.models.mixture import GaussianMixture
from sparke.protocols import State, Step
from sparke.testing import check_guider
from tests import samplers
from tests.float64 import F64, Rows, close, rows
from tests.guidance import states
from tests.guidance.states import STEP, pushed
from tests.oracles import distance
from tests.samplers import MIXTURE, PROMPTS, run


def state(n: int = 5, d: int = 4, step: Step = STEP) -> State:
    return states.state(n, d, step)


def repulsion(z: Rows, i: int) -> list[float]:
    """Sum over the others of 2 w (z_i - z_j) / h, h from the median of their distances."""
    n = len(z)
    apart = sorted(distance(z[i], z[j]) for j in range(n) if j != i)
    h = apart[(n - 2) // 2] ** 2 / math.log(n)
    total = [0.0] * len(z[i])
    for j in range(n):
        if j != i:
            w = math.exp(-(distance(z[i], z[j]) ** 2) / h)
            total = [t + 2 * w * (a - b) / h for t, a, b in zip(total, z[i], z[j], strict=True)]
    return total


def published(x: Rows, denoised: Rows, sigma: float, coefficient: float) -> Rows:
    """What the authors' noise estimate makes of the estimate: their loop, in their latents."""
    signal = 1 / math.sqrt(1 + sigma**2)
    noise = sigma * signal
    z = [[signal * v for v in row] for row in x]
    moved = []
    for i, (zi, di) in enumerate(zip(z, denoised, strict=True)):
        eps = [(a - signal * b) / noise for a, b in zip(zi, di, strict=True)]
        eps = [e - coefficient * sigma * g for e, g in zip(eps, repulsion(z, i), strict=True)]
        moved.append([(a - noise * e) / signal for a, e in zip(zi, eps, strict=True)])
    return moved


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("sigma", [1.0, 3.0, 14.6])
def test_it_is_the_published_update_of_the_noise_estimate(n: int, sigma: float) -> None:
    at = state(n, 4, replace(STEP, sigma=sigma))
    # The published coefficient is for 16384 numbers; these latents have 4.
    ours = at.denoised + pushed(Particle(30.0 * 16384 / 4), at)
    expected = published(at.x.tolist(), at.denoised.tolist(), sigma, 30.0)
    close(ours, expected, 1e-8)
    assert float((ours - at.denoised).norm(dim=1).min()) > 1e-3


def test_at_the_published_size_the_scale_is_the_published_coefficient() -> None:
    g = torch.Generator().manual_seed(0)
    x, denoised = (torch.randn(3, 4, 64, 64, generator=g) for _ in range(2))
    at = State(denoised + 2 * x, denoised, replace(STEP, sigma=2.0))
    ours = denoised + pushed(Particle(), at)
    expected = published(at.x.flatten(1).tolist(), denoised.flatten(1).tolist(), 2.0, 30.0)
    close(ours.flatten(1), expected, 1e-4)
    assert float((ours - denoised).abs().max()) > 1e-3


def test_data_in_other_units_are_pushed_the_same() -> None:
    at = state()
    plain = pushed(Particle(3000.0), at)
    unit = 2.5
    scaled = State(unit * at.x, unit * at.denoised, replace(STEP, sigma=unit * STEP.sigma))
    close(pushed(Particle(3000.0), scaled, sigma_data=unit), unit * plain)
    close(pushed(Particle(3000.0, sigma_data=unit), scaled, sigma_data=None), unit * plain)
    matrix = rows(4, 2, 6)
    features = Particle(features=lambda z: z @ matrix)
    same = Particle(features=lambda z: z @ matrix / unit)
    first = replace(at, step=replace(STEP, sigma=4.0))
    second = replace(scaled, step=replace(STEP, sigma=unit * 4.0))
    close(pushed(same, second, sigma_data=unit), unit * pushed(features, first))


def test_above_the_published_levels_the_displacement_grows_no_further() -> None:
    noise = rows(5, 4, 0)
    lengths = []
    for sigma in (10.0, 14.61, 50.0, 1e4):
        at = State(sigma * noise, torch.zeros(5, 4, dtype=F64), replace(STEP, sigma=sigma))
        lengths.append(pushed(Particle(), at))
    assert float(lengths[0].norm()) < 0.8 * float(lengths[1].norm())
    close(lengths[2], lengths[1])
    close(lengths[3], lengths[1])


def test_features_of_the_estimate_are_compared_and_their_gradient_brought_back() -> None:
    at, matrix = state(step=replace(STEP, sigma=3.5)), rows(4, 2, 6)
    ours = pushed(Particle(features=lambda z: z.flatten(1) @ matrix), at)
    f = (at.denoised @ matrix).tolist()
    signal = 1 / math.sqrt(1 + 3.5**2)
    expected = []
    for i in range(5):
        g = repulsion(f, i)
        # Published: eps -= 8 g J / signal, of z; and D = (z - noise eps) / signal.
        back = [sum(float(matrix[k, m]) * g[m] for m in range(2)) for k in range(4)]
        expected.append([8.0 * 3.5 * v / signal for v in back])
    close(ours, expected)
    below = replace(at, step=replace(STEP, sigma=2.9))
    assert not bool(pushed(Particle(features=lambda z: z.flatten(1) @ matrix), below).any())


def test_below_sigma_one_nothing_is_pushed() -> None:
    for sigma, unit, active in ((1.0, 1.0, True), (0.99, 1.0, False), (1.5, 2.0, False)):
        delta = pushed(Particle(), state(step=replace(STEP, sigma=sigma)), sigma_data=unit)
        assert bool(delta.any()) == active
    assert bool(pushed(Particle(lo=0.5), state(step=replace(STEP, sigma=0.6))).any())


def test_two_samples_are_pushed_apart() -> None:
    # With the authors' log(n - 1) their kernel is infinitely wide, and nothing happens.
    at = state(2)
    delta = pushed(Particle(1000.0), at)
    along = (delta[0] * (at.x[0] - at.x[1])).sum()
    assert float(along) > 0
    close(delta[0], -delta[1])


def test_a_batch_of_one_is_an_error_unless_nothing_is_asked_for() -> None:
    with pytest.raises(ArgumentError, match="at least 2, got 1"):
        pushed(Particle(), state(1))
    assert not bool(pushed(Particle(0), state(1)).any())


@pytest.mark.parametrize("alike", [2, 4, 5])
def test_samples_that_coincide_stay_finite(alike: int) -> None:
    at = state()
    at.x[:alike] = at.x[0].clone()
    delta = pushed(Particle(), at)
    assert bool(delta.isfinite().all())
    if alike == 5:
        assert not bool(delta.any())


def test_the_order_of_the_batch_does_not_matter() -> None:
    at, order = state(), torch.tensor([3, 0, 4, 1, 2])
    ours = pushed(Particle(), replace(at, x=at.x[order], denoised=at.denoised[order]))
    close(ours, pushed(Particle(), at)[order])


def test_samples_of_other_prompts_do_not_count() -> None:
    at, cond = state(5), torch.eye(2)[[0, 1, 0, 0, 1]]
    ours = pushed(Particle(), at, cond=cond)
    for group in ([0, 2, 3], [1, 4]):
        alone = replace(at, x=at.x[group], denoised=at.denoised[group])
        close(ours[group], pushed(Particle(), alone))
    everyone = pushed(Particle(prompt_aware=False), at, cond=cond)
    close(everyone, pushed(Particle(), at))
    lonely = pushed(Particle(), at, cond=torch.eye(5))
    assert not bool(lonely.any())


def test_prompts_are_compared_from_their_origin() -> None:
    # Two prompts of an encoder that gives all prompts nearly the same vector.
    at, common = state(4), torch.tensor([10.0, 0.0])
    cond = common + torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0], [0.0, -1.0]])
    together = pushed(Particle(), at, cond=cond)
    close(together, pushed(Particle(), at))
    apart = pushed(Particle(), at, cond=cond, cond_origin=common)
    pair = replace(at, x=at.x[:2], denoised=at.denoised[:2])
    close(apart[:2], pushed(Particle(), pair))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_half_precision_it_is_the_same_up_to_rounding(dtype: torch.dtype) -> None:
    at = state()
    half = replace(at, x=at.x.to(dtype), denoised=at.denoised.to(dtype))
    ours, exact = pushed(Particle(3000.0), half), pushed(Particle(3000.0), at)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=0.05, atol=0.05 * float(exact.max()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_breaks_goes_on_unguided_and_the_others_guided(value: float) -> None:
    at = state()
    at.x[1] = value
    guider = Particle()
    with pytest.warns(GuidanceWarning, match=r"step 2 \(sigma 3\) for 1 of 5"):
        delta = pushed(guider, at)
    rest = [0, 2, 3, 4]
    assert not bool(delta[1].any())
    close(delta[rest], pushed(guider, replace(at, x=at.x[rest], denoised=at.denoised[rest])))
    with pytest.raises(NonFiniteGuidance, match="step 2"):
        pushed(Particle(nonfinite="raise"), at)


def test_outside_a_run_it_pushes_nothing() -> None:
    guider, at = Particle(), state()
    assert not bool(guider(at).any())
    pushed(guider, at)
    guider.finish(at.denoised)
    assert not bool(guider(at).any())


@pytest.mark.parametrize("name", ["sample_dpmpp_2m", "sample_heun", "sample_euler_ancestral"])
def test_no_strength_is_bit_identical(name: str) -> None:
    bare = samplers.of(name)
    wrapped = sparke.wrap(bare, guider=Particle(0))
    for prompts in (PROMPTS, PROMPTS[:1]):
        options: dict[str, Any] = {"cond_scale": 3.0, "prompts": prompts}
        assert torch.equal(run(wrapped, **options), run(bare, **options))


def test_it_conforms() -> None:
    check_guider(Particle())
    check_guider(Particle(features=lambda z: z.flatten(1)[:, ::2].square()), cond_width=None)
    check_guider(Particle(), shape=(2, 3, 2, 4, 4))


@pytest.mark.parametrize(
    "options",
    [{"scale": -1}, {"scale": "much"}, {"lo": math.nan}, {"sigma_data": 0}, {"nonfinite": "hide"}],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Particle(**options)


def test_features_of_another_shape_are_an_error() -> None:
    with pytest.raises(ShapeError, match="features must return"):
        pushed(Particle(features=lambda z: z.sum(1)), state(step=replace(STEP, sigma=5.0)))


def modes_of_sixteen(guider: Particle | None, cfg: float = 1.0) -> tuple[float, float]:
    """Effective modes and fidelity over four prompts, 32 samples each, 16 at once."""
    mixture = GaussianMixture.planar()
    sampler: Any = sampling.sample_dpmpp_2m
    if guider is not None:
        sampler = sparke.wrap(sampler, guider=guider)
    made, told = [], []
    for seed, prompt in enumerate([*PROMPTS[::2], *PROMPTS[::2]]):
        made.append(
            run(sampler, mixture, prompts=[prompt] * 16, cond_scale=cfg, steps=30, seed=seed)
        )
        told += [prompt] * 16
    verdict = mixture.judge(torch.cat(made), told)
    return mixture.effective_modes(verdict, told), float(verdict.faithful.double().mean())


def test_sixteen_at_once_reach_more_modes_and_stay_faithful() -> None:
    plain, guided = modes_of_sixteen(None), modes_of_sixteen(Particle(60.0))
    assert guided[0] > plain[0] + 0.5
    assert guided[1] > plain[1] - 0.03


def test_a_single_step_moves_noisy_samples_apart() -> None:
    x = MIXTURE.sigma_max * torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    at = State(x, MIXTURE(x, MIXTURE.sigma_max), replace(STEP, sigma=MIXTURE.sigma_max))
    moved = at.x + pushed(Particle(1000.0), at, sigma_data=MIXTURE.sigma_data)
    assert float(torch.pdist(moved).min()) > float(torch.pdist(at.x).min())
