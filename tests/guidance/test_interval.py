"""The guidance interval against guidance done by hand, on denoisers and on real pipelines."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from torch import Tensor

import sparke
from sparke.errors import ArgumentError
from sparke.guidance import DiversityGuider
from sparke.guidance.interval import Interval
from sparke.models import emoji
from sparke.protocols import GuidanceScaleHook, Guider, Run, State, Step
from sparke.testing import check_guider
from tests import samplers
from tests.backends import tiny
from tests.samplers import MIXTURE, Recorder

WINDOW = (0.5, 9.0)


def begun(guider: Interval, sigma_data: float | None = None) -> Interval:
    guider.begin(Run(torch.Size((2, 4)), torch.device("cpu"), torch.float32, sigma_data=sigma_data))
    return guider


def at(sigma: float) -> Step:
    return Step(0, sigma, 0.5 * sigma, 8)


def test_the_scale_is_held_outside_and_the_upper_end_is_inside() -> None:
    guider = begun(Interval())
    inside = {0.0: 1.0, 0.28: 1.0, 0.281: 7.5, 1.0: 7.5, 5.42: 7.5, 5.421: 1.0, 80.0: 1.0}
    for sigma, scale in inside.items():
        assert guider.on_guidance_scale(at(sigma), 7.5) == scale
    assert begun(Interval(0.28, 2.9)).on_guidance_scale(at(5.0), 2.0) == 1.0
    assert begun(Interval(1.0, math.inf)).on_guidance_scale(at(math.inf), 2.0) == 2.0
    assert begun(Interval()).on_guidance_scale(at(math.inf), 2.0) == 1.0


def test_ends_may_be_in_units_of_the_data() -> None:
    told = begun(Interval(0.5, 2.0, relative=True), sigma_data=3.0)
    own = begun(Interval(0.5, 2.0, relative=True, sigma_data=3.0), sigma_data=99.0)
    for guider in (told, own):
        scales = [guider.on_guidance_scale(at(sigma), 4.0) for sigma in (1.5, 1.6, 6.0, 6.1)]
        assert scales == [1.0, 4.0, 4.0, 1.0]
    unread = begun(Interval(0.5, 2.0), sigma_data=3.0)
    assert unread.on_guidance_scale(at(2.5), 4.0) == 1.0
    with pytest.raises(ArgumentError, match="sigma_data"):
        begun(Interval(0.5, 2.0, relative=True))


def test_before_and_after_a_run_the_scale_is_the_hosts() -> None:
    guider = Interval()
    assert guider.on_guidance_scale(at(80.0), 7.5) == 7.5
    begun(guider).finish(torch.zeros(2, 4))
    assert guider.on_guidance_scale(at(80.0), 7.5) == 7.5


def test_denoised_is_not_displaced() -> None:
    x = torch.randn(2, 4)
    assert torch.equal(begun(Interval())(State(x, x, at(80.0))), torch.zeros(2, 4))


def test_it_conforms_and_claims_the_scale() -> None:
    check_guider(Interval())
    assert isinstance(Interval(), GuidanceScaleHook)
    assert isinstance(Interval(), Guider)
    assert Interval().exclusive == {"guidance_scale"}
    assert Interval().idle == Interval(0, math.inf).exclusive == frozenset()
    assert Interval(0, math.inf).idle == {"guidance_scale"}
    assert repr(Interval()) == "Interval(0.28, 5.42)"
    assert repr(Interval(0, 1.6, relative=True)) == (
        "Interval(0.0, 1.6, relative=True, sigma_data=None)"
    )
    with pytest.raises(ArgumentError, match="Interval"):
        sparke.wrap(sampling.sample_euler, guider=[Interval(), Interval(1.0, 2.0)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"lo": -1.0},
        {"lo": 3.0, "hi": 2.0},
        {"hi": math.nan},
        {"hi": None},
        {"lo": None},
        {"hi": "1"},
        {"hi": torch.ones(2)},
        {"hi": -math.inf},
        {"sigma_data": 1.0},
    ],
)
def test_wrong_options_are_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        Interval(**wrong)


# --- inside k-diffusion


class ByHand:
    """Classifier-free guidance as everybody's CFGDenoiser does it, with a window in it."""

    def __call__(
        self, x: Tensor, sigma: Tensor, cond: Tensor, cond_scale: float, uncond: Any = None
    ) -> Tensor:
        wanted = MIXTURE(x, sigma, cond=cond)
        if not WINDOW[0] < float(sigma[0]) <= WINDOW[1]:
            return wanted
        anyone = MIXTURE(x, sigma)
        return anyone + cond_scale * (wanted - anyone)


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpmpp_2m", "sample_lms"])
def test_a_sampler_is_guided_inside_alone(name: str) -> None:
    sampler = samplers.of(name)
    ours = samplers.run(sparke.wrap(sampler, guider=Interval(*WINDOW)), cond_scale=3.0, steps=12)
    by_hand = samplers.run(sampler, ByHand(), cond_scale=3.0, steps=12)
    torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, samplers.run(sampler, cond_scale=3.0, steps=12), atol=0.05)


def test_the_denoiser_is_told_scale_one_outside() -> None:
    model = Recorder()
    samplers.run(
        sparke.wrap(sampling.sample_euler, guider=Interval(*WINDOW)),
        model,
        cond_scale=3.0,
        steps=12,
    )
    assert model.calls == 12
    for sigma, options in zip(model.sigmas, model.options, strict=True):
        assert options["cond_scale"] == (3.0 if WINDOW[0] < sigma <= WINDOW[1] else 1.0)
    assert len({options["cond_scale"] for options in model.options}) == 2


