"""Entropy rectifying guidance: attention with scaled logits as the weak side of guidance."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparke import testing
from sparke.errors import ArgumentError, GuidanceWarning, ShapeError
from sparke.guidance.erg import ERG, build, tempered
from sparke.protocols import (
    EncoderHook,
    Evaluation,
    EvaluationHook,
    Exclusive,
    GuidanceScaleHook,
    Guider,
    Idle,
    ModelHook,
    Run,
    State,
    Step,
)

BATCH, TOKENS, WORDS, WIDTH, HEADS = 2, 3, 2, 4, 2
SIGMAS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = [part(tokens) for part in (self.to_q, self.to_k, self.to_v)]
        q, k, v = (h.unflatten(-1, (HEADS, -1)).transpose(1, 2) for h in heads)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class Network(nn.Module):
    """A denoiser of (b, TOKENS, WIDTH) latents that attends to them and to the words together."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(layers))
        self.calls = 0

    def forward(self, x: Tensor, sigma: float, words: Tensor) -> Tensor:
        self.calls += 1
        tokens = torch.cat([x / math.sqrt(1 + sigma**2), words], 1)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens[:, :TOKENS]


def network(layers: int = 2) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Network(layers).double().requires_grad_(False)
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight))
    return made.eval()


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


X = drawn(BATCH, TOKENS, WIDTH, seed=1) * SIGMAS[0]
PROMPT, WEAK = drawn(BATCH, WORDS, WIDTH, seed=2), drawn(BATCH, WORDS, WIDTH, seed=3)
NULL = torch.zeros(BATCH, WORDS, WIDTH, dtype=torch.float64)


# --- the formulas, in loops


def loop_linear(layer: nn.Linear, row: list[float]) -> list[float]:
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        sum(weight[o][i] * row[i] for i in range(len(row))) + bias[o] for o in range(len(weight))
    ]


def loop_attention(block: Attention, tokens: list[list[float]], tau: float) -> list[list[float]]:
    """One Hopfield step, softmax(tau / sqrt(d) Q K^T) V, head by head and query by query."""
    q, k, v = (
        [loop_linear(part, token) for token in tokens]
        for part in (block.to_q, block.to_k, block.to_v)
    )
    d = WIDTH // HEADS
    mixed = [[0.0] * WIDTH for _ in tokens]
    for head in range(HEADS):
        own = range(head * d, (head + 1) * d)
        for i in range(len(tokens)):
            logits = [tau / math.sqrt(d) * sum(q[i][c] * key[c] for c in own) for key in k]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            for c in own:
                mixed[i][c] = sum(w * value[c] for w, value in zip(weights, v, strict=True)) / sum(
                    weights
                )
    return [loop_linear(block.to_out, row) for row in mixed]


def loop_network(net: Network, x: Tensor, sigma: float, words: Tensor, taus: list[float]) -> Tensor:
    """The network with one tau a layer."""
    out = []
    for sample, said in zip((x / math.sqrt(1 + sigma**2)).tolist(), words.tolist(), strict=True):
        tokens = [*sample, *said]
        for block, tau in zip(net.blocks, taus, strict=True):
            assert isinstance(block, Attention)
            update = loop_attention(block, tokens, tau)
            tokens = [
                [a + b for a, b in zip(old, new, strict=True)]
                for old, new in zip(tokens, update, strict=True)
            ]
        out.append(tokens[:TOKENS])
    return torch.tensor(out, dtype=torch.float64)


def loop_run(weak: Tensor, w: Callable[[int], float], tau: Callable[[int], float]) -> Tensor:
    """Euler steps of D_xi(weak) + w (D - D_xi(weak)), tempered in both layers."""
    net, x = network(), X
    for index, (sigma, following) in enumerate(pairwise(SIGMAS)):
        strong = loop_network(net, x, sigma, PROMPT, [1.0, 1.0])
        away = loop_network(net, x, sigma, weak, [tau(index)] * 2)
        denoised = away + w(index) * (strong - away)
        x = denoised + following / sigma * (x - denoised)
    return x


# --- hosts, ten lines each


def step_of(index: int) -> Step:
    return Step(index, SIGMAS[index], SIGMAS[index + 1], len(SIGMAS) - 1)


