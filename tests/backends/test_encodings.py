"""Prompts as pipelines encode them: pooled, and compared from where unrelated ones are apart."""

from __future__ import annotations

import inspect
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import sparke
from sparke.backends import _encodings
from sparke.backends._encodings import REFERENCE, Encoding
from sparke.errors import GuidanceWarning, ShapeError
from sparke.kernels import prompt_log_weight
from sparke.protocols import Run, State
from tests.backends import tiny

COND_BANDWIDTH = 0.35
UNRELATED = (
    "a lighthouse in a storm",
    "two old friends playing chess in a park",
    "close-up of a sunflower",
    "a steaming cup of coffee on a windowsill",
    "knights riding to a castle, woodcut",
    "a subway train covered in graffiti",
    "jellyfish in deep water",
    "an orchard in spring",
)
"""None of them among the reference prompts."""


class Runs:
    """A guider that keeps what its runs began with."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def begin(self, run: Run) -> None:
        self.runs.append(run)

    def __call__(self, state: State) -> Tensor:
        return torch.zeros_like(state.denoised)

    def finish(self, x: Tensor) -> None: ...


def call(pipe: Any, name: str, prompts: list[str], **changes: Any) -> Any:
    return pipe(**tiny.ALL[name].arguments(prompts, num_inference_steps=1, **changes))


# --- what an encoder returned


def test_tokens_are_averaged() -> None:
    embeds = torch.randn(3, 5, 4)
    found = Encoding.of((embeds, torch.randn(3, 5, 4)))
    assert found is not None
    assert found.mask is None
    torch.testing.assert_close(found.pooled(), embeds.mean(1))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.bfloat16])
def test_tokens_are_averaged_where_the_mask_says(dtype: torch.dtype) -> None:
    embeds = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).to(dtype)
    for result in ((embeds, mask), (embeds, mask, None, None), (embeds, None, mask)):
        found = Encoding.of(result)
        assert found is not None
        expected = torch.stack([embeds[0, :2].mean(0), embeds[1, 1:].mean(0)])
        torch.testing.assert_close(found.pooled(), expected)


def test_padding_does_not_matter_under_a_mask() -> None:
    embeds, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    other = torch.where(mask[..., None] > 0, embeds, 1e6)
    one, two = Encoding.of((embeds, mask)), Encoding.of((other, mask))
    assert one is not None
    assert two is not None
    assert torch.equal(one.pooled(), two.pooled())


def test_numbers_of_the_shape_of_a_mask_are_none() -> None:
    """Pooled embeddings may have as many numbers as there are tokens."""
    embeds, pooled = torch.randn(2, 4, 3), torch.randn(2, 4)
    found = Encoding.of((embeds, pooled))
    assert found is not None
    torch.testing.assert_close(found.pooled(), embeds.mean(1))


def test_prompts_of_different_lengths() -> None:
    parts = [torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(7, 4, dtype=torch.bfloat16)]
    found = Encoding.of((parts, []))
    assert found is not None
    pooled = found.pooled()
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.stack([p.float().mean(0) for p in parts]))


@pytest.mark.parametrize(
    "result",
    [None, (), (None, None), [], "text", torch.ones(2, 3, dtype=torch.long), torch.ones(3)],
)
def test_what_is_no_encoding(result: Any) -> None:
    assert Encoding.of(result) is None


def test_half_precision_is_averaged_in_float32() -> None:
    embeds = 1000 + torch.randn(1, 512, 8)
    found = Encoding.of((embeds.half(),))
    assert found is not None
    torch.testing.assert_close(found.pooled(), embeds.half().float().mean(1))


def test_rows_are_repeated_as_pipelines_repeat_them() -> None:
    pooled = torch.randn(2, 3)
    assert torch.equal(_encodings.rows_of(pooled, 6), pooled[[0, 0, 0, 1, 1, 1]])
    with pytest.raises(ShapeError, match="2 rows for a batch of 3"):
        _encodings.rows_of(pooled, 3)


# --- the origin


@pytest.mark.parametrize("shift", [0.0, 10.0, 1000.0])
def test_what_all_prompts_share_does_not_count(shift: float) -> None:
    """A constant added to every embedding, as encoders do, leaves the weights alone."""
    told = torch.randn(len(REFERENCE) + 4, 32)
    constant = shift * torch.nn.functional.normalize(torch.ones(32), dim=0)

    def weights(rows: Tensor) -> Tensor:
        origin, mine = rows[4:].mean(0), rows[:4]
        seen: list[Tensor] = []

        class Peeking(sparke.DiversityGuider):
            def begin(self, run: Run) -> None:
                super().begin(run)
                assert self._banks is not None
                assert self._banks.mates is not None
                seen.append(self._banks.mates)

        shape = torch.Size((4, 2))
        run = Run(shape, torch.device("cpu"), torch.float32, mine, cond_origin=origin)
        Peeking().begin(run)
        return seen[0].fill_diagonal_(0)

    near = 1e-4 * (1 + shift)
    torch.testing.assert_close(weights(told + constant), weights(told), rtol=0, atol=near)
    assert weights(told).min() < -3


def kernels(rows: Tensor, origin: Tensor | None) -> Tensor:
    """Squared prompt kernels of all pairs."""
    rows = rows if origin is None else rows - origin
    weight = prompt_log_weight(rows, rows, COND_BANDWIDTH).exp()
    return torch.stack([weight[i, j] for i, j in itertools.combinations(range(len(rows)), 2)])


@pytest.mark.parametrize(
    "name", ["sd", "sdxl", "sd3", "flux", "qwen", "zimage", "wan", "pixart-sigma", "kandinsky3"]
)
def test_unrelated_prompts_are_apart(name: str) -> None:
    pipe, guider = tiny.shared(name), Runs()
    wrapped = sparke.wrap(pipe, guider=guider)
    changes = {"negative_prompt": [""] * len(UNRELATED)} if name == "qwen" else {}
    call(wrapped, name, list(UNRELATED), **changes)
    (run,) = guider.runs
    assert run.cond is not None
    assert run.cond_origin is not None
    raw, centred = kernels(run.cond, None), kernels(run.cond, run.cond_origin)
    assert float(centred.median()) < float(raw.median())
    assert float(centred.median()) < 0.05
    assert float(centred.max()) < 0.8


def test_the_origin_is_the_mean_of_the_reference_prompts() -> None:
    pipe, guider = tiny.shared("sd"), Runs()
    call(sparke.wrap(pipe, guider=guider), "sd", ["a cat"])
    embeds = pipe.encode_prompt(list(REFERENCE), "cpu", 1, False)[0]
    origin = guider.runs[0].cond_origin
    assert origin is not None
    torch.testing.assert_close(origin, embeds.mean((0, 1)))


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "zimage", "wan"])
def test_the_origin_is_found_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, guider, asked = tiny.ALL[name].make(), Runs(), []
    kind = type(pipe)
    encode = kind.encode_prompt

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(encode).bind(self, *args, **kwargs)
        prompt = bound.arguments.get("prompt")
        asked.append(1 if isinstance(prompt, str) else len(prompt or ()))
        return encode(self, *args, **kwargs)

    counting.__signature__ = inspect.signature(encode)  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, "encode_prompt", counting)
    wrapped = sparke.wrap(pipe, guider=guider)
    for prompt in ("a cat", "a dog", "a cat"):
        call(wrapped, name, [prompt])
    assert asked.count(len(REFERENCE)) == 1
    first, second, third = guider.runs
    for run in (second, third):
        torch.testing.assert_close(run.cond_origin, first.cond_origin, rtol=0, atol=0)
    assert first.cond_origin is not None
    torch.testing.assert_close(third.cond, first.cond, rtol=0, atol=0)
    assert "encode_prompt" not in vars(pipe)


def test_finding_the_origin_changes_no_picture() -> None:
    """It is one more call of the encoder, which must use up no random numbers of the caller's."""
    pipe = tiny.shared("sd3")
    torch.manual_seed(3)
    bare = tiny.latents(call(pipe, "sd3", ["a cat"], generator=None))
    torch.manual_seed(3)
    idle = tiny.latents(call(sparke.wrap(pipe, scale=0), "sd3", ["a cat"], generator=None))
    assert torch.equal(idle, bare)


