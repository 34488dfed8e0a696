"""Contextual repulsion inside diffusers' own transformers, and in a sampler of k-diffusion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from k_diffusion import sampling
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sparke
from sparke.errors import ArgumentError
from sparke.guidance import _blocks
from sparke.guidance.contextual import Contextual
from sparke.memory import RingMemory
from sparke.metrics import vendi
from tests.backends import tiny

PROMPTS = ["a red cat"] * 3
PIPELINES = ["sd3", "flux", "qwen"]


class Recorder(Contextual):
    """Notes what blocks gave, what was added, at which step and to which branches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.index, self.branches = -1, ("",)
        self.seen: list[tuple[int, tuple[str, ...], int, Tensor, Tensor | None, Any]] = []

    def on_evaluation(self, evaluation: Any) -> None:
        self.index, self.branches = evaluation.step.index, evaluation.branches
        super().on_evaluation(evaluation)

    def edit(self, block: int, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        change = super().edit(block, tokens, mask)
        self.seen.append((self.index, self.branches, block, tokens.clone(), change, mask))
        return change


def run(name: str, guider: Any = None, prompts: Any = PROMPTS, **changes: Any) -> Tensor:
    """Latents of a pipeline, guided if there is a guider."""
    pipe = tiny.shared(name)
    called = pipe if guider is None else sparke.wrap(pipe, guider=guider)
    return tiny.latents(called(**tiny.ALL[name].arguments(prompts, **changes)))


def all_blocks(model: Any) -> list[Any]:
    return [block for block, _ in _blocks.found(model)]


@contextmanager
def listening(model: Any) -> Iterator[list[tuple[int, Tensor]]]:
    """The text tokens every block is called with, and its number."""
    heard: list[tuple[int, Tensor]] = []

    def hear(number: int) -> Any:
        def note(module: Any, args: Any, kwargs: Any) -> None:
            heard.append((number, kwargs["encoder_hidden_states"].clone()))

        return note

    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]
    handles = [
        block.register_forward_pre_hook(hear(n), with_kwargs=True) for n, block in enumerate(blocks)
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def on_modules(model: nn.Module) -> dict[str, set[str]]:
    """Names of what is set on each module, to see that nothing is left behind."""
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    names.pop("")  # diffusers itself keeps an empty registry there
    return names


# --- what reaches the blocks --------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_the_text_of_a_batch_ends_further_apart(name: str) -> None:
    model = tiny.shared(name).transformer
    with listening(model) as plain:
        run(name)
    with listening(model) as guided:
        run(name, Contextual(eta=0.2, steps=1))
    calls = len(model.transformer_blocks) + len(getattr(model, "single_transformer_blocks", ()))
    further = 0
    for (block, before), (_, after) in zip(plain[:calls], guided[:calls], strict=True):
        for rows in range(0, len(before), 3):
            was, now = (
                vendi(text[rows : rows + 3].flatten(1), kernel="cosine") for text in (before, after)
            )
            if block == 0:  # no block yet, and one prompt: nobody differs
                assert now == pytest.approx(1, abs=1e-5)
            else:
                assert now > 1.02 * was
                further += 1
    assert further >= calls - 1


@pytest.mark.parametrize("name", PIPELINES)
def test_the_next_block_gets_what_the_last_gave_and_the_push(name: str) -> None:
    model = tiny.shared(name).transformer
    guider = Recorder(eta=0.2, steps=2)
    with listening(model) as heard:
        run(name, guider)
    assert {index for index, *_ in guider.seen} == {0, 1, 2, 3}
    for index, _, _, tokens, change, mask in guider.seen:
        assert (change is None) == (index >= 2)
        assert mask is None  # prompts of one length need none
        if change is not None:
            lengths = change.flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1)
            # M pushes in nearly one direction.
            assert (lengths < 0.21).all()
            assert (lengths > 0.15).all()
    if name == "flux":
        return  # its single-stream blocks come in the same list, all tokens in one
    _, _, block, tokens, change, _ = guider.seen[0]
    assert block == 0
    assert change is not None
    torch.testing.assert_close(next(text for b, text in heard if b == 1), tokens + change)


