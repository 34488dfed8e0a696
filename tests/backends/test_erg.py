"""Entropy rectifying guidance on real networks: their blocks, their text encoders, compiled."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention
from k_diffusion.sampling import sample_euler
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import sparke
from sparke.errors import ArgumentError, GuidanceWarning
from sparke.guidance.erg import ERG, tempered
from sparke.models import emoji
from sparke.protocols import Evaluation, Run, Step
from tests.backends import tiny

PROMPTS = ["a cat", "two dogs"]
BLOCKS: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "sd3": ("sd3", lambda pipe: pipe.transformer.transformer_blocks[0]),
    "sd3, its last": ("sd3", lambda pipe: pipe.transformer.transformer_blocks[-1]),
    "pixart": ("pixart-sigma", lambda pipe: pipe.transformer.transformer_blocks[0]),
    "dit": ("dit", lambda pipe: pipe.transformer.transformer_blocks[0]),
    "flux": ("flux", lambda pipe: pipe.transformer.transformer_blocks[0]),
    "flux, single": ("flux", lambda pipe: pipe.transformer.single_transformer_blocks[0]),
    "qwen": ("qwen", lambda pipe: pipe.transformer.transformer_blocks[0]),
    "zimage": ("zimage", lambda pipe: pipe.transformer.layers[0]),
    "wan": ("wan", lambda pipe: pipe.transformer.blocks[0]),
    "sdxl": ("sdxl", lambda pipe: pipe.unet.mid_block.attentions[0]),
    "kandinsky3": ("kandinsky3", lambda pipe: pipe.unet.down_blocks[1].attentions[0]),
}


@contextmanager
def temperature(t: float) -> Iterator[list[float]]:
    """Inside, torch's attention runs with scale/t; the scales it was left with are noted."""
    real: Callable[..., Tensor] = F.scaled_dot_product_attention
    scales: list[float] = []

    def attention(query: Tensor, *args: Any, scale: float | None = None, **kwargs: Any) -> Tensor:
        scales.append((1 / math.sqrt(query.shape[-1]) if scale is None else scale) / t)
        out: Tensor = real(query, *args, **kwargs, scale=scales[-1])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield scales


def tensors(out: Any) -> list[Tensor]:
    """What a block returned, or a text encoder."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        out = tuple(out.values())
    return [t for part in out or () for t in tensors(part)] if isinstance(out, tuple) else []


class Asked(Exception):
    """Ends a pipeline's call once its block has been called."""


def asked(name: str, find: Callable[[Any], nn.Module]) -> tuple[nn.Module, Callable[[], Any]]:
    """A block of a pipeline, and a call of it as the pipeline makes it."""
    pipe = tiny.shared(name)
    block, calls = find(pipe), []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise Asked

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    with pytest.raises(Asked):
        pipe(**tiny.ALL[name].arguments(PROMPTS))
    handle.remove()
    ((args, kwargs),) = calls
    return block, lambda: block(*args, **kwargs)