def run_of(x: Tensor) -> Run:
    return Run(x.shape, x.device, x.dtype)


def sampled(
    guider: ERG,
    net: Network,
    *,
    scale: float | None,
    order: tuple[str, ...] = ("uncond", "cond"),
    told: bool = True,
    shown: bool = True,
    apart: bool = False,
    again: Tensor | None = PROMPT,
) -> Tensor:
    """Euler steps of a host that does classifier-free guidance; not with a `scale` of None.

    Args:
        guider: guides.
        net: its network.
        scale: of its guidance.
        order: of the prompts in one call.
        told: whether it tells that.
        shown: whether it shows its scale.
        apart: whether it calls its network once for each prompt.
        again: what it evaluates its network for the second time.
    """
    words, x = {"cond": PROMPT, "uncond": NULL}, X

    def ask(step: Step, branches: tuple[str, ...], *given: Tensor) -> Tensor:
        guider.on_evaluation(Evaluation(step, branches if told else (), BATCH))
        out: Tensor = net(x.repeat(len(given), 1, 1), step.sigma, torch.cat(given))
        return out

    guider.begin(run_of(x))
    with guider.on_model(net):
        for index in range(len(SIGMAS) - 1):
            step = step_of(index)
            if scale is None:
                denoised = conditional = ask(step, ("cond",), PROMPT)
            else:
                w = guider.on_guidance_scale(step, scale) if shown else scale
                if apart:
                    parts = {name: ask(step, (name,), words[name]) for name in order}
                else:
                    both = ask(step, order, *(words[name] for name in order))
                    parts = dict(zip(order, both.chunk(2), strict=True))
                conditional = parts["cond"]
                denoised = parts["uncond"] + w * (conditional - parts["uncond"])
            second = None if again is None else functools.partial(ask, step, ("cond",), again)
            seen = functools.partial(torch.clone, conditional)
            state = State(x, denoised, step, None, seen, None, second)
            denoised = denoised + guider(state)
            x = denoised + step.sigma_next / step.sigma * (x - denoised)
    guider.finish(x)
    return x


def plain(scale: float | None) -> Tensor:
    """The host without a guider."""
    net, x = network(), X
    for index in range(len(SIGMAS) - 1):
        step = step_of(index)
        if scale is None:
            denoised = net(x, step.sigma, PROMPT)
        else:
            away, toward = net(x.repeat(2, 1, 1), step.sigma, torch.cat([NULL, PROMPT])).chunk(2)
            denoised = away + scale * (toward - away)
        x = denoised + step.sigma_next / step.sigma * (x - denoised)
    return x


def erg(tau: float = 0.25, **options: Any) -> ERG:
    return ERG(tau, **{"kickoff": 0.0, "layers": None, **options})


# --- guidance against the null prompt


def test_it_is_a_guider_with_hooks() -> None:
    guider = build()
    for protocol in (Guider, ModelHook, EvaluationHook, EncoderHook, GuidanceScaleHook):
        assert isinstance(guider, protocol)
    assert isinstance(guider, Exclusive)
    assert isinstance(guider, Idle)


@pytest.mark.parametrize("order", [("uncond", "cond"), ("cond", "uncond")])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.25, 3.0])
def test_the_null_branch_is_tempered(tau: float, apart: bool, order: tuple[str, ...]) -> None:
    net = network()
    ours = sampled(erg(tau), net, scale=2.5, order=order, apart=apart)
    theirs = loop_run(NULL, lambda _: 2.5, lambda _: tau)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours, plain(2.5), atol=1e-2)
    assert net.calls == (len(SIGMAS) - 1) * (2 if apart else 1), "guidance itself costs no call"


def test_tau_1_is_classifier_free_guidance_bit_for_bit() -> None:
    assert torch.equal(sampled(ERG(1.0), network(), scale=2.5), plain(2.5))
    assert torch.equal(sampled(ERG(1.0, weak="prompt"), network(), scale=2.5), plain(2.5))
    assert torch.equal(sampled(ERG(1.0), network(), scale=None), plain(None))
    # In force, and 1 nonetheless: the hooks themselves change no bit.
    held = erg(0.25, kickoff=1.0)
    with pytest.warns(GuidanceWarning, match="changed nothing"):
        assert torch.equal(sampled(held, network(), scale=2.5), plain(2.5))


