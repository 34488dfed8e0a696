"""Calls of the published pipelines, carried over; and with exact=True, what their code computes."""

import inspect
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import sparke
from sparke.compat import RKEGuidedSampling, _guiders, _keywords, get_diffusion_pipeline
from sparke.compat._hosts import HOSTS
from sparke.errors import (
    ArgumentError,
    GuidanceWarning,
    MissingHost,
    ShapeError,
    UnknownName,
)
from sparke.features import ClipFeatures
from sparke.guidance import DiversityGuider
from sparke.memory import RingMemory
from sparke.protocols import Features, Run, State, Step
from tests.backends import tiny

TINY = {
    "sdv1.5": "sd",
    "sdv2.1": "sd-v",
    "sdxl": "sdxl",
    "controlnet_pose_sdv1.5": "sd-controlnet",
    "controlnet_pose_sdxl": "sdxl-controlnet",
    "pixart-sigma": "pixart-sigma",
    "kandinsky-3": "kandinsky3",
    "dit-xl-2": "dit",
}
STRENGTHS: dict[str, Any] = {
    "criteria": "vscore_clip",
    "algorithm": "cond-rke",
    "criteria_guidance_scale": 0.05,
    "kernel": "gaussian",
    "sigma_image": 0.8,
    "sigma_text": 0.35,
    "guidance_freq": 2,
    "use_latents_for_guidance": True,
    "regularize": False,
}


def run(pipe: Any, name: str = "sd", seed: int = 0, **keywords: Any) -> Tensor:
    return tiny.latents(pipe(**tiny.ALL[name].arguments(["a cat"], seed=seed, **keywords)))


def facade(name: str = "sdv1.5", **options: Any) -> Any:
    return get_diffusion_pipeline(name, tiny.shared(TINY[name]), **options)


def test_every_published_name_has_a_pipeline() -> None:
    assert set(TINY) == set(HOSTS)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_pipeline_takes_the_published_keywords(name: str) -> None:
    bare, pipe = tiny.shared(TINY[name]), facade(name)
    assert isinstance(pipe, type(bare))
    plain = run(bare, TINY[name])
    # History is empty in the first call, so nothing pushes yet.
    assert torch.equal(run(pipe, TINY[name], **STRENGTHS), plain)
    assert len(pipe.memory) == 1
    guided = run(pipe, TINY[name], **STRENGTHS)
    assert torch.isfinite(guided).all()
    assert not torch.equal(guided, plain)
    assert len(pipe.memory) == 2


@pytest.mark.parametrize("name", sorted(TINY))
def test_an_unguided_call_is_bit_identical(name: str) -> None:
    bare, pipe = tiny.shared(TINY[name]), facade(name)
    run(pipe, TINY[name])
    plain = run(bare, TINY[name])
    for off in ({"criteria": None}, {"criteria_guidance_scale": 0}):
        assert torch.equal(run(pipe, TINY[name], **{**STRENGTHS, **off}), plain)
    assert len(pipe.memory) == 1
    assert torch.equal(run(bare, TINY[name]), plain)


def test_a_call_without_strengths_is_guided_as_by_wrap() -> None:
    pipe, ours = facade(), sparke.wrap(tiny.shared("sd"))
    for seed in range(3):
        assert torch.equal(run(pipe, seed=seed), run(ours, seed=seed))
    assert torch.equal(pipe.memory.features.x, ours.memory.features.x)


def test_names_of_scores_and_kernels_carry_over_without_strengths() -> None:
    pipe = facade()
    ours = sparke.wrap(tiny.shared("sd"), score="cond-vendi", kernel="cosine", cond_bandwidth=0.2)
    asked: dict[str, Any] = {"algorithm": "cond-vendi", "kernel": "cosine", "sigma_text": 0.2}
    for seed in range(3):
        assert torch.equal(run(pipe, seed=seed, **asked), run(ours, seed=seed))


