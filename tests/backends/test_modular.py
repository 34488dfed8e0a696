"""Modular pipelines of diffusers: wrapped, and with blocks of ours inserted."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import modular_pipelines
from diffusers.modular_pipelines import ComponentSpec, InputParam, OutputParam
from torch import Tensor, nn

import sparke
from sparke.backends import _encodings, modular
from sparke.errors import ArgumentError, GuidanceWarning, MissingPrompts, UnsupportedTarget
from sparke.guidance import DiversityGuider, GuiderChain
from sparke.protocols import State
from tests.backends import tiny
from tests.probe import Probe

PROMPTS = ["a cat", "a dog"]
SDXL = tiny.ALL["sdxl-modular"]
PARTS = ("unet", "vae", "scheduler", "guider")
ENCODERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
HELD: dict[str, Any] = {"scale": 1e-30, "cfg_interval": (0, 0)}
"""Repulsion too weak to see, guidance scale held at 1 throughout."""
STRONG: dict[str, Any] = {"scale": 30.0, "cfg_interval": None}


def converted(name: str, blocks: str, *, output_type: str) -> tuple[Any, Callable[..., Any]]:
    """The modular pipeline with a tiny classic pipeline's parts, and how to call it."""
    classic = tiny.shared(name)
    pipe = getattr(modular_pipelines, blocks)().init_pipeline()
    wanted = {spec.name for spec in vars(pipe)["_blocks"].expected_components}
    parts = {k: v for k, v in classic.components.items() if k in wanted}
    if "guider" in wanted:
        parts["guider"] = diffusers.ClassifierFreeGuidance(guidance_scale=5.0)
    pipe.update_components(**parts)
    tiny._quiet(vars(pipe)["_blocks"])

    def call(target: Any, **changes: Any) -> Any:
        arguments = tiny.ALL[name].arguments(PROMPTS, **changes)
        if "guider" in wanted:
            del arguments["guidance_scale"]
        arguments.update(output="latents", output_type=output_type)
        return target(**arguments)

    return pipe, call


def call(target: Any, prompts: list[str] = PROMPTS, **changes: Any) -> Any:
    return target(**SDXL.arguments(prompts, **changes))


@pytest.fixture
def pipe() -> Iterator[Any]:
    """The tiny SDXL, and proof that the test left it as it found it."""
    pipe = tiny.shared("sdxl-modular")
    before, guider = dict(vars(pipe)), dict(vars(pipe.guider))
    kinds = type(pipe), type(pipe.scheduler), type(pipe.unet)
    expected = call(pipe)
    yield pipe
    assert vars(pipe) == before
    assert (type(pipe), type(pipe.scheduler), type(pipe.unet)) == kinds
    assert vars(pipe.guider).keys() == guider.keys()
    assert vars(pipe.guider)["_enabled"] is guider["_enabled"]
    assert torch.equal(call(pipe), expected)


@contextlib.contextmanager
def guider_of(pipe: Any, guider: Any) -> Iterator[None]:
    own = pipe.guider
    pipe.guider = guider
    try:
        yield
    finally:
        pipe.guider = own


@contextlib.contextmanager
def inserted(pipe: Any, guider: Any, **options: Any) -> Iterator[None]:
    assert modular.insert(pipe, guider, **options) is pipe
    try:
        yield
    finally:
        modular.remove(pipe)


