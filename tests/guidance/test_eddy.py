"""EDDY against autograd and loops in float64, and its marginals against exact draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from scipy import stats
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import sparke
from sparke.errors import ArgumentError, GuidanceWarning, NonFiniteGuidance, ShapeError
from sparke.guidance import _eddy
from sparke.guidance.eddy import EDDY
from sparke.guidance.interval import Interval
from sparke.guidance.noise import Noise
from sparke.models.mixture import GaussianMixture
from sparke.protocols import GuidanceScaleHook, Guider, State, Step
from sparke.testing import check_guider
from tests import samplers
from tests.backends import tiny
from tests.float64 import F64, rows
from tests.guidance.states import pushed as moved
from tests.samplers import MIXTURE, PROMPTS, Recorder, run

STEP = Step(index=0, sigma=2.0, sigma_next=1.5, total=8)


def state(n: int = 4, d: int = 3, step: Step = STEP) -> State:
    denoised = rows(n, d, 1)
    return State(denoised + 1.2 * step.sigma * rows(n, d, 0), denoised, step)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# --- the drift, written out -------------------------------------------------------------------


def gaussian(h: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: torch.exp(-(a - b).square().sum() / (2 * h**2))


def field(k: Callable[[Tensor, Tensor], Tensor], y: Tensor, mate: Tensor, v: Tensor) -> Tensor:
    """(d, d) r v^T - v r^T at y, by autograd, differentiable in y."""
    leaf = y if y.requires_grad else y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(k(leaf, mate), leaf, create_graph=True)
    return -torch.outer(gradient, v) + torch.outer(v, gradient)


def divergence(matrix: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """(d,) of a matrix field, row by row."""
    slopes = jacobian(matrix, y)
    d = len(y)
    return torch.stack([sum(slopes[a, b, b] for b in range(d)) for a in range(d)])


def expected(
    x: Tensor, denoised: Tensor, sigma: float, h: float, mates: list[list[int]], c: float = 1.0
) -> Tensor:
    """sigma^2 (c div A + A score), sample by sample and mate by mate."""
    k = gaussian(h)
    found = torch.zeros_like(x)
    for i, others in enumerate(mates):
        score = (denoised[i] - x[i]) / sigma**2
        for j in others:
            v = denoised[j] - x[j]

            def a(y: Tensor, j: int = j, v: Tensor = v) -> Tensor:
                return field(k, y, x[j], v)

            psi = c * divergence(a, x[i]) + a(x[i]).detach() @ score
            found[i] += sigma**2 * psi / len(others)
    return found


def everyone(n: int) -> list[list[int]]:
    return [[j for j in range(n) if j != i] for i in range(n)]


@pytest.mark.parametrize(("n", "d"), [(2, 2), (2, 3), (4, 3), (3, 5)])
def test_the_exact_form_is_the_formula_by_autograd(n: int, d: int) -> None:
    for sigma, unit, bandwidth in ((2.0, 1.0, 1.0), (0.4, 1.5, 0.6)):
        at = state(n, d, replace(STEP, sigma=sigma))
        h = bandwidth * math.sqrt(d * (sigma**2 + unit**2))
        ours = moved(EDDY(0.7, exact=True, bandwidth=bandwidth), at, sigma_data=unit)
        theirs = 0.7 * expected(at.x, at.denoised, sigma, h, everyone(n))
        close(ours, theirs)
        assert float(theirs.norm(dim=1).min()) > 1e-3
        own = EDDY(0.7, exact=True, bandwidth=bandwidth, sigma_data=unit)
        close(moved(own, at, sigma_data=9.0), ours)


@pytest.mark.parametrize("d", [2, 3])
def test_the_divergence_has_the_sign_that_autograd_gives_it(d: int) -> None:
    y, mate, v, h = rows(1, d, 2)[0], rows(1, d, 3)[0], rows(1, d, 4)[0], 1.3
    second = hessian(lambda z: gaussian(h)(z, mate), y)
    ours = (second.trace() * torch.eye(d, dtype=F64) - second) @ v
    close(divergence(lambda z: field(gaussian(h), z, mate, v), y), ours)
    # With a residual of zero for y itself, nothing but sigma^2 div A is left of the drift.
    pair, residual = torch.stack([y, mate]), torch.stack([torch.zeros_like(v), v])
    weight = 1 - torch.eye(2, dtype=F64)
    close(_eddy.drift(pair, residual, weight, 2.0, h)[0], 4 * ours)
    close(_eddy.drift(pair, residual, weight, 2.0, h, -1.0)[0], -4 * ours)


@pytest.mark.parametrize("d", [2, 3])
def test_the_field_is_antisymmetric_and_blind_to_its_own_residual(d: int) -> None:
    # A R_i without the divergence: orthogonal to R_i, and linear in it.
    at = state(3, d)
    still = _eddy.drift(
        at.x, at.denoised - at.x, 1 - torch.eye(3, dtype=F64), 2.0, 2.5, divergence=0.0
    )
    inner = (still * (at.denoised - at.x)).sum(1)
    close(inner, torch.zeros_like(inner), 1e-9)
    assert float(still.norm(dim=1).min()) > 1e-3


def score_of(x: Tensor, sigma: float) -> Tensor:
    """Of a two-mode mixture with noise, for (..., 2)."""
    means = torch.tensor([[1.0, 0.0], [-1.5, 0.7]], dtype=F64)
    total = 0.3**2 + sigma**2
    distance = (x[..., None, :] - means).square().sum(-1)
    logits = -distance / (2 * total) + torch.tensor([0.7, 0.3], dtype=F64).log()
    share = torch.softmax(logits, -1)
    return (share @ means - x) / total


def log_density(x: Tensor, sigma: float) -> Tensor:
    means = torch.tensor([[1.0, 0.0], [-1.5, 0.7]], dtype=F64)
    total = 0.3**2 + sigma**2
    distance = (x[..., None, :] - means).square().sum(-1)
    logits = -distance / (2 * total) + torch.tensor([0.7, 0.3], dtype=F64).log()
    return torch.logsumexp(logits, -1)


@pytest.mark.parametrize(
    ("c", "stationary"), [(1.0, True), (0.0, False), (-1.0, False), (0.9, False)]
)
def test_the_density_stands_still_under_the_right_drift_alone(c: float, stationary: bool) -> None:
    # d/dt log p = -(div psi + psi . score) for each sample in the others' presence.
    sigma, h, x = 0.8, 1.5, 1.2 * rows(4, 2, 5)
    weight = (1 - torch.eye(4, dtype=F64)) / 3
    for i in range(4):

        def psi(y: Tensor, i: int = i) -> Tensor:
            z = torch.cat([x[:i], y[None], x[i + 1 :]])
            return _eddy.drift(z, sigma**2 * score_of(z, sigma), weight, sigma, h, c)[i]

        flow = jacobian(psi, x[i]).trace() + psi(x[i]) @ score_of(x[i], sigma)
        assert (abs(float(flow)) < 1e-10) == stationary
    close(jacobian(lambda y: log_density(y, sigma), x[0]), score_of(x[0], sigma))


def test_the_divergence_has_no_mean_over_independent_mates() -> None:
    # What divergence=False rests on: E_j (Laplacian I - Hessian) k(x - x_j) score(x_j) = 0.
    sigma, h, y = 0.8, 1.1, torch.tensor([0.4, -0.6], dtype=F64)
    axis = torch.linspace(-9, 9, 241, dtype=F64)
    mates = torch.cartesian_prod(axis, axis)
    p = log_density(mates, sigma).exp()
    delta, v = y - mates, score_of(mates, sigma)
    k = torch.exp(-delta.square().sum(1) / (2 * h**2))
    along = delta * (delta * v).sum(1, keepdim=True) / h**4
    each = k[:, None] * (v * (delta.square().sum(1, keepdim=True) / h**4 - 1 / h**2) - along)
    mean = (p[:, None] * each).sum(0) / p.sum()
    assert float(mean.norm()) < 1e-10
    assert float((p[:, None] * each.abs()).sum(0).norm() / p.sum()) > 0.05


# --- one sample's law -------------------------------------------------------------------------

MEANS, WEIGHTS, STD = MIXTURE.means[0], MIXTURE.weights[0], MIXTURE.std
HIGH = 20.0


def posterior(x: Tensor, sigma: float) -> Tensor:
    """(..., 2) denoised, of the first prompt of the planar mixture."""
    total = sigma**2 + STD**2
    share = torch.softmax(
        (x @ MEANS.mT - MEANS.square().sum(1) / 2) / total + WEIGHTS.log(), dim=-1
    )
    return (STD**2 * x + sigma**2 * (share @ MEANS)) / total


def draws(n: int, g: torch.Generator) -> Tensor:
    modes = torch.multinomial(WEIGHTS, n, replacement=True, generator=g)
    return MEANS[modes] + STD * torch.randn(n, 2, generator=g)


def levels(steps: int) -> list[float]:
    rungs = torch.linspace(HIGH ** (1 / 7), 0.03 ** (1 / 7), steps, dtype=F64) ** 7
    return [*rungs.tolist(), 0.0]


def batches(
    particles: int, batch: int, scale: float, c: float, steps: int = 60, mirrored: bool = False
) -> Tensor:
    """(batches, batch, 2) samples by Heun's method, from exact draws of the noisy density."""
    g = torch.Generator().manual_seed(7)
    noise = torch.randn(particles // batch, batch, 2, generator=g)
    if mirrored:
        noise[:, 1::2] = -noise[:, ::2]
    x = draws(particles, g).view_as(noise) + HIGH * noise
    weight = (1 - torch.eye(batch)) / (batch - 1)

    def slope(x: Tensor, sigma: float) -> Tensor:
        residual = posterior(x, sigma) - x
        h = math.sqrt(2 * (sigma**2 + MIXTURE.sigma_data**2))
        return -(residual + scale * _eddy.drift(x, residual, weight, sigma, h, c)) / sigma

    table = levels(steps)
    for sigma, after in itertools.pairwise(table):
        first = slope(x, sigma)
        ahead = x + (after - sigma) * first
        x = ahead if after == 0 else x + (after - sigma) * (first + slope(ahead, after)) / 2
    return x


def differ(made: Tensor) -> float:
    """p of the two-sample test: shares of the modes, and four projections, Bonferroni."""
    ours, exact = made.flatten(0, 1), draws(made[..., 0].numel(), torch.Generator().manual_seed(8))
    modes = [torch.cdist(x, MEANS).argmin(1) for x in (ours, exact)]
    counts = torch.stack([torch.bincount(m, minlength=6) for m in modes])
    found = [stats.chi2_contingency(counts.numpy()).pvalue]
    for turn in range(4):
        axis = torch.tensor([math.cos(turn * math.pi / 4), math.sin(turn * math.pi / 4)])
        found.append(stats.ks_2samp((ours @ axis).numpy(), (exact @ axis).numpy()).pvalue)
    return min(1.0, len(found) * float(min(found)))


def coverage(made: Tensor) -> float:
    mode = torch.cdist(made.flatten(0, 1), MEANS).argmin(1).view(len(made), -1)
    return float(torch.zeros(len(made), 6).scatter_(1, mode, 1.0).mean())


def test_the_two_sample_test_passes_the_sampler_itself() -> None:
    assert differ(batches(20_000, 2, 0.0, 1.0)) > 0.01


def test_the_exact_form_keeps_the_law_of_one_sample_and_the_coverage_of_a_batch() -> None:
    made = batches(20_000, 2, 3.0, 1.0)
    assert differ(made) > 0.01
    assert coverage(made) == pytest.approx(coverage(batches(20_000, 2, 0.0, 1.0)), abs=0.004)


@pytest.mark.parametrize("c", [0.0, -1.0])
def test_planted_errors_fail_it(c: float) -> None:
    assert differ(batches(20_000, 2, 3.0, c)) < 1e-6


def test_from_dependent_noise_even_the_exact_form_changes_it() -> None:
    assert differ(batches(20_000, 2, 0.0, 1.0, mirrored=True)) > 0.01
    assert differ(batches(20_000, 2, 1.0, 1.0, mirrored=True)) < 1e-20


def test_without_the_divergence_a_batch_covers_more_and_the_law_hardly_moves() -> None:
    plain, guided = batches(16_000, 16, 0.0, 1.0), batches(16_000, 16, 3.0, 0.0)
    assert coverage(guided) > coverage(plain) + 0.03
    assert differ(guided) > 0.01


@pytest.mark.slow
def test_one_hundred_thousand_particles() -> None:
    assert differ(batches(100_000, 2, 3.0, 1.0, steps=80)) > 0.01
    assert differ(batches(100_000, 2, 3.0, 0.0, steps=80)) < 1e-20
    assert differ(batches(100_000, 2, 3.0, -1.0, steps=80)) < 1e-100


def test_batches_side_by_side_are_batches_alone() -> None:
    x = rows(12, 2, 0).view(4, 3, 2)
    residual, weight = rows(12, 2, 1).view(4, 3, 2), (1 - torch.eye(3, dtype=F64)) / 2
    together = _eddy.drift(x, residual, weight, 1.5, 2.0)
    h = 2.0 / math.sqrt(2 * (1.5**2 + 1))
    for one, r, found in zip(x, residual, together, strict=True):
        at = State(one, one + r, replace(STEP, sigma=1.5))
        close(moved(EDDY(exact=True, bandwidth=h), at), found)


def test_a_wrapped_sampler_does_what_the_loop_does() -> None:
    class Denoiser:
        sigma_data = MIXTURE.sigma_data

        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            return posterior(x, float(sigma[0]))

    x = batches(8, 4, 0.0, 1.0, steps=3) * 0 + HIGH * rows(8, 2, 9).float().view(2, 4, 2)
    sampler = sparke.wrap(sampling.sample_heun, guider=EDDY(2.0, exact=True))
    weight, table = (1 - torch.eye(4)) / 3, levels(12)
    for start in x:
        ours = sampler(Denoiser(), start, torch.tensor(table), disable=True)
        z = start[None]
        for sigma, after in itertools.pairwise(torch.tensor(table).tolist()):

            def slope(z: Tensor, at: float) -> Tensor:
                residual = posterior(z, at) - z
                h = math.sqrt(2 * (at**2 + MIXTURE.sigma_data**2))
                return -(residual + 2 * _eddy.drift(z, residual, weight, at, h)) / at

            first = slope(z, sigma)
            ahead = z + (after - sigma) * first
            last = after == 0
            z = ahead if last else z + (after - sigma) * (first + slope(ahead, after)) / 2
        close(ours, z[0], 1e-3)
        bare = sampling.sample_heun(Denoiser(), start, torch.tensor(table), disable=True)
        assert float((ours - bare).norm(dim=1).max()) > 0.02


# --- the published approximation --------------------------------------------------------------


def test_the_approximation_tends_to_the_exact_form() -> None:
    at = state(4, 3)
    exact = moved(EDDY(exact=True), at)
    off = [
        float((moved(EDDY(probes=m, eps=eps), at) - exact).norm() / exact.norm())
        for m, eps in ((5, 0.3), (3000, 1e-3))
    ]
    assert off[0] > 0.03
    assert off[1] < 0.02


def curved(z: Tensor) -> Tensor:
    flat = z.flatten(1)
    return torch.stack([flat[:, 0] * flat[:, 1], flat[:, 2].sin(), flat[:, 0] ** 2], 1)


def through_features(y: Tensor, residual: Tensor, h: float, sigma: float, c: float) -> Tensor:
    """The same sum with every derivative by autograd, as loops."""
    found = torch.zeros_like(y)
    n = len(y)
    for i, j in itertools.permutations(range(n), 2):

        def k(z: Tensor, j: int = j) -> Tensor:
            return torch.exp(-(curved(z[None])[0] - curved(y[j : j + 1])[0]).square().sum() / 2 / h)

        gradient, second = jacobian(k, y[i]), hessian(k, y[i])
        v = residual[j]
        still = -gradient * (v @ residual[i]) + v * (gradient @ residual[i])
        found[i] += (still + c * sigma**2 * (second.trace() * v - second @ v)) / (n - 1)
    return found


@pytest.mark.parametrize("c", [1.0, 0.0])
def test_through_features_it_is_autograds_hessian(c: float) -> None:
    y, residual, h, sigma = rows(3, 3, 0), rows(3, 3, 1), 1.7, 0.6
    weight = (1 - torch.eye(3, dtype=F64)) / 2
    # All the signs there are: Hutchinson's mean over them is the trace.
    signs = [
        torch.tensor(s, dtype=F64).expand(3, 3) for s in itertools.product((-1.0, 1.0), repeat=3)
    ]
    pairs = _eddy.Pairs(y, curved, curved(y), weight, math.sqrt(h))
    ours = _eddy.estimated(pairs, residual, signs, sigma, step=1e-3, divergence=bool(c))
    theirs = through_features(y, residual, h, sigma, c)
    close(ours, theirs, 1e-5)
    assert float(theirs.norm(dim=1).min()) > 1e-2


def test_what_stands_for_the_jacobian_enters_once_and_twice() -> None:
    y, residual, weight = rows(3, 3, 0), rows(3, 3, 1), (1 - torch.eye(3, dtype=F64)) / 2
    pairs = _eddy.Pairs(y, curved, curved(y), weight, 1.3)

    def at(jacobian: float, c: bool) -> Tensor:
        probe = torch.ones_like(y)
        return _eddy.estimated(
            pairs, residual, [probe], 0.6, step=1e-3, jacobian=jacobian, divergence=c
        )

    still, curve = at(1.0, False), at(1.0, True) - at(1.0, False)
    close(at(0.5, True), 0.5 * still + 0.25 * curve)


def test_features_read_the_estimate_in_its_own_width() -> None:
    at = state(3, 3)
    ours = moved(EDDY(features=curved, divergence=False, eps=1e-3), at)
    seen = curved(at.denoised)
    width = float(torch.pdist(seen).median()) / math.sqrt(2)
    shrink = float(torch.pdist(at.denoised).median() / torch.pdist(at.x).median())
    theirs = through_features(at.denoised, at.denoised - at.x, width**2, STEP.sigma, 0.0)
    close(ours, shrink * theirs, 1e-5)


@pytest.mark.parametrize(("divergence", "calls"), [(True, 2 * 25 + 4 + 7), (False, 3 + 1)])
def test_features_are_evaluated_as_often_as_said(divergence: bool, calls: int) -> None:
    seen = []

    def counted(z: Tensor) -> Tensor:
        seen.append(len(z))
        return curved(z)

    moved(EDDY(features=counted, divergence=divergence), state(4))
    assert seen == [4] * calls


def test_latents_without_the_divergence_need_no_differences() -> None:
    at = state(3, 4)
    h = math.sqrt(4 * (STEP.sigma**2 + 1))
    theirs = expected(at.x, at.denoised, STEP.sigma, h, everyone(3), c=0.0)
    close(moved(EDDY(divergence=False), at), theirs)


def test_probes_are_the_samples_own() -> None:
    at, before = state(3, 4), torch.get_rng_state()
    ours = moved(EDDY(), at, seeds=(5, 6, 7))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(moved(EDDY(), at, seeds=(5, 6, 7)), ours)
    assert not torch.equal(moved(EDDY(), at, seeds=(5, 6, 8)), ours)
    close(moved(EDDY(), at, seeds=(5, 6, 8))[:2], ours[:2])
    order = [2, 0, 1]
    turned = replace(at, x=at.x[order], denoised=at.denoised[order])
    close(moved(EDDY(), turned, seeds=(7, 5, 6)), ours[order])
    later = replace(at, step=replace(STEP, sigma=1.999999))
    assert not torch.allclose(moved(EDDY(), later, seeds=(5, 6, 7)), ours, atol=1e-4)


# --- who, when, and in which units ------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"exact": True}, 1e-9),
        ({"divergence": False}, 1e-9),
        ({"divergence": False, "features": torch.sin}, 1e-9),
        ({"probes": 3000, "eps": 1e-3}, 0.05),  # probes are of the noise level, in its own units
    ],
)
def test_other_units_change_nothing_else(options: dict[str, Any], tolerance: float) -> None:
    at, unit = state(), 2.5
    scaled = State(unit * at.x, unit * at.denoised, replace(STEP, sigma=unit * STEP.sigma))
    plain = moved(EDDY(**options), at)
    if read := options.get("features"):
        options = {**options, "features": lambda z: read(z / unit)}
    close(moved(EDDY(**options), scaled, sigma_data=unit), unit * plain, tolerance)


