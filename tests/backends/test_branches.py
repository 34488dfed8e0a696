"""Pipelines that evaluate a third branch beside the two of classifier-free guidance.

Perturbed attention guidance adds the prompt once more, InstructPix2Pix the null prompt once more;
each is held against the same pipeline called, or changed by hand, so that it does the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import sparke
from sparke.errors import ArgumentError, GuidanceWarning
from sparke.guidance.cads import CADS
from sparke.guidance.erg import ERG
from sparke.guidance.interval import Interval
from sparke.protocols import Step
from tests.backends import tiny
from tests.backends.hooks import OnCondition, OnEvaluation, moved
from tests.probe import Probe

PROMPTS = ["a red fox", "blueprint of a steam engine"]
B = len(PROMPTS)
PICTURES = torch.rand(B, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0))
CALLS: dict[str, dict[str, Any]] = {
    "pag": {"height": tiny.SIDE, "width": tiny.SIDE, "pag_scale": 3.0},
    "pag-xl": {"height": tiny.SIDE, "width": tiny.SIDE, "pag_scale": 3.0},
    "pix2pix": {"image": PICTURES, "image_guidance_scale": 1.5},
}
BRANCHES = {
    "pag": ("uncond", "cond", "cond"),
    "pag-xl": ("uncond", "cond", "cond"),
    "pix2pix": ("cond", "uncond", "uncond"),
}
NAMES = tuple(CALLS)
PERTURBED = NAMES[:2]
every = pytest.mark.parametrize("name", NAMES)
perturbed = pytest.mark.parametrize("name", PERTURBED)
NOWHERE = (0.0, 1e-9)
"""An interval of noise levels that holds none of a run's."""


@functools.cache
def shared(name: str) -> Any:
    if name == "pag":
        made = diffusers.StableDiffusionPAGPipeline(**tiny._sd_parts(), pag_applied_layers="mid")
    elif name == "pag-xl":
        made = diffusers.StableDiffusionXLPAGPipeline(
            **tiny._sdxl_parts(), pag_applied_layers="mid"
        )
    else:
        size = {"cross_attention_dim": tiny.WIDTH, "attention_head_dim": 2, "in_channels": 8}
        parts = {**tiny._sd_parts(), "unet": diffusers.UNet2DConditionModel(**tiny._UNET, **size)}
        made = diffusers.StableDiffusionInstructPix2PixPipeline(**parts)
    return tiny._finish(made)


def call(name: str, guider: Any = None, **changes: Any) -> Tensor:
    pipe = shared(name) if guider is None else sparke.wrap(shared(name), guider=guider)
    given = {
        "prompt": list(PROMPTS),
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **CALLS[name],
    }
    return tiny.latents(pipe(**{**given, **changes})).detach().clone()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@contextlib.contextmanager