@contextlib.contextmanager
def breaking(module: nn.Module, error: BaseException, *, at: int) -> Iterator[None]:
    """The module raises at its call number `at`, from 0."""
    left = [at]

    def hook(*_: object) -> None:
        if left[0] == 0:
            raise error
        left[0] -= 1

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def counting(module: nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    try:
        yield calls
    finally:
        handle.remove()


# --- wrap


def test_wrap_is_the_pipelines_own_kind(pipe: Any) -> None:
    memory = sparke.memory.RingMemory()
    wrapped = sparke.wrap(pipe, memory=memory)
    assert isinstance(wrapped, type(pipe))
    assert type(wrapped).__name__ == type(pipe).__name__
    assert wrapped.guider is pipe.guider
    assert wrapped.memory is memory
    assert wrapped.unet is pipe.unet


@pytest.mark.parametrize("options", [{}, STRONG, {"score": "rke", "scale": 5.0}, HELD])
def test_as_the_classic_pipeline(pipe: Any, options: dict[str, Any]) -> None:
    ours = sparke.wrap(pipe, **options)
    classic = sparke.wrap(tiny.shared("sdxl"), **options)
    bare = call(pipe)
    for _ in range(2):  # the second call has a memory to repel from
        found = call(ours)
        expected = tiny.latents(classic(**tiny.ALL["sdxl"].arguments(PROMPTS)))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert float((found - bare).abs().max()) > 0.01
    assert len(ours.memory) == 4
    kept, others = ours.memory.select(), classic.memory.select()
    torch.testing.assert_close(kept.x, others.x, atol=1e-3, rtol=1e-4)
    if kept.cond is not None and others.cond is not None:
        torch.testing.assert_close(kept.cond, others.cond)


def test_scale_0_and_an_empty_memory_change_no_bit(pipe: Any) -> None:
    bare = call(pipe)
    wrapped = sparke.wrap(pipe, scale=0)
    assert torch.equal(call(wrapped), bare)
    assert torch.equal(call(wrapped), bare)
    assert len(wrapped.memory) == 4
    assert torch.equal(call(sparke.wrap(pipe, in_batch=False)), bare)


@pytest.mark.parametrize("formulation", [False, True])
def test_held_at_scale_1(pipe: Any, formulation: bool) -> None:
    cfg = diffusers.ClassifierFreeGuidance
    unguided = cfg(guidance_scale=0.0 if formulation else 1.0, use_original_formulation=formulation)
    with guider_of(pipe, unguided):
        expected = call(pipe)
    strong = cfg(guidance_scale=4.0, use_original_formulation=formulation)
    with guider_of(pipe, strong):
        guided = call(pipe)
        with counting(pipe.unet) as calls:
            held = call(sparke.wrap(pipe, **HELD))
        assert len(calls) == 4  # the unconditional prediction is not computed
        kept_on = call(sparke.wrap(pipe, scale=1e-30, cfg_interval=None))
    torch.testing.assert_close(held, expected)
    assert torch.equal(kept_on, guided)
    assert float((guided - expected).abs().max()) > 1


def test_scale_is_held_above_the_interval_only(pipe: Any) -> None:
    probe = Probe()
    call(sparke.wrap(pipe, guider=probe))
    low, high = probe.states[-1].step.sigma, probe.states[-2].step.sigma
    with counting(pipe.unet) as calls:
        call(sparke.wrap(pipe, scale=1e-30, cfg_interval=(0, (low + high) / 2)))
    assert len(calls) == 3 + 2


def test_the_guider_sees_the_conditional_prediction(pipe: Any) -> None:
    with guider_of(pipe, diffusers.ClassifierFreeGuidance(guidance_scale=1.0)):
        alone = Probe()
        call(sparke.wrap(pipe, guider=alone))
    probe = Probe()
    seen: list[Tensor] = []
    probe.__class__ = type("Reading", (Probe,), {"__call__": _conditional(seen)})
    call(sparke.wrap(pipe, guider=probe))
    torch.testing.assert_close(seen[0], alone.states[0].denoised, atol=1e-3, rtol=1e-4)
    assert float((probe.states[0].denoised - seen[0]).abs().max()) > 0.1


def _conditional(seen: list[Tensor]) -> Callable[[Probe, State], Tensor]:
    def see(self: Probe, state: State) -> Tensor:
        assert state.conditional is not None
        seen.append(state.conditional())
        return Probe.__call__(self, state)

    return see


@pytest.mark.parametrize("images", [1, 2])
def test_prompts_are_those_of_the_state(pipe: Any, images: int) -> None:
    arguments = SDXL.arguments(PROMPTS, num_images_per_prompt=images, output="prompt_embeds")
    expected = pipe(**arguments).mean(1)
    assert len(expected) == 2 * images
    probe = Probe()
    wrapped = sparke.wrap(pipe, guider=probe)
    latents = call(wrapped, num_images_per_prompt=images)
    (run,) = probe.runs
    assert run.cond is not None
    torch.testing.assert_close(run.cond, expected)
    assert torch.equal(run.cond[0], run.cond[images - 1])
    assert not torch.equal(run.cond[0], run.cond[-1])
    assert run.shape == latents.shape
    assert len(probe.states) == 4
    (finished,) = probe.finished
    assert torch.equal(finished, latents)


def test_origin_is_the_text_encoders(pipe: Any) -> None:
    probe = Probe()
    wrapped = sparke.wrap(pipe, guider=probe)
    call(wrapped, negative_prompt=["a blur"] * 2, clip_skip=1)
    embeds = tiny.shared("sdxl").encode_prompt(
        list(_encodings.REFERENCE), do_classifier_free_guidance=False, clip_skip=1
    )[0]
    origin = probe.runs[0].cond_origin
    assert origin is not None
    torch.testing.assert_close(origin, embeds.mean((0, 1)))
    with counting_calls(pipe.text_encoder) as calls:
        call(wrapped)
    assert max(calls) == 2  # the reference prompts are encoded once


@contextlib.contextmanager
def counting_calls(module: nn.Module) -> Iterator[list[int]]:
    rows: list[int] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    try:
        yield rows
    finally:
        handle.remove()


def test_without_a_text_encoder(pipe: Any) -> None:
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    embeds = call(pipe, output=names)
    blocks = pipe.blocks
    blocks.sub_blocks.pop("text_encoder")
    rest = blocks.init_pipeline()
    rest.update_components(**{name: getattr(pipe, name) for name in PARTS})
    tiny._quiet(vars(rest)["_blocks"])
    arguments = SDXL.arguments(PROMPTS)
    del arguments["prompt"]
    probe = Probe()
    found = sparke.wrap(rest, guider=probe)(**{**arguments, **embeds})
    assert torch.equal(found, call(pipe))
    (run,) = probe.runs
    assert run.cond_origin is None
    assert run.cond is not None
    torch.testing.assert_close(run.cond, embeds["prompt_embeds"].mean(1))


def test_prompts_of_the_users_own(pipe: Any) -> None:
    rows = torch.eye(2)
    probe = Probe()
    call(sparke.wrap(pipe, guider=probe, prompt_embeds=rows))
    call(sparke.wrap(pipe, guider=probe, prompt_embeds=lambda v: v["pooled_prompt_embeds"]))
    call(
        sparke.wrap(
            pipe,
            guider=probe,
            prompt_encoder=lambda texts: torch.tensor([[float(len(t)), 1.0] for t in texts]),
        ),
        ["a cat", "a horse"],
    )
    conds = [run.cond for run in probe.runs]
    assert conds[0] is not None
    assert torch.equal(conds[0], rows)
    assert conds[1] is not None
    assert torch.equal(conds[1], call(pipe, output="pooled_prompt_embeds"))
    assert conds[2] is not None
    assert conds[2].tolist() == [[5.0, 1.0], [7.0, 1.0]]


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()])
def test_a_broken_call_leaves_nothing_behind(pipe: Any, error: BaseException) -> None:
    wrapped = sparke.wrap(pipe, scale=5.0)
    with breaking(pipe.unet, error, at=3), pytest.raises(type(error)):
        call(wrapped)
    assert len(wrapped.memory) == 0
    first = call(wrapped)
    assert torch.equal(first, call(sparke.wrap(pipe, scale=5.0)))


