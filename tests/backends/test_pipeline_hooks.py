"""Hooks of guiders on diffusers' pipelines, each against the same change made by hand."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparke
from sparke.backends import _noise, modular
from sparke.backends._calls import Call, Texts
from sparke.backends._network import SecondEncoding
from sparke.backends._predictions import Predictions
from sparke.errors import ArgumentError, GuidanceWarning, ShapeError
from sparke.guidance import DiversityGuider
from sparke.models import emoji
from tests.backends import tiny
from tests.backends.hooks import (
    OnCondition,
    OnEncoder,
    OnEvaluation,
    OnModel,
    OnNoise,
    moved,
    negated,
    scaled,
)
from tests.backends.test_diffusers import Cropped
from tests.probe import Probe

PROMPTS = ["a red fox", "blueprint of a steam engine"]
TEXTS = {
    "sd": ("encoder_hidden_states",),
    "sdxl": ("encoder_hidden_states", "text_embeds"),
    "sdxl-modular": ("encoder_hidden_states", "text_embeds"),
    "sd3": ("encoder_hidden_states", "pooled_projections"),
    "flux": ("encoder_hidden_states", "pooled_projections"),
    "pixart-sigma": ("encoder_hidden_states",),
    "qwen": ("encoder_hidden_states",),
    "zimage": ("cap_feats",),
    "wan": ("encoder_hidden_states",),
    "kandinsky3": ("encoder_hidden_states",),
    "emoji": ("encoder_hidden_states",),
}
"""What a change of the prompt changes among the arguments of each denoiser."""
DOUBLED = {
    "sd": ("uncond", "cond"),
    "sdxl": ("uncond", "cond"),
    "sd3": ("uncond", "cond"),
    "pixart-sigma": ("uncond", "cond"),
    "kandinsky3": ("uncond", "cond"),
    "emoji": ("uncond", "cond"),
    "zimage": ("cond", "uncond"),
    "dit": ("cond", "uncond"),
}
SEPARATE = ("qwen", "wan", "sdxl-modular")
NAMES = tuple(TEXTS)
every = pytest.mark.parametrize("name", NAMES)
ENCODED = [name for name in NAMES if name != "emoji"]


@functools.cache
def drawing() -> Any:
    pipe: Any = emoji.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shared(name: str) -> Any:
    return drawing() if name == "emoji" else tiny.shared(name)


def arguments(name: str, prompts: list[str], seed: int, **changes: Any) -> dict[str, Any]:
    if name == "emoji":
        generator = torch.Generator().manual_seed(seed)
        given = {"prompt": ["cat face", "airplane"][: len(prompts)], "guidance_scale": 3.0}
        return {**given, "generator": generator, "output_type": "latent", **changes}
    return tiny.ALL[name].arguments(prompts, seed=seed, **changes)


def call(
    pipe: Any, name: str, prompts: list[str] = PROMPTS, *, seed: int = 0, **changes: Any
) -> Tensor:
    torch.manual_seed(seed)
    changes = {"num_inference_steps": 2, **changes}
    return tiny.latents(pipe(**arguments(name, prompts, seed, **changes))).detach().clone()


def guided(guider: Any, name: str, **options: Any) -> Tensor:
    return call(sparke.wrap(shared(name), guider=guider), name, **options)


def denoiser(pipe: Any) -> nn.Module:
    names = ("unet", "transformer")
    found = next(m for n in names if (m := getattr(pipe, n, None)) is not None)
    assert isinstance(found, nn.Module)
    return found


def rows_of(args: Any, kwargs: Any) -> int:
    return len(args[0] if args else kwargs["hidden_states"])


@contextlib.contextmanager
def seen_by(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The arguments of each call, by name."""
    calls: list[dict[str, Any]] = []

    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append({"rows": rows_of(args, kwargs), "args": args, **kwargs})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextlib.contextmanager