def test_samples_of_other_prompts_are_left_alone() -> None:
    at, cond = state(5), torch.eye(2)[[0, 1, 0, 0, 1]]
    guider = EDDY(exact=True)
    ours = moved(guider, at, cond=cond)
    for group in ([0, 2, 3], [1, 4]):
        close(ours[group], moved(guider, replace(at, x=at.x[group], denoised=at.denoised[group])))
    close(moved(EDDY(exact=True, prompt_aware=False), at, cond=cond), moved(guider, at))
    assert not bool(moved(guider, at, cond=torch.eye(5)).any())


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"divergence": False}])
def test_a_single_sample_is_left_alone(options: dict[str, Any]) -> None:
    assert torch.equal(moved(EDDY(**options), state(1)), torch.zeros(1, 3, dtype=F64))


def test_it_acts_in_the_first_steps() -> None:
    def acts(guider: EDDY, **step: Any) -> bool:
        return bool(moved(guider, state(step=replace(STEP, **step))).any())

    for index, active in ((0, True), (1, True), (2, False), (4, False), (7, False)):
        assert acts(EDDY(), index=index) == active
        assert acts(EDDY(exact=True), index=index)
        assert acts(EDDY(first=0.5), index=index) == (index < 4)
    assert acts(EDDY(), total=None, sigma=4.1)
    assert not acts(EDDY(), total=None, sigma=3.9)