def test_single_stream_blocks_push_text_and_image_as_one() -> None:
    guider, model = Recorder(eta=0.2, steps=1), tiny.shared("flux").transformer
    with listening(model) as heard:
        run("flux", guider)
    text = heard[0][1].shape[1]
    sizes = [(block, tokens.shape[1]) for _, _, block, tokens, _, _ in guider.seen[:4]]
    image = 4 * 4  # patches of latents of 8 x 8
    assert sizes == [(0, text), (1, text), (2, text + image), (3, text + image)]
    _, _, _, tokens, change, _ = guider.seen[2]
    assert change is not None
    torch.testing.assert_close(heard[3][1], (tokens + change)[:, :text])


def test_branches_side_by_side_are_pushed_apart_on_their_own() -> None:
    guider = Recorder(eta=0.2, steps=1)
    run("sd3", guider)
    _, branches, block, tokens, change, _ = guider.seen[0]
    assert branches == ("uncond", "cond")
    assert len(tokens) == 6
    alone = Contextual(eta=0.2)
    alone.begin(sparke.protocols.Run(torch.Size((3, 4)), tokens.device, tokens.dtype))
    for half, name in enumerate(branches):
        part = tokens[3 * half : 3 * half + 3]
        step = sparke.Step(0, 1.0, 0.5, 4)
        alone.on_evaluation(sparke.protocols.Evaluation(step, (name,), 3))
        assert change is not None
        torch.testing.assert_close(
            alone.edit(block, part, None), change[3 * half : 3 * half + 3], rtol=1e-4, atol=1e-6
        )


def test_branches_one_after_the_other_are_both_pushed() -> None:
    guider = Recorder(eta=0.2, steps=1)
    run("qwen", guider)
    pushed = {branches for _, branches, _, _, change, _ in guider.seen if change is not None}
    assert pushed == {("cond",), ("uncond",)}


def test_padding_of_prompts_of_other_lengths_is_left_alone() -> None:
    guider = Recorder("vendi", eta=0.2, steps=1)
    run("qwen", guider, ["a cat", "a large red cat", "a cat"])
    _, _, _, _, change, mask = next(seen for seen in guider.seen if seen[5] is not None)
    assert change is not None
    assert not mask.all()
    assert not change[~mask.bool()].any()
    assert change[mask.bool()].any(1).all()


def test_half_precision_stays_half() -> None:
    pipe = tiny.ALL["sd3"].make().to(torch.bfloat16)
    guided = sparke.wrap(pipe, guider=Contextual(eta=0.2))
    plain = tiny.latents(pipe(**tiny.ALL["sd3"].arguments(PROMPTS)))
    ours = tiny.latents(guided(**tiny.ALL["sd3"].arguments(PROMPTS)))
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert ours.isfinite().all()
    assert not torch.equal(ours, plain)


# --- the whole call -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_zero_is_bit_identical(name: str) -> None:
    assert torch.equal(run(name, Contextual(eta=0)), run(name))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_is_repeatable_and_leaves_nothing(name: str) -> None:
    model, plain = tiny.shared(name).transformer, run(name)
    before, guider = on_modules(model), Contextual(eta=0.2)
    ours = run(name, guider)
    assert not torch.equal(ours, plain)
    assert torch.equal(run(name, guider), ours)
    assert torch.equal(run(name), plain)
    assert on_modules(model) == before


def test_its_name_is_contextual() -> None:
    assert torch.equal(run("sd3", "contextual"), run("sd3", Contextual()))