def test_an_interval_of_everything_is_bit_identical() -> None:
    bare = samplers.run(sampling.sample_euler, cond_scale=3.0)
    everything = sparke.wrap(sampling.sample_euler, guider=Interval(0, math.inf))
    assert torch.equal(samplers.run(everything, cond_scale=3.0), bare)


def test_a_diversity_guiders_own_interval_rests_beside_it() -> None:
    """Guided where Interval says, not where the DiversityGuider would."""
    model = Recorder()
    both = sparke.wrap(sampling.sample_euler, guider=[Interval(20.0, 90.0), DiversityGuider()])
    samplers.run(both, model, cond_scale=3.0, steps=12)
    for sigma, options in zip(model.sigmas, model.options, strict=True):
        assert options["cond_scale"] == (3.0 if sigma > 20 else 1.0)


def test_modes_come_back_on_the_trained_model_at_high_guidance() -> None:
    model, judge = emoji.load(), emoji.load_judge()
    prompts = list(emoji.EVALUATION_PROMPTS[::2]) * 24
    x = torch.randn(len(prompts), 320, generator=torch.Generator().manual_seed(0))
    extra = {"cond": model.encode(prompts), "cond_scale": 6.0}

    def figures(sampler: samplers.Sampler) -> tuple[float, float]:
        with torch.no_grad():
            made = sampler(
                model, model.sigma_max * x, model.sigmas(12), extra_args=extra, disable=True
            )
        verdict, ids = judge(model.decode(made)), judge.ids(prompts)
        return judge.effective_modes(verdict, ids), judge.name_accuracy(verdict, ids)[0]

    interval = Interval(0, 1.6, relative=True)
    plain, _ = figures(sampling.sample_dpmpp_2m)
    modes, names = figures(sparke.wrap(sampling.sample_dpmpp_2m, guider=interval))
    assert modes > plain + 1.2
    assert names > 0.97


# --- inside diffusers' pipelines


def sigmas_of(pipe: Any, steps: int) -> list[float]:
    """Noise over signal at each step, from the scheduler's own table."""
    pipe.scheduler.set_timesteps(steps)
    kept = [float(pipe.scheduler.alphas_cumprod[int(t)]) for t in pipe.scheduler.timesteps]
    return [math.sqrt((1 - a) / a) for a in kept]


def test_a_pipeline_is_guided_inside_alone() -> None:
    """Against Stable Diffusion with its own scale set from step to step."""
    pipe = tiny.with_scheduler(tiny.ALL["sd"].make(), "DDIMScheduler")
    steps, off = 8, 1 + 1e-6  # the pipeline must not find out that it is not guiding
    levels = sigmas_of(pipe, steps)
    lo, hi = (levels[6] + levels[5]) / 2, (levels[2] + levels[1]) / 2
    wanted = [6.0 if lo < sigma <= hi else off for sigma in levels]
    assert [scale > 2 for scale in wanted] == [False] * 2 + [True] * 4 + [False] * 2

    def set_next(pipe: Any, i: int, _: Any, __: Any) -> dict[str, Any]:
        pipe._guidance_scale = wanted[min(i + 1, steps - 1)]
        return {}

    options: dict[str, Any] = {"num_inference_steps": steps}
    arguments = tiny.ALL["sd"].arguments(["a cat", "a dog"], **options)
    by_hand = tiny.latents(
        pipe(**{**arguments, "guidance_scale": off, "callback_on_step_end": set_next})
    )
    arguments = tiny.ALL["sd"].arguments(["a cat", "a dog"], **options, guidance_scale=6.0)
    ours = tiny.latents(sparke.wrap(pipe, guider=Interval(lo, hi))(**arguments))
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-4)
    arguments = tiny.ALL["sd"].arguments(["a cat", "a dog"], **options, guidance_scale=6.0)
    assert not torch.allclose(ours, tiny.latents(pipe(**arguments)), atol=0.05)


@pytest.mark.parametrize("name", ["sd", "sd3", "zimage", "wan"])
def test_pipelines_are_unguided_outside_and_untouched_inside(name: str) -> None:
    pipe = tiny.shared(name)
    off: dict[str, Any] = {"guidance_scale": 0.0 if name == "zimage" else 1.0}

    def call(guider: Interval | None = None, **changes: Any) -> Tensor:
        target = pipe if guider is None else sparke.wrap(pipe, guider=guider)
        arguments = tiny.ALL[name].arguments(["a cat", "a dog"], **changes)
        return tiny.latents(target(**arguments)).clone()

    bare, unguided, held = call(), call(**off), call(Interval(0, 0))
    assert torch.equal(call(Interval(0, math.inf)), bare)
    near = 1e-4 * max(1.0, float(unguided.abs().max()))
    torch.testing.assert_close(held, unguided, rtol=0, atol=near)
    assert not torch.allclose(held, bare, atol=10 * near)


def test_where_branches_are_called_apart_the_unconditional_one_is_saved() -> None:
    pipe = tiny.ALL["wan"].make()
    counts = []
    for guider in (Interval(0, math.inf), Interval(0, 0)):
        calls: list[int] = []
        handle = pipe.transformer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        sparke.wrap(pipe, guider=guider)(**tiny.ALL["wan"].arguments(["a cat"]))
        handle.remove()
        counts.append(len(calls))
    assert counts[0] == 2 * counts[1] > 0