def test_an_encoder_that_refuses_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, guider = tiny.ALL["sd"].make(), Runs()
    kind = type(pipe)
    encode = kind.encode_prompt

    def picky(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(prompt, list) and len(prompt) > 2:
            raise RuntimeError("two prompts at most")
        return encode(self, prompt, *args, **kwargs)

    picky.__signature__ = inspect.signature(encode)  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, "encode_prompt", picky)
    wrapped = sparke.wrap(pipe, guider=guider)
    with pytest.warns(GuidanceWarning, match="two prompts at most") as told:
        call(wrapped, "sd", ["a cat", "a dog"])
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(wrapped, "sd", ["a cat", "a dog"])
    for run in guider.runs:
        assert run.cond is not None
        assert run.cond_origin is None
    embeds = encode(pipe, ["a cat", "a dog"], "cpu", 1, False)[0]
    torch.testing.assert_close(guider.runs[0].cond, embeds.mean(1))


def test_prompts_are_compared_as_given_without_a_text_encoder() -> None:
    pipe = tiny.ALL["sd"].make()
    given, empty = pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, True)
    pipe.text_encoder = pipe.tokenizer = None
    guider = Runs()
    wrapped = sparke.wrap(pipe, guider=guider)
    embeds = {"prompt_embeds": given, "negative_prompt_embeds": empty, "prompt": None}
    call(wrapped, "sd", [], **embeds)
    assert guider.runs[0].cond_origin is None
    torch.testing.assert_close(guider.runs[0].cond, given.mean(1))


