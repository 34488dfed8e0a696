"""Designed starts: exact marginals, the correlations that are meant, and real hosts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from scipy import stats
from torch import Tensor

import sparke
from sparke.errors import ArgumentError, GuidanceWarning
from sparke.guidance.noise import Noise
from sparke.protocols import Guider, NoiseHook, Run, State, Step
from sparke.testing import check_guider
from tests import samplers
from tests.backends import tiny
from tests.probe import Probe
from tests.samplers import MIXTURE

F64 = torch.float64
EXACT = ("orthogonal", "antithetic", "latin")
every_exact = pytest.mark.parametrize("kind", EXACT)


def pink(alpha: float | None = None) -> Noise:
    with pytest.warns(GuidanceWarning, match="not trained on"):
        return Noise("pink", alpha=alpha)


def start(guider: Noise, x: Tensor, first_seed: int = 0) -> Tensor:
    seeds = tuple(range(first_seed, first_seed + len(x)))
    guider.begin(Run(x.shape, x.device, x.dtype, seeds=seeds))
    return guider.on_noise(x)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def many(kind: str, runs: int, b: int, d: int, sigma: float = 1.0) -> Tensor:
    """(runs, b, d) designed starts from as many draws of noise."""
    noise = sigma * normal(runs, b, d)
    return torch.stack([start(Noise(kind), x, i * b) for i, x in enumerate(noise)])


# --- each sample by itself is what it was


@every_exact
@pytest.mark.parametrize(("b", "d"), [(3, 4), (2, 2), (5, 3)])
def test_every_sample_is_an_exact_draw(kind: str, b: int, d: int) -> None:
    """Each number normal, numbers of a sample independent, in few dimensions, where it is hard."""
    sigma, runs = 14.6, 3000
    made = many(kind, runs, b, d, sigma) / sigma
    for i in range(b):
        rows = made[:, i]
        for k in range(d):
            assert stats.kstest(rows[:, k].numpy(), "norm").pvalue > 1e-4, (i, k)
        assert stats.kstest(rows.square().sum(1).numpy(), "chi2", args=(d,)).pvalue > 1e-4
        # Along any direction, and in products and in sizes, as for independent numbers.
        slanted = rows @ torch.nn.functional.normalize(normal(d, seed=i), dim=0)
        assert stats.kstest(slanted.numpy(), "norm").pvalue > 1e-4
        for j in range(d):
            for k in range(j):
                bound = 4.5 / math.sqrt(runs)
                assert abs(float((rows[:, j] * rows[:, k]).mean())) < bound
                sizes = torch.corrcoef(rows[:, (j, k)].square().T)
                assert abs(float(sizes[0, 1])) < bound


@every_exact
def test_the_scale_of_the_noise_is_kept_without_being_told(kind: str) -> None:
    x = normal(6, 4, 8, 8)
    one, other = start(Noise(kind), x), start(Noise(kind), 157.0 * x)
    torch.testing.assert_close(157.0 * one, other)
    torch.testing.assert_close(one.flatten(1).norm(dim=1)[0], x.flatten(1).norm(dim=1)[0])
    assert not torch.allclose(one, x, atol=1e-2)


# --- and together they are what they should be


def test_orthogonal_rows_are_at_right_angles_and_as_long_as_they_were() -> None:
    x = normal(7, 3, 4, 5)
    made = start(Noise(), x)
    rows, before = made.flatten(1), x.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.diag(before.square().sum(1)))
    # The same as taking from each row, one by one, what it has in common with those before it.
    frame: list[Tensor] = []
    for row in before:
        left = row.clone()
        for axis in frame:
            left -= (left @ axis) * axis
        frame.append(left / left.norm())
    lengths = before.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows, lengths * torch.stack(frame))


def test_more_rows_than_dimensions_are_orthogonal_in_blocks() -> None:
    x = normal(8, 3)
    made = start(Noise("orthogonal"), x)
    for block in (made[:3], made[3:6], made[6:]):
        product = block @ block.T
        torch.testing.assert_close(product, torch.diag(product.diagonal()))
    torch.testing.assert_close(made.norm(dim=1), x.norm(dim=1))


@pytest.mark.parametrize("b", [2, 5, 8])
def test_antithetic_pairs_sum_to_zero(b: int) -> None:
    x = normal(b, 4, 3, 3, dtype=torch.float16)
    made = start(Noise("antithetic"), x)
    assert torch.equal(made[::2], x[::2])
    for i in range(b // 2):
        assert not bool((made[2 * i] + made[2 * i + 1]).any())


def test_latin_starts_fall_one_into_each_stratum() -> None:
    b, d = 8, 16384
    x = normal(b, d)
    made = start(Noise("latin"), x)
    share = torch.special.ndtr(made)
    strata = (share * b).long()
    counts = torch.stack([(strata == s).sum(0) for s in range(b)])
    # Their own lengths move numbers by a percent or so, and some of them across a border.
    assert float((counts == 1).double().mean()) > 0.93
    own = torch.stack([((torch.special.ndtr(x) * b).long() == s).sum(0) for s in range(b)])
    assert float((own == 1).double().mean()) < 0.45
    ranks = made.argsort(0).argsort(0) == x.argsort(0).argsort(0)
    assert float(ranks.double().mean()) > 0.95  # each sample stays near the noise it came with


def test_latin_means_hardly_vary() -> None:
    b, d = 8, 256
    means = many("latin", 200, b, d).mean(1)
    plain = normal(200, b, d).mean(1)
    assert float(plain.var()) == pytest.approx(1 / b, rel=0.05)
    assert float(means.var()) < 0.1 / b


def test_latin_draws_by_seed_and_moves_no_generator() -> None:
    x, state = normal(4, 32), torch.get_rng_state()
    first, again, other = (start(Noise("latin"), x, seed) for seed in (0, 0, 100))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@every_exact
def test_a_single_sample_keeps_its_noise(kind: str) -> None:
    x = normal(1, 4, 8, 8, dtype=torch.float32)
    assert start(Noise(kind), x) is x


# --- pink


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_pink_has_the_spectrum_and_the_variance(alpha: float) -> None:
    h, w = 16, 24
    made = start(pink(alpha), 3.0 * normal(400, 4, h, w))
    assert float(made.var()) == pytest.approx(9.0, rel=0.03)
    each = made.flatten(0, 1).var(0)
    assert float(each.min()) > 9 * 0.8
    assert float(each.max()) < 9 * 1.2
    power = torch.fft.fft2(made).abs().square().mean((0, 1))
    reference = float(power[0, 6])
    for i in range(h):
        for j in range(w):
            down, across = min(i, h - i) / h, min(j, w - j) / w
            frequency = max(math.hypot(down, across), 1 / max(h, w))
            expected = reference * (frequency / 0.25) ** -alpha
            assert float(power[i, j]) == pytest.approx(expected, rel=0.25)


def test_pink_filters_each_plane_of_each_sample_by_itself() -> None:
    x = normal(2, 3, 5, 8, 8)
    made = start(pink(), x)
    for i in range(2):
        assert torch.equal(start(pink(), x[i : i + 1])[0], made[i])
    x[0, 1, 2] = 0
    changed = (start(pink(), x) != made).flatten(3).any(3)
    assert changed.nonzero().tolist() == [[0, 1, 2]]


def test_pink_of_slope_zero_is_white_and_silent() -> None:
    x = normal(2, 3, 8, 8)
    white = Noise("pink", alpha=0)
    assert start(white, x) is x
    assert white.exclusive == Noise().idle == frozenset()
    assert white.idle == {"noise"}
    assert Noise().exclusive == {"noise"}
    assert repr(white) == "Noise('pink', alpha=0.0)"
    assert repr(Noise("latin")) == "Noise('latin')"


@pytest.mark.parametrize("shape", [(2, 320), (2, 64, 16)])
def test_pink_needs_a_height_and_a_width(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="height, width"):
        start(pink(), normal(*shape))


# --- a guider like others


@pytest.mark.parametrize("kind", [*EXACT, "pink"])
@pytest.mark.filterwarnings("ignore:kind='pink'")
def test_it_conforms(kind: str) -> None:
    check_guider(Noise(kind))
    assert isinstance(Noise(kind), NoiseHook)
    assert isinstance(Noise(kind), Guider)
    x = normal(2, 4, 4, 4)
    guider = Noise(kind)
    assert guider.on_noise(x) is x  # no run has begun
    start(guider, x)
    state = State(x, x, Step(0, 5.0, 4.0, 8))
    assert torch.equal(guider(state), torch.zeros_like(x))
    guider.finish(x)
    assert guider.on_noise(x) is x
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        before = x.to(dtype)
        kept = before.clone()
        made = start(guider, before)
        assert made.dtype == dtype
        assert made.shape == x.shape
        assert torch.equal(before, kept)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"kind": "blue"}, "orthogonal, antithetic, latin, pink"),
        ({"kind": "latin", "alpha": 1.0}, "unread"),
        ({"kind": "pink", "alpha": -1.0}, "alpha"),
    ],
)
def test_wrong_options_are_errors(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        Noise(**wrong)


# --- inside k-diffusion


@every_exact
def test_a_sampler_starts_from_it(kind: str) -> None:
    probe = Probe()
    wrapped = sparke.wrap(sampling.sample_euler, guider=[Noise(kind), probe])
    prompts = [samplers.PROMPTS[0]] * 4
    made = samplers.run(wrapped, prompts=prompts)
    torch.manual_seed(0)
    x = MIXTURE.sigma_max * torch.randn(4, 2)
    guider = Noise(kind)
    guider.begin(probe.runs[0])
    expected = guider.on_noise(x)
    assert torch.equal(probe.states[0].x, expected)
    assert not torch.allclose(expected, x, atol=0.1)
    extra = {"cond": MIXTURE.encode(prompts), "cond_scale": 1.0}
    bare = sampling.sample_euler(
        MIXTURE, expected, MIXTURE.sigmas(8), extra_args=extra, disable=True
    )
    assert torch.equal(made, bare)


def test_seeds_are_those_of_the_noise_the_host_drew() -> None:
    alone, with_noise = Probe(), Probe()
    samplers.run(sparke.wrap(sampling.sample_euler, guider=alone))
    samplers.run(sparke.wrap(sampling.sample_euler, guider=[Noise("latin"), with_noise]))
    assert alone.runs[0].seeds == with_noise.runs[0].seeds
    assert len(set(alone.runs[0].seeds)) == 8


def test_only_one_guider_decides_the_noise() -> None:
    with pytest.raises(ArgumentError, match="initial noise"):
        sparke.wrap(sampling.sample_euler, guider=[Noise("latin"), Noise("antithetic")])


# --- inside diffusers' pipelines


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "qwen", "wan", "zimage"])
def test_pipelines_start_from_it(name: str) -> None:
    pipe, probe, bare = tiny.shared(name), Probe(), Probe()
    texts = ["a cat", "a dog", "a tree", "a ship"]
    sparke.wrap(pipe, guider=bare)(**tiny.ALL[name].arguments(texts))
    made = sparke.wrap(pipe, guider=[Noise(), probe])(**tiny.ALL[name].arguments(texts))
    before, after = (seen.states[0].x.flatten(1).double() for seen in (bare, probe))
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=1e-3, atol=1e-6)
    cosines = torch.nn.functional.cosine_similarity(after[:, None], after[None], dim=-1)
    torch.testing.assert_close(cosines, torch.eye(4, dtype=F64), rtol=0, atol=1e-3)
    plain = torch.nn.functional.cosine_similarity(before[:, None], before[None], dim=-1)
    assert float((plain - torch.eye(4)).abs().max()) > 0.01
    assert bool(torch.isfinite(tiny.latents(made)).all())


def test_pink_starts_in_a_pipeline() -> None:
    pipe, probe = tiny.shared("sd"), Probe()
    arguments = tiny.ALL["sd"].arguments(["a cat"] * 8, height=64, width=64)
    sparke.wrap(pipe, guider=[pink(2.0), probe])(**arguments)
    x = probe.states[0].x
    power = torch.fft.fft2(x).abs().square().mean((0, 1))
    assert float(power[0, 1]) > 20 * float(power[16, 16])


def test_a_run_that_starts_from_a_picture_has_no_noise_to_design() -> None:
    pipe = tiny.shared("sd-img2img")
    arguments = tiny.ALL["sd-img2img"].arguments(["a cat", "a dog"])
    bare = tiny.latents(pipe(**arguments)).clone()
    arguments = tiny.ALL["sd-img2img"].arguments(["a cat", "a dog"])
    with pytest.warns(GuidanceWarning, match="Noise"):
        made = tiny.latents(sparke.wrap(pipe, guider=Noise())(**arguments))
    assert torch.equal(made, bare)
