"""`callback`: what a wrapped pipeline does, through diffusers' own hook at the end of a step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from torch import Tensor

import sparke
from sparke.backends import _latent_push, _schedulers
from sparke.errors import (
    ArgumentError,
    GuidanceWarning,
    MissingPrompts,
    ShapeError,
    UnsupportedTarget,
)
from sparke.guidance import DiversityGuider
from sparke.memory import RingMemory
from sparke.models import emoji
from sparke.protocols import State
from sparke.schedules import Constant, RemainingNoise
from tests.backends import tiny
from tests.probe import Probe

PROMPTS = ("a cat", "a red car")
HOOKED = [
    name
    for name, entry in tiny.ALL.items()
    if name not in ("sdxl-modular", "pixart-sigma", "dit")  # their calls take no such callback
]
every = pytest.mark.parametrize("name", HOOKED)
# A tiny network answers small changes loudly; these many steps keep the two samplers together.
STEPS = 6


def call(
    pipe: Any, name: str, guide: Any = None, prompts: Sequence[str] = PROMPTS, **changes: Any
) -> Tensor:
    if guide is not None:
        changes["callback_on_step_end"] = guide
        if "callback_on_step_end_tensor_inputs" not in changes:
            changes["callback_on_step_end_tensor_inputs"] = inputs(pipe, guide)
    changes.setdefault("num_inference_steps", STEPS)
    return tiny.latents(pipe(**tiny.ALL[name].arguments(prompts, **changes)))


def inputs(pipe: Any, guide: Any) -> list[str]:
    own = ["denoised"] if "denoised" in pipe._callback_tensor_inputs else []
    return [*guide.tensor_inputs, *own]


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm() / b.float().norm())


def always_apart(**options: Any) -> DiversityGuider:
    """Pushes however far apart samples are; those of networks with random weights are."""
    return DiversityGuider("rke", gate=False, bandwidth=20.0, scale=3.0, **options)


def later(step: sparke.Step) -> float:
    """The default push, but at the first step, whose beginning a callback never sees."""
    return RemainingNoise(0.3, power=1)(step) if step.index else 0.0


def always(step: sparke.Step) -> float:
    return RemainingNoise(0.3, power=1)(step)


# --- the hook


def test_all_that_have_the_hook_are_tested() -> None:
    def takes(name: str) -> bool:
        kind = type(tiny.shared(name))
        return "callback_on_step_end" in inspect.signature(kind.__call__).parameters

    assert [name for name in tiny.ALL if takes(name)] == HOOKED


@every
@pytest.mark.filterwarnings("ignore:Kandinsky3Pipeline goes on unguided")
def test_scale_zero_is_bit_identical(name: str) -> None:
    pipe = tiny.shared(name)
    bare = call(pipe, name)
    guide = sparke.callback(scale=0)
    for _ in range(2):  # the second time there is something to repel
        assert torch.equal(call(pipe, name, guide), bare)
    assert len(guide.memory) == 4  # type: ignore[arg-type]
    assert torch.equal(call(pipe, name), bare)


def test_a_first_sample_alone_is_bit_identical() -> None:
    pipe = tiny.shared("sd")
    guide = sparke.callback()
    one = call(pipe, "sd", guide, PROMPTS[:1])
    assert torch.equal(one, call(pipe, "sd", prompts=PROMPTS[:1]))
    assert not torch.equal(call(pipe, "sd", guide, PROMPTS[:1]), one)


def test_what_is_not_pushed_is_the_tensor_given() -> None:
    pipe, seen = tiny.shared("sd"), []
    guide = sparke.callback(scale=0)

    def watching(pipe: Any, i: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        given = tensors["latents"]
        returned = guide(pipe, i, t, tensors)
        seen.append(returned["latents"] is given)
        return returned

    call(pipe, "sd", watching, callback_on_step_end_tensor_inputs=guide.tensor_inputs)
    assert seen == [True] * STEPS


@pytest.mark.parametrize(
    ("name", "scheduler", "changes", "schedule"),
    [
        ("sd", "DDIMScheduler", {}, later),
        ("sd-v", "DDIMScheduler", {}, later),
        ("sdxl", "EulerDiscreteScheduler", {}, later),
        ("sd3", "FlowMatchEulerDiscreteScheduler", {}, later),
        ("flux", "FlowMatchEulerDiscreteScheduler", {}, later),
        ("zimage", "FlowMatchEulerDiscreteScheduler", {}, later),
        # These keep what they need to push the first step as well.
        ("sd", "DPMSolverMultistepScheduler", {"solver_order": 1}, always),
        ("lcm", "LCMScheduler", {}, later),
        (
            "sd",
            "DPMSolverMultistepScheduler",
            {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
            later,
        ),
    ],
)
def test_equals_wrap(name: str, scheduler: str, changes: dict[str, Any], schedule: Any) -> None:
    pipe = tiny.with_scheduler(tiny.ALL[name].make(), scheduler, **changes)
    given: dict[str, Any] = {"schedule": schedule, "cfg_interval": None}
    guide = sparke.callback(guider=always_apart(**given))
    wrapped = sparke.wrap(pipe, guider=always_apart(**given))
    for seed in range(2):  # the second run repels the first
        bare = call(pipe, name, seed=seed)
        theirs = call(wrapped, name, seed=seed)
        ours = call(pipe, name, guide, seed=seed)
        assert apart(theirs, bare) > 5e-3
        assert apart(ours, theirs) < 1e-5
    assert len(guide.memory) == len(wrapped.memory) == 4  # type: ignore[arg-type]


def test_equals_wrap_on_the_model_that_ships() -> None:
    pipe = emoji.pipeline("EulerDiscreteScheduler")
    pipe.set_progress_bar_config(disable=True)

    def made(pipe: Any, **changes: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = pipe(
            ["dog face"],
            num_images_per_prompt=4,
            num_inference_steps=12,
            guidance_scale=1.0,
            generator=generator,
            output_type="latent",
            **changes,
        )
        return tiny.latents(drawn)

    guide = sparke.callback(schedule=later, cfg_interval=None)
    ours = made(
        pipe,
        callback_on_step_end=guide,
        callback_on_step_end_tensor_inputs=guide.tensor_inputs,
    )
    theirs = made(sparke.wrap(pipe, schedule=later, cfg_interval=None))
    assert apart(theirs, made(pipe)) > 0.02
    assert apart(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "zimage"])
def test_holds_the_guidance_scale_as_wrap_does(name: str) -> None:
    pipe = tiny.ALL[name].make()
    # Outside from the middle on, since the first evaluation is over before any callback.
    given: dict[str, Any] = {"schedule": later, "cfg_interval": (1.0, 1e4)}
    guide, seen = sparke.callback(guider=always_apart(**given)), []

    def watching(pipe: Any, i: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        returned = guide(pipe, i, t, tensors)
        seen.append(pipe.guidance_scale)
        return returned

    ours = call(pipe, name, watching, callback_on_step_end_tensor_inputs=guide.tensor_inputs)
    theirs = call(sparke.wrap(pipe, guider=always_apart(**given)), name)
    given["cfg_interval"] = None
    free = call(sparke.wrap(pipe, guider=always_apart(**given)), name)
    assert apart(theirs, free) > 1e-3
    assert apart(ours, theirs) < 1e-4  # the scale is held a hair above none
    neutral = 0.0 if name == "zimage" else 1.0  # Z-Image counts from there
    assert seen[0] == seen[-1] == 5.0
    assert seen[-2] == pytest.approx(neutral, abs=1e-5)
    assert seen[-2] > neutral


@pytest.mark.parametrize("name", ["flux", "wan", "sdxl-controlnet", "lcm"])
def test_leaves_scales_out_of_reach_alone(name: str) -> None:
    # Distilled into the network, or copied to a local name before the loop.
    pipe, seen = tiny.shared(name), []
    guide = sparke.callback(cfg_interval=(0.0, 0.0))

    def watching(pipe: Any, i: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        returned = guide(pipe, i, t, tensors)
        seen.append(pipe.guidance_scale)
        return returned

    call(pipe, name, watching, callback_on_step_end_tensor_inputs=inputs(pipe, guide))
    assert seen == [5.0] * STEPS


@pytest.mark.parametrize("name", [n for n in HOOKED if n != "kandinsky3"])
def test_changes_samples(name: str) -> None:
    pipe = tiny.shared(name)
    guide = sparke.callback(guider=always_apart(cfg_interval=None))
    guided = call(pipe, name, guide)
    bare = call(pipe, name)
    assert guided.isfinite().all()
    assert apart(guided, bare) > 1e-3


# --- prompts


@every
@pytest.mark.filterwarnings("ignore:Kandinsky3Pipeline goes on unguided")
@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}])
def test_sees_the_prompts_that_wrap_sees(name: str, changes: dict[str, Any]) -> None:
    pipe = tiny.shared(name)
    known = inspect.signature(type(pipe).__call__).parameters
    changes = {n: v for n, v in changes.items() if n in known}
    times = changes.get("num_images_per_prompt", 1)
    ours, theirs = Probe(), Probe()
    guide = sparke.callback(guider=ours)
    named = [*inputs(pipe, guide), "prompt_embeds"]
    call(pipe, name, guide, callback_on_step_end_tensor_inputs=named, **changes)
    # With one picture each: Qwen and Kandinsky 3 repeat masks in another order than embeddings.
    changes.pop("num_images_per_prompt", None)
    call(sparke.wrap(pipe, guider=theirs), name, **changes)
    (mine,), (other,) = ours.runs, theirs.runs
    assert mine.cond is not None
    assert other.cond is not None
    torch.testing.assert_close(mine.cond, other.cond.repeat_interleave(times, 0))
    assert len(mine.cond) == mine.shape[0]
    assert mine.cond_origin is not None
    assert other.cond_origin is not None
    torch.testing.assert_close(mine.cond_origin, other.cond_origin)
    assert (mine.shape[1:], mine.dtype, mine.eta) == (other.shape[1:], other.dtype, other.eta)


def test_the_reference_prompts_are_encoded_once() -> None:
    pipe, count = tiny.ALL["sd"].make(), 0
    guide = sparke.callback()
    encode = pipe.text_encoder.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return encode(*args, **kwargs)

    pipe.text_encoder.forward = counting
    call(pipe, "sd", guide)
    first, count = count, 0
    call(pipe, "sd", guide)
    bare, count = count, 0
    call(pipe, "sd")
    assert first == bare + 1
    assert bare == count


def test_prompt_embeds_may_be_given() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for given in (rows, lambda tensors: rows[: len(tensors["latents"])]):
        guide = sparke.callback(prompt_embeds=given)
        assert guide.tensor_inputs == ["latents"]
        call(tiny.shared("sd"), "sd", guide)
        assert isinstance(guide.memory, RingMemory)
        assert guide.memory.features.cond is not None
        assert torch.equal(guide.memory.features.cond, rows)
    with pytest.raises(ShapeError, match="3 rows for a batch of 2"):
        call(tiny.shared("sd"), "sd", sparke.callback(prompt_embeds=torch.ones(3, 2)))


def test_inputs_are_those_the_score_needs() -> None:
    assert sparke.callback().tensor_inputs == ["latents", "prompt_embeds"]
    assert sparke.callback(guider=["rke", "cond-vendi"]).tensor_inputs[-1] == "prompt_embeds"
    assert sparke.callback("rke").tensor_inputs == ["latents"]
    sparke.callback("rke").tensor_inputs.append("prompt_embeds")
    assert sparke.callback("rke").tensor_inputs == ["latents"]


def test_missing_tensors_are_named() -> None:
    pipe = tiny.shared("sd")
    guide = sparke.callback()
    with pytest.raises(MissingPrompts, match=r"guide\.tensor_inputs"):
        call(pipe, "sd", guide, callback_on_step_end_tensor_inputs=["latents"])
    with pytest.raises(ArgumentError, match=r"guide\.tensor_inputs"):
        call(pipe, "sd", guide, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert len(guide.memory) == 0  # type: ignore[arg-type]


def test_arguments_are_those_of_wrap() -> None:
    guide = sparke.callback("rke", scale=0.3, in_batch=False, bandwidth=0.9)
    assert isinstance(guide.guider, DiversityGuider)
    assert (guide.guider.scale, guide.guider.in_batch) == (0.3, False)
    assert guide.guider.score == sparke.score("rke", bandwidth=0.9)
    assert guide.memory is guide.guider.memory
    with pytest.raises(ArgumentError, match="scale"):
        sparke.callback(guider=DiversityGuider(), scale=0.3)


# --- the estimate of the step that was taken


@contextmanager
def truth(pipe: Any, found: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """The x and the denoised estimate of each evaluation, read off the model's outputs."""
    reading: Any = None

    def watch(step: Any, bound: Any) -> Any:
        nonlocal reading
        given = bound.arguments
        if reading is None or not reading.is_of(pipe.scheduler):
            reading = _schedulers.Reading(pipe.scheduler)
        level = reading.levels[reading.position(pipe.scheduler, given["timestep"])]
        sample, output = given["sample"], given["model_output"]
        found.append((sample / level.scale, level.denoised(output, sample)))
        return step(*bound.args, **bound.kwargs)

    with _schedulers.stepping(pipe.scheduler, watch):
        yield