def embeds_changed(name: str, change: Any) -> Iterator[list[list[Tensor]]]:
    """The prompt's rows of all embeddings changed by hand; yields what each call had, by branch."""
    seen: list[list[Tensor]] = []

    def changed(value: Tensor) -> Tensor:
        parts = value.split(B)
        named = zip(parts, BRANCHES[name], strict=True)
        return torch.cat([change(p) if branch == "cond" else p for p, branch in named])

    def hook(_: Any, __: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["encoder_hidden_states"] = changed(kwargs["encoder_hidden_states"])
        seen.append(list(kwargs["encoder_hidden_states"].split(B)))
        added = kwargs.get("added_cond_kwargs")
        if added:
            added = {**added, "text_embeds": changed(added["text_embeds"])}
            kwargs["added_cond_kwargs"] = added
        return None, kwargs

    def with_args(module: Any, args: Any, kwargs: Any) -> Any:
        _, kwargs = hook(module, args, kwargs)
        return args, kwargs

    handle = shared(name).unet.register_forward_pre_hook(with_args, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class Scale(Probe):
    """Wants one guidance scale, and keeps those it was shown."""

    def __init__(self, wanted: float) -> None:
        super().__init__()
        self.wanted = wanted
        self.shown: list[float] = []

    def on_guidance_scale(self, step: Step, guidance_scale: float) -> float:
        self.shown.append(guidance_scale)
        return self.wanted


@every
def test_each_branch_is_told_by_its_prompt(name: str) -> None:
    guider = OnEvaluation()
    out = call(name, guider)
    assert [e.branches for e in guider.told] == [BRANCHES[name]] * 3
    assert torch.equal(out, call(name))


@every
def test_embeddings_are_changed_in_every_branch_of_the_prompt(name: str) -> None:
    guider = OnCondition(moved)
    ours = call(name, guider)
    with embeds_changed(name, moved):
        theirs = call(name)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, call(name))
    assert {len(given) for given in guider.given} == {B}


@every
def test_cads_gives_all_branches_of_the_prompt_the_same_noise(name: str) -> None:
    with embeds_changed(name, lambda x: x) as seen:
        call(name)
        clean = list(seen)
        seen.clear()
        call(name, CADS(s=0.5, tau1=0.0, tau2=0.5))
    for before, after in zip(clean, seen, strict=True):
        noised = []
        for old, new, branch in zip(before, after, BRANCHES[name], strict=True):
            assert torch.equal(old, new) == (branch == "uncond" or torch.equal(after[0], old))
            noised += [new] if branch == "cond" else []
        assert all(torch.equal(new, noised[0]) for new in noised)
    assert any(not torch.equal(a, b) for a, b in zip(clean[0], seen[0], strict=True))


@every
def test_outside_its_interval_guidance_is_off_and_the_rest_stays(name: str) -> None:
    # At scale 1 the pipeline leaves the null prompt out; perturbed attention goes on.
    ours, bare = call(name, Interval(*NOWHERE)), call(name)
    close(ours, call(name, guidance_scale=1.0))
    assert float((ours - bare).abs().max()) > 0.1
    assert torch.equal(call(name, Interval(0.0, float("inf"))), bare)


@every
def test_another_scale_is_what_the_pipeline_makes_of_that_scale(name: str) -> None:
    guider = Scale(3.0)
    ours = call(name, guider)
    assert guider.shown == [5.0] * 3
    # Half way to the conditional prediction, for the pictures' scale of InstructPix2Pix as well.
    rest = {"image_guidance_scale": 1.25} if name == "pix2pix" else {}
    close(ours, call(name, guidance_scale=3.0, **rest))


@perturbed
def test_without_a_null_prompt_nothing_is_taken_for_one(name: str) -> None:
    bare = call(name, guidance_scale=1.0)
    assert torch.equal(call(name, Interval(*NOWHERE), guidance_scale=1.0), bare)
    guider = OnEvaluation()
    call(name, guider, guidance_scale=1.0)
    assert [e.branches for e in guider.told] == [("cond", "cond")] * 3
    scale = Scale(4.0)
    assert torch.equal(call(name, scale, guidance_scale=1.0), bare)
    assert scale.shown == []


@perturbed
def test_with_perturbed_attention_off_it_is_a_pipeline_like_any(name: str) -> None:
    guider = OnEvaluation(again=True)
    call(name, guider, pag_scale=0.0)
    assert [e.branches for e in guider.told[::2]] == [("uncond", "cond")] * 3
    assert all(seen is not None for seen in guider.seen_again)


@every
def test_the_conditional_prediction_is_that_of_the_prompts_branch(name: str) -> None:
    answers: list[Tensor] = []
    pipe = shared(name)
    handle = pipe.unet.register_forward_hook(lambda _, __, out: answers.append(out[0].clone()))
    guider = OnEvaluation(again=True, conditional=True)
    try:
        call(name, guider)
    finally:
        handle.remove()
    place = BRANCHES[name].index("cond")
    with_whole = [a for a in answers if len(a) == 3 * B]
    states = guider.states
    assert len(with_whole) == len(states) == 3
    for answer, state, seen in zip(with_whole, states, guider.conditionals, strict=True):
        noise = answer[place * B : (place + 1) * B]
        torch.testing.assert_close(seen, state.x - state.step.sigma * noise, rtol=1e-3, atol=1e-3)
    if name in PERTURBED:  # its layers count the rows of a call; half of them is another thing
        assert guider.seen_again == [None] * 3
    else:
        for seen, again in zip(guider.conditionals, guider.seen_again, strict=True):
            assert again is not None
            torch.testing.assert_close(again, seen, rtol=1e-3, atol=1e-3)


@every
def test_repulsion_acts_on_what_the_branches_make_together(name: str) -> None:
    quiet = call(name, sparke.DiversityGuider("cond-rke", scale=0.0))
    assert torch.equal(quiet, call(name))
    # At one prompt, and the same noise all but, samples repel each other.
    noise = torch.randn(1, 4, tiny.SIDE // 2, tiny.SIDE // 2, generator=torch.Generator())
    start = noise + 0.05 * torch.randn(B, *noise.shape[1:], generator=torch.Generator())
    one = {"prompt": [PROMPTS[0]] * B, "latents": start}
    if name == "pix2pix":
        one["image"] = PICTURES[:1].repeat(B, 1, 1, 1)
    guider = sparke.DiversityGuider("cond-rke", scale=10.0, cfg_interval=None)
    apart, bare = call(name, guider, **one), call(name, **one)
    assert float((apart[0] - apart[1]).norm()) > 1.001 * float((bare[0] - bare[1]).norm())
    assert len(guider.memory) == B


@perturbed
def test_erg_says_what_it_cannot_have(name: str) -> None:
    bare, unet = call(name), shared(name).unet
    processors = dict(unet.attn_processors)
    for weak in ("null", "prompt", "auto"):
        with pytest.raises(ArgumentError, match=r"perturbed attention .*pag_scale=0"):
            call(name, ERG(0.5, weak=weak, kickoff=0.0, layers=None))
        unet.set_attn_processor(dict(processors))  # diffusers does so after a whole call only
        assert torch.equal(call(name), bare)
    assert torch.equal(call(name, ERG(1.0)), bare)
    ours = call(name, ERG(0.5, weak="null", kickoff=0.0, layers=None), pag_scale=0.0)
    assert float((ours - call(name, pag_scale=0.0)).abs().max()) > 1e-2


def test_rows_that_nobody_can_tell_apart_are_left_alone_with_a_warning() -> None:
    # A prompt that says nothing is the null prompt's equal: all three branches look alike.
    nothing = {"prompt": ["", ""]}
    for guider in (Interval(*NOWHERE), sparke.DiversityGuider("rke")):
        with pytest.warns(GuidanceWarning, match="for the guidance scale: which rows") as told:
            call("pix2pix", guider, **nothing)
        assert len([w for w in told if w.category is GuidanceWarning]) == 1
    bare = call("pix2pix", **nothing)
    assert torch.equal(call("pix2pix", sparke.DiversityGuider("rke", scale=0.0), **nothing), bare)
    call("pix2pix", sparke.DiversityGuider("rke", cfg_interval=None), **nothing)