def test_its_own_scale_takes_the_place_of_the_hosts() -> None:
    ours = sampled(erg(guidance_scale=4.0), network(), scale=2.5)
    assert torch.allclose(ours, loop_run(NULL, lambda _: 4.0, lambda _: 0.25), rtol=1e-9, atol=1e-9)
    only = sampled(ERG(1.0, guidance_scale=4.0), network(), scale=2.5)
    assert torch.equal(only, plain(4.0)), "with tau 1 it is guidance at that scale"


def test_kickoff_is_a_share_of_the_steps() -> None:
    for kickoff, first in ((0.2, 1), (0.21, 2), (0.6, 3)):
        ours = sampled(erg(kickoff=kickoff), network(), scale=2.5)
        taus = [1.0] * first + [0.25] * (len(SIGMAS) - first)
        theirs = loop_run(NULL, lambda _: 2.5, taus.__getitem__)
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_kickoff_without_a_count_of_steps_goes_by_the_share_of_signal() -> None:
    guider, net = erg(kickoff=0.5), network()
    guider.begin(run_of(X))
    with guider.on_model(net):
        shown = []
        for sigma in (1e9, 1.1, 0.9, 0.0):
            guider.on_evaluation(Evaluation(Step(0, sigma, 0.0), ("uncond",), BATCH))
            shown.append(net(X, 1.0, NULL))
    with tempered(net, 0.25):
        blurred = net(X, 1.0, NULL)
    assert [torch.equal(out, blurred) for out in shown] == [False, False, True, True]


def test_layers_are_chosen() -> None:
    ours = {}
    for name, layers in {"half": (0.5, 1.0), "glob": "*.1", "list": ["blocks.1"]}.items():
        ours[name] = sampled(erg(layers=layers), network(), scale=2.5)
    net, x = network(), X
    for index in range(len(SIGMAS) - 1):
        step = step_of(index)
        away = loop_network(net, x, step.sigma, NULL, [1.0, 0.25])
        denoised = away + 2.5 * (loop_network(net, x, step.sigma, PROMPT, [1.0, 1.0]) - away)
        x = denoised + step.sigma_next / step.sigma * (x - denoised)
    for name, found in ours.items():
        assert torch.allclose(found, x, rtol=1e-9, atol=1e-9), name


def test_hosts_that_do_not_tell_their_rows_need_branches() -> None:
    with pytest.raises(ArgumentError, match=r"branches=\('uncond', 'cond'\)"):
        sampled(erg(), network(), scale=2.5, told=False)
    given = erg(branches=["uncond", "cond"])
    ours = sampled(given, network(), scale=2.5, told=False)
    assert torch.equal(ours, sampled(erg(), network(), scale=2.5))
    turned = sampled(erg(branches=("cond", "uncond")), network(), scale=2.5, told=False)
    assert not torch.allclose(ours, turned), "the order matters"


def test_an_error_about_branches_comes_before_the_kickoff() -> None:
    net = network()
    with pytest.raises(ArgumentError, match="branches="):
        sampled(erg(kickoff=0.9), net, scale=2.5, told=False)
    assert net.calls == 1


def test_wrong_branches_are_an_error() -> None:
    guider, net = erg(branches=("uncond", "cond")), network()
    guider.begin(run_of(X))
    guider.on_evaluation(Evaluation(step_of(1), (), BATCH))
    with guider.on_model(net), pytest.raises(ShapeError, match="temperatures for 4 rows"):
        net(X[:1].repeat(3, 1, 1), 1.0, NULL[:1].repeat(3, 1, 1))


# --- guidance against the prompt


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("tau", [0.0, 0.25, 3.0])
def test_the_prompts_own_prediction_is_tempered(tau: float, scale: float | None) -> None:
    net = network()
    ours = sampled(erg(tau, weak="prompt", guidance_scale=1.7), net, scale=scale)
    theirs = loop_run(PROMPT, lambda _: 1.7, lambda _: tau)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert net.calls == 2 * (len(SIGMAS) - 1)