def test_in_a_with_statement(pipe: Any) -> None:
    bare = call(pipe)
    kind = type(pipe)
    with sparke.wrap(pipe, **STRONG) as guided:
        assert not torch.equal(call(pipe), bare)
        assert len(guided.memory) == 2
    assert type(pipe) is kind
    assert torch.equal(call(pipe), bare)


def test_wrapped_twice(pipe: Any) -> None:
    inner, outer = Probe(), DiversityGuider(**STRONG)
    with pytest.warns(GuidanceWarning, match="wrapped already"):
        twice = sparke.wrap(sparke.wrap(pipe, guider=inner), guider=outer)
    found = call(twice)
    assert torch.equal(found, call(sparke.wrap(pipe, **STRONG)))
    assert len(inner.finished) == len(inner.runs) == 1
    assert len(outer.memory) == 2


# --- insert


@pytest.mark.parametrize("kind", ["ClassifierFreeGuidance", "AdaptiveProjectedGuidance"])
def test_inserted_as_wrapped(pipe: Any, kind: str) -> None:
    with guider_of(pipe, getattr(diffusers, kind)(guidance_scale=4.0)):
        bare = call(pipe)
        guider, wrapped = DiversityGuider(**STRONG), sparke.wrap(pipe, **STRONG)
        with inserted(pipe, guider):
            found = [call(pipe) for _ in range(2)]
        for latents in found:
            assert torch.equal(latents, call(wrapped))
            assert float((latents - bare).abs().max()) > 0.01
    ours, theirs = guider.memory.select(), wrapped.memory.select()
    assert torch.equal(ours.x, theirs.x)
    assert ours.cond is not None
    assert theirs.cond is not None
    assert torch.equal(ours.cond, theirs.cond)