@pytest.mark.parametrize("options", [{"exact": True}, {"divergence": False}, {}])
def test_samples_that_coincide_stay_finite(options: dict[str, Any]) -> None:
    at = state()
    for alike in (2, 4):
        same = replace(at, x=at.x.clone(), denoised=at.denoised.clone())
        same.x[:alike], same.denoised[:alike] = at.x[0], at.denoised[0]
        assert bool(moved(EDDY(**options), same).isfinite().all())
        assert bool(moved(EDDY(features=curved, **_loose(options)), same).isfinite().all())


def _loose(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "exact"}


def test_a_broken_sample_is_left_alone_and_breaks_nobody() -> None:
    at = state(5)
    for part in (at.x, at.denoised):
        kept = part[1].clone()
        part[1, 0] = math.nan
        with pytest.warns(GuidanceWarning, match="1 of 5"):
            delta = moved(EDDY(exact=True), at)
        assert not bool(delta[1].any())
        assert bool(delta.isfinite().all())
        assert bool(delta[[0, 2, 3, 4]].any(1).all())
        with pytest.raises(NonFiniteGuidance, match="step 0"):
            moved(EDDY(exact=True, nonfinite="raise"), at)
        part[1] = kept


def test_half_precision_is_computed_in_single() -> None:
    at = state(4, 6)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        half = State(at.x.to(dtype), at.denoised.to(dtype), STEP)
        full = State(half.x.double(), half.denoised.double(), STEP)
        delta = moved(EDDY(exact=True), half)
        assert delta.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        close(delta.double(), moved(EDDY(exact=True), full), tolerance)