def test_auto_takes_the_prompt_where_the_host_does_not_guide() -> None:
    ours = sampled(erg(), network(), scale=None)
    assert torch.equal(ours, sampled(erg(weak="prompt"), network(), scale=None))
    theirs = loop_run(PROMPT, lambda _: 3.0, lambda _: 0.25)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_hosts_scale_is_taken_over() -> None:
    ours = sampled(erg(weak="prompt"), network(), scale=2.5)
    theirs = loop_run(PROMPT, lambda _: 2.5, lambda _: 0.25)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_before_the_kickoff_the_hosts_guidance_acts() -> None:
    net, x = network(), X
    for index in range(len(SIGMAS) - 1):
        step = step_of(index)
        late = index >= 2
        strong = loop_network(net, x, step.sigma, PROMPT, [1.0, 1.0])
        weak = loop_network(
            net, x, step.sigma, PROMPT if late else NULL, [0.25 if late else 1.0] * 2
        )
        denoised = weak + 2.5 * (strong - weak)
        x = denoised + step.sigma_next / step.sigma * (x - denoised)
    ours = sampled(erg(weak="prompt", kickoff=0.4), network(), scale=2.5)
    assert torch.allclose(ours, x, rtol=1e-9, atol=1e-9)


def test_it_joins_the_hosts_guidance() -> None:
    net, x = network(), X
    for index in range(len(SIGMAS) - 1):
        step = step_of(index)
        strong = loop_network(net, x, step.sigma, PROMPT, [1.0, 1.0])
        null = loop_network(net, x, step.sigma, NULL, [1.0, 1.0])
        weak = loop_network(net, x, step.sigma, PROMPT, [0.25, 0.25])
        denoised = null + 2.5 * (strong - null) + 0.7 * (strong - weak)
        x = denoised + step.sigma_next / step.sigma * (x - denoised)
    guider = erg(weak="prompt", cfg="joins", guidance_scale=1.7)
    ours = sampled(guider, network(), scale=2.5)
    assert torch.allclose(ours, x, rtol=1e-9, atol=1e-9)
    assert guider.exclusive == frozenset()


def test_a_weakened_prompt_has_the_whole_run() -> None:
    """C-ERG from the first step on, I-ERG from the kick-off: the paper's formula."""
    guider = ERG(0.25, tau_c=0.5, kickoff=0.4, layers=None)
    encoder = network()
    with guider.on_encoder(encoder):
        encoder(X, 1.0, PROMPT)
    ours = sampled(guider, network(), scale=2.5, again=WEAK)
    theirs = loop_run(WEAK, lambda _: 2.5, lambda i: 0.25 if i >= 2 else 1.0)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_weakened_prompt_alone() -> None:
    guider = ERG(1.0, tau_c=0.5)
    with guider.on_encoder(network()):
        pass
    ours = sampled(guider, network(), scale=2.5, again=WEAK)
    theirs = loop_run(WEAK, lambda _: 2.5, lambda _: 1.0)
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_on_encoder_tempers_every_layer() -> None:
    encoder = network()
    with ERG(0.3, tau_c=0.5, layers=(0.9, 1.0)).on_encoder(encoder):
        weak = encoder(X, 1.0, PROMPT)
    assert torch.allclose(weak, loop_network(encoder, X, 1.0, PROMPT, [0.5, 0.5]), atol=1e-9)
    with ERG(0.3, tau_c=0.5, encoder_layers="blocks.0").on_encoder(encoder):
        weak = encoder(X, 1.0, PROMPT)
    assert torch.allclose(weak, loop_network(encoder, X, 1.0, PROMPT, [0.5, 1.0]), atol=1e-9)


def test_tau_c_needs_a_host_that_encodes() -> None:
    with pytest.raises(ArgumentError, match=r"tempered\(text_encoder, tau_c\)"):
        sampled(ERG(0.25, tau_c=0.5), network(), scale=2.5)
    # Nor does it do that another host did so, one run before.
    guider = ERG(0.25, tau_c=0.5)
    with guider.on_encoder(network()):
        pass
    sampled(guider, network(), scale=2.5, again=WEAK)
    with pytest.raises(ArgumentError, match="needs a host that encodes prompts"):
        sampled(guider, network(), scale=2.5, again=WEAK)