@pytest.mark.parametrize(
    ("name", "scheduler", "changes", "seen"),
    [
        # The first step is seen where the scheduler keeps what it began with, the second stage of a
        # step of two never.
        ("sd", "DDIMScheduler", {}, 5),
        ("sd", "EulerDiscreteScheduler", {}, 5),
        ("sd", "TCDScheduler", {}, 5),
        ("sd3", "FlowMatchEulerDiscreteScheduler", {}, 5),
        ("sd-img2img", "DDIMScheduler", {}, 3),
        ("sd", "LMSDiscreteScheduler", {}, 6),
        ("sd", "PNDMScheduler", {"skip_prk_steps": True}, 6),
        ("sd", "PNDMScheduler", {"skip_prk_steps": False}, 6),
        ("sd-v", "PNDMScheduler", {"skip_prk_steps": True}, 6),
        ("sd", "DEISMultistepScheduler", {}, 6),
        ("sd-v", "DEISMultistepScheduler", {}, 6),
        ("sd", "DPMSolverMultistepScheduler", {}, 6),
        (
            "sd",
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            6,
        ),
        ("sd", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 5),
        ("sd", "DPMSolverSinglestepScheduler", {"lower_order_final": True}, 4),
        ("sd", "UniPCMultistepScheduler", {}, 6),
        (
            "sd",
            "UniPCMultistepScheduler",
            {"predict_x0": False, "final_sigmas_type": "sigma_min"},
            6,
        ),
        ("wan", "UniPCMultistepScheduler", {}, 6),
        ("sd", "HeunDiscreteScheduler", {}, 6),
        ("sd-v", "HeunDiscreteScheduler", {}, 6),
        ("sd-img2img", "HeunDiscreteScheduler", {}, 4),
        ("sd", "KDPM2DiscreteScheduler", {}, 6),
        ("sd", "KDPM2AncestralDiscreteScheduler", {}, 6),
        ("sd3", "FlowMatchHeunDiscreteScheduler", {}, 6),
    ],
)
def test_the_estimate_is_the_models(
    name: str, scheduler: str, changes: dict[str, Any], seen: int
) -> None:
    pipe = tiny.with_scheduler(tiny.ALL[name].make(), scheduler, **changes)
    probe = Probe()
    found: list[tuple[Tensor, Tensor]] = []
    with truth(pipe, found):
        out = call(pipe, name, sparke.callback(guider=probe))
    assert len(probe.states) == seen
    # The last estimate has no noise left to absorb a push, and DDIM's is off by its final alpha.
    for state in probe.states[:-1]:
        x, denoised = min(found, key=lambda pair: apart(state.x, pair[0]))
        assert apart(state.x, x) < 1e-5
        assert apart(state.denoised, denoised) < 1e-5
    sigmas = [(state.step.sigma, state.step.sigma_next) for state in probe.states]
    assert all(high > low for high, low in sigmas)
    assert sigmas[-1][1] == 0
    (finished,) = probe.finished
    assert torch.equal(finished, out)