@pytest.mark.parametrize("algorithm", ["cond-rke", "rke", "vendi", "cond-vendi"])
@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_a_call_with_strengths_runs_the_published_update(algorithm: str, kernel: str) -> None:
    pipe = facade()
    options: dict[str, Any] = {"cond_bandwidth": 0.3} if algorithm.startswith("cond") else {}
    guider = DiversityGuider.published(
        algorithm, eta=0.05, every=2, bandwidth=0.6, kernel=kernel, **options
    )
    ours = sparke.wrap(tiny.shared("sd"), guider=guider)
    asked = {
        **STRENGTHS,
        "algorithm": algorithm,
        "kernel": kernel,
        "sigma_image": 0.6,
        "sigma_text": 0.3,
    }
    results = [(run(pipe, seed=s, **asked), run(ours, seed=s)) for s in range(3)]
    assert all(torch.equal(a, b) for a, b in results)
    assert not torch.equal(results[2][0], run(tiny.shared("sd"), seed=2))


def test_one_strength_is_enough_and_the_rest_has_published_values() -> None:
    asked = _keywords.read({"guidance_freq": 5}, exact=False)
    assert asked is not None
    assert (asked.published, asked.scale, asked.every) == (True, 0.03, 5)
    assert (asked.sigma_image, asked.sigma_text) == (0.8, 0.35)
    assert _keywords.read({"sigma_text": 0.3}, exact=False).published is False  # type: ignore[union-attr]
    assert _keywords.read({}, exact=True).published is True  # type: ignore[union-attr]


def test_the_call_of_their_readme_runs() -> None:
    pipe = facade("sdxl")
    call = tiny.ALL["sdxl"].arguments(["a photorealistic portrait of a man with freckles"])
    published = {
        **STRENGTHS,
        "guidance_scale": 7.5,
        "criteria_guidance_scale": 0.4,
        "guidance_freq": 10,
        "regions_list": ["face"],
    }
    with pytest.warns(GuidanceWarning, match="pictures come apart") as caught:
        pipe(**{**call, **published})
    assert caught[0].filename == __file__
    assert len(pipe.memory) == 1


def test_the_call_of_their_demonstration_runs() -> None:
    pipe = facade("sdxl")
    sampler = RKEGuidedSampling(
        algorithm="rke",
        kernel="gaussian",
        sigma_image=0.6,
        sigma_text=0.3,
        max_bank_size=3,
        use_latents_for_guidance=True,
        model_name="sdxl",
        model=pipe,
    )
    call = {
        "criteria": "vscore_clip",
        "algorithm": "vscore_clip",  # the sampler's own is meant
        "criteria_guidance_scale": 0.02,
        "guidance_freq": 1,
        "F_M": None,
        "F_T": None,
        "F_M_real": None,
        "F_T_real": None,
        "beta": 0,
        "regions_list": [],
        "return_kernels": False,
        "rke_guided_sampler": sampler,
        "logger_": None,
        "clip_for_guidance": object(),
        "regularize": False,
        "regularize_weight": 0,
    }
    guider = DiversityGuider.published(
        "rke", RingMemory(3), eta=0.02, every=1, bandwidth=0.6, kernel="gaussian"
    )
    ours = sparke.wrap(tiny.shared("sdxl"), guider=guider)
    for seed in range(4):
        assert torch.equal(run(pipe, "sdxl", seed, **call), run(ours, "sdxl", seed))
    assert len(sampler.memory) == 3
    assert len(pipe.memory) == 0
    sampler.reset()
    assert len(sampler.memory) == 0


def test_history_lives_as_long_as_the_pipeline() -> None:
    pipe, other = facade(), facade()
    for seed in range(3):
        run(pipe, seed=seed, **STRENGTHS, max_bank_size=5)
    assert (len(pipe.memory), len(other.memory), pipe.memory.capacity) == (3, 0, 5)
    rows = pipe.memory.features.x
    run(pipe, seed=3, **STRENGTHS, max_bank_size=2)
    assert (len(pipe.memory), pipe.memory.capacity) == (2, 2)
    assert torch.equal(pipe.memory.features.x[0], rows[2])
    run(pipe, seed=3, **STRENGTHS)
    assert pipe.memory.capacity == 2
    pipe.reset()
    assert len(pipe.memory) == 0
    assert torch.equal(run(pipe, **STRENGTHS), run(tiny.shared("sd")))