def test_a_host_that_hides_its_scale_cannot_be_replaced() -> None:
    with pytest.raises(ArgumentError, match="does not show its scale"):
        sampled(erg(weak="prompt"), network(), scale=2.5, shown=False)
    sampled(erg(weak="prompt", cfg="joins"), network(), scale=2.5, shown=False)
    ours = sampled(erg(), network(), scale=2.5, shown=False)
    assert torch.equal(ours, sampled(erg(), network(), scale=2.5)), (
        "its null branch can be tempered"
    )


def test_a_host_at_scale_1_is_left_alone() -> None:
    for told in (True, False):
        guider = erg(tau=0.25, kickoff=1.0)
        with pytest.warns(GuidanceWarning, match="changed nothing"):
            assert torch.equal(sampled(guider, network(), scale=1.0, told=told), plain(1.0))


def test_calls_nobody_tells_of_are_not_tempered() -> None:
    guider, net = erg(weak="prompt"), network()
    untold = net(X, 1.0, PROMPT)
    guider.begin(run_of(X))
    with guider.on_model(net):
        state = State(X, X, step_of(2), again=lambda: net(X, 1.0, PROMPT))
        moved = guider(state)
        assert torch.equal(net(X, 1.0, PROMPT), untold)
        with pytest.raises(KeyboardInterrupt):
            guider(replace(state, again=_interrupted))
        assert torch.equal(net(X, 1.0, PROMPT), untold)
    blurred = loop_network(net, X, 1.0, PROMPT, [0.25, 0.25])
    assert torch.allclose(moved, 2 * (X - blurred), rtol=1e-9, atol=1e-9)


def _interrupted() -> Tensor:
    raise KeyboardInterrupt


def test_a_host_without_a_second_evaluation() -> None:
    with pytest.raises(ArgumentError, match="does not allow"):
        sampled(erg(weak="prompt"), network(), scale=None, again=None)


# --- what it claims, says and refuses


def test_what_it_claims() -> None:
    scale = frozenset({"guidance_scale"})
    assert ERG().exclusive == frozenset()
    assert ERG(guidance_scale=3).exclusive == scale
    assert ERG(weak="prompt").exclusive == scale
    assert ERG(tau_c=0.5).exclusive == scale
    assert ERG(1.0, weak="prompt", guidance_scale=3).exclusive == frozenset()
    assert ERG(1.0, guidance_scale=3).exclusive == scale


def test_what_it_has_no_use_for() -> None:
    assert ERG().idle == {"encoder"}
    assert ERG(1.0, tau_c=0.5).idle == frozenset()
    assert ERG(1.0).idle == {"encoder", "model", "evaluation", "guidance_scale"}
    assert ERG(1.0, guidance_scale=3).idle == {"encoder", "model", "evaluation"}