def test_another_text_encoder_has_another_origin() -> None:
    pipe, guider = tiny.ALL["sd"].make(), Runs()
    wrapped = sparke.wrap(pipe, guider=guider)
    call(wrapped, "sd", ["a cat"])
    old = pipe.text_encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        other = tiny.ALL["sd"].make().text_encoder
        tiny.randomise(other)
    pipe.text_encoder = other
    call(wrapped, "sd", ["a cat"])
    first, second = (run.cond_origin for run in guider.runs)
    assert first is not None
    assert second is not None
    assert not torch.allclose(first, second)
    pipe.text_encoder = old
    call(wrapped, "sd", ["a cat"])
    assert torch.equal(guider.runs[2].cond_origin, first)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change"),
    [("sdxl", {"clip_skip": 1}), ("flux", {"max_sequence_length": 32}), ("sd3", {"clip_skip": 1})],
)
def test_other_ways_to_encode_have_another_origin(name: str, change: dict[str, Any]) -> None:
    """The origin belongs to the encoding as the call asked for it."""
    pipe, guider = tiny.shared(name), Runs()
    wrapped = sparke.wrap(pipe, guider=guider)
    call(wrapped, name, ["a cat"])
    call(wrapped, name, ["a cat"], **change)
    alone = Runs()
    call(sparke.wrap(pipe, guider=alone), name, ["a cat"], **change)
    torch.testing.assert_close(guider.runs[1].cond, alone.runs[0].cond)
    torch.testing.assert_close(guider.runs[1].cond_origin, alone.runs[0].cond_origin)


# --- listening


def test_prompt_lists_that_the_host_rewrites_do_no_harm() -> None:
    """Z-Image writes the chat template into the caller's list of prompts."""
    pipe, guider = tiny.shared("zimage"), Runs()
    wrapped = sparke.wrap(pipe, guider=guider)
    reference = tuple(REFERENCE)
    for _ in range(2):
        call(wrapped, "zimage", ["a cat", "a dog"])
    first, second = guider.runs
    assert first.cond is not None
    assert torch.equal(first.cond, second.cond)  # type: ignore[arg-type]
    assert reference == REFERENCE
    single = Runs()
    call(sparke.wrap(pipe, guider=single), "zimage", ["a cat"])
    torch.testing.assert_close(single.runs[0].cond, first.cond[:1], rtol=1e-4, atol=1e-5)


class Host:
    def encode_prompt(self, prompt: list[str], times: int = 1) -> Tensor:
        prompt[0] = "rewritten"
        return torch.full((len(prompt), 3), float(times))


def test_listening_hears_arguments_as_they_were() -> None:
    host, heard = Host(), []
    with _encodings.listened(host, "encode_prompt", lambda *told: heard.append(told)):
        assert inspect.signature(host.encode_prompt) == inspect.signature(Host().encode_prompt)
        found = host.encode_prompt(["a cat"], times=4)
    assert "encode_prompt" not in vars(host)
    method, bound, result = heard[0]
    assert result is found
    assert bound.arguments == {"prompt": ["a cat"], "times": 4}
    assert torch.equal(method(*bound.args, **bound.kwargs), found)
    host.encode_prompt(["a cat"])
    assert len(heard) == 1


def test_listening_puts_a_replaced_method_back() -> None:
    host, heard = Host(), []

    def own(prompt: list[str]) -> str:
        return "own"

    host.encode_prompt = own  # type: ignore[method-assign, assignment]
    with _encodings.listened(host, "encode_prompt", lambda *told: heard.append(told)):
        assert host.encode_prompt([]) == "own"
    with pytest.raises(KeyError), _encodings.listened(host, "encode_prompt", lambda *_: None):
        raise KeyError
    assert vars(host)["encode_prompt"] is own
    assert len(heard) == 1
    with _encodings.listened(host, "no_such_method", lambda *_: None):
        pass


# --- an encoder of the user's


def test_encoded_takes_what_encoders_return() -> None:
    prompts = ["a", "bb"]
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(_encodings.encoded(lambda _: rows, prompts), rows)
    assert torch.equal(_encodings.encoded(lambda _: rows.numpy(), prompts), rows)
    assert torch.equal(_encodings.encoded(lambda _: rows.tolist(), prompts), rows)
    tokens = torch.randn(2, 5, 3)
    torch.testing.assert_close(_encodings.encoded(lambda _: tokens, prompts), tokens.mean(1))
    with pytest.raises(ShapeError, match="3 rows for a batch of 2"):
        _encodings.encoded(lambda _: torch.randn(3, 4), prompts)
    with pytest.raises(ShapeError, match="finite"):
        _encodings.encoded(lambda _: rows * torch.nan, prompts)