def test_a_memory_from_elsewhere_goes_on(tmp_path: Path) -> None:
    pipe = facade()
    for seed in range(2):
        run(pipe, seed=seed, **STRENGTHS)
    pipe.memory.save(tmp_path / "seen.safetensors")
    again = facade()
    again.memory = RingMemory.load(tmp_path / "seen.safetensors")
    assert torch.equal(run(again, seed=2, **STRENGTHS), run(pipe, seed=2, **STRENGTHS))
    assert len(again.memory) == 3


def test_rows_of_two_kinds_are_not_compared() -> None:
    pipe = facade()
    run(pipe)
    with pytest.raises(ArgumentError, match=r"L2-normalised latents and memory holds latents"):
        run(pipe, **STRENGTHS)
    pipe.reset()
    run(pipe, **STRENGTHS)
    assert len(pipe.memory) == 1


def test_a_failed_call_remembers_nothing() -> None:
    pipe = facade()

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, callback_on_step_end=stop)
    assert len(pipe.memory) == 0
    run(pipe, **STRENGTHS)  # nor what kind of rows it would have been


def test_attributes_are_the_pipeline_s_own() -> None:
    bare = tiny.ALL["sd"].make()
    pipe = get_diffusion_pipeline("sdv1.5", bare)
    assert pipe.to("cpu") is pipe
    tiny.with_scheduler(pipe, "EulerDiscreteScheduler")
    assert bare.scheduler is pipe.scheduler
    run(pipe)
    run(pipe, seed=1)
    assert len(pipe.memory) == 2
    assert pipe.__wrapped__ is bare


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"sigma_img": 0.8}, r"sigma_img= is taken neither.*sigma_image="),
        ({"guidence_scale": 3}, r"guidence_scale= .*guidance_scale="),
        ({"criteria": "clip_loss"}, "criteria must be one of vscore_clip"),
        ({"algorithm": "cond_rke"}, "algorithm must be one of cond-rke"),
        ({"kernel": "linear"}, "kernel must be one of"),
        ({"criteria_guidance_scale": -1}, "criteria_guidance_scale must be finite and at least 0"),
        ({"guidance_freq": 0}, "guidance_freq must be a whole number above 0"),
        ({"sigma_image": 0}, "sigma_image must be finite and above 0"),
        ({"sigma_text": (0.8, 0.3)}, "sigma_text must be a number"),
        ({"max_bank_size": 0}, "max_bank_size must be a whole number"),
        ({"beta": 2.0, "F_M_real": [1]}, "the guider 'cvsg'"),
        ({"regularize": True}, "regularize=True adds a penalty"),
        ({"F_M": [1]}, r"F_M= would go nowhere.*pipe\.memory"),
        ({"return_kernels": True}, r"n x n.*pipe\.memory\.features"),
        ({"rke_guided_sampler": object()}, r"sparke\.compat\.RKEGuidedSampling"),
        ({"use_latents_for_guidance": False}, "clip_for_guidance= takes a CLIP model"),
    ],
)
def test_a_keyword_without_meaning_is_an_error(keywords: dict[str, Any], said: str) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the pipeline ran")

    bare = tiny.ALL["sd"].make()
    bare.encode_prompt = never
    with pytest.raises(ArgumentError, match=said):
        run(get_diffusion_pipeline("sdv1.5", bare), **keywords)


def test_what_is_off_may_be_said() -> None:
    off = {"beta": 2.0, "regularize": False, "regularize_weight": 1e-4, "region": "x"}
    assert _keywords.read(off, exact=False) is not None
    assert _keywords.read({"beta": 0, "F_M_real": [1]}, exact=False) is not None


def test_every_keyword_is_on_the_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "compat.md").read_text(encoding="utf-8")
    assert [name for name in sorted(_keywords.KEYWORDS) if f"`{name}`" not in page] == []
    assert [name for name in HOSTS if f"`{name}`" not in page] == []


# --- classes in place of prompts