@pytest.mark.parametrize(
    "guider",
    [
        ERG(),
        ERG(1.0),
        erg(),
        erg(weak="null"),
        erg(weak="prompt"),
        erg(weak="prompt", cfg="joins"),
        erg(tau_c=0.5),
        erg(branches=("uncond", "cond"), guidance_scale=2.0),
    ],
    ids=repr,
)
def test_conforms(guider: ERG) -> None:
    testing.check_guider(guider)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": -0.1}, "tau must be"),
        ({"tau": math.inf}, "tau must be"),
        ({"tau_c": -1}, "tau_c must be"),
        ({"kickoff": 1.5}, "kickoff is a share"),
        ({"kickoff": -1}, "kickoff must be"),
        ({"guidance_scale": math.nan}, "guidance_scale must be"),
        ({"weak": "empty"}, "weak must be one of"),
        ({"cfg": "off"}, "cfg must be one of"),
        ({"weak": "null", "tau_c": 0.5}, "the null prompt says nothing"),
        ({"branches": ("cond", "cond")}, "branches must be"),
        ({"branches": ("cond",)}, "branches must be"),
        ({"layers": (0.5, 0.4)}, "layers must be"),
        ({"layers": (0.5, 1.4)}, "layers must be"),
        ({"layers": []}, "layers must be"),
        ({"layers": ["a", 3]}, "layers must be"),
        ({"layers": 5}, "layers must be"),
        ({"encoder_layers": (1, 0)}, "encoder_layers must be"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        ERG(**options)


def test_a_run_that_it_could_not_change_warns() -> None:
    with pytest.warns(GuidanceWarning, match="no network was called for the null prompt"):
        sampled(erg(weak="null"), network(), scale=None)


def test_repr_tells_what_matters() -> None:
    assert repr(ERG(0.5, kickoff=0.1)) == (
        "ERG(0.5, tau_c=1.0, guidance_scale=None, weak='auto', cfg='replaces', kickoff=0.1, "
        "layers=(0.625, 0.83))"
    )


# --- attention with scaled logits


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Asserts that these modules look afterwards as they did before, whatever happened between."""

    def look() -> list[dict[str, Any]]:
        found = [dict(vars(inner)) for module in modules for inner in module.modules()]
        return [{k: v for k, v in one.items() if k != "calls"} for one in found]

    before = look()
    try:
        yield
    finally:
        after = look()
        assert [list(one) for one in after] == [list(one) for one in before]
        for now, then in zip(after, before, strict=True):
            assert all(now[key] is then[key] for key in then)


@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0, 4.0])
def test_tempered_is_the_loops_formula(tau: float) -> None:
    net = network()
    with tempered(net, tau):
        ours = net(X, 1.0, PROMPT)
    assert torch.allclose(ours, loop_network(net, X, 1.0, PROMPT, [tau] * 2), rtol=1e-9, atol=1e-9)
    if tau == 1:
        assert torch.equal(ours, net(X, 1.0, PROMPT))


def test_tau_of_each_row() -> None:
    net = network()
    with tempered(net, torch.tensor([0.25, 1.0])):
        ours = net(X, 1.0, PROMPT)
        folded = net(X.repeat_interleave(3, 0), 1.0, PROMPT.repeat_interleave(3, 0))
        with pytest.raises(ShapeError, match="temperatures for 2 rows and the network was called"):
            net(X[:1], 1.0, PROMPT[:1])
    with tempered(net, 0.25):
        blurred = net(X, 1.0, PROMPT)
    assert torch.allclose(ours[:1], blurred[:1], atol=1e-12)
    assert torch.equal(ours[1:], net(X, 1.0, PROMPT)[1:])
    assert torch.allclose(folded, ours.repeat_interleave(3, 0), atol=1e-12)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error_in_a_block(error: type[BaseException]) -> None:
    net = network()
    plainly = net(X, 1.0, PROMPT)
    last = net.blocks[1]
    assert isinstance(last, Attention)

    def fail(*_: object) -> None:
        raise error("in a block")

    for hold in (tempered(net, 0.3), erg().on_model(net)):
        planted = last.to_out.register_forward_pre_hook(fail)
        with untouched(net), pytest.raises(error, match="in a block"), hold:
            net(X, 1.0, PROMPT)
        planted.remove()
        assert torch.equal(net(X, 1.0, PROMPT), plainly)


def test_nothing_is_left_after_a_run() -> None:
    net = network()
    with untouched(net):
        sampled(erg(), net, scale=2.5)
    with untouched(net), pytest.raises(ArgumentError), ERG(layers="nowhere").on_model(net):
        pass


def test_contexts_are_nested() -> None:
    net = network()
    with untouched(net):
        with tempered(net, 0.5), tempered(net, 0.5):
            twice = net(X, 1.0, PROMPT)
        with tempered(net, 0.25):
            once = net(X, 1.0, PROMPT)
    assert torch.allclose(once, twice, atol=1e-12)


def test_a_module_hooked_by_others_meanwhile_is_left_to_them() -> None:
    net = network()
    block = net.blocks[0]
    assert isinstance(block, Attention)

    def theirs(x: Tensor) -> Tensor:
        return x

    with tempered(net, 0.5):
        block.to_q.forward = theirs  # type: ignore[assignment, method-assign]
    assert block.to_q.forward is theirs


def test_two_networks_share_a_guider() -> None:
    guider, one, other = erg(0.25), network(), network()
    guider.begin(run_of(X))
    with untouched(one, other), guider.on_model(one), guider.on_model(other):
        guider.on_evaluation(Evaluation(step_of(1), ("uncond",), BATCH))
        assert torch.equal(one(X, 1.0, NULL), other(X, 1.0, NULL))
        assert not torch.allclose(one(X, 1.0, NULL), network()(X, 1.0, NULL))


def test_half_precision_stays() -> None:
    net = network().to(torch.bfloat16)
    with tempered(net, 0.5):
        assert net(X.bfloat16(), 1.0, PROMPT.bfloat16()).dtype == torch.bfloat16


def test_gradients_pass_under_inference_mode_too() -> None:
    guider, net = erg(), network().float()
    with torch.inference_mode():
        guider.begin(run_of(X))
        with guider.on_model(net):
            guider.on_evaluation(Evaluation(step_of(1), ("uncond", "cond"), 1))
            with torch.inference_mode(False), torch.enable_grad():
                x = X.float().requires_grad_()
                (gradient,) = torch.autograd.grad(net(x, 1.0, NULL.float()).square().sum(), x)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 0


# --- layers of other shapes


class Named(nn.Module):
    """An attention layer whose parts go by other names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def linear(width: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, width, dtype=torch.float64)


def norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, dtype=torch.float64)