def test_a_pipeline_without_text_in_its_blocks_is_an_error() -> None:
    for name in ("sd", "pixart-sigma"):
        with pytest.raises(ArgumentError, match=r"no blocks with text tokens .*SD3.*blocks="):
            run(name, Contextual())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_a_block_fails(error: type[BaseException]) -> None:
    model, memory = tiny.shared("sd3").transformer, RingMemory()
    plain, before = run("sd3"), on_modules(model)
    calls = []

    def fail(module: Any, args: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error("on the way")

    handle = model.transformer_blocks[1].register_forward_hook(fail)
    guider = Contextual(eta=0.2, memory=memory)
    with pytest.raises(error, match="on the way"):
        run("sd3", guider)
    handle.remove()
    assert len(calls) == 2
    assert on_modules(model) == before
    assert len(memory) == 0
    assert torch.equal(run("sd3"), plain)


def test_hooks_of_others_stay() -> None:
    model, calls = tiny.shared("sd3").transformer, []

    class Counts(ModelHook):  # type: ignore[misc]
        def post_forward(self, module: Any, output: Any) -> Any:
            calls.append(1)
            return output

    block = model.transformer_blocks[0]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(Counts(), "theirs")
    try:
        expected = run("sd3", Contextual(eta=0.2))
        assert len(calls) == 4
        assert list(block._diffusers_hook.hooks) == ["theirs"]
        run("sd3")
        assert len(calls) == 8
    finally:
        block._diffusers_hook.remove_hook("theirs")
        del block._diffusers_hook, block.forward
    assert torch.equal(run("sd3", Contextual(eta=0.2)), expected)


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_made_one_at_a_time_are_repelled_by_earlier_ones(name: str) -> None:
    def one(guider: Any, seed: int, prompt: str = "a red cat") -> Tensor:
        return run(name, guider, [prompt], seed=seed)

    guider = Contextual(memory=RingMemory(), eta=0.3)
    first = one(guider, 0)
    assert torch.equal(first, one(None, 0))  # there was nothing to repel from
    for seed in (1, 2):
        one(guider, seed)
    memory = guider.memory
    assert memory is not None
    assert len(memory) == 3
    kept = memory.select().x.clone()
    again = one(guider, 7)
    fresh = Contextual(memory=RingMemory(), eta=0.3)
    assert torch.equal(one(fresh, 7), one(None, 7))
    assert not torch.equal(again, one(None, 7))
    assert fresh.memory is not None
    ours, unaware = memory.select().x[-1:], fresh.memory.select().x
    assert torch.cdist(ours, kept).min() > torch.cdist(unaware, kept).min()


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_compiled_models_are_pushed_alike_and_compile_once(name: str) -> None:
    pipe, counter = tiny.ALL[name].make(), CompileCounter()

    def call(guider: Any) -> Tensor:
        called = pipe if guider is None else sparke.wrap(pipe, guider=guider)
        return tiny.latents(called(**tiny.ALL[name].arguments(PROMPTS)))

    guiders = [None, Contextual(eta=0.2), Contextual("rke", eta=0.1, steps=2), None]
    expected = [call(guider) for guider in guiders]
    pipe.transformer.compile(backend=counter, fullgraph=True)
    call(None)  # compiled before anything is hooked
    plain = counter.frame_count
    for guider, result in zip(guiders, expected, strict=True):
        torch.testing.assert_close(call(guider), result, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    # As many graphs for the hooked blocks, whatever the guider, the step and the run.
    assert plain < counter.frame_count <= 2 * plain


# --- other families, other hosts ----------------------------------------------------------------

FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
SMALL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
}
TEXT, IMAGE = 5, 9


def flux_inputs(axes: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, IMAGE, 16),
        "img_ids": torch.zeros(IMAGE, axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], list[int]]] = {
    "Flux2": (
        {**FLUX, "axes_dims_rope": (4,) * 4, "guidance_embeds": False},
        flux_inputs(4),
        [TEXT] * 2 + [TEXT + IMAGE] * 2,
    ),
    "Chroma": (
        {
            **FLUX,
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        {**flux_inputs(), "attention_mask": torch.ones(2, TEXT + IMAGE)},
        [TEXT] * 2 + [TEXT + IMAGE] * 2,
    ),
    "Bria": (FLUX, flux_inputs(), [TEXT] * 2 + [TEXT + IMAGE] * 2),
    "LongCatImage": (
        {**FLUX, "pooled_projection_dim": 32},
        flux_inputs(),
        [TEXT] * 2 + [TEXT + IMAGE] * 2,
    ),
    "OvisImage": (FLUX, flux_inputs(), [TEXT] * 2 + [TEXT + IMAGE] * 2),
    "AuraFlow": (
        {
            **SMALL,
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
        {"hidden_states": torch.randn(2, 4, 6, 6)},
        [8 + TEXT] * 2 + [8 + TEXT + IMAGE] * 2,  # its eight registers go with the text
    ),
    "HunyuanImage": (
        {
            **SMALL,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "rope_axes_dim": (8, 8),
        },
        {
            "hidden_states": torch.randn(2, 4, 3, 3),
            "encoder_attention_mask": torch.ones(2, TEXT),
        },
        [TEXT] * 2 + [TEXT + IMAGE] * 2,
    ),
    "CogView4": (
        {
            **SMALL,
            "num_layers": 2,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "pos_embed_max_size": 8,
            "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        {
            "hidden_states": torch.randn(2, 4, 6, 6),
            "original_size": torch.ones(2, 2),
            "target_size": torch.ones(2, 2),
            "crop_coords": torch.zeros(2, 2),
        },
        [TEXT] * 2,
    ),
}


class Sizes:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def edit(self, block: int, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        assert block == len(self.seen)
        self.seen.append(tokens.shape[1])
        return tokens.roll(1, -1)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_text_of_every_family_is_where_it_is_said_to_be(family: str) -> None:
    config, inputs, sizes = FAMILIES[family]
    model = getattr(diffusers, f"{family}Transformer2DModel")(**config).eval()
    tiny.randomise(model)
    call = {
        **inputs,
        "encoder_hidden_states": torch.randn(2, TEXT, 32),
        "timestep": torch.ones(2),
        "return_dict": False,
    }
    editor, before = Sizes(), on_modules(model)
    with torch.no_grad():
        (plain,) = model(**call)
        with _blocks.edited(_blocks.found(model), editor):
            (edited,) = model(**call)
        assert torch.equal(model(**call)[0], plain)
    assert editor.seen == sizes
    assert not torch.allclose(edited, plain, atol=1e-3)
    assert on_modules(model) == before


def test_every_family_is_tested() -> None:
    tested = {f"{family}Transformer" for family in FAMILIES}
    tested |= {"FluxTransformer", "QwenImageTransformer", "JointTransformer"}
    known = {name for family in _blocks.FAMILIES.values() for name in family}
    assert {
        name.split("Block")[0].replace("Single", "").replace("FlowJoint", "Flow") for name in known
    } == tested


class Talking(nn.Module):
    """A denoiser of one's own: text and image tokens in joint blocks, x as one image token."""

    sigma_data = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))
        self.turns = nn.ModuleList(Turn(block) for block in self.blocks)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        text, image = cond, (x / (1 + sigma[:, None] ** 2).sqrt())[:, None]
        for turn in self.turns:
            text, image = turn(text, image)
        return 0.5 * image[:, 0]


class Turn(nn.Module):
    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return text + self.mix(image), image + text.mean(1, True)


def test_a_sampler_with_a_network_of_ones_own() -> None:
    model = Talking()
    x = 10 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    cond = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(2)).expand(4, 5, 6)
    sigmas = sampling.get_sigmas_karras(8, 0.1, 10.0)
    guider = Recorder(eta=0.3, steps=0.25, blocks={"Turn": 0}, memory=RingMemory())
    sampler = sparke.wrap(sampling.sample_heun, guider=guider)
    with torch.no_grad():
        plain = sampling.sample_heun(model, x, sigmas, extra_args={"cond": cond}, disable=True)
        ours = sampler(model, x, sigmas, extra_args={"cond": cond}, disable=True)
    pushed = {index for index, _, _, _, change, _ in guider.seen if change is not None}
    assert pushed == {0, 1}
    assert torch.pdist(ours).mean() > 1.01 * torch.pdist(plain).mean()
    assert guider.memory is not None
    assert len(guider.memory) == 4
    assert all("forward" not in vars(turn) for turn in model.turns)