def test_classes_are_named_as_prompts() -> None:
    bare = tiny.ALL["dit"].make()
    bare.labels = {"tench": 0, "golden retriever": 207, "tabby": 281}
    pipe = get_diffusion_pipeline("dit-xl-2", bare)
    call = {"num_inference_steps": 2, "output_type": "pt"}

    def by(**prompt: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return tiny.latents(pipe(**call, **prompt, generator=generator, criteria=None))

    wanted = by(class_labels=[207])
    assert torch.equal(by(prompt="golden retriever, in the park"), wanted)
    assert torch.equal(by(prompt=["golden retriever"]), wanted)
    assert not torch.equal(by(prompt="tabby"), wanted)
    with pytest.raises(ArgumentError, match="must name classes"):
        by(prompt="a unicorn")


# --- loading


def test_folders_are_loaded(tmp_path: Path) -> None:
    import diffusers

    tiny.ALL["sd"].make().save_pretrained(tmp_path)
    pipe = get_diffusion_pipeline("sdv1.5", tmp_path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    # The authors put this one in place of the files' own.
    assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler
    made = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    tiny.with_scheduler(made, "DPMSolverMultistepScheduler")
    assert torch.equal(run(pipe, criteria=None), run(made))


def test_a_controlnet_is_found_beside_or_given(tmp_path: Path) -> None:
    made = tiny.ALL["sd-controlnet"].make()
    made.save_pretrained(tmp_path)
    name = "controlnet_pose_sdv1.5"
    pipe = get_diffusion_pipeline(name, str(tmp_path), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(run(pipe, "sd-controlnet", criteria=None), run(made, "sd-controlnet"))
    given = get_diffusion_pipeline(
        name, tmp_path, controlnet=made.controlnet, local_files_only=True
    )
    assert given.controlnet is made.controlnet


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
@pytest.mark.parametrize(
    ("name", "model", "named"),
    [
        ("sdxl", None, "stabilityai/stable-diffusion-xl-base-1.0"),
        ("pixart-sigma", "somebody/something", "somebody/something"),
        ("dit-xl-2", "/no/such/folder", "/no/such/folder"),
        ("controlnet_pose_sdxl", None, "thibaud/controlnet-openpose-sdxl-1.0"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    name: str, model: str | None, named: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match="folder or a pipeline that is loaded") as caught:
        get_diffusion_pipeline(name, model, local_files_only=True, cache_dir=tmp_path)
    assert named in str(caught.value)


def test_wrong_names_and_models_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match=r"Did you mean 'sdv1\.5'"):
        get_diffusion_pipeline("sd1.5")
    with pytest.raises(ArgumentError, match=r"StableDiffusionXLPipeline.*fits name='sdv1\.5'"):
        get_diffusion_pipeline("sdxl", tiny.shared("sd"))
    with pytest.raises(ArgumentError, match="got a int"):
        get_diffusion_pipeline("sdxl", 3)
    with pytest.raises(ArgumentError, match="torch_dtype would go nowhere"):
        get_diffusion_pipeline("sdxl", tiny.shared("sdxl"), torch_dtype=torch.float16)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingHost, match=r"sparke\[diffusers\]"):
        get_diffusion_pipeline("sdxl")


def test_the_first_arguments_are_the_published_ones() -> None:
    assert inspect.signature(get_diffusion_pipeline).parameters["name"].default == "sdv2.1"
    published = "algorithm kernel sigma_image sigma_text use_latents_for_guidance max_bank_size"
    names = list(inspect.signature(RKEGuidedSampling).parameters)
    assert names == [*published.split(), "model_name", "model"]


# --- an image encoder's space


def encoder(pixels: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(pixels, 3).flatten(1)


@pytest.mark.parametrize("name", ["sdv1.5", "sdxl", "pixart-sigma"])
@pytest.mark.parametrize("strengths", [{}, {"criteria_guidance_scale": 0.05, "guidance_freq": 2}])
def test_an_image_encoder_s_space_is_compared(name: str, strengths: dict[str, Any]) -> None:
    bare, pipe = tiny.shared(TINY[name]), facade(name)
    asked = {"use_latents_for_guidance": False, "clip_for_guidance": encoder, **strengths}
    first = run(pipe, TINY[name], **asked)
    assert torch.equal(first, run(bare, TINY[name]))
    with torch.no_grad():
        expected = ClipFeatures(encoder, bare.vae)(first)
    assert torch.allclose(pipe.memory.features.x, expected, atol=1e-5)
    assert not torch.equal(run(pipe, TINY[name], **asked), first)
    ready = {**asked, "clip_for_guidance": ClipFeatures(encoder, bare.vae)}
    run(pipe, TINY[name], **ready)
    assert len(pipe.memory) == 3


def test_a_pipeline_without_vae_cannot_be_read_by_an_encoder() -> None:
    asked: dict[str, Any] = {"use_latents_for_guidance": False, "clip_for_guidance": encoder}
    with pytest.raises(ArgumentError, match="it has none"):
        run(facade("kandinsky-3"), "kandinsky3", **asked)


def test_the_published_strength_is_that_of_latents_in_the_encoder_s_space_too() -> None:
    asked = _keywords.read(
        {
            "criteria_guidance_scale": 0.05,
            "use_latents_for_guidance": False,
            "clip_for_guidance": encoder,
        },
        exact=False,
    )
    assert asked is not None
    vae = tiny.shared("sd").vae
    memory = RingMemory()
    made = _guiders.guider(asked, memory, vae)
    x, denoised = torch.randn(2, 1, 4, 8, 8)
    with torch.no_grad():
        memory.commit(
            Features(ClipFeatures(encoder, vae)(torch.randn(1, 4, 8, 8)), torch.ones(1, 3))
        )
    made.begin(Run(x.shape, x.device, x.dtype, torch.ones(1, 3)))
    delta = made(State(x, denoised, Step(0, 4.0, 3.0), torch.ones(1, 3)))
    # An Euler step moves by 1 - 3/4 of it.
    assert float(delta.norm() / 4) == pytest.approx(0.05 * float(x.norm()), rel=1e-4)


# --- prompts


def colour(prompts: list[str]) -> Tensor:
    return torch.tensor([[float("red" in p), float("blue" in p), 1.0] for p in prompts])


@pytest.mark.parametrize("exact", [False, True])
def test_prompts_may_be_compared_by_another_encoder(exact: bool) -> None:
    pipe = facade(exact=exact, prompt_encoder=colour)
    call = tiny.ALL["sd"].arguments(["red", "blue"], **STRENGTHS, num_images_per_prompt=2)
    if exact:
        call["num_inference_steps"], call["guidance_freq"] = 51, 1
        tiny.with_scheduler(pipe, "DPMSolverMultistepScheduler")
    try:
        pipe(**call)
    finally:
        tiny.shared.cache_clear()
    kept = pipe.memory.features.cond
    assert torch.equal(kept, colour(["red", "red", "blue", "blue"]))


# --- exactly as published


def rank(
    algorithm: str, kernel: str, rows: Features, z: Tensor, p: Tensor, sigma: tuple[float, float]
) -> Tensor:
    """What published code differentiates: the score of a history with z added, prompts p."""
    x = torch.cat([rows.x, z / z.norm()])
    assert rows.cond is not None
    t = torch.nn.functional.normalize(torch.cat([rows.cond, p]), dim=1)

    def similarity(u: Tensor, v: Tensor, s: float) -> Tensor:
        if kernel == "cosine":
            return (
                torch.nn.functional.normalize(u, dim=1) @ torch.nn.functional.normalize(v, dim=1).T
            )
        return torch.exp(-torch.cdist(u, v).square() / (2 * s**2))

    use_prompts = algorithm == "cond-rke"
    if len(x) > {"cond-rke": 10, "rke": 20}[algorithm]:
        values = similarity(x[-1:], x, sigma[0])
        if use_prompts:
            values = values * similarity(t[-1:], t, sigma[1])
        return 1 / (values.square() if kernel == "cosine" else values).mean()
    matrix = similarity(x, x, sigma[0])
    if use_prompts:
        matrix = matrix * similarity(t, t, sigma[1])
    return 1 / (matrix / len(x)).square().sum()


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
@pytest.mark.parametrize(
    ("algorithm", "n"),
    [
        ("cond-rke", 4),
        ("cond-rke", 9),
        ("cond-rke", 10),
        ("cond-rke", 25),
        ("rke", 12),
        ("rke", 19),
        ("rke", 20),
        ("rke", 30),
    ],
)
def test_exactly_is_the_gradient_of_the_published_score(
    algorithm: str, n: int, kernel: str
) -> None:
    torch.manual_seed(n)
    x = torch.randn(1, 4, 6)
    rows = Features(
        torch.nn.functional.normalize(x.flatten(1) + 1.5 * torch.randn(n, 24), dim=1),
        torch.randn(n, 5) + 1,
    )
    p = torch.randn(1, 5) + 1
    asked = _keywords.read(
        {
            "algorithm": algorithm,
            "kernel": kernel,
            "sigma_image": 0.5,
            "sigma_text": 0.7,
            "criteria_guidance_scale": 0.04,
        },
        exact=True,
    )
    assert asked is not None
    memory = RingMemory()
    memory.commit(rows)
    made = _guiders.guider(asked, memory, None, lambda: [999])
    origin = torch.full((5,), 3.0)
    made.begin(Run(x.shape, x.device, x.dtype, p, cond_origin=origin))
    sigma, sigma_next = 5.0, 4.0
    delta = made(State(x, torch.zeros_like(x), Step(0, sigma, sigma_next), p))

    z = x.flatten(1).double().requires_grad_()
    exact = Features(rows.x.double(), rows.cond.double() if rows.cond is not None else None)
    value = rank(algorithm, kernel, exact, z, p.double(), (0.5, 0.7))
    (gradient,) = torch.autograd.grad(value, z)
    update = 0.04 * x.norm() * gradient / gradient.norm()
    moved = delta.flatten(1) * (1 - sigma_next / sigma)  # of an Euler step
    assert torch.allclose(moved, update.float(), rtol=1e-3, atol=2e-4 * float(x.norm()) * 0.04)


def test_without_exact_the_kernel_is_always_squared() -> None:
    keywords = {"algorithm": "rke", "criteria_guidance_scale": 0.04}
    published = _keywords.read(keywords, exact=True)
    assert published is not None
    few, many = (_guiders._score(published, n, exact=True)[1]["bandwidth"] for n in (19, 20))
    assert (few, many) == (0.8, pytest.approx(0.8 * math.sqrt(2)))
    assert _guiders._score(published, 20, exact=False)[1]["bandwidth"] == 0.8


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("sd", "DPMSolverMultistepScheduler"), ("sdxl", "EulerDiscreteScheduler")],
)
def test_exactly_history_is_written_when_a_guided_step_meets_the_end(
    name: str, scheduler: str
) -> None:
    bare = tiny.with_scheduler(tiny.ALL[name].make(), scheduler)
    published = {"sd": "sdv1.5", "sdxl": "sdxl"}[name]
    ours, exact = (get_diffusion_pipeline(published, bare, exact=e) for e in (False, True))
    asked: dict[str, Any] = {"criteria_guidance_scale": 0.03, "guidance_freq": 10}
    kept = {}
    for steps in (50, 51):
        for pipe in (ours, exact):
            pipe.reset()
            run(pipe, name, num_inference_steps=steps, **asked)
        kept[steps] = (len(ours.memory), len(exact.memory))
    assert kept == {50: (1, 0), 51: (1, 1)}
    # What is kept are the latents before the last step: nearly the sample, not the sample.
    a, b = ours.memory.features.x, exact.memory.features.x
    assert float((a * b).sum()) > 0.9
    assert not torch.allclose(a, b, rtol=0, atol=1e-5)


def test_exactly_prompts_are_compared_from_the_origin() -> None:
    seen: list[Run] = []
    inner = SimpleNamespace(memory=RingMemory(), begin=seen.append)
    made: Any = _guiders._AsWritten(inner, list, 1)  # type: ignore[arg-type]
    x = torch.zeros(1, 2)
    made.begin(Run(x.shape, x.device, x.dtype, x, cond_origin=x[0]))
    assert seen[0].cond_origin is None
    assert seen[0].cond is x


def test_latents_of_another_size_are_refused() -> None:
    pipe = facade()
    run(pipe)
    with pytest.raises(ShapeError, match="Latents of another size"):
        run(pipe, height=32, width=32)