def factors(layer: Named, tau: float = 0.25) -> dict[str, float]:
    """By how much each part's output is scaled."""
    parts = dict(layer.named_children())
    row = drawn(1, WIDTH, seed=5)
    layer.requires_grad_(False)
    before = {name: part(row) for name, part in parts.items()}
    with untouched(layer), tempered(nn.ModuleList([layer]), tau):
        after = {name: part(row) for name, part in parts.items()}
    found = {name: (after[name] / before[name]).unique() for name in parts}
    return {
        name: float(ratio.mean()) for name, ratio in found.items() if not bool((ratio == 1).all())
    }


@pytest.mark.parametrize(
    "names", [("to_q", "to_k"), ("q_proj", "k_proj"), ("q", "k"), ("query", "key")]
)
def test_projections_by_name(names: tuple[str, str]) -> None:
    layer = Named(**{name: linear() for name in names})
    assert factors(layer) == pytest.approx({names[0]: 0.25})


def test_a_norm_after_the_projection_is_the_last_word() -> None:
    layer = Named(to_q=linear(), to_k=linear(), norm_q=norm(), norm_k=norm())
    assert factors(layer) == pytest.approx({"norm_q": 0.25})
    layer = Named(q_proj=linear(), k_proj=linear(), q_norm=norm(), k_norm=norm())
    assert factors(layer) == pytest.approx({"q_norm": 0.25})


def test_joint_attention_has_two_queries() -> None:
    layer = Named(to_q=linear(), to_k=linear(), add_q_proj=linear(), add_k_proj=linear())
    assert factors(layer) == pytest.approx({"to_q": 0.25, "add_q_proj": 0.25})
    layer.add_module("norm_added_q", norm())
    assert factors(layer) == pytest.approx({"to_q": 0.25, "norm_added_q": 0.25})


def test_a_norm_of_queries_and_keys_takes_the_root() -> None:
    layer = Named(qkv_proj=linear(3 * WIDTH), qk_norm=norm())
    assert factors(layer) == pytest.approx({"qk_norm": 0.5})


@pytest.mark.parametrize("name", ["to_qkv", "qkv_proj"])
def test_a_fused_projection_gives_its_first_third(name: str) -> None:
    layer, rows = Named(**{name: linear(3 * WIDTH)}), drawn(2, 6, WIDTH, seed=5)
    fused = getattr(layer, name)
    before = fused(rows)
    with tempered(nn.ModuleList([layer]), 0.25):
        after = fused(rows)
    assert torch.equal(after[..., :WIDTH], 0.25 * before[..., :WIDTH])
    assert torch.equal(after[..., WIDTH:], before[..., WIDTH:])


def test_a_fused_convolution_gives_its_first_third_of_channels() -> None:
    fused, x = nn.Conv2d(2, 6, 1), torch.randn(1, 2, 3, 3)
    before = fused(x)
    with tempered(nn.ModuleList([Named(qkv_proj=fused)]), 0.25):
        after = fused(x)
    assert torch.equal(after[:, :2], 0.25 * before[:, :2])
    assert torch.equal(after[:, 2:], before[:, 2:])