def test_inserted_at_scale_0_changes_no_bit(pipe: Any) -> None:
    bare = call(pipe)
    guider = DiversityGuider(scale=0)
    with inserted(pipe, guider):
        assert torch.equal(call(pipe), bare)
    assert len(guider.memory) == 2


@pytest.mark.parametrize("name", ["UniPCMultistep", "DPMSolverMultistep", "EulerAncestralDiscrete"])
def test_inserted_with_other_schedulers(pipe: Any, name: str) -> None:
    own = pipe.scheduler
    try:
        tiny.with_scheduler(pipe, f"{name}Scheduler")
        bare, wrapped = call(pipe), sparke.wrap(pipe, **STRONG)
        guider = DiversityGuider(**STRONG)
        with inserted(pipe, guider):
            found = call(pipe)
        assert torch.equal(found, call(wrapped))
        assert not torch.equal(found, bare)
        assert len(guider.memory) == 2
    finally:
        pipe.scheduler = own


def test_inserted_sees_prompts_and_origin(pipe: Any) -> None:
    probes = Probe(), Probe()
    call(sparke.wrap(pipe, guider=probes[0]), clip_skip=1, eta=0.5)
    with inserted(pipe, probes[1]):
        latents = call(pipe, clip_skip=1, eta=0.5)
    (ours,), (theirs,) = probes[1].runs, probes[0].runs
    for name in ("cond", "cond_origin"):
        assert getattr(ours, name) is not None
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert (ours.shape, ours.dtype, ours.eta) == (theirs.shape, theirs.dtype, theirs.eta)
    (finished,) = probes[1].finished
    assert torch.equal(finished, latents)
    rows = torch.eye(2)
    with inserted(pipe, probes[1], prompt_embeds=rows):
        call(pipe)
    assert torch.equal(probes[1].runs[-1].cond, rows)  # type: ignore[arg-type]


