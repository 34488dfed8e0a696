"""The emoji model as a pipeline of diffusers."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import sparke
from sparke.errors import (
    ArgumentError,
    MissingHost,
    ShapeError,
    UnknownName,
    UnsupportedTarget,
)
from sparke.models import emoji
from sparke.models.emoji._levels import Levels
from sparke.protocols import State
from tests.probe import Probe

with warnings.catch_warnings():
    # The host's own dependencies warn at import.
    warnings.simplefilter("ignore")
    from k_diffusion import sampling

DPM, EULER, DDIM = "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler"
FLOW, FLOW_HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
EDM, UNIPC = "EDMEulerScheduler", "UniPCMultistepScheduler"
HEUN, DDPM = "HeunDiscreteScheduler", "DDPMScheduler"

SCHEDULERS: list[tuple[str, str | None]] = [
    (DPM, "epsilon"),
    (DPM, "v_prediction"),
    (DPM, "sample"),
    (EULER, "epsilon"),
    (EULER, "v_prediction"),
    (EULER, "sample"),
    ("EulerAncestralDiscreteScheduler", "epsilon"),
    ("EulerAncestralDiscreteScheduler", "v_prediction"),
    (HEUN, "epsilon"),
    (HEUN, "v_prediction"),
    (DDIM, "epsilon"),
    (DDIM, "v_prediction"),
    (DDIM, "sample"),
    (DDPM, "epsilon"),
    (UNIPC, "epsilon"),
    (UNIPC, "v_prediction"),
    (FLOW, None),
    (FLOW_HEUN, None),
    (EDM, "epsilon"),
    (EDM, "v_prediction"),
    ("EDMDPMSolverMultistepScheduler", "epsilon"),
]


@functools.cache
def built(scheduler: str = DPM, prediction_type: str | None = None) -> Any:
    pipe = emoji.pipeline(scheduler, prediction_type=prediction_type)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> Iterator[Any]:
    """The default pipeline, with the scheduler it was made with."""
    found = built()
    before = found.scheduler
    yield found
    found.scheduler = before


@pytest.fixture(scope="module")
def judge() -> emoji.Judge:
    return emoji.load_judge()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(rows: int) -> Tensor:
    return torch.randn(rows, 320, generator=seeded(1))


def latents(pipe: Any, prompt: Any, **options: Any) -> Tensor:
    options = {"generator": seeded(), **options}
    found: Tensor = pipe(prompt, output_type="latent", **options).images
    return found


def names(judge: emoji.Judge, pictures: Tensor, prompts: Sequence[str]) -> float:
    """The lesser share of right names by the judge's two methods; pictures in [0, 1]."""
    return min(judge.name_accuracy(judge(2 * pictures.float() - 1), judge.ids(prompts)))


def noise_of(scheduler: Any, t: Tensor, sample: Tensor) -> tuple[Tensor, float]:
    """A scheduler's sample in the form x0 + sigma eps, and sigma, before a step is taken."""
    if not hasattr(scheduler, "sigmas"):  # DDIM and DDPM
        kept = float(scheduler.alphas_cumprod[int(t)])
        return sample / kept**0.5, (1 / kept - 1) ** 0.5
    sigma = float(scheduler.sigmas[scheduler.step_index])
    if "FlowMatch" in type(scheduler).__name__:
        alpha = max(1 - sigma, 1e-9)
        return sample / alpha, sigma / alpha
    is_exploding = scheduler.init_noise_sigma > 1
    return sample if is_exploding else sample * (1 + sigma**2) ** 0.5, sigma


def watch(pipe: Any, steps: list[tuple[float, Tensor, Tensor]], embeds: Tensor) -> None:
    """Note (sigma, denoised as read, denoised by the model) of each step taken from now on.

    Schedulers read by their own code, or by the formula of their source where it is inline.
    """
    scheduler, model = pipe.scheduler, pipe.transformer.model
    original = scheduler.step

    @functools.wraps(original)
    def step(output: Tensor, t: Tensor, sample: Tensor, **options: Any) -> Any:
        if hasattr(scheduler, "step_index") and scheduler.step_index is None:
            scheduler._init_step_index(t)
        noisy, sigma = noise_of(scheduler, t, sample)
        read = None
        if hasattr(scheduler, "convert_model_output"):
            read = scheduler.convert_model_output(output, sample=sample)
        elif "FlowMatch" in type(scheduler).__name__:
            read = sample - scheduler.sigmas[scheduler.step_index] * output
        result = original(output, t, sample, **{**options, "return_dict": True})
        if read is None:
            read = result.pred_original_sample
        if sigma > model.sigma_max:  # pure noise: asked at the greatest level
            noisy, sigma = noisy * (model.sigma_max / sigma), model.sigma_max
        steps.append((sigma, read, model(noisy, torch.tensor([sigma]), cond=embeds)))
        return (result.prev_sample,)

    scheduler.step = step