# --- what becomes of a push


def shift(scheduler: str, at: int, *, repaired: bool = True, **config: Any) -> float:
    """By how much +0.3 to the latents after one of ten steps moves the samples of N(0, 1)."""

    def final(push: bool) -> Tensor:
        taken = getattr(diffusers, scheduler)(**config)
        taken.set_timesteps(10)
        track = _latent_push.Track(taken, 0.0)
        x = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(0))
        x = x * taken.init_noise_sigma
        for i, t in enumerate(taken.timesteps):
            level = track.reading.levels[track.reading.position(taken, t)]
            denoised = x * level.alpha / (level.alpha**2 + level.sigma**2)
            (x, *_) = taken.step((denoised - level.skip * x) / level.out, t, x, return_dict=False)
            track.arrived(t, x, None)
            if push and i == at:
                move = torch.full_like(x, 0.3)
                x = track.pushed(x, move) if repaired else x + move
            track.leave(x)
        return x

    return float((final(True) - final(False)).mean())


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
NOISE = {"final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize("at", [3, 4, 5])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"solver_order": 3}, {}),
        (FLOW, FLOW),
        ({"predict_x0": False, **NOISE}, {"algorithm_type": "dpmsolver", **NOISE}),
    ],
    ids=["clean", "third order", "flow", "noise"],
)
def test_unipc_keeps_a_push_as_dpm_solver_does(
    at: int, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    kept = shift("UniPCMultistepScheduler", at, **ours)
    assert kept == pytest.approx(shift("DPMSolverMultistepScheduler", at, **theirs), rel=0.1)
    # Its corrector alone would undo nearly all of it, or reverse it.
    assert shift("UniPCMultistepScheduler", at, repaired=False, **ours) < 0.1 * kept


@pytest.mark.parametrize(
    ("name", "scheduler"), [("sd", "UniPCMultistepScheduler"), ("wan", "UniPCMultistepScheduler")]
)
def test_unipc_is_pushed_in_pipelines(name: str, scheduler: str) -> None:
    pipe = tiny.with_scheduler(tiny.ALL[name].make(), scheduler)
    still, moved = (
        call(pipe, name, sparke.callback(guider=Probe(push)), guidance_scale=1.0)
        for push in (0.0, 0.2)
    )
    assert (moved - still).mean() > 0.1


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd", "DDIMScheduler"),
        ("sd", "HeunDiscreteScheduler"),
        ("sd", "KDPM2DiscreteScheduler"),
        ("sd", "DPMSolverMultistepScheduler"),
        ("sd", "UniPCMultistepScheduler"),
        ("sd3", "FlowMatchEulerDiscreteScheduler"),
        ("lcm", "LCMScheduler"),
    ],
)
def test_a_last_push_lands_in_the_output(name: str, scheduler: str) -> None:
    class Last(Probe):
        def __call__(self, state: State) -> Tensor:
            self.push = 0.0 if state.step.sigma_next else 0.25
            return super().__call__(state)

    pipe = tiny.with_scheduler(tiny.ALL[name].make(), scheduler)
    probe = Last()
    out = call(pipe, name, sparke.callback(guider=probe))
    torch.testing.assert_close(out, call(pipe, name) + 0.25, rtol=1e-5, atol=1e-5)
    assert torch.equal(probe.finished[0], out)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_dtype(name: str, dtype: torch.dtype) -> None:
    pipe = tiny.ALL[name].make().to(dtype)
    seen = []
    guide = sparke.callback(guider=always_apart())

    def watching(pipe: Any, i: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        before = tensors["latents"]
        returned = guide(pipe, i, t, tensors)
        seen.append((before.dtype, returned["latents"].dtype, returned["latents"] is before))
        return returned

    made = call(pipe, name, watching, callback_on_step_end_tensor_inputs=["latents"])
    assert made.isfinite().all()
    assert all(before == after for before, after, _ in seen)
    assert not all(same for *_, same in seen)


# --- what cannot be guided


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd", "SASolverScheduler"),
        ("sd", "DDPMScheduler"),
        ("sd", "EulerAncestralDiscreteScheduler"),
        ("sd", "LCMScheduler"),
        ("lcm", "LCMScheduler"),
    ],
)
def test_says_once_a_run_what_it_cannot_do(name: str, scheduler: str) -> None:
    pipe = tiny.with_scheduler(tiny.ALL[name].make(), scheduler)
    guide = sparke.callback()
    bare = call(pipe, name)
    for run in range(2):
        with pytest.warns(GuidanceWarning) as caught:
            out = call(pipe, name, guide, callback_on_step_end_tensor_inputs=guide.tensor_inputs)
        (warning,) = caught
        assert f"{scheduler}" in str(warning.message)
        assert "sparke.wrap" in str(warning.message)
        assert ("'denoised'" in str(warning.message)) == (name == "lcm")
        assert warning.filename.endswith(f"{type(pipe).__module__.rpartition('.')[2]}.py")
        assert torch.equal(out, bare)
        assert len(guide.memory) == 2 * (run + 1)  # type: ignore[arg-type]