def test_inserted_into_blocks_and_every_loop_of_them(pipe: Any) -> None:
    guider = DiversityGuider(**STRONG)
    blocks = modular.insert(modular_pipelines.StableDiffusionXLAutoBlocks(), guider)
    loops = modular._loops(blocks)
    assert len(loops) == 4  # text to image, control, and both with a mask
    for loop in loops:
        names = list(loop)
        assert names.index("after_denoiser") == names.index("diversity") + 1
        assert names[-1] == "diversity_finish"
    fresh = copy.deepcopy(blocks).init_pipeline()
    fresh.update_components(**{name: getattr(pipe, name) for name in PARTS + ENCODERS})
    tiny._quiet(vars(fresh)["_blocks"])
    assert torch.equal(call(fresh), call(sparke.wrap(pipe, **STRONG)))
    assert len(guider.memory) == 2  # one memory, whatever copies there are


def test_inserting_leaves_what_the_blocks_take_and_give(pipe: Any) -> None:
    blocks = pipe.blocks
    inputs, outputs = blocks.input_names, blocks.output_names
    made = blocks.intermediate_output_names
    modular.insert(blocks, Probe())
    assert set(blocks.input_names) == set(inputs)
    assert (blocks.output_names, blocks.intermediate_output_names) == (outputs, made)
    assert "Moves the denoised estimate apart" in repr(modular._loops(blocks)[0]["diversity"].doc)
    modular.remove(blocks)
    assert repr(blocks) == repr(pipe.blocks)


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()])
def test_a_broken_loop_leaves_nothing_behind(pipe: Any, error: BaseException) -> None:
    guider = DiversityGuider(**STRONG)
    with inserted(pipe, guider):
        with breaking(pipe.unet, error, at=3), pytest.raises(type(error)):
            call(pipe)
        assert len(guider.memory) == 0
        found = call(pipe)
    assert torch.equal(found, call(sparke.wrap(pipe, **STRONG)))


def test_inserted_once(pipe: Any) -> None:
    with inserted(pipe, GuiderChain([Probe(), Probe()])):
        with pytest.raises(ArgumentError, match="inserted here already"):
            modular.insert(pipe, Probe())
        call(pipe)


@pytest.mark.parametrize("target", [torch.nn.Linear(1, 1), diffusers.ClassifierFreeGuidance()])
def test_nowhere_to_insert(target: Any) -> None:
    with pytest.raises(UnsupportedTarget, match="after_denoiser"):
        modular.insert(target, Probe())


# --- other families


@pytest.mark.parametrize(
    ("name", "blocks", "output_type"),
    [("wan", "WanBlocks", "pt"), ("flux", "FluxAutoBlocks", "latent")],
)
def test_another_family(name: str, blocks: str, output_type: str) -> None:
    pipe, run = converted(name, blocks, output_type=output_type)
    bare = run(pipe)
    assert torch.equal(run(sparke.wrap(pipe, scale=0)), bare)
    wrapped, guider = sparke.wrap(pipe, **STRONG), DiversityGuider(**STRONG)
    classic = sparke.wrap(tiny.shared(name), **STRONG)
    with inserted(pipe, guider):
        found = [run(pipe) for _ in range(2)]
    for latents in found:
        assert torch.equal(latents, run(wrapped))
        assert not torch.equal(latents, bare)
        classic(**tiny.ALL[name].arguments(PROMPTS))
    kept, others = wrapped.memory.select(), classic.memory.select()
    torch.testing.assert_close(kept.x, others.x, atol=1e-3, rtol=1e-4)
    assert kept.cond is not None
    assert others.cond is not None
    torch.testing.assert_close(kept.cond, others.cond)
    assert torch.equal(run(pipe), bare)


# --- blocks of somebody's own, without prompts