@pytest.mark.parametrize(("scheduler", "prediction_type"), SCHEDULERS)
def test_schedulers_read_what_the_model_denoised(
    scheduler: str, prediction_type: str | None
) -> None:
    pipe = built(scheduler, prediction_type)
    prompts = ["dog face", "woman cook tone:dark", "rocket"]
    seen: list[tuple[float, Tensor, Tensor]] = []
    watch(pipe, seen, pipe.transformer.model.encode(prompts))
    try:
        latents(pipe, prompts, num_inference_steps=7, guidance_scale=1.0)
    finally:
        del pipe.scheduler.step
    assert len(seen) == pipe.num_timesteps == (13 if pipe.scheduler.order == 2 else 7)
    # DDIM and DDPM space their times so that the first is one step from the end of the table.
    assert max(sigma for sigma, _, _ in seen) > 50
    assert min(sigma for sigma, _, _ in seen) < 0.11
    for sigma, read, denoised in seen:
        off = float((read - denoised).norm() / denoised.norm())
        assert off < 1e-3, f"{off} at sigma {sigma}"


@pytest.mark.parametrize(
    ("scheduler", "prediction_type", "steps"),
    [
        (DPM, "epsilon", 25),
        (DPM, "v_prediction", 25),
        (FLOW, None, 25),
        (FLOW_HEUN, None, 15),
        (EULER, "epsilon", 25),
        (HEUN, "epsilon", 13),
        ("EulerAncestralDiscreteScheduler", "epsilon", 25),
        (DDIM, "epsilon", 25),
        (DDPM, "epsilon", 25),
        (UNIPC, "epsilon", 20),
        ("LCMScheduler", "epsilon", 10),
        ("EDMDPMSolverMultistepScheduler", "epsilon", 25),
    ],
)
def test_pictures_show_their_prompts(
    judge: emoji.Judge, scheduler: str, prediction_type: str | None, steps: int
) -> None:
    pipe = built(scheduler, prediction_type)
    prompts = list(emoji.EVALUATION_PROMPTS)
    pictures = pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=1.0,
        num_images_per_prompt=4,
        generator=seeded(),
        output_type="pt",
    ).images
    assert names(judge, pictures, [p for p in prompts for _ in range(4)]) > 0.95


def test_default_grids_are_those_of_the_model() -> None:
    expected = built().transformer.model.sigmas(25)
    for name in (DPM, UNIPC, EULER, EDM, FLOW):
        pipe = built(name)
        latents(pipe, "pizza", guidance_scale=1.0)
        sigmas = pipe.scheduler.sigmas
        sigmas = sigmas / (1 - sigmas) if name == FLOW else sigmas
        torch.testing.assert_close(sigmas, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [(EULER, "sample_euler"), (FLOW, "sample_euler"), (DPM, "sample_dpmpp_2m")],
)
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_the_same_noise_ends_where_k_diffusion_ends(
    scheduler: str, sampler: str, scale: float
) -> None:
    pipe = built(scheduler)
    model = pipe.transformer.model
    prompts, avoided = ["princess", "dog face", "tulip"], ["man", "cat face", "rose"]
    ours = latents(
        pipe,
        prompts,
        negative_prompt=avoided,
        latents=noise(3),
        guidance_scale=scale,
        num_inference_steps=20,
    )
    theirs = getattr(sampling, sampler)(
        model,
        noise(3) * model.sigma_max,
        model.sigmas(20),
        extra_args={
            "cond": model.encode(prompts),
            "uncond": model.encode(avoided),
            "cond_scale": scale,
        },
        disable=True,
    )
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-3


@pytest.mark.parametrize("name", [EULER, DDIM, FLOW, UNIPC, "LCMScheduler"])
def test_the_scheduler_is_exchanged_as_usual(pipe: Any, judge: emoji.Judge, name: str) -> None:
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    prompts = ["dog face", "rocket", "pizza", "princess"]
    pictures = pipe(prompts, guidance_scale=1.0, generator=seeded(), output_type="pt").images
    assert names(judge, pictures, prompts) == 1