def test_outside_a_run_it_moves_nothing() -> None:
    guider, at = EDDY(exact=True), state()
    assert not bool(guider(at).any())
    assert guider.on_guidance_scale(STEP, 5.0) == 5.0
    assert bool(moved(guider, at).any())
    guider.finish(at.denoised)
    assert not bool(guider(at).any())


@pytest.mark.parametrize("name", ["sample_dpmpp_2m", "sample_heun", "sample_euler_ancestral"])
@pytest.mark.parametrize("exact", [True, False])
def test_no_strength_is_bit_identical(name: str, exact: bool) -> None:
    bare = samplers.of(name)
    wrapped = sparke.wrap(bare, guider=EDDY(0, exact=exact))
    for prompts in (PROMPTS, PROMPTS[:1]):
        options: dict[str, Any] = {"cond_scale": 3.0, "prompts": prompts}
        assert torch.equal(run(wrapped, **options), run(bare, **options))


class WithoutHooks:
    """A guider's three methods alone: the exact form refuses the scale that hooks are shown."""

    def __init__(self, guider: EDDY) -> None:
        self.begin, self.finish, self._call = guider.begin, guider.finish, guider.__call__

    def __call__(self, state: State) -> Tensor:
        return self._call(state)


def test_it_conforms() -> None:
    check_guider(EDDY())
    check_guider(EDDY(divergence=False, first=1.0))
    check_guider(WithoutHooks(EDDY(exact=True)))
    check_guider(EDDY(features=lambda z: z.flatten(1)[:, ::2].sin()), cond_width=None)
    check_guider(EDDY(), shape=(2, 3, 2, 4, 4))
    assert not isinstance(EDDY(), GuidanceScaleHook)
    assert sparke.guidance.guider("eddy", scale=2.0).__dict__["scale"] == 2.0