class Cosine(Named):
    """Compares directions, as HDiT of k-diffusion does."""

    def __init__(self) -> None:
        super().__init__(qkv_proj=linear(3 * WIDTH))
        self.scale = nn.Parameter(torch.ones(HEADS))


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.MultiheadAttention(WIDTH, HEADS), "one parameter makes its queries"),
        (Named(to_q=linear(), to_k=linear(), q_rescaling_norm=norm()), "may undo it"),
        (Named(to_qkv_mlp_proj=linear(5 * WIDTH)), "none of its submodules"),
        (Cosine(), "learned its own scale"),
    ],
    ids=["MultiheadAttention", "unknown norm", "fused beyond thirds", "cosine"],
)
def test_out_of_reach(layer: nn.Module, said: str) -> None:
    net = network()
    net.add_module("odd", layer)
    with untouched(net), pytest.raises(ArgumentError, match=f"queries of odd .*{said}"):  # noqa: SIM117
        with tempered(net, 0.3):
            pass
    with tempered(net, 0.3, layers="blocks.*"):
        pass


def test_modules_themselves() -> None:
    net = network()
    first = net.blocks[0]
    assert isinstance(first, Attention)
    for layers in ([first], [first.to_q]):
        with untouched(net), tempered(net, 0.25, layers=layers):
            ours = net(X, 1.0, PROMPT)
        theirs = loop_network(net, X, 1.0, PROMPT, [0.25, 1.0])
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_modules_reach_a_model_that_is_none() -> None:
    net = network()
    with (
        pytest.raises(ArgumentError, match="a function and no torch module"),
        erg().on_model(drawn),
    ):
        pass
    with erg(layers=list(net.blocks)).on_model(lambda x: x):
        assert "forward" in vars(net.blocks[0].to_q)


def test_a_function_of_name_and_module() -> None:
    net = network()
    with tempered(net, 0.25, layers=lambda name, module: module is net.blocks[1]):
        ours = net(X, 1.0, PROMPT)
    assert torch.allclose(ours, loop_network(net, X, 1.0, PROMPT, [1.0, 0.25]), atol=1e-9)


def test_a_network_without_attention() -> None:
    with pytest.raises(ArgumentError, match=r"Sequential has no .*ERG needs attention"):  # noqa: SIM117
        with tempered(nn.Sequential(linear()), 0.5):
            pass


def test_attention_of_a_form_not_known_here_is_to_be_given() -> None:
    odd = nn.ModuleDict({"attention": linear()})
    with pytest.raises(ArgumentError, match=r"no attention layer known here\. Give the modules"):  # noqa: SIM117
        with tempered(odd, 0.5):
            pass


def test_a_pattern_that_fits_none_names_what_there_is() -> None:
    with pytest.raises(ArgumentError, match=r"tells none of the 2 .*: blocks\.0, blocks\.1\."):  # noqa: SIM117
        with tempered(network(), 0.5, layers=["*attn*", "x"]):
            pass


@pytest.mark.parametrize(
    ("depth", "picked"), [(1, {0}), (2, {1}), (4, {2, 3}), (24, {*range(15, 20)})]
)
def test_shares_of_the_depth(depth: int, picked: set[int]) -> None:
    net = network(depth)
    with ERG().on_model(net):
        hooked = {i for i, block in enumerate(net.blocks) if "forward" in vars(block.to_q)}
    assert hooked == picked


def test_a_middle_registered_last_is_in_the_middle() -> None:
    parts = {
        name: nn.ModuleList([Attention()]) for name in ("down_blocks", "up_blocks", "mid_block")
    }
    net = Named(**parts)
    with tempered(net, 0.3, layers=(0.4, 0.6)):
        assert [name for name, part in parts.items() if "forward" in vars(part[0].to_q)] == [
            "mid_block"
        ]


@pytest.mark.parametrize("tau", [-0.5, math.nan, torch.tensor([1.0, -1.0]), torch.tensor([])])
def test_tau_is_checked(tau: float | Tensor) -> None:
    with pytest.raises(ArgumentError, match="tau must be finite and at least 0"):  # noqa: SIM117
        with tempered(network(), tau):
            pass