def largest(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest value."""
    pairs = list(zip(tensors(ours), tensors(theirs), strict=True))
    assert pairs
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("t", [0.5, 4.0])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_a_block_at_temperature_t_is_attention_with_scale_over_t(name: str, t: float) -> None:
    block, call = asked(*BLOCKS[name])
    plain = call()
    with temperature(t) as scales:
        theirs = call()
    with tempered(block, 1 / t):
        ours = call()
    assert scales
    assert largest(ours, theirs) < 1e-6
    assert largest(theirs, plain) > 1e-3, "the temperature must matter"
    with tempered(block, 1.0):
        assert all(map(torch.equal, tensors(call()), tensors(plain)))
    assert all(map(torch.equal, tensors(call()), tensors(plain)))


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit"])
@torch.no_grad()
def test_fused_projections(name: str) -> None:
    block, call = asked(*BLOCKS[name])
    with temperature(4.0):
        theirs = call()
    fused: list[Any] = [m for m in block.modules() if hasattr(m, "fuse_projections")]
    assert fused
    processors = [module.processor for module in fused]
    try:
        for module in fused:
            module.fuse_projections()
            kind = "FusedJointAttnProcessor2_0" if name == "sd3" else "FusedAttnProcessor2_0"
            module.set_processor(_processor(kind))
        with tempered(block, 0.25):
            assert largest(call(), theirs) < 1e-6
    finally:
        for module, processor in zip(fused, processors, strict=True):
            module.fused_projections = False
            for part in ("to_qkv", "to_kv", "to_added_qkv"):
                vars(module)["_modules"].pop(part, None)
            module.set_processor(processor)


def _processor(kind: str) -> Any:
    from diffusers.models import attention_processor

    return getattr(attention_processor, kind)()


def loop_attention(attn: Any, tokens: Tensor, tau: float) -> Tensor:
    """Self-attention of diffusers in double precision, one query at a time."""
    weight = {n: getattr(attn, n).weight.double() for n in ("to_q", "to_k", "to_v")}
    bias = {n: getattr(attn, n).bias.double() for n in weight}
    q, k, v = (tokens.double() @ weight[n].T + bias[n] for n in weight)
    width, out = q.shape[-1] // attn.heads, torch.zeros_like(q)
    for sample in range(len(q)):
        for head in range(attn.heads):
            own = slice(head * width, (head + 1) * width)
            for i in range(q.shape[1]):
                logits = [
                    tau * float(q[sample, i, own] @ key[own]) / math.sqrt(width)
                    for key in k[sample]
                ]
                shares = [math.exp(logit - max(logits)) for logit in logits]
                for share, value in zip(shares, v[sample], strict=True):
                    out[sample, i, own] += share / sum(shares) * value[own]
    last = attn.to_out[0]
    found: Tensor = out @ last.weight.double().T + last.bias.double()
    return found


@pytest.mark.parametrize("tau", [0.01, 0.25, 3.0])
@torch.no_grad()
def test_attention_of_diffusers_against_loops(tau: float) -> None:
    attn: Any = tiny.shared("dit").transformer.transformer_blocks[0].attn1
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 7, attn.to_q.in_features, generator=generator)
    with tempered(nn.ModuleList([attn]), tau):
        ours = attn(tokens)
    theirs = loop_attention(attn, tokens, tau)
    assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("sd3", "text_encoder"),
        ("sd3", "text_encoder_3"),
        ("sd", "text_encoder"),
        ("qwen", "text_encoder"),
        ("zimage", "text_encoder"),
        ("wan", "text_encoder"),
    ],
)
@torch.no_grad()
def test_text_encoders(name: str, which: str) -> None:
    encoder = getattr(tiny.shared(name), which)
    if name == "qwen":
        encoder = encoder.model.language_model
    ids = torch.tensor([[5, 9, 3, 7, 11], [8, 8, 2, 40, 6]])

    def call() -> Tensor:
        states: Tensor = encoder(input_ids=ids).last_hidden_state
        return states

    plain = call()
    with temperature(4.0) as scales:
        theirs = call()
    with tempered(encoder, 0.25):
        ours = call()
    assert scales
    assert largest(ours, theirs) < 1e-5
    assert largest(theirs, plain) > 1e-3
    assert torch.equal(call(), plain)


class Normed(nn.Module):
    """The norm that attention layers of k-diffusion are made with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)

    def forward(self, x: Tensor, cond: Any) -> Tensor:
        out: Tensor = self.norm(x)
        return out


@pytest.mark.parametrize("kind", ["self", "cross", "transformer"])
@torch.no_grad()
def test_attention_of_k_diffusion(kind: str) -> None:
    from k_diffusion import layers
    from k_diffusion.models import image_transformer_v1

    torch.manual_seed(0)
    x, words = torch.randn(2, 8, 3, 3), torch.randn(2, 5, 6)
    layer: Any
    given: tuple[Any, ...]
    if kind == "self":
        layer, given = layers.SelfAttention2d(8, 2, Normed), (x, {})
    elif kind == "cross":
        layer = layers.CrossAttention2d(8, 6, 2, Normed)
        given = (x, {"cross": words, "cross_padding": torch.zeros(2, 5)})
    else:
        layer = image_transformer_v1.SelfAttentionBlock(32, 16)
        pos = image_transformer_v1.make_axial_pos(3, 3)
        given = (torch.randn(2, 9, 32), pos, None, torch.randn(2, 1, 32))
    for weight in layer.parameters():
        weight.copy_(torch.randn_like(weight))
    with torch.compiler.set_stance("force_eager"):  # k-diffusion compiles parts of its own
        plain = layer(*given)
        with temperature(4.0) as scales:
            theirs = layer(*given)
        with tempered(nn.ModuleList([layer]), 0.25):
            ours = layer(*given)
        assert scales
        assert largest(ours, theirs) < 1e-5
        assert largest(theirs, plain) > 1e-3
        assert torch.equal(layer(*given), plain)