# --- what the exact form refuses --------------------------------------------------------------


def test_guidance_where_it_acts_is_refused_before_the_first_evaluation() -> None:
    recorder = Recorder()
    exact = sparke.wrap(sampling.sample_heun, guider=EDDY(exact=True))
    with pytest.raises(ArgumentError, match="guidance scale 3 there is none"):
        run(exact, recorder, prompts=PROMPTS[:1] * 4, cond_scale=3.0)
    assert recorder.calls == 0
    run(exact, prompts=PROMPTS[:1] * 4, cond_scale=1.0)
    run(sparke.wrap(sampling.sample_heun, guider=EDDY()), prompts=PROMPTS[:1] * 4, cond_scale=3.0)


def test_guidance_may_be_on_after_it() -> None:
    interval = Interval(0, 2.0)
    together: list[Guider | str] = [interval, EDDY(3.0, exact=True, first=0.3)]
    guided = sparke.wrap(sampling.sample_dpmpp_2m, guider=together)
    alone = sparke.wrap(sampling.sample_dpmpp_2m, guider=Interval(0, 2.0))
    options: dict[str, Any] = {"prompts": PROMPTS[:1] * 4, "cond_scale": 3.0}
    assert not torch.equal(run(guided, **options), run(alone, **options))
    late = sparke.wrap(sampling.sample_dpmpp_2m, guider=[interval, EDDY(exact=True)])
    with pytest.raises(ArgumentError, match="guidance scale"):
        run(late, **options)