def by_hand(name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The prompt's rows of the denoiser's embeddings changed, as the pipeline calls it."""
    calls: list[int] = []

    def changed(value: Any) -> Any:
        if isinstance(value, list):  # Z-Image: the prompt's come first
            return [change(v[None])[0] if i < len(PROMPTS) else v for i, v in enumerate(value)]
        out = value.clone()
        where = slice(len(PROMPTS), None) if len(value) == 2 * len(PROMPTS) else slice(None)
        out[where] = change(value[where])
        return out

    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        calls.append(1)
        if name in SEPARATE and len(calls) % 2 == 0:
            return None  # the null prompt's call
        if name == "zimage":
            return (*args[:2], changed(args[2]), *args[3:]), kwargs
        kwargs = dict(kwargs)
        for text in TEXTS[name]:
            if text == "text_embeds":
                added = kwargs["added_cond_kwargs"]
                kwargs["added_cond_kwargs"] = {**added, text: changed(added[text])}
            else:
                kwargs[text] = changed(kwargs[text])
        return args, kwargs

    module = denoiser(shared(name))
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Everything(OnNoise, OnCondition, OnModel, OnEvaluation):
    """All hooks, and none does anything."""

    def __init__(self) -> None:
        for kind in (OnNoise, OnCondition, OnModel, OnEvaluation):
            kind.__init__(self)


# --- all of them


@every
def test_hooks_that_do_nothing_change_no_bit_and_stay_nowhere(name: str) -> None:
    pipe, guider = shared(name), Everything()
    module = denoiser(pipe)
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    bare = call(pipe, name)
    held = dict(vars(pipe))
    assert torch.equal(call(sparke.wrap(pipe, guider=guider), name), bare)
    assert guider.entered == [module]
    assert guider.held_at_evaluations == [1, 1]
    assert guider.held == 0
    assert guider.told
    assert guider.begun == [1]
    assert dict(vars(pipe)).keys() == held.keys()
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    assert after == before


# --- on_noise, seeds


@contextlib.contextmanager
def negative_start(pipe: Any, name: str) -> Iterator[None]:
    original = pipe.prepare_latents

    def prepare(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return (-found[0], *found[1:]) if isinstance(found, tuple) else -found

    pipe.prepare_latents = prepare
    try:
        yield
    finally:
        del pipe.prepare_latents


@pytest.mark.parametrize("name", [n for n in NAMES if n != "sdxl-modular"])
def test_other_noise_is_what_the_pipeline_starts_from(name: str) -> None:
    pipe, guider = shared(name), OnNoise(negated)
    ours = guided(guider, name)
    with negative_start(pipe, name):
        assert torch.equal(ours, call(pipe, name))
    assert guider.begun == [1]
    (given,) = guider.noises
    assert guider.runs[0].seeds == _noise.seeds(given)
    assert len(set(guider.runs[0].seeds)) == len(PROMPTS)
    assert guider.runs[0].shape == given.shape
    assert guider.runs[0].cond is not None


def test_other_noise_in_a_modular_pipeline_as_in_the_classic_one() -> None:
    classic, ours = OnNoise(negated), OnNoise(negated)
    expected, found = guided(classic, "sdxl"), guided(ours, "sdxl-modular")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(ours.noises[0], classic.noises[0])
    assert ours.runs[0].seeds == classic.runs[0].seeds
    assert (ours.begun, len(ours.noises)) == ([1], 1)
    assert not torch.allclose(found, call(shared("sdxl-modular"), "sdxl-modular"), atol=0.1)


def test_equal_noise_has_equal_seeds_in_whatever_batch() -> None:
    def seeds(generators: list[int]) -> tuple[int, ...]:
        probe = Probe()
        made = [torch.Generator().manual_seed(g) for g in generators]
        guided(probe, "sd", prompts=["a red fox"] * len(made), generator=made)
        return probe.runs[0].seeds

    together = seeds([1, 2])
    assert together == seeds([1]) + seeds([2])
    assert together[::-1] == seeds([2, 1])


def test_seeds_without_prepared_latents_are_those_of_the_first_input() -> None:
    probe = Probe()
    with seen_by(denoiser(shared("dit"))) as calls:
        guided(probe, "dit")
    assert probe.runs[0].seeds == _noise.seeds(calls[0]["args"][0][: len(PROMPTS)])


def test_noise_comes_after_prompts_in_a_chain() -> None:
    memory, guider = sparke.memory.RingMemory(), OnNoise(negated)
    chain = [DiversityGuider("cond-rke", memory), guider]
    first, second = guided(chain, "sd"), guided(chain, "sd")
    assert len(memory) == 4
    assert guider.begun == [1, 2]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("white", [True, False])
def test_latents_of_the_caller_are_noise_if_they_look_it(white: bool) -> None:
    guider, latents = OnNoise(negated), torch.randn(2, 4, 8, 8)
    if white:
        ours = guided(guider, "sd", latents=latents)
        assert torch.equal(ours, call(shared("sd"), "sd", latents=-latents))
        return
    latents = nn.functional.avg_pool2d(latents, 3, 1, 1) * 3
    with pytest.warns(GuidanceWarning, match="latents that are no white noise"):
        ours = guided(guider, "sd", latents=latents)
    assert torch.equal(ours, call(shared("sd"), "sd", latents=latents))


def test_a_start_from_a_picture_is_left_alone_and_said_once() -> None:
    guider = OnNoise(negated)
    with pytest.warns(GuidanceWarning, match="OnNoise for the initial noise: .* picture") as caught:
        ours = guided(guider, "sd-img2img")
    assert len(caught) == 1
    assert guider.noises == []
    assert len(guider.runs) == 1
    assert torch.equal(ours, call(shared("sd-img2img"), "sd-img2img"))


def test_a_control_image_is_no_start() -> None:
    guider = OnNoise(negated)
    guided(guider, "sd-controlnet")
    assert len(guider.noises) == 1


@pytest.mark.parametrize(
    ("arguments", "noise"),
    [
        ({"timestep": None, "image": torch.ones(1)}, True),
        ({"timestep": torch.tensor(5)}, False),
        ({"timestep": torch.tensor(5), "is_strength_max": True}, True),
        ({"timestep": torch.tensor(5), "is_strength_max": False}, False),
        ({"strength": 0.5}, False),
    ],
)
def test_what_latents_were_prepared_with_tells_a_start_from_a_picture(
    arguments: dict[str, Any], noise: bool
) -> None:
    assert (_noise.obstacle(arguments, torch.randn(2, 4, 16, 16)) is None) is noise


def test_noise_that_cannot_be_reached_is_said_once() -> None:
    with pytest.warns(GuidanceWarning, match="DiTPipeline goes on without OnNoise") as caught:
        ours = guided(OnNoise(negated), "dit")
    assert len(caught) == 1
    assert torch.equal(ours, call(shared("dit"), "dit"))


def test_noise_of_another_shape_is_an_error() -> None:
    with pytest.raises(ShapeError, match="on_noise of OnNoise must return shape"):
        guided(OnNoise(lambda x: x[:1]), "sd")


class Late(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """Prepares its latents before it encodes its prompts."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def encode_prompt(self, prompt: list[str]) -> Tensor:
        return torch.stack([torch.full((7, 32), float(len(p))) for p in prompt])

    def prepare_latents(self, batch: int) -> Tensor:
        return torch.randn(batch, 4, 8, 8)

    @torch.no_grad()
    def __call__(self, prompt: list[str], bend: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        self.scheduler.set_timesteps(3)
        latents = self.prepare_latents(len(prompt))
        embeds = self.encode_prompt(prompt)
        for t in self.scheduler.timesteps:
            out = self.unet(latents, t, encoder_hidden_states=embeds).sample
            latents = self.scheduler.step(bend(out), t, latents).prev_sample
        return latents


def late() -> Any:
    parts = tiny.shared("sd")
    return Late(parts.unet, diffusers.DDIMScheduler.from_config(parts.scheduler.config))


def test_noise_before_prompts_is_left_alone_and_said_once() -> None:
    guider = OnNoise(negated)
    with pytest.warns(GuidanceWarning, match="before it encodes its prompts") as caught:
        sparke.wrap(late(), guider=guider)(PROMPTS)
    assert len(caught) == 1
    assert len(guider.runs) == 1
    assert guider.runs[0].cond is not None
    assert len(guider.runs[0].seeds) == 2


# --- on_condition


@every
def test_the_denoiser_sees_other_embeddings_for_the_prompt_alone(name: str) -> None:
    guider = OnCondition(moved)
    ours = guided(guider, name)
    with by_hand(name, moved):
        assert torch.equal(ours, call(shared(name), name))
    assert len(guider.given) == 2 * len(TEXTS[name])
    assert all(len(given) == len(PROMPTS) for given in guider.given)
    half = len(TEXTS[name])
    for first, second in zip(guider.given[:half], guider.given[half:], strict=True):
        assert torch.equal(first, second)  # clean ones, every time
    steps = [step.index for step in guider.steps]
    assert steps == [0] * half + [1] * half


@pytest.mark.parametrize("name", ["sd", "sdxl", "zimage"])
def test_the_pipelines_own_embeddings_are_left_alone(name: str) -> None:
    pipe = shared(name)
    encoded = pipe.encode_prompt(
        prompt=list(PROMPTS),
        device=torch.device("cpu"),
        do_classifier_free_guidance=True,
        **({} if name == "zimage" else {"num_images_per_prompt": 1}),
    )
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"] if name == "sdxl" else []
    given = dict(zip(names, encoded, strict=True))
    flat = [t for v in given.values() for t in (v if isinstance(v, list) else [v])]
    before = [t.clone() for t in flat]
    guider = OnCondition(moved)
    ours = guided(guider, name, prompt=None, **given)
    assert guider.given
    assert not torch.equal(ours, call(pipe, name, prompt=None, **given))
    assert all(torch.equal(a, b) for a, b in zip(flat, before, strict=True))


def test_masks_come_along_as_booleans() -> None:
    masks = {}
    for name in ("pixart-sigma", "qwen", "zimage", "wan", "sd", "flux"):
        guider = OnCondition()
        guided(guider, name, num_inference_steps=1)
        masks[name] = guider.masks[0], guider.given[0]
    for name in ("pixart-sigma", "qwen", "zimage", "wan"):
        mask, given = masks[name]
        assert mask is not None
        assert mask.dtype == torch.bool
        assert mask.shape == given.shape[:2]
        lengths = mask.sum(1).tolist()
        assert 0 < lengths[0] < lengths[1]  # the second prompt is longer
        assert all(bool(row[:n].all()) for row, n in zip(mask, lengths, strict=True))
    assert masks["sd"][0] is None
    assert masks["flux"][0] is None


def test_one_length_has_no_padding_to_tell_of() -> None:
    guider = OnCondition()
    guided(guider, "zimage", prompts=["a cat", "a dog"])
    assert guider.masks == [None, None]


def test_class_labels_are_no_embeddings_and_it_is_said_once() -> None:
    with pytest.warns(GuidanceWarning, match="class labels are none") as caught:
        ours = guided(OnCondition(moved), "dit")
    assert len(caught) == 1
    assert torch.equal(ours, call(shared("dit"), "dit"))


def test_embeddings_of_another_shape_are_an_error() -> None:
    with pytest.raises(ShapeError, match="on_condition of OnCondition must return shape"):
        guided(OnCondition(lambda x: x[:, :1]), "sd")


def asked(kind: str, texts: Any, **more: Any) -> Call:
    module = tiny.shared("sd").unet
    return Call(
        module,
        (torch.randn(len(texts), 4, 8, 8), 5),
        {"encoder_hidden_states": texts, **more},
        kind,
    )


@pytest.mark.parametrize("kind", ["cond", "uncond+cond", "cond+uncond"])
def test_a_call_changed_and_unchanged(kind: str) -> None:
    branches = kind.count("+") + 1
    texts = torch.randn(3 * branches, 5, 4)
    before = asked(kind, texts)
    assert Texts(3).changed(before, lambda _, own, __: own) is before
    after = Texts(3).changed(before, lambda _, own, __: own + 1)
    at = kind.split("+").index("cond")
    expected = [t + (i == at) for i, t in enumerate(texts.chunk(branches))]
    torch.testing.assert_close(after.kwargs["encoder_hidden_states"], torch.cat(expected))
    assert before.kwargs["encoder_hidden_states"] is texts


@pytest.mark.parametrize("kind", ["uncond", "other"])
def test_calls_for_others_are_left_alone(kind: str) -> None:
    before = asked(kind, torch.randn(3, 5, 4))
    assert Texts(3).changed(before, lambda *_: pytest.fail("asked")) is before


def test_embeddings_by_position_are_found() -> None:
    texts = torch.randn(3, 5, 4)
    before = Call(tiny.shared("sd").unet, (torch.randn(3, 4, 8, 8), 5, texts), {}, "cond")
    after = Texts(3).changed(before, lambda _, own, __: own + 1)
    assert torch.equal(after.args[2], texts + 1)
    assert after.args[0] is before.args[0]


def test_zeros_are_padding_where_there_is_no_mask() -> None:
    texts = torch.randn(2, 4, 3)
    texts[0, 2:] = 0
    seen: list[Any] = []

    def look(_: str, own: Tensor, mask: Tensor | None) -> Tensor:
        seen.append(mask)
        return own

    Texts(2).changed(asked("cond", texts), look)
    assert seen[0].tolist() == [[True, True, False, False], [True] * 4]


# --- half of a call


def test_the_prompts_half_of_a_call() -> None:
    both = {n: torch.randn(4, 2) for n in ("time_ids", "text_embeds", "image_embeds")}
    call_ = Call(
        tiny.shared("sd").unet,
        (torch.randn(4, 4, 8, 8), torch.tensor(5)),
        {
            "encoder_hidden_states": torch.randn(4, 5, 4),
            "timestep_cond": None,
            "added_cond_kwargs": {**both, "image_embeds": [both["image_embeds"]]},
            "down_block_additional_residuals": tuple(torch.randn(4, 3) for _ in range(4)),
            "img_ids": torch.randn(4, 3),
            "return_dict": False,
        },
        "uncond+cond",
    )
    half = call_.alone(2)
    assert half.kind == "cond"
    assert torch.equal(half.args[0], call_.args[0][2:])
    assert half.args[1] is call_.args[1]
    assert torch.equal(half.kwargs["added_cond_kwargs"]["time_ids"], both["time_ids"][2:])
    (image,) = half.kwargs["added_cond_kwargs"]["image_embeds"]
    assert torch.equal(image, both["image_embeds"][2:])
    residuals = half.kwargs["down_block_additional_residuals"]
    assert [r.shape for r in residuals] == [(2, 3)] * 4
    assert half.kwargs["img_ids"] is call_.kwargs["img_ids"]
    assert half.kwargs["return_dict"] is False
    single = asked("cond", torch.randn(2, 5, 4))
    assert single.alone(2) is single


def test_half_of_a_list_of_samples() -> None:
    transformer = tiny.shared("zimage").transformer
    images = [torch.randn(4, 1, 8, 8) for _ in range(4)]
    texts = [torch.randn(i + 4, 6) for i in range(4)]
    half = Call(transformer, (images, torch.ones(4), texts), {}, "cond+uncond").alone(2)
    assert [a is b for a, b in zip(half.args[0], images[:2], strict=True)] == [True, True]
    assert [a is b for a, b in zip(half.args[2], texts[:2], strict=True)] == [True, True]
    assert half.args[1].shape == (2,)


# --- on_model


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["sd", "flux", "sdxl-modular"])
def test_nothing_stays_hooked_after_an_error(name: str, error: type[BaseException]) -> None:
    pipe, guider = shared(name), OnModel(scaled)
    module = denoiser(pipe)
    block = next(m for m in module.modules() if type(m).__name__.endswith("Block"))
    before = call(pipe, name)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error("on purpose")

    handle = block.register_forward_pre_hook(fail)
    with handle, pytest.raises(error, match="on purpose"):
        guided(guider, name, num_inference_steps=4)
    assert guider.entered == [module]
    assert guider.held == 0
    assert not any(m._forward_hooks for m in module.modules())
    assert torch.equal(call(pipe, name), before)


@pytest.mark.parametrize("name", ["sd", "wan", "sdxl-modular"])
def test_what_is_done_to_the_network_has_an_effect(name: str) -> None:
    ours = guided(OnModel(scaled), name)
    with scaled(denoiser(shared(name))):
        assert torch.equal(ours, call(shared(name), name))


def test_the_network_is_held_where_samples_have_another_shape_than_the_latents() -> None:
    parts = tiny.shared("sd")
    pipe = Cropped(parts.unet, diffusers.DDIMScheduler.from_config(parts.scheduler.config))
    embeds, guider = torch.randn(2, 7, 32), Everything()
    wrapped = sparke.wrap(pipe, guider=guider)
    held_at: list[int] = []
    with parts.unet.register_forward_pre_hook(lambda *_: held_at.append(guider.held)):
        for number in (1, 2):
            wrapped(embeds, torch.Generator().manual_seed(0))
            assert len(guider.entered) == number
    assert held_at == [1] * 6
    assert len(guider.noises) == 2
    assert [given.shape for given in guider.given] == [(2, 7, 32)] * 6
    assert guider.states[-1].x.shape == (2, 4, 8, 8)
    assert [len(run.seeds) for run in guider.runs] == [2] * len(guider.runs)


# --- on_evaluation, again


@pytest.mark.parametrize("name", [*NAMES, "dit", "lcm"])
def test_each_call_is_told_with_whose_rows_it_has(name: str) -> None:
    guider, pipe = OnEvaluation(), shared(name)
    with seen_by(denoiser(pipe)) as calls:
        guided(guider, name)
    assert [len(e.branches) * e.batch for e in guider.told] == [c["rows"] for c in calls]
    if name in DOUBLED:
        assert [e.branches for e in guider.told] == [DOUBLED[name]] * 2
    elif name in SEPARATE:
        assert [e.branches for e in guider.told] == [("cond",), ("uncond",)] * 2
    else:
        assert [e.branches for e in guider.told] == [("cond",)] * 2
    assert {e.batch for e in guider.told} == {2}
    sigmas = [state.step.sigma for state in guider.states]
    assert list(dict.fromkeys(e.step.sigma for e in guider.told)) == pytest.approx(sigmas)


def test_a_call_that_is_not_made_is_not_told() -> None:
    class Held(OnEvaluation):
        def on_guidance_scale(self, step: Any, guidance_scale: float) -> float:
            return 1.0

    guider = Held(again=True, conditional=True)
    with seen_by(denoiser(shared("wan"))) as calls:
        guided(guider, "wan")
    assert [e.branches for e in guider.told] == [("cond",)] * 4
    assert len(calls) == 4
    for seen, conditional in zip(guider.seen_again, guider.conditionals, strict=True):
        assert seen is not None
        torch.testing.assert_close(seen, conditional)


@pytest.mark.parametrize("name", [*NAMES, "dit", "lcm", "sd-v", "sd-controlnet"])
def test_a_second_look_costs_one_branch_and_sees_the_same(name: str) -> None:
    guider = OnEvaluation(again=True, conditional=True)
    with seen_by(denoiser(shared(name))) as calls:
        ours = guided(guider, name)
    assert torch.equal(ours, call(shared(name), name))
    rows = 2 * len(DOUBLED.get(name.removesuffix("-v").removesuffix("-controlnet"), ("cond",)))
    per_step = [rows, 2] if name not in SEPARATE else [2, 2, 2]
    assert [c["rows"] for c in calls] == per_step * 2
    assert guider.told[-1].branches == ("cond",)
    for seen, conditional in zip(guider.seen_again, guider.conditionals, strict=True):
        assert seen is not None
        torch.testing.assert_close(seen, conditional, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sd", "zimage", "qwen", "wan", "sdxl-modular"])
def test_a_second_look_without_guidance(name: str) -> None:
    scale: dict[str, Any] = {"guidance_scale": 0.0 if name == "zimage" else 1.0}
    if name == "qwen":
        scale = {"true_cfg_scale": 1.0}
    pipe, guider = shared(name), OnEvaluation(again=True)
    with contextlib.ExitStack() as held:
        if name == "sdxl-modular":
            scale, own = {}, pipe.guider
            pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=1.0)
            held.callback(setattr, pipe, "guider", own)
        guided(guider, name, **scale)
    assert {e.branches for e in guider.told} == {("cond",)}
    for seen, state in zip(guider.seen_again, guider.states, strict=True):
        assert seen is not None
        torch.testing.assert_close(seen, state.denoised, rtol=1e-3, atol=1e-4)


def test_a_second_look_sees_what_hooks_do_meanwhile() -> None:
    class Weak(OnModel):
        factor = 1.0

        def __call__(self, state: Any) -> Tensor:
            self.factor = 0.0
            self.weak = state.again()
            self.factor = 1.0
            self.state = state
            return super().__call__(state)

    guider = Weak()
    guider.hooked = lambda module: _answers_times(module, guider)
    assert torch.equal(guided(guider, "sd"), call(shared("sd"), "sd"))
    # Where the predicted noise is zero, the estimate is the sample over its scale.
    torch.testing.assert_close(guider.weak, guider.state.x)


@contextlib.contextmanager
def _answers_times(module: nn.Module, guider: Any) -> Iterator[None]:
    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        return (out[0] * guider.factor, *out[1:])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_no_second_look_where_it_is_not_certain_what_it_means() -> None:
    guider, pipe = OnEvaluation(again=True), late()
    out = sparke.wrap(pipe, guider=guider)(PROMPTS, bend=torch.tanh)
    assert guider.seen_again == [None] * 3
    assert out.isfinite().all()
    plain = OnEvaluation(again=True, conditional=True)
    sparke.wrap(pipe, guider=plain)(PROMPTS, bend=torch.neg)
    for seen, conditional in zip(plain.seen_again, plain.conditionals, strict=True):
        assert seen is not None
        torch.testing.assert_close(seen, conditional)


def test_guiders_without_hooks_get_no_second_look() -> None:
    probe = Probe()
    guided(probe, "sd")
    assert [state.again for state in probe.states] == [None, None]


def test_signs_of_answers() -> None:
    c, u = torch.randn(2, 3), torch.randn(2, 3)
    for sign in (1.0, -1.0):
        seen = Predictions(2, None)
        seen.conditional = c
        assert seen.sign(sign * c) == sign
        assert seen.sign(c + u) is None
        assert seen.as_output(sign * c) is None
        seen.unconditional = u
        guided_ = sign * (u + 3 * (c - u))
        assert seen.sign(guided_) == sign
        torch.testing.assert_close(seen.as_output(guided_), sign * c)
    assert Predictions(2, None).sign(c) is None
    zeros = Predictions(2, None)
    zeros.conditional = torch.zeros(2, 3)
    assert zeros.sign(torch.zeros(2, 3)) is None


# --- on_encoder


@contextlib.contextmanager
def turned(encoder: nn.Module) -> Iterator[None]:
    """Another encoder: what it looks up, features in reverse order."""
    with contextlib.ExitStack() as held:
        for module in encoder.modules():
            if isinstance(module, nn.Embedding):
                held.enter_context(module.register_forward_hook(lambda _, __, out: out.flip(-1)))
        yield


@pytest.mark.parametrize("name", ENCODED)
def test_a_second_look_at_prompts_encoded_differently(name: str) -> None:
    """At the first step it is the prediction for embeddings made by hooked encoders throughout."""
    pipe = shared(name)
    encoders = {id(v): v for k, v in pipe.components.items() if k.startswith("text_encoder")}
    kept = [v for v in encoders.values() if isinstance(v, nn.Module)]
    guider = OnEncoder(turned)
    bare = call(pipe, name)  # in its first call transformers hooks what it wants to see
    before = [len(m._forward_hooks) for e in kept for m in e.modules()]
    assert torch.equal(call(sparke.wrap(pipe, guider=guider), name), bare)
    assert [id(e) for e in guider.encoders] == [id(e) for e in kept]
    plain = OnEvaluation(conditional=True)
    with contextlib.ExitStack() as held:
        for encoder in kept:
            held.enter_context(turned(encoder))
        guided(plain, name)
    seen = guider.seen_again[0]
    assert seen is not None
    torch.testing.assert_close(seen, plain.conditionals[0], rtol=1e-3, atol=1e-4)
    assert float((seen - guider.conditionals[0]).abs().max()) > 1e-3
    assert [len(m._forward_hooks) for e in kept for m in e.modules()] == before


@contextlib.contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def test_prompts_are_encoded_a_second_time_and_not_a_third() -> None:
    pipe = shared("sd")
    wrapped = sparke.wrap(pipe, guider=Probe())
    other = sparke.wrap(pipe, guider=OnEncoder(scaled))
    unwilling = sparke.wrap(pipe, guider=OnEncoder())
    for target in (wrapped, other, unwilling):
        call(target, "sd")  # the reference prompts are encoded in the first call
    counts = []
    for target in (wrapped, other, unwilling):
        with counted(pipe.text_encoder) as calls:
            call(target, "sd")
        counts.append(len(calls))
    assert counts == [2, 4, 2]  # prompts and negative prompts


def test_embeddings_of_the_caller_cannot_be_encoded_again() -> None:
    pipe = shared("sd")
    embeds, negative = pipe.encode_prompt(list(PROMPTS), torch.device("cpu"), 1, True)
    guider = OnEncoder(scaled)
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with pytest.warns(GuidanceWarning, match="OnEncoder for a second encoding .* call it with"):
        guided(guider, "sd", **given)
    assert guider.encoders == []
    assert guider.seen_again[0] is not None
    torch.testing.assert_close(guider.seen_again[0], guider.conditionals[0], rtol=1e-3, atol=1e-4)


def test_a_pipeline_without_prompts_has_nothing_to_encode() -> None:
    with pytest.warns(GuidanceWarning, match="DiTPipeline goes on without OnEncoder"):
        guided(OnEncoder(scaled), "dit")


def test_an_encoder_that_fails_is_left_as_it_was() -> None:
    pipe = shared("sd")

    @contextlib.contextmanager
    def failing(encoder: nn.Module) -> Iterator[None]:
        with scaled(encoder):
            encoder.register_forward_pre_hook(fail)
            try:
                yield
            finally:
                encoder._forward_pre_hooks.clear()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt("on purpose")

    with pytest.raises(KeyboardInterrupt, match="on purpose"):
        guided(OnEncoder(failing), "sd")
    assert not pipe.text_encoder._forward_hooks
    assert not pipe.text_encoder._forward_pre_hooks


def test_weakened_embeddings_pass_through_on_condition() -> None:
    class Both(OnEncoder, OnCondition):
        def __init__(self) -> None:
            OnCondition.__init__(self, moved)
            OnEncoder.__init__(self, lambda encoder: scaled(encoder, 0.7))
            self.change = moved

    guider = Both()
    guided(guider, "sd", num_inference_steps=1)
    plain, weak = guider.given
    assert not torch.allclose(plain, weak, atol=1e-3)


def test_parts_of_an_encoding_are_known_by_their_values() -> None:
    tokens, pooled = torch.randn(2, 5, 4), torch.randn(2, 4)
    second = SecondEncoding([tokens, None, pooled], [tokens + 1, None, pooled + 2])
    many = tokens.repeat_interleave(3, 0)
    torch.testing.assert_close(second.instead("a", many), many + 1)
    torch.testing.assert_close(second.instead("b", pooled), pooled + 2)
    assert not second.missing
    other = torch.randn(2, 4)
    assert second.instead("c", other) is other
    lost = SecondEncoding([tokens], [tokens + 1])
    assert not lost.missing
    lost.instead("a", torch.randn(2, 5, 4))
    assert lost.missing


# --- compiled networks


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_hooks_outside_the_network_leave_a_compiled_one_in_one_graph() -> None:
    name = "sd3"
    pipe = tiny.ALL[name].make()
    expected = call(sparke.wrap(pipe, guider=OnCondition(moved)), name)
    counter = CompileCounterWithBackend("eager")
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    for _ in range(2):
        holding = OnModel()
        guiders = [OnCondition(moved), holding, OnEvaluation(), OnNoise()]
        ours = call(sparke.wrap(pipe, guider=guiders), name)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert holding.entered == [pipe.transformer]
    assert counter.frame_count == 1


# --- modular pipelines with blocks of ours


@pytest.mark.parametrize("guider", [OnNoise(), OnCondition(), OnModel(), OnEvaluation()])
def test_blocks_refuse_what_they_cannot_reach(guider: Any) -> None:
    pipe = shared("sdxl-modular")
    needed = {"OnNoise": "on_noise", "OnCondition": "on_condition", "OnModel": "on_model"}
    wanted = needed.get(type(guider).__name__, "on_evaluation")
    with pytest.raises(ArgumentError, match=rf"needs {wanted}.*sparke\.wrap\(pipe"):
        modular.insert(pipe, guider)
    assert "diversity" not in str(list(vars(pipe)["_blocks"].sub_blocks))


def test_a_modular_pipelines_state_is_a_plain_one_afterwards() -> None:
    pipe = shared("sdxl-modular")
    wrapped = sparke.wrap(pipe, guider=OnNoise(negated))
    given = {**arguments("sdxl-modular", PROMPTS, 0, num_inference_steps=1), "output": None}
    state = wrapped(**given)
    assert type(state.values) is dict