# --- whole pipelines, against the same pipelines with networks that compute the formula


def called(pipe: Any, name: str, **changes: Any) -> Tensor:
    return tiny.latents(pipe(**tiny.ALL[name].arguments(PROMPTS, **changes)))


def guided(guider: Any, name: str, **changes: Any) -> Tensor:
    return called(sparke.wrap(tiny.shared(name), guider=guider), name, **changes)


@contextmanager
def standing_in(name: str, head: Callable[[Callable[[float], Tensor]], Tensor]) -> Iterator[Any]:
    """The pipeline with a network whose answer is made by `head` of its answers at any tau."""
    pipe = tiny.shared(name)
    module = pipe.transformer
    real = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        def at(tau: float) -> Tensor:
            with temperature(1 / tau):
                out: Tensor = real(*args, **kwargs)[0]
            return out

        plain = real(*args, **kwargs)
        if isinstance(plain, tuple):
            return (head(at), *plain[1:])
        plain[next(iter(plain))] = head(at)
        return plain

    module.forward = forward
    try:
        yield pipe
    finally:
        del module.forward


TAU, W = 0.25, 5.0


def spliced(first: str) -> Callable[[Callable[[float], Tensor]], Tensor]:
    """Classifier-free guidance in one call: the unconditional half is tempered."""

    def head(at: Callable[[float], Tensor]) -> Tensor:
        taus = (TAU, 1.0) if first == "uncond" else (1.0, TAU)
        low, high = (at(tau) for tau in taus)
        return torch.cat([low[: len(low) // 2], high[len(high) // 2 :]])

    return head


def alternating() -> Callable[[Callable[[float], Tensor]], Tensor]:
    """Classifier-free guidance in two calls, the prompt's first."""
    calls: list[float] = []

    def head(at: Callable[[float], Tensor]) -> Tensor:
        calls.append(TAU if len(calls) % 2 else 1.0)
        return at(calls[-1])

    return head


def extrapolated(w: float) -> Callable[[Callable[[float], Tensor]], Tensor]:
    """No classifier-free guidance: away from the network's own tempered answer."""

    def head(at: Callable[[float], Tensor]) -> Tensor:
        weak = at(TAU)
        return weak + w * (at(1.0) - weak)

    return head


def erg(tau: float = TAU, **options: Any) -> ERG:
    return ERG(tau, **{"kickoff": 0.0, "layers": None, **options})


NULL = {
    "sd3": spliced("uncond"),
    "pixart-sigma": spliced("uncond"),
    "dit": spliced("cond"),
    "qwen": alternating(),
}


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma", "dit", "flux", "qwen", "sdxl-modular"])
def test_tau_1_is_the_pipeline_itself_bit_for_bit(name: str) -> None:
    """Classifier-free guidance where the pipeline does it; Flux does none."""
    plain = called(tiny.shared(name), name)
    assert torch.equal(guided(ERG(1.0), name), plain)
    assert torch.equal(guided(ERG(1.0, weak="prompt"), name), plain)


@pytest.mark.parametrize("name", NULL)
def test_the_null_branch_of_a_pipeline(name: str) -> None:
    with standing_in(name, NULL[name]) as pipe:
        theirs = called(pipe, name)
    ours = guided(erg(), name)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, called(tiny.shared(name), name), atol=1e-2)


def test_flux_without_guidance() -> None:
    """Its scale is an input of the network: guidance is away from its own tempered answer."""
    with standing_in("flux", extrapolated(1.5)) as pipe:
        theirs = called(pipe, "flux")
    for weak in ("auto", "prompt"):
        ours = guided(erg(weak=weak, guidance_scale=1.5), "flux")
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_unconditional_pipeline() -> None:
    """DDIM: no prompt anywhere, so guidance is away from the network's own tempered answer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=2,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        for weight in unet.parameters():
            weight.copy_(weight + 0.1 * torch.randn_like(weight))
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)

    def images(pipeline: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        made = pipeline(2, generator, num_inference_steps=4, output_type="np").images
        return torch.as_tensor(made)

    plain = images(pipe)
    assert torch.equal(images(sparke.wrap(pipe, guider=ERG(1.0))), plain)
    ours = images(sparke.wrap(pipe, guider=erg(guidance_scale=1.5)))
    real = unet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        with temperature(1 / TAU):
            weak = real(*args, **kwargs).sample
        out.sample = weak + 1.5 * (out.sample - weak)
        return out

    unet.forward = forward
    theirs = images(pipe)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)


@pytest.mark.parametrize("name", ["sd3", "qwen"])
def test_guidance_is_replaced(name: str) -> None:
    """The same as without the pipeline's own guidance, at its scale."""
    off = "true_cfg_scale" if name == "qwen" else "guidance_scale"
    with standing_in(name, extrapolated(W)) as pipe:
        theirs = called(pipe, name, **{off: 1.0})
    ours = guided(erg(weak="prompt"), name)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    without = guided(erg(guidance_scale=W), name, **{off: 1.0})
    assert torch.allclose(without, theirs, rtol=1e-4, atol=1e-5)


def test_class_labels() -> None:
    """DiT without its null class."""
    with standing_in("dit", extrapolated(2.0)) as pipe:
        theirs = called(pipe, "dit", guidance_scale=1.0)
    ours = guided(erg(guidance_scale=2.0), "dit", guidance_scale=1.0)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def weakened(name: str, t: float) -> dict[str, Tensor]:
    """Arguments of a call of SD3 whose null prompt is the prompt, encoded at temperature t."""
    pipe = tiny.shared(name)
    arguments = tiny.ALL[name].arguments(PROMPTS)
    given = {"prompt_2": None, "prompt_3": None, "max_sequence_length": tiny.LENGTH}
    embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, **given, do_classifier_free_guidance=False)
    with temperature(t):
        weak, _, pooled_weak, _ = pipe.encode_prompt(
            PROMPTS, **given, do_classifier_free_guidance=False
        )
    del arguments["prompt"]
    return {
        **arguments,
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": weak,
        "negative_pooled_prompt_embeds": pooled_weak,
    }


def test_a_weakened_prompt_takes_the_null_prompts_place() -> None:
    pipe = tiny.shared("sd3")
    theirs = tiny.latents(pipe(**weakened("sd3", 2.0)))
    ours = guided(ERG(1.0, tau_c=0.5), "sd3")
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    with standing_in("sd3", spliced("uncond")) as pipe:
        theirs = tiny.latents(pipe(**weakened("sd3", 2.0)))
    ours = guided(erg(tau_c=0.5), "sd3")
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # And by hand, at the cost of guidance alone.
    by_hand = sparke.wrap(pipe, guider=erg())(**weakened("sd3", 2.0))
    assert torch.allclose(tiny.latents(by_hand), theirs, rtol=1e-4, atol=1e-5)


def test_tau_c_wants_strings() -> None:
    arguments = weakened("sd3", 2.0)
    wrapped = sparke.wrap(tiny.shared("sd3"), guider=ERG(tau_c=0.5))
    with (
        pytest.warns(GuidanceWarning, match="second encoding"),
        pytest.raises(ArgumentError, match=r"tempered\(text_encoder, tau_c\)"),
    ):
        wrapped(**arguments)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pipeline_is_left_as_it_was_found(error: type[BaseException]) -> None:
    pipe = tiny.shared("sd3")
    plain = called(pipe, "sd3")
    modules = [*pipe.transformer.modules(), *pipe.text_encoder.modules()]
    before = [dict(vars(module)) for module in modules]
    last = pipe.transformer.transformer_blocks[-1]
    wrapped = sparke.wrap(pipe, guider=erg(tau_c=0.5))
    called(wrapped, "sd3")

    def fail(*_: object) -> None:
        raise error("in a block")

    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(error, match="in a block"):
        called(wrapped, "sd3")
    handle.remove()
    for module, then in zip(modules, before, strict=True):
        assert list(vars(module)) == list(then)
        assert all(vars(module)[key] is then[key] for key in then)
    assert torch.equal(called(pipe, "sd3"), plain)


# --- with others


def test_with_adaptive_projected_guidance() -> None:
    """diffusers' own guider combines; the null prompt's answer that it is given is tempered."""
    name, pipe = "sdxl-modular", tiny.ALL["sdxl-modular"].make()
    outs = {}
    rules = {
        "cfg": diffusers.ClassifierFreeGuidance(guidance_scale=5.0),
        "apg": diffusers.AdaptiveProjectedGuidance(
            guidance_scale=5.0, eta=0.0, adaptive_projected_guidance_rescale=2.0
        ),
    }
    for rule, component in rules.items():
        pipe.update_components(guider=component)
        for tau in (None, 1.0, TAU):
            run = pipe if tau is None else sparke.wrap(pipe, guider=erg(tau))
            outs[rule, tau] = called(run, name)
        assert torch.equal(outs[rule, None], outs[rule, 1.0])
    different = [out for (_, tau), out in outs.items() if tau != 1.0]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert float((one - other).abs().max()) > 1e-2

    def by_hand(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The network, told apart from outside: every second call is the null prompt's."""
        calls.append(kwargs)
        with temperature(1 / TAU if len(calls) % 2 == 0 else 1.0):
            return kind.forward(self, *args, **kwargs)

    calls: list[Any] = []
    kind = type(pipe.unet)
    pipe.unet.forward = functools.partial(by_hand, pipe.unet)
    theirs = called(pipe, name)
    assert torch.allclose(outs["apg", TAU], theirs, rtol=1e-4, atol=1e-5)


def test_with_cads() -> None:
    from sparke.guidance.cads import CADS

    both = guided([CADS(s=0.5), erg()], "sd3")
    assert torch.equal(both, guided([erg(), CADS(s=0.5)], "sd3"))
    for alone in (CADS(s=0.5), erg()):
        assert float((both - guided(alone, "sd3")).abs().max()) > 1e-2


def test_with_repulsion() -> None:
    """Its interval leaves the scale to whoever replaces guidance."""
    both = guided([erg(weak="prompt"), sparke.DiversityGuider("vendi", scale=9.0)], "sd3")
    assert float((both - guided(erg(weak="prompt"), "sd3")).abs().max()) > 1e-3


def test_two_that_hold_the_scale_are_an_error() -> None:
    with pytest.raises(ArgumentError, match="classifier-free guidance"):
        guided([erg(weak="prompt"), sparke.DiversityGuider(cfg_interval=(0, 3))], "sd3")


# --- k-diffusion


class Guiding(nn.Module):
    """A denoiser that guides inside, with the rows of the null prompt first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner_model = network

    def forward(
        self, x: Tensor, sigma: Tensor, cond: Tensor, uncond: Tensor, cond_scale: float
    ) -> Tensor:
        if cond_scale == 1:
            return self.denoised(x, sigma, cond)
        both = self.denoised(x.repeat(2, 1), sigma.repeat(2), torch.cat([uncond, cond]))
        away, toward = both.chunk(2)
        return away + cond_scale * (toward - away)

    def denoised(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        scaled = x / (1 + sigma[:, None] ** 2).sqrt()
        update: Tensor = self.inner_model(torch.cat([scaled[:, None], cond[:, None]], 1))
        return update[:, 0]


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(query_dim=8, heads=2, dim_head=4)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = tokens + self.attn(tokens)
        return out


@pytest.mark.parametrize("weak", ["auto", "prompt"])
def test_a_sampler_of_k_diffusion(weak: str) -> None:
    torch.manual_seed(0)
    model = Guiding(OneLayer()).requires_grad_(False)
    cond, uncond, x = torch.randn(3, 8), torch.zeros(3, 8), 10 * torch.randn(3, 8)
    sigmas = torch.tensor([10.0, 5.0, 2.0, 0.5, 0.0])
    extra = {"cond": cond, "uncond": uncond, "cond_scale": 3.0}
    guider = erg(weak=weak, branches=("uncond", "cond"))
    ours = sparke.wrap(sample_euler, guider=guider)(
        model, x, sigmas, extra_args=extra, disable=True
    )

    def formula(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        with temperature(1 / TAU):
            away = model.denoised(x, sigma, cond if weak == "prompt" else uncond)
        return away + 3.0 * (model.denoised(x, sigma, cond) - away)

    theirs = sample_euler(formula, x, sigmas, disable=True)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="branches="):
        sparke.wrap(sample_euler, guider=erg(weak="null"))(
            model, x, sigmas, extra_args=extra, disable=True
        )


def test_an_unconditional_sampler_of_k_diffusion() -> None:
    torch.manual_seed(0)
    network, x = OneLayer().requires_grad_(False), 10 * torch.randn(3, 5, 8)
    sigmas = torch.tensor([10.0, 5.0, 2.0, 0.5, 0.0])

    def formula(x: Tensor, sigma: Tensor) -> Tensor:
        with temperature(1 / TAU):
            away: Tensor = network(x)
        strong: Tensor = network(x)
        return strong + 0.5 * (strong - away)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner_model = network

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            out: Tensor = self.inner_model(x)
            return out

    wrapped = sparke.wrap(sample_euler, guider=erg(guidance_scale=1.5))
    ours = wrapped(Model(), x, sigmas, disable=True)
    theirs = sample_euler(formula, x, sigmas, disable=True)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # A function shows no network; its layers do.
    with pytest.raises(ArgumentError, match="no torch module"):
        wrapped(lambda x, sigma: Model()(x, sigma), x, sigmas, disable=True)
    named = sparke.wrap(sample_euler, guider=erg(guidance_scale=1.5, layers=[network.attn]))
    plain = Model()
    assert torch.equal(named(lambda x, s: plain(x, s), x, sigmas, disable=True), ours)


def test_the_emoji_model_has_no_attention() -> None:
    model = emoji.load()
    sampler = sparke.wrap(sample_euler, guider=ERG())
    x = torch.randn(1, 320) * model.sigma_max
    with pytest.raises(ArgumentError, match="no attention layer known here"):
        sampler(model, x, model.sigmas(3), disable=True)


# --- compiled


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("first", ["hooked", "compiled"])
@torch.no_grad()
def test_a_compiled_network_needs_one_graph(first: str) -> None:
    counter: Any = CompileCounter()
    pipe = tiny.ALL["sd3"].make()
    network = pipe.transformer
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(4, *shape, generator=generator)

    given = {
        "hidden_states": noise(4, 8, 8),
        "encoder_hidden_states": noise(6, 64),
        "pooled_projections": noise(64),
        "timestep": torch.full((4,), 500.0),
        "return_dict": False,
    }
    (plain,) = network(**given)
    with temperature(1 / TAU):
        (blurred,) = network(**given)
    compiled: Any = torch.compile(network, backend=counter, fullgraph=True)
    if first == "compiled":
        assert torch.equal(compiled(**given)[0], plain)
    before, guider = counter.frame_count, erg(kickoff=0.5)
    guider.begin(Run(torch.Size((2, 4, 8, 8)), torch.device("cpu"), torch.float32))
    with guider.on_model(compiled):
        for index in range(4):
            step = Step(index, 4.0 - index, 3.0 - index, 4)
            guider.on_evaluation(Evaluation(step, ("uncond", "cond"), 2))
            (out,) = compiled(**given)
            assert torch.equal(out[2:], plain[2:])
            assert torch.allclose(out[:2], (blurred if index >= 2 else plain)[:2], atol=1e-5)
    assert counter.frame_count == before + 1, "one graph, whatever the temperatures"
    assert torch.equal(compiled(**given)[0], plain), "and none of it afterwards"


@pytest.mark.usefixtures("fresh_compiler")
def test_a_pipeline_with_compiled_blocks() -> None:
    """Compiled and run before anybody hooks anything."""
    plain, theirs = called(tiny.shared("flux"), "flux"), guided(erg(), "flux")
    pipe = tiny.ALL["flux"].make()
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.allclose(called(pipe, "flux"), plain, atol=1e-5)
    ours = called(sparke.wrap(pipe, guider=erg()), "flux")
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.allclose(called(pipe, "flux"), plain, atol=1e-5)