def test_a_stable_diffusion_scheduler_runs_too(judge: emoji.Judge) -> None:
    theirs = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon"
    )
    pipe = emoji.pipeline(theirs)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler is theirs
    prompts = ["dog face", "rocket", "pizza", "princess"]
    pictures = pipe(prompts, guidance_scale=1.0, generator=seeded(), output_type="pt").images
    assert names(judge, pictures, prompts) == 1


def test_levels_between_the_entries_of_a_table() -> None:
    scheduler = built(EULER).scheduler
    scheduler.set_timesteps(10)
    levels = Levels(scheduler)
    low, high = levels(400.0), levels(401.0)
    middle = levels(400.5)
    assert middle.ratio(1e9) == pytest.approx((low.ratio(1e9) * high.ratio(1e9)) ** 0.5, rel=1e-6)
    for level in (low, middle, high):
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1)
    flow = Levels(built(FLOW).scheduler)
    assert flow(1000.0).alpha == 0
    assert flow(1000.0).ratio(100.0) == 100.0
    assert flow(500.0).ratio(100.0) == pytest.approx(1.0)


def test_a_rounded_time_has_the_sigma_the_scheduler_goes_on_with() -> None:
    scheduler = built().scheduler
    scheduler.set_timesteps(25)
    levels = Levels(scheduler)
    assert not scheduler.timesteps.is_floating_point()
    for time, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False):
        assert levels(time).ratio(1e9) == pytest.approx(sigma, rel=1e-6)


def test_the_network_is_called_as_others_are(pipe: Any) -> None:
    network, model = pipe.transformer, pipe.transformer.model
    pipe.scheduler.set_timesteps(10)
    levels = network.follow(pipe.scheduler)
    times = pipe.scheduler.timesteps[[2, 7]]
    x, embeds = noise(2), model.encode(["pizza", "tulip"])
    together = network(x, times, encoder_hidden_states=embeds).sample
    for i, time in enumerate(times):
        (alone,) = network(x[i : i + 1], time, embeds[i : i + 1], return_dict=False)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        level = levels(float(time))
        sigma = torch.tensor([level.sigma / level.alpha])
        denoised = model(x[i : i + 1] / level.alpha, sigma, cond=embeds[i : i + 1])
        epsilon = (x[i : i + 1] - level.alpha * denoised) / level.sigma
        torch.testing.assert_close(alone, epsilon, rtol=1e-3, atol=1e-4)
    assert network.device == torch.device("cpu")
    assert network.dtype == torch.float32


def test_pictures_in_every_form(pipe: Any) -> None:
    model = pipe.transformer.model
    call = functools.partial(pipe, ["pizza", "tulip"], num_inference_steps=4)
    plain = call(generator=seeded(), output_type="latent").images
    pixels = (model.decode(plain) + 1) / 2
    assert torch.equal(call(generator=seeded(), output_type="pt").images, pixels)
    array = call(generator=seeded(), output_type="np").images
    assert array.shape == (2, 32, 32, 3)
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), pixels)
    pictures = call(generator=seeded()).images
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    assert pictures[0].getpixel((16, 16)) == tuple((array[0, 16, 16] * 255).round().astype(int))
    (same,) = call(generator=seeded(), output_type="latent", return_dict=False)
    assert torch.equal(same, plain)


def test_what_the_pipeline_offers(pipe: Any) -> None:
    model = pipe.transformer.model
    assert isinstance(pipe, diffusers.DiffusionPipeline)
    assert type(pipe).__name__ == "EmojiPipeline"
    assert set(pipe.components) == {"transformer", "scheduler"}
    assert pipe.sigma_data == model.sigma_data
    assert len(set(pipe.reference_prompts)) == 16
    assert not set(pipe.reference_prompts) & set(emoji.EVALUATION_PROMPTS)
    assert set(pipe.reference_prompts) <= set(model.prompts)
    for name, kind in ((None, DPM), (DDIM, DDIM)):
        assert type(emoji.pipeline(name).scheduler).__name__ == kind


def test_encoded_prompts(pipe: Any) -> None:
    model = pipe.transformer.model
    prompts = ["pizza", "tulip"]
    embeds, none = pipe.encode_prompt(prompts, torch.device("cpu"), 2, False)
    assert none is None
    assert torch.equal(embeds, model.encode(["pizza", "pizza", "tulip", "tulip"]))
    _, avoided = pipe.encode_prompt(prompts, negative_prompt="house")
    assert torch.equal(avoided, model.encode(["house", "house"]))
    _, avoided = pipe.encode_prompt("pizza", num_images_per_prompt=3)
    assert torch.equal(avoided, model.null_embeds(3))