def test_pipelines_are_refused_alike() -> None:
    pipe = sparke.wrap(tiny.ALL["sd"].make(), guider=EDDY(exact=True))
    prompts = ["a cat", "a cat"]
    with pytest.raises(ArgumentError, match="guidance scale"):
        pipe(**tiny.ALL["sd"].arguments(prompts, guidance_scale=5.0))
    plain = tiny.ALL["sd"].make()
    ours = tiny.latents(pipe(**tiny.ALL["sd"].arguments(prompts, guidance_scale=1.0)))
    bare = tiny.latents(plain(**tiny.ALL["sd"].arguments(prompts, guidance_scale=1.0)))
    assert not torch.equal(ours, bare)


def test_designed_noise_is_refused() -> None:
    with pytest.raises(ArgumentError, match="the initial noise alone"):
        sparke.wrap(sampling.sample_heun, guider=[Noise("antithetic"), EDDY(exact=True)])
    sparke.wrap(sampling.sample_heun, guider=[Noise("antithetic"), EDDY()])
    sparke.wrap(sampling.sample_heun, guider=[Noise("antithetic"), EDDY(0, exact=True)])


@pytest.mark.parametrize(
    "options",
    [
        {"scale": -1},
        {"scale": "much"},
        {"bandwidth": 0},
        {"probes": 0},
        {"probes": 2.5},
        {"eps": 0},
        {"first": 0},
        {"first": 1.5},
        {"sigma_data": 0},
        {"nonfinite": "hide"},
        {"divergence": False, "exact": True},
        {"features": curved, "exact": True},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        EDDY(**options)


def test_features_of_another_shape_are_an_error() -> None:
    with pytest.raises(ShapeError, match="features must return"):
        moved(EDDY(features=lambda z: z.sum(1)), state())


def test_repr_tells_the_form() -> None:
    assert repr(EDDY(exact=True)) == "EDDY(scale=1.0, exact=True, first=1.0, reads noisy latents)"
    assert repr(EDDY(2, divergence=False, features=curved)) == (
        "EDDY(scale=2.0, divergence=False, first=0.2, reads features of denoised)"
    )


def test_it_moves_batches_on_the_mixture_in_every_form() -> None:
    mixture = GaussianMixture.planar()
    for options in ({"exact": True}, {"divergence": False, "first": 1.0}, {"first": 1.0}):
        guided = sparke.wrap(sampling.sample_dpmpp_2m, guider=EDDY(**options))
        told: dict[str, Any] = {"prompts": PROMPTS[:1] * 8, "steps": 30, "mixture": mixture}
        ours, bare = run(guided, mixture, **told), run(sampling.sample_dpmpp_2m, mixture, **told)
        assert not torch.equal(ours, bare)
        assert float(mixture.judge(ours, PROMPTS[:1] * 8).faithful.double().mean()) > 0.7