class Start(modular_pipelines.ModularPipelineBlocks):  # type: ignore[misc]
    @property
    def expected_components(self) -> list[Any]:
        return [ComponentSpec("scheduler", diffusers.DDIMScheduler)]

    @property
    def inputs(self) -> list[Any]:
        return [InputParam("generator")]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [OutputParam("latents"), OutputParam("timesteps")]

    def __call__(self, components: Any, state: Any) -> Any:
        block_state = self.get_block_state(state)
        components.scheduler.set_timesteps(3)
        block_state.timesteps = components.scheduler.timesteps
        block_state.latents = torch.randn(2, 3, 8, 8, generator=block_state.generator)
        self.set_block_state(state, block_state)
        return components, state


class Predict(modular_pipelines.ModularPipelineBlocks):  # type: ignore[misc]
    output = "noise_pred"

    @property
    def expected_components(self) -> list[Any]:
        return [ComponentSpec("unet", diffusers.UNet2DModel)]

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> Any:
        block_state[self.output] = components.unet(block_state.latents, t).sample
        return components, block_state


class Move(modular_pipelines.ModularPipelineBlocks):  # type: ignore[misc]
    @property
    def inputs(self) -> list[Any]:
        return [InputParam("latents"), InputParam("timesteps")]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [OutputParam("latents")]

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> Any:
        moved = components.scheduler.step(block_state.noise_pred, t, block_state.latents)
        block_state.latents = moved.prev_sample
        return components, block_state


class Loop(modular_pipelines.LoopSequentialPipelineBlocks):  # type: ignore[misc]
    block_classes = (Predict, Move)
    block_names = ("denoiser", "after_denoiser")

    @property
    def description(self) -> str:
        return "A loop."

    def __call__(self, components: Any, state: Any) -> Any:
        block_state = self.get_block_state(state)
        for i, t in enumerate(block_state.timesteps):
            components, block_state = self.loop_step(components, block_state, i=i, t=t)
        self.set_block_state(state, block_state)
        return components, state


@pytest.fixture
def own() -> Any:
    blocks = modular_pipelines.SequentialPipelineBlocks.from_blocks_dict(
        {"start": Start(), "denoise": Loop()}
    )
    pipe = blocks.init_pipeline()
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe.update_components(unet=unet.eval(), scheduler=diffusers.DDIMScheduler(clip_sample=False))
    return pipe


def draw(pipe: Any) -> Any:
    return pipe(generator=torch.Generator().manual_seed(0), output="latents")


def test_blocks_without_prompts(own: Any) -> None:
    bare = draw(own)
    wrapped = sparke.wrap(own, "rke", scale=30.0)
    guider = DiversityGuider("rke", scale=30.0)
    with inserted(own, guider):
        found = [draw(own) for _ in range(2)]
    for latents in found:
        assert not torch.equal(latents, bare)
        assert torch.equal(latents, draw(wrapped))
    assert len(guider.memory) == 4
    assert torch.equal(draw(own), bare)


def test_missing_prompts_come_before_the_first_step(own: Any) -> None:
    with (
        counting(own.unet) as calls,
        pytest.raises(MissingPrompts, match="Give prompt_embeds="),
    ):
        draw(sparke.wrap(own, "cond-rke"))
    assert calls == []
    with (
        inserted(own, DiversityGuider("cond-rke")),
        counting(own.unet) as calls,
        pytest.raises(MissingPrompts, match="Give prompt_embeds="),
    ):
        draw(own)
    assert len(calls) == 1
    embeds = torch.eye(2)
    assert len(draw(sparke.wrap(own, "cond-rke", prompt_embeds=embeds))) == 2


def test_a_loop_that_predicts_something_else(own: Any) -> None:
    loop = vars(own)["_blocks"].sub_blocks["denoise"].sub_blocks
    loop["denoiser"].output = "velocity"
    with inserted(own, Probe()), pytest.raises(UnsupportedTarget, match="no noise_pred"):
        draw(own)


def test_a_pipeline_without_its_components() -> None:
    empty = modular_pipelines.StableDiffusionXLAutoBlocks().init_pipeline()
    empty.scheduler = None
    with pytest.raises(UnsupportedTarget, match="no scheduler"):
        sparke.wrap(empty)
