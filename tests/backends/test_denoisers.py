"""A pipeline's denoiser seen from outside: told apart by prompt, compiled or not, put back."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparke
from sparke.backends import _denoisers
from sparke.backends._pipeline_run import PipelineRun
from sparke.backends._predictions import Predictions
from tests.backends import tiny
from tests.backends.hooks import OnEvaluation

BATCH = 2
PROMPT, NEGATIVE = torch.randn(BATCH, 5, 3), torch.randn(BATCH, 5, 3)
SAME = ["a red fox", "a red fox"]


def latents(rows: int = BATCH) -> Tensor:
    return torch.randn(rows, 4, 3, 3)


def asked(prompts: Any, rows: int | None = None, **more: Any) -> tuple[tuple[Any, ...], Any]:
    """A denoiser's arguments, as diffusers' UNets are called."""
    rows = len(prompts) if rows is None else rows
    return (latents(rows), torch.tensor(5)), {"encoder_hidden_states": prompts, **more}


# --- which prompts a call is for


def test_one_call_for_both_prompts() -> None:
    seen = Predictions(BATCH, PROMPT)
    assert seen.kind(*asked(torch.cat([NEGATIVE, PROMPT]))) == "uncond+cond"
    seen = Predictions(BATCH, PROMPT)
    assert seen.kind(*asked(torch.cat([PROMPT, NEGATIVE]))) == "cond+uncond"


def test_two_calls_in_either_order() -> None:
    seen = Predictions(BATCH, PROMPT)
    assert seen.kind(*asked(PROMPT)) == "cond"
    seen.answered("cond", latents(), 0.0)
    assert seen.kind(*asked(NEGATIVE)) == "uncond"
    seen = Predictions(BATCH, PROMPT)
    assert seen.kind(*asked(NEGATIVE)) != "cond"
    assert seen.kind(*asked(PROMPT)) == "cond"


@pytest.mark.parametrize(
    ("prompts", "rows"),
    [
        (torch.randn(BATCH, 5, 3), BATCH),
        (torch.randn(2 * BATCH, 5, 3), 2 * BATCH),
        (torch.cat([PROMPT, PROMPT, NEGATIVE]), 3 * BATCH),
        (torch.randn(1, 5, 3), 1),
    ],
)
def test_calls_for_other_prompts_are_left_alone(prompts: Tensor, rows: int) -> None:
    seen = Predictions(BATCH, PROMPT)
    args, kwargs = asked(prompts, rows)
    kind = seen.kind(args, kwargs)
    assert kind == "other"
    out = (latents(rows),)
    assert seen.answered(kind, out, 1.0) is out
    assert seen.conditional is None


def test_without_known_prompts_nothing_is_told_apart() -> None:
    assert Predictions(BATCH, None).kind(*asked(torch.cat([NEGATIVE, PROMPT]))) == "other"


def test_prompts_in_lists_and_by_position() -> None:
    known = [torch.randn(4, 3), torch.randn(6, 3)]
    empty = [torch.randn(2, 3), torch.randn(2, 3)]
    seen = Predictions(BATCH, known)
    images = [torch.randn(4, 1, 3, 3) for _ in range(2 * BATCH)]
    kind = seen.kind((images, torch.ones(2 * BATCH), [*known, *empty]), {})
    assert kind == "cond+uncond"
    out: Any = ([torch.full((4, 1, 3, 3), float(i)) for i in range(4)], {})
    moved = seen.answered(kind, out, 0.5)
    assert [float(m.mean()) for m in moved[0]] == [0.0, 1.0, 1.0, 2.0]
    assert moved[1] is out[1]
    assert [float(m.mean()) for m in out[0]] == [0.0, 1.0, 2.0, 3.0]


def test_the_same_prompt_in_another_precision() -> None:
    seen = Predictions(BATCH, PROMPT)
    assert seen.kind(*asked(torch.cat([NEGATIVE, PROMPT]).bfloat16())) == "uncond+cond"


def test_labels_are_prompts_too() -> None:
    labels = torch.tensor([3, 7])
    seen = Predictions(BATCH, labels)
    args = (latents(4),)
    kwargs = {"timestep": torch.ones(4), "class_labels": torch.tensor([3, 7, 1000, 1000])}
    assert seen.kind(args, kwargs) == "cond+uncond"


def test_kinds_are_by_place_and_hold_for_the_run() -> None:
    """Prompts are compared at the first step only; who changes them on the way is told nothing."""
    seen = Predictions(BATCH, PROMPT)
    both = torch.cat([NEGATIVE, PROMPT])
    for _ in range(3):
        assert seen.kind(*asked(both)) == "uncond+cond"
        assert seen.kind(*asked(PROMPT)) == "cond"
        seen.next_step()
        assert seen.conditional is None


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, -0.5])
@pytest.mark.parametrize("order", ["uncond+cond", "cond+uncond"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_share_is_a_scale(share: float, order: str, scale: float) -> None:
    halves = {"uncond": latents(), "cond": latents()}
    seen = Predictions(BATCH, PROMPT)
    out = torch.cat([halves[word] for word in order.split("+")])
    before = out.clone()
    moved = seen.answered(order, (out, "rest"), share)
    assert moved[1] == "rest"
    assert torch.equal(out, before)
    parts = dict(zip(order.split("+"), moved[0].chunk(2), strict=True))
    assert torch.equal(parts["cond"], halves["cond"])
    guided = parts["uncond"] + scale * (parts["cond"] - parts["uncond"])
    effective = share + scale * (1 - share)
    expected = halves["uncond"] + effective * (halves["cond"] - halves["uncond"])
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)
    if share == 1:
        assert torch.equal(parts["uncond"], halves["cond"])
    assert torch.equal(seen.conditional, halves["cond"])
    assert torch.equal(seen.unconditional, halves["uncond"])


def test_a_second_look_at_the_same_prompt_is_not_the_prediction() -> None:
    seen, first = Predictions(BATCH, PROMPT), latents()
    seen.answered("cond", (first,), 0.0)
    seen.answered("cond", (latents(),), 0.0)
    assert seen.conditional is first


def test_answers_keep_their_kind() -> None:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    head, other = latents(), latents()
    whole = Transformer2DModelOutput(sample=head)
    changed = _denoisers.replaced(whole, other)
    assert type(changed) is Transformer2DModelOutput
    assert changed.sample is other
    assert changed[0] is other
    assert whole.sample is head
    assert _denoisers.replaced((head, 1), other) == (other, 1)
    assert _denoisers.replaced(head, other) is other


def test_the_time_of_a_call() -> None:
    x = latents()
    assert _denoisers.time_of((x, torch.tensor(7)), {}) == 7
    assert _denoisers.time_of((x,), {"timestep": torch.tensor([0.25, 0.25])}) == 0.25
    assert _denoisers.time_of((x,), {"timestep": 3}) == 3
    assert _denoisers.time_of((x,), {}) is None


# --- stand-ins


class Holder:
    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return self.weight * x * factor

    @property
    def width(self) -> int:
        return 3


def test_a_stand_in_is_the_module_but_for_its_calls() -> None:
    module = Doubling()
    holder, seen = Holder(module), []

    def watcher(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return call(*args, **kwargs) + 1

    with _denoisers.watched(holder, watcher) as any_:
        assert any_
        held: Any = holder.unet
        assert isinstance(held, Doubling)
        assert type(held).__name__ == "Doubling"
        assert held.width == 3
        assert held.weight is module.weight
        assert next(iter(held.parameters())) is module.weight
        assert set(held.state_dict()) == {"weight"}
        assert float(held(torch.ones(1), factor=3.0)) == 4
        assert seen == [((torch.ones(1),), {"factor": 3.0})]
        held.eval()
        assert not module.training
        setattr(module, "marker", 5)  # noqa: B010  as pipelines set what is not declared
        assert held.marker == 5
        hooks: list[int] = []
        held.register_forward_hook(lambda *_: hooks.append(1))
        held(torch.ones(1))
        assert hooks == [1]
    assert holder.unet is module
    assert float(module(torch.ones(1))) == 2


def test_a_pipeline_without_a_denoiser_is_left_alone() -> None:
    class Empty:
        unet = None

    with _denoisers.watched(Empty(), lambda *_: None) as any_:
        assert not any_


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_module_is_back_after_an_error(error: type[BaseException]) -> None:
    module = Doubling()
    holder = Holder(module)
    with pytest.raises(error), _denoisers.watched(holder, lambda *_: None):
        raise error
    assert holder.unet is module


# --- compiled denoisers


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sampled(pipe: Any, name: str) -> Tensor:
    arguments = tiny.ALL[name].arguments(SAME, num_inference_steps=2)
    return tiny.latents(pipe(**arguments)).detach().clone()


COMPILED = [
    ("sd", "unet", False),
    ("dit", "transformer", True),
    ("sd3", "transformer", True),
    ("flux", "transformer", False),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "part", "in_place"), COMPILED)
def test_compiled_denoisers_stay_one_graph(name: str, part: str, in_place: bool) -> None:
    pipe = tiny.ALL[name].make()
    bare, guided = sampled(pipe, name), sampled(sparke.wrap(pipe), name)
    counter = CompileCounterWithBackend("eager")
    if in_place:
        getattr(pipe, part).compile(backend=counter, fullgraph=True)
    else:
        setattr(pipe, part, torch.compile(getattr(pipe, part), backend=counter, fullgraph=True))
    held = getattr(pipe, part)
    near = 1e-4 * float(bare.abs().max())
    torch.testing.assert_close(sampled(pipe, name), bare, rtol=0, atol=near)
    assert counter.frame_count == 1
    for _ in range(2):
        torch.testing.assert_close(sampled(sparke.wrap(pipe), name), guided, rtol=0, atol=near)
        assert getattr(pipe, part) is held
    assert counter.frame_count == 1
    torch.testing.assert_close(sampled(pipe, name), bare, rtol=0, atol=near)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_first_in_a_guided_call() -> None:
    name, part = "dit", "transformer"
    pipe = tiny.ALL[name].make()
    guided = sampled(sparke.wrap(pipe), name)
    counter = CompileCounterWithBackend("eager")
    setattr(pipe, part, torch.compile(getattr(pipe, part), backend=counter, fullgraph=True))
    near = 1e-4 * float(guided.abs().max())
    torch.testing.assert_close(sampled(sparke.wrap(pipe), name), guided, rtol=0, atol=near)
    sampled(pipe, name)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor() -> None:
    pipe = tiny.ALL["dit"].make()
    bare, guided = sampled(pipe, "dit"), sampled(sparke.wrap(pipe), "dit")
    counter = CompileCounterWithBackend("inductor")
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    torch.testing.assert_close(sampled(pipe, "dit"), bare, rtol=0, atol=1e-3)
    torch.testing.assert_close(sampled(sparke.wrap(pipe), "dit"), guided, rtol=0, atol=1e-3)
    assert counter.frame_count == 1


def runs() -> set[int]:
    gc.collect()
    return {id(held) for held in gc.get_objects() if isinstance(held, PipelineRun)}


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_offloading_keeps_working_and_holds_no_run(name: str) -> None:
    before = runs()  # that failed in other tests, in tracebacks
    pipe, case = tiny.ALL[name].make(), tiny.ALL[name]

    def made(target: Any) -> Tensor:
        return tiny.latents(target(**case.arguments(["a cat", "a dog"])))

    bare = made(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # each call hooks the modules anew
        assert torch.equal(made(sparke.wrap(pipe, scale=0)), bare)
    first = made(sparke.wrap(pipe, "rke"))
    assert torch.equal(made(sparke.wrap(pipe, "rke")), first)
    assert torch.equal(made(pipe), bare)
    # A second look goes through the hooks of offloading as well.
    looking = OnEvaluation(again=True, conditional=True)
    assert torch.equal(made(sparke.wrap(pipe, guider=looking)), bare)
    for seen, conditional in zip(looking.seen_again, looking.conditionals, strict=True):
        assert seen is not None
        torch.testing.assert_close(seen, conditional, rtol=1e-3, atol=1e-4)
    del looking
    assert runs() <= before
