"""CADS against its formula written in loops, and inside real samplers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from scipy import stats
from torch import Tensor

import sparke
from sparke.errors import ArgumentError, ShapeError
from sparke.guidance.cads import CADS
from sparke.models import emoji
from sparke.protocols import ConditionHook, Guider, Run, State, Step
from sparke.testing import check_guider
from tests import samplers
from tests.backends import tiny
from tests.probe import Probe
from tests.samplers import MIXTURE

F64 = torch.float64
HALFWAY = Step(index=2, sigma=8.0, sigma_next=6.0, total=8)
"""Where t is 0.75 and, with the defaults, gamma 0.5."""


def started(guider: CADS, seeds: tuple[int, ...] = (11, 12, 13)) -> CADS:
    shape = torch.Size((len(seeds), 4))
    guider.begin(Run(shape, torch.device("cpu"), torch.float32, seeds=seeds))
    return guider


def embeds(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=g, dtype=F64) + 0.5).to(dtype)


def noise_of(
    y: Tensor, step: Step, gamma: float, mask: Tensor | None = None, **options: Any
) -> Any:
    """The noise added at a step, solved for where nothing is rescaled."""
    bare = started(CADS(1.0, psi=0.0, **options)).on_condition(y, step, mask)
    return (bare - math.sqrt(gamma) * y) / math.sqrt(1 - gamma)


def annealed(
    y: list[list[float]], n: list[list[float]], gamma: float, s: float, psi: float
) -> list[list[float]]:
    """y' of one sample's tokens, number by number."""
    noisy = [
        [math.sqrt(gamma) * a + s * math.sqrt(1 - gamma) * b for a, b in zip(u, v, strict=True)]
        for u, v in zip(y, n, strict=True)
    ]

    def mean_and_std(rows: list[list[float]]) -> tuple[float, float]:
        flat = [v for row in rows for v in row]
        mean = sum(flat) / len(flat)
        return mean, math.sqrt(sum((v - mean) ** 2 for v in flat) / (len(flat) - 1))

    (m, d), (m0, d0) = mean_and_std(noisy), mean_and_std(y)
    return [[psi * ((v - m) / d * d0 + m0) + (1 - psi) * v for v in row] for row in noisy]


# --- the formula


@pytest.mark.parametrize("psi", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("s", [0.25, 2.0])
def test_it_is_the_formula(s: float, psi: float) -> None:
    y = embeds(3, 5, 4)
    n = noise_of(y, HALFWAY, 0.5)
    ours = started(CADS(s, psi=psi)).on_condition(y, HALFWAY)
    expected = [annealed(u, v, 0.5, s, psi) for u, v in zip(y.tolist(), n.tolist(), strict=True)]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=F64), rtol=1e-6, atol=1e-6)


def test_only_tokens_of_the_prompt_count_and_padding_is_left_as_it_was() -> None:
    y = embeds(3, 5, 4)
    y[1, 3:] = torch.nan  # whatever padding holds
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    guider = started(CADS(0.8, psi=0.6))
    ours = guider.on_condition(y, HALFWAY, mask)
    n = noise_of(y, HALFWAY, 0.5, mask)
    for i in range(3):
        own = mask[i].bool()
        expected = annealed(y[i, own].tolist(), n[i, own].tolist(), 0.5, 0.8, 0.6)
        torch.testing.assert_close(
            ours[i, own], torch.tensor(expected, dtype=F64), rtol=1e-6, atol=1e-6
        )
        bits = (t[i, ~own].view(torch.int64) for t in (ours, y))
        assert torch.equal(*bits)
    assert torch.equal(guider.on_condition(y, HALFWAY, mask.bool())[2], ours[2])


def test_a_pooled_vector_is_annealed_by_itself() -> None:
    y = embeds(3, 32)
    n = noise_of(y, HALFWAY, 0.5)
    ours = started(CADS(0.5)).on_condition(y, HALFWAY)
    for i in range(3):
        (expected,) = annealed([y[i].tolist()], [n[i].tolist()], 0.5, 0.5, 1.0)
        torch.testing.assert_close(ours[i], torch.tensor(expected, dtype=F64), rtol=1e-6, atol=1e-6)
    first_token = noise_of(embeds(3, 5, 32), HALFWAY, 0.5)[:, 0]
    assert not torch.allclose(n, first_token, atol=0.1)


def test_with_psi_one_each_prompt_keeps_its_mean_and_spread() -> None:
    y = embeds(3, 50, 8, dtype=torch.float32)
    mask = torch.arange(50) < torch.tensor([[50], [20], [3]])
    for index in (0, 1, 2, 3):
        ours = started(CADS(5.0)).on_condition(y, Step(index, 9.0, 8.0, 8), mask)
        for i in range(3):
            own, clean = ours[i, mask[i]], y[i, mask[i]]
            torch.testing.assert_close(own.mean(), clean.mean(), rtol=0, atol=1e-5)
            torch.testing.assert_close(own.std(), clean.std())
            assert not torch.allclose(own, clean, atol=0.1)


def test_above_tau2_nothing_of_the_prompt_is_left() -> None:
    y = embeds(3, 40, 8, dtype=torch.float32)
    first = started(CADS()).on_condition(y, Step(0, 9.0, 8.0, 8))
    other = started(CADS()).on_condition(3 * y.flip(1) - 1, Step(0, 9.0, 8.0, 8))
    unscaled = [
        (t - t.mean((1, 2), keepdim=True)) / t.std((1, 2), keepdim=True) for t in (first, other)
    ]
    torch.testing.assert_close(*unscaled, rtol=0, atol=1e-5)


def test_the_noise_is_standard_normal() -> None:
    n = noise_of(torch.zeros(3, 100, 200, dtype=F64), HALFWAY, 0.5)
    for row in n:
        assert stats.kstest(row.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(n.flatten(1)) - torch.eye(3)
    assert float(correlation.abs().max()) < 5 / math.sqrt(20000)


# --- the schedule


def test_gamma_is_one_then_linear_then_zero() -> None:
    for tau1, tau2 in ((0.6, 0.9), (0.2, 1.0), (0.5, 0.5), (0.0, 0.0)):
        guider = CADS(tau1=tau1, tau2=tau2)
        for index in range(21):
            t = (20 - index) / 20
            expected = 1.0
            if t > tau1:
                expected = 0.0 if t >= tau2 else (tau2 - t) / (tau2 - tau1)
            assert guider.gamma(Step(index, 1.0, 0.9, 20)) == pytest.approx(expected)


def test_time_is_progress_and_without_steps_flow_time() -> None:
    guider = CADS(tau1=0.0, tau2=1.0)
    assert guider.gamma(Step(3, 77.0, 1.0, 12)) == pytest.approx(0.25)
    assert guider.gamma(Step(14, 0.1, 0.0, 12)) == 1.0
    assert guider.gamma(Step(3, 3.0, 1.0)) == pytest.approx(0.25)


def test_flow_time_is_that_of_flow_models() -> None:
    guider = CADS(tau1=0.0, tau2=1.0, time="flow")
    for t in (0.05, 0.4, 0.83, 0.999):
        assert guider.gamma(Step(0, t / (1 - t), 0.0, 4)) == pytest.approx(1 - t)
    assert guider.gamma(Step(0, math.inf, 5.0, 4)) == 0.0


def test_vp_time_is_stable_diffusions_timestep() -> None:
    guider = CADS(tau1=0.0, tau2=1.0, time="vp")
    kept = 1.0
    for i in range(1000):
        kept *= 1 - (math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2
        if i in (0, 10, 250, 500, 750, 990):
            step = Step(0, math.sqrt((1 - kept) / kept), 0.0, 4)
            assert guider.gamma(step) == pytest.approx(1 - (i + 1) / 1000, abs=2e-3)
    assert guider.gamma(Step(0, 500.0, 0.0, 4)) == guider.gamma(Step(0, math.inf, 0.0, 4)) == 0.0
    assert guider.gamma(Step(0, 0.0, 0.0, 4)) == pytest.approx(1.0)


def test_time_may_be_ones_own() -> None:
    guider = CADS(tau1=0.0, tau2=1.0, time=lambda step: step.sigma / 10)
    assert guider.gamma(HALFWAY) == pytest.approx(0.2)


# --- where the noise comes from


def test_noise_is_fresh_each_step_and_the_same_when_a_step_is_evaluated_again() -> None:
    guider, y = started(CADS()), embeds(3, 5, 4)
    steps = [Step(i, 9.0 - i, 8.0 - i, 8) for i in range(3)]
    before = [guider.on_condition(y, step) for step in steps]
    again = [guider.on_condition(y, step) for step in reversed(steps)]
    for one, other in zip(before, reversed(again), strict=True):
        assert torch.equal(one, other)
    drawn = [noise_of(y, step, guider.gamma(step)) for step in steps]
    table = torch.corrcoef(torch.stack(drawn).flatten(1))
    assert float((table - torch.eye(3)).abs().max()) < 0.5


def test_the_same_seed_draws_the_same_in_any_batch() -> None:
    y, seeds = embeds(3, 6, 4, dtype=torch.float32), (5, 6, 7)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    together = started(CADS(), seeds).on_condition(y, HALFWAY, mask)
    for i, seed in enumerate(seeds):
        length = int(mask[i].sum())  # alone, a prompt is padded to its own length
        alone = started(CADS(), (seed,)).on_condition(y[i : i + 1, :length], HALFWAY)
        assert torch.equal(alone[0], together[i, :length])
    left = started(CADS(), seeds).on_condition(y.flip(1), HALFWAY, mask.flip(1))
    padded_left = left[1, 4:]
    right = started(CADS(), seeds).on_condition(
        torch.cat([y[:, :2].flip(1), y[:, 2:]], 1), HALFWAY, mask
    )
    assert torch.equal(padded_left, right[1, :2])


def test_other_seeds_draw_other_noise() -> None:
    y = embeds(1, 5, 4).repeat(3, 1, 1)
    first = started(CADS(), (1, 2, 3)).on_condition(y, HALFWAY)
    second = started(CADS(), (1, 3, 1)).on_condition(y, HALFWAY)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[1])
    assert torch.equal(first[0], second[2])
    assert not torch.equal(first[0], first[1])


def test_without_seeds_rows_draw_by_their_number() -> None:
    y = embeds(3, 5, 4)
    bare = CADS()
    bare.begin(Run(torch.Size((3, 4)), torch.device("cpu"), torch.float32))
    expected = started(CADS(), (0, 1, 2)).on_condition(y, HALFWAY)
    assert torch.equal(bare.on_condition(y, HALFWAY), expected)


def test_nobody_elses_generator_is_moved_and_the_embeddings_stand() -> None:
    y = embeds(3, 5, 4)
    before, state = y.clone(), torch.get_rng_state()
    started(CADS()).on_condition(y, HALFWAY)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, before)


# --- nothing to do, nothing done


def test_what_there_is_nothing_to_anneal_is_handed_back_itself() -> None:
    y = embeds(3, 5, 4)
    clean = Step(6, 1.0, 0.5, 8)
    assert started(CADS()).on_condition(y, clean) is y
    for psi in (0.0, 1.0):
        assert started(CADS(0.0, psi=psi)).on_condition(y, HALFWAY) is y
    guider = CADS()
    assert guider.on_condition(y, HALFWAY) is y
    started(guider).finish(torch.zeros(3, 4))
    assert guider.on_condition(y, HALFWAY) is y


def test_a_prompt_without_tokens_stays() -> None:
    y = embeds(3, 5, 4)
    none = torch.zeros(3, 5, dtype=torch.bool)
    assert torch.equal(started(CADS()).on_condition(y, HALFWAY, none), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    y = embeds(3, 5, 4)
    ours = started(CADS()).on_condition(y.to(dtype), HALFWAY)
    assert ours.dtype == dtype
    expected = started(CADS()).on_condition(y, HALFWAY)
    torch.testing.assert_close(ours.to(F64), expected, rtol=0.02, atol=0.02)


def test_denoised_is_not_displaced() -> None:
    x = torch.randn(3, 4)
    delta = started(CADS())(State(x, x, HALFWAY))
    assert torch.equal(delta, torch.zeros(3, 4))


def test_it_conforms() -> None:
    check_guider(CADS())
    assert isinstance(CADS(), ConditionHook)
    assert isinstance(CADS(), Guider)
    assert CADS().idle == frozenset()
    assert CADS(0).idle == CADS().exclusive == {"condition"}
    assert CADS(0).exclusive == frozenset()
    with pytest.raises(ArgumentError, match="the prompt embeddings alone"):
        sparke.wrap(sampling.sample_euler, guider=["cads", CADS(0.5)])
    wrapped: Any = sparke.wrap(sampling.sample_euler, guider=["cads", CADS(0), "cond-rke"])
    assert len(wrapped.guider.guiders) == 3
    assert repr(CADS(2.0)) == "CADS(s=2.0, tau1=0.6, tau2=0.9, psi=1.0, time='progress')"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"s": -1.0}, "s must be finite and at least 0"),
        ({"tau1": 0.8, "tau2": 0.7}, "tau1 must be at most tau2"),
        ({"tau1": -0.1}, "tau1"),
        ({"psi": 1.5}, "psi must be at most 1"),
        ({"psi": -0.5}, "psi"),
        ({"time": "sigma"}, "progress, flow, vp"),
    ],
)
def test_wrong_options_are_errors(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        CADS(**wrong)


def test_rows_and_masks_that_do_not_fit_are_errors() -> None:
    guider, y = started(CADS()), embeds(3, 5, 4)
    with pytest.raises(ShapeError, match="one row per sample"):
        guider.on_condition(y[:1], HALFWAY)
    with pytest.raises(ShapeError, match=r"must be \(3, 5\), got \(3, 4\)"):
        guider.on_condition(y, HALFWAY, torch.ones(3, 4))


# --- inside k-diffusion


class Listening:
    """The mixture, and the embeddings it was called with."""

    sigma_data, sigma_max = MIXTURE.sigma_data, MIXTURE.sigma_max

    def __init__(self) -> None:
        self.heard: list[tuple[float, Tensor]] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor, **options: Any) -> Tensor:
        self.heard.append((float(sigma[0]), cond))
        out: Tensor = MIXTURE(x, sigma, cond=cond, **options)
        return out


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpmpp_2m"])
def test_samplers_hand_the_denoiser_annealed_embeddings(name: str) -> None:
    model, clean = Listening(), MIXTURE.encode(samplers.PROMPTS)
    samplers.run(sparke.wrap(samplers.of(name), guider=CADS()), model, steps=10)
    levels = [float(sigma) for sigma in MIXTURE.sigmas(10)[:-1]]
    seen: dict[float, Tensor] = {}
    for sigma, cond in model.heard:
        index = min(range(10), key=lambda i: abs(levels[i] - sigma))
        if 1 - index / 10 <= 0.6:
            assert torch.equal(cond, clean)
            continue
        first = seen.setdefault(levels[index], cond)  # Heun comes back to it
        assert torch.equal(first, cond)
        assert not torch.allclose(cond, clean, atol=0.1)
        torch.testing.assert_close(cond.std(1), clean.std(1))
    assert len(seen) == 4
    table = torch.corrcoef(torch.stack([seen[level] for level in levels[:2]]).flatten(1))
    assert abs(float(table[0, 1])) < 0.3  # above tau2, noise alone, and never the same


class Restless(CADS):
    """Noise of its own at each evaluation, as CADS has it where there are steps."""

    evaluations = 0

    def on_condition(self, prompt_embeds: Tensor, step: Step, mask: Tensor | None = None) -> Tensor:
        self.evaluations += 1
        step = replace(step, index=self.evaluations, total=10**6)
        return super().on_condition(prompt_embeds, step, mask)


def test_an_adaptive_solver_sees_one_draw_of_noise_and_takes_few_more_steps() -> None:
    model, prompts = emoji.load(), list(emoji.EVALUATION_PROMPTS[:8])
    clean = model.encode(prompts)
    x = torch.randn(8, 320, generator=torch.Generator().manual_seed(0))

    def heard(guider: Guider) -> list[Tensor]:
        embeds: list[Tensor] = []

        def denoise(x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
            embeds.append(cond)
            out: Tensor = model(x, sigma, cond=cond)
            return out

        adaptive = sparke.wrap(sampling.sample_dpm_adaptive, guider=guider)
        ends = (model.sigma_min, model.sigma_max)
        adaptive(denoise, model.sigma_max * x, *ends, extra_args={"cond": clean}, disable=True)
        return embeds

    ours = heard(CADS(1.0))
    assert not torch.equal(ours[0], clean)
    assert all(torch.equal(embeds, ours[0]) for embeds in ours[:6])
    assert torch.equal(ours[-1], clean)
    assert len(ours) <= 2 * len(heard(Probe()))
    assert len(heard(Restless(1.0, time="flow"))) >= 2 * len(ours)


def test_zero_strength_is_bit_identical_and_singles_equal_the_batch() -> None:
    bare = samplers.run(sampling.sample_dpmpp_2m, cond_scale=3.0)
    off = samplers.run(sparke.wrap(sampling.sample_dpmpp_2m, guider=CADS(0.0)), cond_scale=3.0)
    assert torch.equal(off, bare)
    on = sparke.wrap(sampling.sample_dpmpp_2m, guider=CADS())
    batch = samplers.run(on, cond_scale=3.0)
    assert not torch.equal(batch, bare)
    torch.manual_seed(0)
    x = MIXTURE.sigma_max * torch.randn(len(samplers.PROMPTS), 2)
    for i, prompt in enumerate(samplers.PROMPTS):
        extra = {"cond": MIXTURE.encode([prompt]), "cond_scale": 3.0}
        one = on(MIXTURE, x[i : i + 1], MIXTURE.sigmas(8), extra_args=extra, disable=True)
        torch.testing.assert_close(one[0], batch[i], rtol=0, atol=1e-4)


def test_our_prompt_kernel_reads_the_clean_prompts() -> None:
    probe = Probe()
    samplers.run(sparke.wrap(sampling.sample_euler, guider=[CADS(), probe]))
    clean = MIXTURE.encode(samplers.PROMPTS)
    assert len(probe.states) == 8
    for state in probe.states:
        assert state.cond is not None
        torch.testing.assert_close(state.cond, clean)


def test_modes_come_back_on_the_trained_model_at_high_guidance() -> None:
    model, judge = emoji.load(), emoji.load_judge()
    prompts = list(emoji.EVALUATION_PROMPTS[::2]) * 24
    x = torch.randn(len(prompts), 320, generator=torch.Generator().manual_seed(0))
    extra = {"cond": model.encode(prompts), "cond_scale": 6.0}

    def figures(sampler: Callable[..., Tensor]) -> tuple[float, float]:
        with torch.no_grad():
            made = sampler(
                model, model.sigma_max * x, model.sigmas(12), extra_args=extra, disable=True
            )
        verdict, ids = judge(model.decode(made)), judge.ids(prompts)
        return judge.effective_modes(verdict, ids), judge.name_accuracy(verdict, ids)[0]

    plain, _ = figures(sampling.sample_dpmpp_2m)
    modes, names = figures(sparke.wrap(sampling.sample_dpmpp_2m, guider=CADS(2.0)))
    assert modes > plain + 0.8
    assert names > 0.97


# --- inside diffusers' pipelines

TEXTS = ["a cat", "a large dog on a red mat"]
PIPELINES = {
    "sd": ("encoder_hidden_states",),
    "sdxl": ("encoder_hidden_states", "text_embeds"),
    "pixart-sigma": ("encoder_hidden_states",),
    "sd3": ("encoder_hidden_states", "pooled_projections"),
    "flux": ("encoder_hidden_states", "pooled_projections"),
    "qwen": ("encoder_hidden_states",),
    "wan": ("encoder_hidden_states",),
    "zimage": ("cap_feats",),
}
"""What each pipeline tells its network of the prompt; the last one in a list of tensors."""
STEPS = 10


class Heard:
    """Arguments of a pipeline's network, call by call."""

    def __init__(self, pipe: Any, names: tuple[str, ...]) -> None:
        self.names, self.calls = names, list[dict[str, Any]]()
        self.module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer

    def __call__(self, pipe: Any, name: str, **changes: Any) -> tuple[Tensor, list[dict[str, Any]]]:
        self.calls = []
        handle = self.module.register_forward_pre_hook(self._hear, with_kwargs=True)
        arguments = tiny.ALL[name].arguments(TEXTS, num_inference_steps=STEPS, **changes)
        try:
            made = tiny.latents(pipe(**arguments)).clone()
        finally:
            handle.remove()
        return made, self.calls

    def _hear(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given.update(given.get("added_cond_kwargs") or {})
        self.calls.append(given)


def rows_of(embeds: Any) -> list[Tensor]:
    return [row.clone() for row in embeds]


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_hand_the_network_annealed_embeddings(name: str) -> None:
    pipe, arguments = tiny.shared(name), PIPELINES[name]
    heard = Heard(pipe, arguments)
    bare, clean = heard(pipe, name)
    made, calls = heard(sparke.wrap(pipe, guider=CADS()), name)
    again, _ = heard(sparke.wrap(pipe, guider=CADS()), name)
    assert torch.equal(again, made)
    assert not torch.allclose(made, bare, atol=1e-3)
    assert len(calls) == len(clean)
    per_step = len(calls) // STEPS
    changed = 0
    for at, (ours, theirs) in enumerate(zip(calls, clean, strict=True)):
        early = 1 - at // per_step / STEPS > 0.6
        for argument in arguments:
            before, after = rows_of(theirs[argument]), rows_of(ours[argument])
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            if not early:
                assert all(same)
            elif len(same) == 4:  # the null prompt's two, and the prompts'
                assert sorted(same) == [False, False, True, True]
                assert same in ([True, True, False, False], [False, False, True, True])
            elif per_step == 2:
                assert all(same) or not any(same)
            else:
                assert not any(same)
            for a, b, kept in zip(before, after, same, strict=True):
                if not kept:
                    said = (a != b).reshape(*b.shape).any(-1) if b.ndim > 1 else slice(None)
                    torch.testing.assert_close(b[said].std(), a[said].std(), rtol=1e-3, atol=1e-4)
                    torch.testing.assert_close(b[said].mean(), a[said].mean(), rtol=0, atol=1e-4)
            changed += same.count(False)
    assert changed == 2 * 4 * len(arguments)  # two samples, four early steps


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_with_zero_strength_are_bit_identical(name: str) -> None:
    pipe = tiny.shared(name)
    heard = Heard(pipe, PIPELINES[name])
    assert torch.equal(heard(sparke.wrap(pipe, guider=CADS(0)), name)[0], heard(pipe, name)[0])


@pytest.mark.parametrize(
    ("name", "mask"),
    [("pixart-sigma", "encoder_attention_mask"), ("qwen", "encoder_hidden_states_mask")],
)
def test_padding_in_pipelines_is_left_as_it_was(name: str, mask: str) -> None:
    pipe = tiny.shared(name)
    heard = Heard(pipe, PIPELINES[name])
    _, clean = heard(pipe, name)
    _, calls = heard(sparke.wrap(pipe, guider=CADS()), name)
    padding = 0
    for ours, theirs in zip(calls, clean, strict=True):
        said = ours[mask]
        if said is None:  # nothing padded in this call
            continue
        said = said.flatten(1)
        said = said > -0.5 if bool((said < 0).any()) else said > 0.5
        before, after = (call["encoder_hidden_states"][~said] for call in (theirs, ours))
        assert torch.equal(before, after)
        padding += len(before)
    assert padding > 0


def test_flow_models_are_annealed_by_their_own_time() -> None:
    pipe = tiny.shared("sd3")
    heard = Heard(pipe, PIPELINES["sd3"])
    _, clean = heard(pipe, "sd3")
    _, calls = heard(sparke.wrap(pipe, guider=CADS(time="flow")), "sd3")
    times = [float(call["timestep"].reshape(-1)[0]) / 1000 for call in calls]
    assert min(times) < 0.6 < max(times)
    for t, ours, theirs in zip(times, calls, clean, strict=True):
        same = torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
        assert same == (t <= 0.6)


def test_samples_of_a_pipelines_batch_do_not_depend_on_each_other() -> None:
    pipe = tiny.shared("sd")
    wrapped = sparke.wrap(pipe, guider=CADS())
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def call(texts: list[str], latents: Tensor) -> Tensor:
        arguments = tiny.ALL["sd"].arguments(texts, latents=latents.clone())
        return tiny.latents(wrapped(**arguments)).clone()

    together = call(TEXTS, noise)
    for i, text in enumerate(TEXTS):
        one = call([text], noise[i : i + 1])
        torch.testing.assert_close(one[0], together[i], rtol=0, atol=1e-4)