def test_a_pipeline_that_ignores_latents_is_told() -> None:
    class Deaf(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
        def __call__(self, *args: Any, callback_on_step_end: Any, **kwargs: Any) -> Any:
            kwargs["callback_on_step_end_tensor_inputs"] = ["latents"]

            def ignored(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                callback_on_step_end(pipe, i, t, tensors)
                return {}

            return super().__call__(*args, callback_on_step_end=ignored, **kwargs)

    pipe = Deaf(**tiny.ALL["sd"].make().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    given = tiny.ALL["sd"].arguments(PROMPTS)
    with pytest.warns(GuidanceWarning, match="ignores the latents"):
        pipe(**given, callback_on_step_end=sparke.callback("rke"))


def test_a_scheduler_that_cannot_be_read_is_an_error() -> None:
    pipe = tiny.ALL["sd"].make()
    bare = call(pipe, "sd")
    kind: Any = type("InverseScheduler", (diffusers.DDIMScheduler,), {})
    before, pipe.scheduler = pipe.scheduler, kind.from_config(pipe.scheduler.config)
    guide = sparke.callback()
    with pytest.raises(UnsupportedTarget, match="InverseScheduler"):
        call(pipe, "sd", guide)
    pipe.scheduler = before
    call(pipe, "sd", guide)
    assert torch.equal(call(pipe, "sd"), bare)


# --- runs


class Stop(Exception):
    """Of a user's own callback."""


def breaking(guide: Any, at: int, *, interrupt: bool) -> Any:
    def hook(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        returned: dict[str, Any] = guide(pipe, i, t, tensors)
        if i == at:
            if not interrupt:
                raise Stop
            pipe._interrupt = True
        return returned

    return hook


@pytest.mark.parametrize("interrupt", [True, False])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_an_unfinished_run_leaves_no_trace(name: str, interrupt: bool) -> None:
    pipe = tiny.ALL[name].make()
    low = (0.0, 0.5)
    bare, guide = call(pipe, name), sparke.callback(cfg_interval=low)
    fresh = sparke.callback(cfg_interval=low)
    named = {"callback_on_step_end_tensor_inputs": guide.tensor_inputs}
    try:
        call(pipe, name, breaking(guide, 1, interrupt=interrupt), **named)
        assert interrupt
    except Stop:
        assert not interrupt
    assert len(guide.memory) == 0  # type: ignore[arg-type]
    # The scale was held when the run broke off; a call sets it anew.
    assert pipe.guidance_scale == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(call(pipe, name), bare)
    assert pipe.guidance_scale == 5.0
    assert torch.equal(call(pipe, name, guide), call(pipe, name, fresh))
    assert len(guide.memory) == 2  # type: ignore[arg-type]


def test_runs_share_memory() -> None:
    pipe, memory = tiny.shared("sd"), RingMemory()
    guide = sparke.callback(guider=always_apart(memory=memory))
    made = torch.cat([call(pipe, "sd", guide, seed=seed) for seed in range(2)])
    assert torch.equal(memory.features.x, made.flatten(1))
    alone = call(pipe, "sd", sparke.callback(guider=always_apart()), seed=1)
    assert apart(made[2:], alone) > 1e-3


def test_a_batch_of_another_size_begins_anew() -> None:
    pipe, guide = tiny.shared("sd"), sparke.callback()
    for prompts in (PROMPTS, PROMPTS[:1], (*PROMPTS, "a dog")):
        call(pipe, "sd", guide, prompts)
    assert len(guide.memory) == 6  # type: ignore[arg-type]


def test_goes_with_other_callbacks() -> None:
    pipe = tiny.ALL["sd"].make()
    guide = sparke.callback(cond_bandwidth=10.0, cfg_interval=(0.0, 0.5))
    call(pipe, "sd", guide, PROMPTS[:1], seed=1)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3)
    both = []
    for order in ([guide, cutoff], [cutoff, guide]):
        chained = MultiPipelineCallbacks(order)
        both.append(call(pipe, "sd", chained, PROMPTS[:1]))
        assert pipe.guidance_scale == 0.0  # its last word, not undone
    assert all(made.isfinite().all() for made in both)
    assert apart(both[0], call(pipe, "sd", cutoff, PROMPTS[:1])) > 1e-3
    assert len(guide.memory) == 3  # type: ignore[arg-type]


def test_a_schedule_decides_when() -> None:
    pipe = tiny.shared("sd")
    guide = sparke.callback(schedule=Constant(1.0, lo=2.0, hi=4.0), cfg_interval=None)
    moved = []

    def watching(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        before = tensors["latents"]
        returned = guide(pipe, i, t, tensors)
        moved.append(returned["latents"] is not before)
        return returned

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(pipe, "sd", watching, callback_on_step_end_tensor_inputs=guide.tensor_inputs)
    # DDIM's six levels are 5.91, 2.91, 1.61 and below.
    assert moved == [False, True, False, False, False, False]