def test_embeddings_and_latents_may_be_given(pipe: Any) -> None:
    model = pipe.transformer.model
    options = {"latents": noise(2), "num_inference_steps": 4}
    said = latents(pipe, ["pizza", "tulip"], negative_prompt="house", **options)
    given = latents(
        pipe,
        None,
        prompt_embeds=model.encode(["pizza", "tulip"]),
        negative_prompt_embeds=model.encode(["house", "house"]),
        **options,
    )
    assert torch.equal(said, given)
    assert not torch.equal(said, latents(pipe, ["pizza", "tulip"], **options))


def test_one_generator_for_each_picture(pipe: Any) -> None:
    options = {"num_inference_steps": 3}
    both = latents(pipe, ["pizza"] * 2, generator=[seeded(1), seeded(2)], **options)
    for i, row in enumerate(both):
        alone = latents(pipe, "pizza", generator=seeded(i + 1), **options)
        torch.testing.assert_close(row, alone[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentError, match="a list of 2"):
        latents(pipe, ["pizza"] * 2, generator=[seeded(1)], **options)


def test_eta_and_generator_reach_the_scheduler() -> None:
    pipe = built(DDIM)
    options = {"num_inference_steps": 4, "latents": noise(1)}
    quiet, loud = (latents(pipe, "pizza", eta=eta, **options) for eta in (0.0, 1.0))
    assert not torch.equal(quiet, loud)
    assert torch.equal(loud, latents(pipe, "pizza", eta=1.0, **options))
    ancestral = built("EulerAncestralDiscreteScheduler", "epsilon")
    first, second = (latents(ancestral, "pizza", **options) for _ in range(2))
    assert torch.equal(first, second)


def test_callbacks_see_and_replace(pipe: Any) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def callback(host: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert host is pipe
        assert (host.num_timesteps, host.guidance_scale) == (5, 6.0)
        assert host.do_classifier_free_guidance
        seen.append((i, float(t), tuple(tensors["prompt_embeds"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 4 else {}

    out = latents(
        pipe,
        ["pizza", "tulip"],
        num_inference_steps=5,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert [i for i, _, _ in seen] == list(range(5))
    assert [t for _, t, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert {shape for _, _, shape in seen} == {(4, 128)}
    assert torch.equal(out, torch.zeros(2, 320))


def test_a_callback_interrupts(pipe: Any) -> None:
    count: list[int] = []

    def callback(host: Any, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        count.append(i)
        host._interrupt = i == 1
        return {}

    latents(pipe, "pizza", num_inference_steps=5, callback_on_step_end=callback)
    assert count == [0, 1]
    assert pipe.interrupt
    latents(pipe, "pizza", num_inference_steps=2)
    assert not pipe.interrupt


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"prompt": None}, ArgumentError, "prompt or prompt_embeds must be given"),
        ({"prompt_embeds": torch.zeros(1, 128)}, ArgumentError, "must not both"),
        ({"prompt": 3}, ArgumentError, "list of strings"),
        ({"prompt": []}, ArgumentError, "list of strings"),
        ({"prompt": ["pizza", 3]}, ArgumentError, "list of strings"),
        ({"negative_prompt": ["a"] * 3}, ArgumentError, "as many as prompts"),
        (
            {"negative_prompt": "man", "negative_prompt_embeds": torch.zeros(1, 128)},
            ArgumentError,
            "negative_prompt and negative_prompt_embeds",
        ),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 7)}, ShapeError, r"\(1, 128\)"),
        ({"negative_prompt_embeds": torch.zeros(2, 128)}, ShapeError, r"\(1, 128\)"),
        ({"latents": torch.zeros(1, 4, 8, 10)}, ShapeError, r"\(1, 320\)"),
        ({"output_type": "png"}, ArgumentError, "pil, np, pt, latent"),
        ({"num_inference_steps": 0}, ArgumentError, "num_inference_steps must be at least 1"),
        ({"num_images_per_prompt": 0}, ArgumentError, "num_images_per_prompt must be at least 1"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            ArgumentError,
            "tensor_inputs must be among latents",
        ),
        ({"prompt": "ocotpus"}, emoji.UnknownWords, "near: octopus"),
        ({"negative_prompt": "ocotpus"}, emoji.UnknownWords, "near: octopus"),
    ],
)
def test_calls_that_are_refused(
    pipe: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        pipe(**{"prompt": "pizza", "num_inference_steps": 2, **options})


def test_schedulers_that_are_refused(pipe: Any) -> None:
    with pytest.raises(UnknownName, match="EulerDiscreteScheduler"):
        emoji.pipeline("EulerDiscretScheduler")
    for name in ("CMStochasticIterativeScheduler", "SCMScheduler", "VQDiffusionScheduler"):
        with pytest.raises(UnsupportedTarget, match=name):
            emoji.pipeline(name)
    with pytest.raises(UnsupportedTarget, match="Adam"):
        emoji.pipeline(torch.optim.Adam([torch.zeros(1)]))
    with pytest.raises(ArgumentError, match="clip_sample=False"):
        emoji.pipeline(diffusers.DDIMScheduler())
    with pytest.raises(ArgumentError, match="prediction_type of EDMEulerScheduler"):
        emoji.pipeline(EDM, prediction_type="sample")
    with pytest.raises(ArgumentError, match="reads 'flow_prediction'"):
        emoji.pipeline(FLOW, prediction_type="epsilon")
    with pytest.raises(ArgumentError, match="reads 'epsilon'"):
        emoji.pipeline(diffusers.EulerDiscreteScheduler(), prediction_type="v_prediction")
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ArgumentError, match="clip_sample=False"):
        pipe("pizza")


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingHost, match=r"sparke\[diffusers\]"):
        emoji.pipeline()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(judge: emoji.Judge, dtype: torch.dtype) -> None:
    pipe = emoji.pipeline(prediction_type="v_prediction", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["dog face", "rocket", "pizza", "princess"]
    call = functools.partial(pipe, prompts, guidance_scale=1.0)
    assert call(generator=seeded(), output_type="latent").images.dtype == dtype
    pictures = call(generator=seeded(), output_type="pt").images
    assert names(judge, pictures, prompts) == 1


def test_guidance_works_and_at_scale_0_changes_no_bit(pipe: Any) -> None:
    guided = sparke.wrap(pipe, score="cond-rke")
    assert isinstance(guided, type(pipe))
    pictures = guided("dog face", num_images_per_prompt=4, generator=seeded()).images
    assert len(pictures) == len(guided.memory) == 4
    plain = latents(pipe, "dog face", num_images_per_prompt=4)
    pushed = latents(guided, "dog face", num_images_per_prompt=4)
    assert float((pushed - plain).norm() / plain.norm()) > 0.1
    idle = sparke.wrap(pipe, score="cond-rke", scale=0)
    assert torch.equal(latents(idle, "dog face", num_images_per_prompt=4), plain)
    assert torch.equal(latents(pipe, "dog face", num_images_per_prompt=4), plain)


class Spy(Probe):
    """Keeps the conditional predictions too."""

    def __init__(self) -> None:
        super().__init__()
        self.cond: list[Tensor] = []

    def __call__(self, state: State) -> Tensor:
        assert state.conditional is not None
        self.cond.append(state.conditional())
        return super().__call__(state)


@pytest.mark.parametrize("name", [DPM, EULER, DDIM, FLOW, EDM])
def test_guiders_see_the_model_itself(name: str) -> None:
    pipe, spy = built(name), Spy()
    model = pipe.transformer.model
    wrapped = sparke.wrap(pipe, guider=spy)
    prompts = ["dog face", "tulip"]
    out = latents(wrapped, prompts, num_images_per_prompt=2, num_inference_steps=5)
    embeds = model.encode(prompts).repeat_interleave(2, 0)
    (run,) = spy.runs
    assert run.sigma_data == model.sigma_data
    assert run.cond is not None
    assert run.cond_origin is not None
    torch.testing.assert_close(run.cond, embeds)
    torch.testing.assert_close(run.cond_origin, model.encode(pipe.reference_prompts).mean(0))
    assert len(spy.states) == 5
    for state, cond in zip(spy.states, spy.cond, strict=True):
        sigma = torch.tensor([state.step.sigma])
        guided = model(state.x, sigma, cond=embeds, cond_scale=6.0)
        assert float((state.denoised - guided).norm() / guided.norm()) < 2e-3
        alone = model(state.x, sigma, cond=embeds)
        assert float((cond - alone).norm() / alone.norm()) < 2e-3
    assert torch.equal(spy.finished[0], out)
