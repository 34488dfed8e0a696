"""The exact test bed: denoiser, draws and judge against plain float64 arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparke.errors import ShapeError, UnknownName
from sparke.models.mixture import WEIGHTS, GaussianMixture, Verdict

F64 = torch.float64
TRUE_MODES = math.exp(-sum(w * math.log(w) for w in WEIGHTS))


@pytest.fixture(scope="module")
def planar() -> GaussianMixture:
    return GaussianMixture.planar()


@pytest.fixture(scope="module")
def structured() -> GaussianMixture:
    return GaussianMixture.structured()


@pytest.fixture(params=["planar", "structured"])
def mixture(request: pytest.FixtureRequest) -> GaussianMixture:
    found: GaussianMixture = request.getfixturevalue(request.param)
    return found


def posterior_mean(m: GaussianMixture, x: Tensor, sigma: float, prompt: int | None) -> list[float]:
    """E[x0 | x0 + sigma e = x] of one sample, mode by mode: shares by Bayes, then averages."""
    point = [float(v) for v in x]
    variance = m.std**2 + sigma**2
    logs, centres = [], []
    for p in range(8) if prompt is None else [prompt]:
        for k in range(6):
            mean = [float(v) for v in m.means[p, k]]
            away = sum((a - b) ** 2 for a, b in zip(point, mean, strict=True))
            logs.append(math.log(float(m.weights[p, k])) - away / (2 * variance))
            # Within one mode: the product of two Gaussians.
            gain = m.std**2 / variance
            centres.append([b + gain * (a - b) for a, b in zip(point, mean, strict=True)])
    top = max(logs)
    shares = [math.exp(v - top) for v in logs]
    return [
        sum(s * c[i] for s, c in zip(shares, centres, strict=True)) / sum(shares)
        for i in range(len(point))
    ]


def log_density(m: GaussianMixture, x: Tensor, sigma: float, prompt: int) -> Tensor:
    """Of the noisy samples of one prompt, up to a constant."""
    law = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(m.weights[prompt].to(F64)),
        torch.distributions.Independent(
            torch.distributions.Normal(m.means[prompt].to(F64), math.hypot(m.std, sigma)), 1
        ),
        validate_args=False,
    )
    return law.log_prob(x)  # type: ignore[no-any-return]


def noisy(m: GaussianMixture, sigma: float, seed: int = 0) -> tuple[Tensor, list[str]]:
    """One noisy draw of each prompt."""
    generator = torch.Generator().manual_seed(seed)
    x = m.sample(m.prompts, generator)
    return x + sigma * torch.randn(x.shape, generator=generator).to(x), m.prompts


@torch.no_grad()
def euler(m: GaussianMixture, prompts: list[str], scale: float, steps: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sigmas, embeds = m.sigmas(steps), m.encode(prompts)
    x = torch.randn(len(prompts), *m.latent_shape, generator=generator) * sigmas[0]
    for sigma, following in pairwise(sigmas):
        denoised = m(x, sigma, cond=embeds, cond_scale=scale)
        x = denoised + following / sigma * (x - denoised)
    return x


@pytest.mark.parametrize("sigma", [0.02, 0.4, 3.0, 80.0])
@pytest.mark.parametrize("with_prompt", [True, False])
def test_the_denoiser_is_the_posterior_mean(
    mixture: GaussianMixture, sigma: float, with_prompt: bool
) -> None:
    x, prompts = noisy(mixture, sigma)
    x = x[[0, 5]]
    cond = mixture.encode([prompts[0], prompts[5]]) if with_prompt else None
    ours = mixture(x, torch.full((2,), sigma), cond=cond)
    expected = [posterior_mean(mixture, r, sigma, p) for r, p in zip(x, (0, 5), strict=True)]
    if not with_prompt:
        expected = [posterior_mean(mixture, r, sigma, None) for r in x]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.to(F64), torch.tensor(expected, dtype=F64), rtol=0, atol=2e-4)


def test_in_float64_the_denoiser_is_the_posterior_mean_to_rounding() -> None:
    for m in (GaussianMixture.planar(dtype=F64), GaussianMixture.structured(dim=64, dtype=F64)):
        x, prompts = noisy(m, 1.0)
        ours = m(x, 1.0, cond=m.encode(prompts))
        expected = [posterior_mean(m, row, 1.0, p) for p, row in enumerate(x)]
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_the_denoiser_gives_the_score_of_the_noisy_density(
    mixture: GaussianMixture, sigma: float
) -> None:
    x, prompts = noisy(mixture, sigma)
    leaf = x.to(F64).requires_grad_()
    total = torch.stack([log_density(mixture, row, sigma, p) for p, row in enumerate(leaf)])
    (score,) = torch.autograd.grad(total.sum(), leaf)
    ours = (mixture(x, sigma, cond=mixture.encode(prompts)) - x) / sigma**2
    torch.testing.assert_close(ours.to(F64), score, rtol=1e-3, atol=1e-3 / sigma)


def test_guidance_extrapolates_from_all_prompts_to_one(mixture: GaussianMixture) -> None:
    x, prompts = noisy(mixture, 2.0)
    cond = mixture.encode(prompts)
    of_all, own = mixture(x, 2.0), mixture(x, 2.0, cond=cond)
    assert float((of_all - own).abs().max()) > 0.1
    for scale in (0.0, 1.0, 3.5, -1.0):
        expected = of_all + scale * (own - of_all)
        ours = mixture(x, 2.0, cond=cond, uncond="anything", cond_scale=scale)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_each_row_has_its_own_noise_level_and_prompt(mixture: GaussianMixture) -> None:
    x, prompts = noisy(mixture, 1.0)
    sigma = torch.logspace(-1, 1, len(x))
    together = mixture(x, sigma, cond=mixture.encode(prompts), cond_scale=2.0)
    for i, prompt in enumerate(prompts):
        cond = mixture.encode([prompt])
        alone = mixture(x[i : i + 1], float(sigma[i]), cond=cond, cond_scale=2.0)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_the_gradient_passes_through() -> None:
    m = GaussianMixture.planar(dtype=F64)
    x, prompts = noisy(m, 1.0)
    cond = m.encode(prompts)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: m(z, 1.0, cond=cond, cond_scale=3.0), (x,))


def test_a_first_call_under_inference_mode_leaves_the_gradient_be() -> None:
    m = GaussianMixture.planar()
    x, _ = noisy(m, 1.0)
    with torch.inference_mode():
        m(x, 1.0)
    m(x.clone().requires_grad_(), 1.0).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_came(mixture: GaussianMixture, dtype: torch.dtype) -> None:
    x, prompts = noisy(mixture, 1.0)
    sigma, cond = torch.ones(len(x), dtype=dtype), mixture.encode(prompts).to(dtype)
    ours = mixture(x.to(dtype), sigma, cond=cond)
    assert ours.dtype == dtype
    expected = mixture(x.to(dtype).float(), 1.0, cond=mixture.encode(prompts))
    assert torch.equal(ours, expected.to(dtype))


def test_the_data_are_as_described(mixture: GaussianMixture) -> None:
    assert mixture.means.shape == (8, 6, *mixture.latent_shape)
    for row in mixture.weights:
        assert sorted(row.tolist()) == pytest.approx(sorted(WEIGHTS))
    # Twins share weights and nearly their modes; other groups are far.
    for p in range(0, 8, 2):
        assert torch.equal(mixture.weights[p], mixture.weights[p + 1])
    apart = torch.cdist(mixture.means.flatten(1), mixture.means.flatten(1))
    twin = torch.arange(8) ^ 1
    same = apart[torch.arange(8), twin]
    others = apart.fill_diagonal_(torch.inf)
    others[torch.arange(8), twin] = torch.inf
    assert float(same.max()) < 0.25 * float(others.min())


def test_embeddings_are_unit_vectors_whose_twins_nearly_agree(mixture: GaussianMixture) -> None:
    embeds = mixture.encode(mixture.prompts)
    assert embeds.shape == (8, 32)
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(8))
    alike = embeds @ embeds.T
    for p in range(8):
        for q in range(8):
            if p // 2 != q // 2:
                assert alike[p, q] < 0.8
            elif p != q:
                assert 0.95 < alike[p, q] < 0.999


def test_seeds_make_different_worlds_and_the_same_one_again() -> None:
    assert torch.equal(GaussianMixture.planar(3).means, GaussianMixture.planar(3).means)
    assert not torch.equal(GaussianMixture.planar(3).means, GaussianMixture.planar(4).means)


def test_sigma_data_is_the_spread_of_one_prompts_draws(mixture: GaussianMixture) -> None:
    generator = torch.Generator().manual_seed(0)
    variances = [mixture.sample([p] * 500, generator).var(0).mean() for p in mixture.prompts]
    assert mixture.sigma_data == pytest.approx(
        float(torch.stack(variances).mean().sqrt()), rel=0.05
    )


def test_noise_levels_are_those_of_karras(mixture: GaussianMixture) -> None:
    sigmas = mixture.sigmas(10)
    low, high = mixture.sigma_min ** (1 / 7), mixture.sigma_max ** (1 / 7)
    expected = [(high + i / 9 * (low - high)) ** 7 for i in range(10)]
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx([*expected, 0.0], rel=1e-5)
    assert mixture.sigmas(1).tolist() == pytest.approx([80.0, 0.0])


def test_exact_draws_are_faithful_and_have_the_weights(mixture: GaussianMixture) -> None:
    prompts = [p for p in mixture.prompts for _ in range(150)]
    x = mixture.sample(prompts, torch.Generator().manual_seed(0))
    verdict = mixture.judge(x, prompts)
    assert float(verdict.faithful.float().mean()) >= 0.98
    for p in range(8):
        mine = slice(150 * p, 150 * (p + 1))
        share = verdict.mode[mine].bincount(minlength=6) / 150
        # Four standard errors of the largest share.
        torch.testing.assert_close(share, mixture.weights[p], rtol=0, atol=0.16)
    again = mixture.sample(prompts, torch.Generator().manual_seed(0))
    assert torch.equal(x, again)


def test_the_judge_sees_what_is_wrong(mixture: GaussianMixture) -> None:
    prompts = [mixture.prompts[2]] * 100
    good = mixture.sample(prompts, torch.Generator().manual_seed(0))
    others = mixture.sample([mixture.prompts[6]] * 100, torch.Generator().manual_seed(0))
    between = mixture.means[2, :2].mean(0).expand(100, -1)
    rough = good + 9 * (good - mixture.means[2, mixture.judge(good, prompts).mode])
    for wrong in (others, between, rough, good + torch.nan):
        assert float(mixture.judge(wrong, prompts).faithful.float().mean()) < 0.2
    assert bool(mixture.judge(mixture.means[2], prompts[:6]).faithful.all())
    assert mixture.judge(mixture.means[2], prompts[:6]).mode.tolist() == list(range(6))


def test_the_judge_hears_noise_outside_the_space_of_the_modes(structured: GaussianMixture) -> None:
    prompts = structured.prompts
    x = structured.sample(prompts, torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(structured.means.flatten(0, 1).T)[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    noise = noise - noise @ basis @ basis.T
    quiet, loud = (structured.judge(x + a * 0.15 * noise, prompts).faithful for a in (0.5, 2.0))
    assert bool(quiet.all())
    assert not bool(loud.any())


def test_effective_modes_are_the_exponential_of_an_entropy(planar: GaussianMixture) -> None:
    first, second, third = planar.prompts[0], planar.prompts[1], planar.prompts[2]
    prompts = [first] * 5 + [second] * 4 + [third]
    verdict = Verdict(
        mode=torch.tensor([0, 0, 1, 1, 2, 3, 3, 3, 3, 5]),
        faithful=torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 1, 0]).bool(),
    )
    # Two modes in equal shares (the third is not faithful), one mode, none.
    assert planar.effective_modes(verdict, prompts) == pytest.approx((2 + 1 + 0) / 3)
    uneven = Verdict(torch.tensor([0, 0, 0, 4]), torch.ones(4).bool())
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert planar.effective_modes(uneven, [first] * 4) == pytest.approx(expected)


def test_sampling_without_guidance_gives_the_weights_and_guidance_takes_modes_away(
    mixture: GaussianMixture,
) -> None:
    n = 250 if mixture.latent_shape == (2,) else 40
    prompts = [p for p in mixture.prompts for _ in range(n)]
    modes = {}
    for scale in (1.0, 3.0, 6.0):
        verdict = mixture.judge(euler(mixture, prompts, scale, 80 if n == 250 else 30), prompts)
        modes[scale] = mixture.effective_modes(verdict, prompts)
        if scale == 1.0:
            assert float(verdict.faithful.float().mean()) >= 0.98
            of_rank = mixture.weights.argsort(1, descending=True)
            ranks = of_rank.argsort(1).repeat_interleave(n, 0)
            rank = ranks[torch.arange(len(prompts)), verdict.mode]
            share = rank.bincount(minlength=6) / len(prompts)
            torch.testing.assert_close(share, torch.tensor(WEIGHTS), rtol=0, atol=0.06)
    assert modes[1.0] == pytest.approx(TRUE_MODES, abs=0.45)
    assert modes[1.0] > modes[3.0] + 0.3
    assert modes[3.0] > modes[6.0] + 0.1


def test_what_it_does_not_know_is_an_error(planar: GaussianMixture) -> None:
    with pytest.raises(UnknownName, match="a cat"):
        planar.encode(["a catt"])
    with pytest.raises(UnknownName):
        planar.sample(["a dog"])
    with pytest.raises(ShapeError, match=r"x must be \(3, 2\)"):
        planar(torch.zeros(3, 3), 1.0)
    with pytest.raises(ShapeError, match=r"cond must be \(3, 32\)"):
        planar(torch.zeros(3, 2), 1.0, cond=torch.zeros(1, 32))


def test_it_moves_between_devices(planar: GaussianMixture) -> None:
    moved = planar.to("meta")
    assert moved.means.device.type == moved.weights.device.type == "meta"
    assert moved(torch.zeros(3, 2, device="meta"), 1.0).shape == (3, 2)
