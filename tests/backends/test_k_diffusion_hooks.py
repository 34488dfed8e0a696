"""Hooks of guiders on k-diffusion's samplers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from torch import Tensor, nn

import sparke
from sparke.backends import _masks, _noise
from sparke.errors import GuidanceWarning, ShapeError
from sparke.guidance import GuiderChain
from tests import samplers
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
from tests.probe import Probe
from tests.samplers import MIXTURE, PROMPTS, Recorder, run

pytestmark = pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning")
every = pytest.mark.parametrize("name", samplers.ALL)
BARE = sampling.sample_euler


class Net(nn.Module):
    """The mixture, as a module that does classifier-free guidance in one call of twice the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.sigma_max = MIXTURE.sigma_max

    def forward(
        self, x: Tensor, sigma: Tensor, cond: Any = None, cond_scale: float = 1.0, **_: Any
    ) -> Tensor:
        if cond_scale == 1:
            alone: Tensor = self.inner(x, sigma, cond)
            return alone
        both = self.inner(
            x.repeat(2, 1), sigma.repeat(2), torch.cat([torch.zeros_like(cond), cond])
        )
        uncond, told = both.chunk(2)
        guided: Tensor = uncond + cond_scale * (told - uncond)
        return guided


class Inner(nn.Module):
    """Depends smoothly on its embeddings, which the mixture does not."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        shift = cond.flatten(1).mean(1, keepdim=True)
        return x / (1 + sigma[:, None] ** 2) + shift


def embeds(*shape: int) -> Tensor:
    return torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(3))


def noise(sigma: float = MIXTURE.sigma_max, rows: int = len(PROMPTS), *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return sigma * torch.randn(rows, *(shape or (2,)), generator=generator)


def sampled(guider: Any, model: Any = None, **extra: Any) -> Tensor:
    extra = {"cond": embeds(6), **extra}
    wrapped: Any = sparke.wrap(BARE, guider=guider)
    out: Tensor = wrapped(
        model or Net(), noise(), MIXTURE.sigmas(4), extra_args=extra, disable=True
    )
    return out


# --- seeds


def test_equal_noise_has_equal_seeds_in_whatever_batch() -> None:
    x = torch.randn(5, 4, 8, 8)
    found = _noise.seeds(x)
    assert len(set(found)) == 5
    assert all(0 <= seed < 2**63 for seed in found)
    assert found == _noise.seeds(x.clone())
    for i in range(5):
        assert _noise.seeds(x[i : i + 1]) == found[i : i + 1]
    assert _noise.seeds(x.flip(0)) == found[::-1]
    assert _noise.seeds(torch.cat([x[:1], x[:1]])) == found[:1] * 2
    assert _noise.seeds(x.transpose(2, 3).contiguous().transpose(2, 3)) == found
    assert _noise.seeds(x.bfloat16()) == _noise.seeds(x.bfloat16().float())
    other = x.clone()
    other[0, 0, 0, 0] += 1e-3
    assert _noise.seeds(other)[0] != found[0]


def test_seeds_of_large_samples_read_a_part_and_no_generator() -> None:
    x, state = torch.randn(1, 3 * _noise.READ + 1), torch.random.get_rng_state()
    with torch.inference_mode():
        found = _noise.seeds(x.requires_grad_())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found == _noise.seeds(x[:, ::4])


def test_a_run_tells_the_seeds_of_its_noise() -> None:
    probe = Probe()
    sampled(probe)
    assert probe.runs[0].seeds == _noise.seeds(noise())


# --- on_noise


@every
def test_other_noise_is_the_noise_one_starts_from(name: str) -> None:
    bare = samplers.of(name)

    def started(sampler: Any, sign: float) -> Tensor:
        torch.manual_seed(1)
        x = sign * noise()
        levels = samplers.schedule(bare, MIXTURE, 5)
        extra = {"cond": MIXTURE.encode(PROMPTS)}
        out: Tensor = sampler(MIXTURE, x, **levels, extra_args=extra, disable=True)
        return out

    guider = OnNoise(negated)
    assert torch.equal(started(sparke.wrap(bare, guider=guider), 1.0), started(bare, -1.0))
    assert guider.begun == [1]
    assert guider.runs[0].seeds == _noise.seeds(noise())
    assert torch.equal(guider.noises[0], noise())


def test_noise_passes_through_a_chain_and_the_callers_is_left_alone() -> None:
    x = noise()
    doubled = OnNoise(lambda x: x.mul(2))
    chain = GuiderChain([Probe(), OnNoise(negated), doubled])
    kept = x.clone()
    sparke.wrap(BARE, guider=chain)(MIXTURE, x, MIXTURE.sigmas(3), disable=True)
    assert torch.equal(x, kept)
    assert torch.equal(doubled.noises[0], -x)
    assert torch.equal(doubled.states[0].x, -2 * x)


def test_noise_given_back_is_the_very_tensor() -> None:
    seen: list[Tensor] = []

    def sampler(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        seen.append(x)
        return x

    x = noise()
    sparke.wrap(sampler, guider=OnNoise())(MIXTURE, x, MIXTURE.sigmas(3))
    assert seen[0] is x


class Untold:
    """A denoiser that says nothing of itself."""

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        return MIXTURE(x, sigma)


def told(**attributes: Any) -> Untold:
    model = Untold()
    vars(model).update(attributes)
    return model


class Around:
    def __init__(self, inner: Any) -> None:
        self.inner_model = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.inner_model(*args, **kwargs)
        return out


PICTURE = torch.linspace(-1, 1, 32).outer(torch.linspace(-1, 1, 32)).expand(3, 4, 32, 32)


@pytest.mark.parametrize(
    ("model", "sigma", "picture", "reason"),
    [
        (told(sigma_max=80.0), 80.0, None, None),
        (told(sigma_max=torch.tensor(80.0)), 79.9, None, None),
        (Around(Around(told(sigma_max=80.0))), 80.0, None, None),
        (told(sigma_max=80.0), 20.0, None, "below the model's sigma_max 80"),
        (told(sigma_data=0.5), 5.0, None, None),
        (told(sigma_data=0.5), 4.9, None, "where an image would show"),
        (told(), 10.0, None, None),
        (told(), 9.0, None, "where an image would show"),
        (told(sigma_max=2.0), 2.0, 3.0, "no white noise"),
        (told(sigma_max=80.0), 80.0, 1.0, None),
        (told(sigma_max=80.0), 80.0, 300.0, "no white noise"),
    ],
)
def test_noise_is_changed_where_there_is_noise_and_nothing_else(
    model: Any, sigma: float, picture: float | None, reason: str | None
) -> None:
    x = noise(sigma, 3, 4, 32, 32) + (0 if picture is None else picture * PICTURE)
    guider = OnNoise(negated)
    wrapped = sparke.wrap(_in_one_step, guider=guider)
    sigmas = torch.tensor([sigma, 0.0])
    if reason is None:
        wrapped(model, x, sigmas)
        assert len(guider.noises) == 1
        return
    with pytest.warns(GuidanceWarning, match=reason) as caught:
        wrapped(model, x, sigmas)
    assert len(caught) == 1
    assert "OnNoise" in str(caught[0].message)
    assert guider.noises == []


def _in_one_step(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return x


def test_noise_at_the_wrong_level_is_not_taken_for_the_start() -> None:
    guider = OnNoise(negated)
    with pytest.warns(GuidanceWarning, match="standard deviation 80"):
        sparke.wrap(_in_one_step, guider=guider)(
            told(sigma_max=80.0), noise(1.0, 3, 4, 32, 32), torch.tensor([80.0, 0.0])
        )


def test_white_noise_passes_for_white_noise() -> None:
    shapes = [(1, 2), (4, 320), (2, 4, 64, 64), (2, 1024, 64), (1, 16, 5, 8, 8), (16, 4, 8, 8)]
    for shape in shapes:
        for seed in range(20):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            assert _noise.is_white(x, 1.0)
            assert _noise.is_white(3 * x.bfloat16())
            assert _noise.is_white(x[:1].repeat(8, *[1] * (len(shape) - 1)), 1.0)


def test_other_things_do_not_pass_for_white_noise() -> None:
    x = torch.randn(2, 4, 32, 32)
    assert not _noise.is_white(x, 1.5)
    assert not _noise.is_white(x + 0.5)
    assert not _noise.is_white(nn.functional.avg_pool2d(x, 3, 1, 1))
    assert not _noise.is_white(x.repeat_interleave(2, 2))
    frozen = torch.randn(1, 4, 5, 16, 16)
    frozen[:, :, 0] = 1.0
    assert not _noise.is_white(frozen)


@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: x.double(), lambda x: None])
def test_noise_of_another_kind_is_an_error(change: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ShapeError, match="on_noise of OnNoise must return"):
        sampled(OnNoise(change))


# --- on_condition


def test_the_network_sees_other_embeddings_and_only_it() -> None:
    guider, model = OnCondition(moved), Recorder(Net())
    cond = embeds(6)
    kept, extra = cond.clone(), {"cond": cond, "uncond": embeds(6), "cond_scale": 3.0}
    wrapped = sparke.wrap(BARE, guider=guider)
    out = wrapped(model, noise(), MIXTURE.sigmas(4), extra_args=extra, disable=True)
    assert all(torch.equal(o["cond"], moved(cond)) for o in model.options)
    assert all(o["uncond"] is extra["uncond"] for o in model.options)
    assert all(torch.equal(given, cond) for given in guider.given)  # clean ones, every time
    assert [step.sigma for step in guider.steps] == pytest.approx(model.sigmas)
    assert guider.masks == [None] * 4
    assert torch.equal(cond, kept)
    assert extra["cond"] is cond
    expected = BARE(
        Net(),
        noise(),
        MIXTURE.sigmas(4),
        disable=True,
        extra_args={"cond": moved(cond), "cond_scale": 3.0},
    )
    assert torch.equal(out, expected)
    assert guider.runs[0].cond is not None
    assert torch.equal(guider.runs[0].cond, cond)


@pytest.mark.parametrize("name", ["cond_mask", "mask"])
@pytest.mark.parametrize("form", ["bool", "int", "bias"])
def test_a_mask_comes_along_as_booleans(name: str, form: str) -> None:
    mask = torch.ones(len(PROMPTS), 3, dtype=torch.bool)
    mask[:, 2] = False
    given = {"bool": mask, "int": mask.long(), "bias": (1 - mask.float()) * -1e4}[form]
    guider = OnCondition(moved)
    sampled(guider, Recorder(Net()), cond=embeds(3, 6), **{name: given})
    assert all(m is not None and torch.equal(m, mask) for m in guider.masks)


def test_a_mask_of_something_else_stays_where_it_is() -> None:
    guider = OnCondition(moved)
    sampled(guider, cond=embeds(3, 6), mask=torch.ones(len(PROMPTS), 1, 4, 4))
    assert set(guider.masks) == {None}


def test_masks_of_all_forms_say_the_same() -> None:
    expected = torch.tensor([[True, True, False], [True, False, False]])
    bias = torch.where(expected, 0.0, -10000.0)
    for given in (
        expected,
        expected.int(),
        expected.float(),
        bias,
        bias[:, None],
        bias[:, None, None],
    ):
        assert torch.equal(_masks.present(given), expected)
    full = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(_masks.present(torch.zeros(2, 3)), full)


def test_embeddings_in_dicts_and_lists_are_found() -> None:
    model = Recorder(lambda x, sigma, **_: MIXTURE(x, sigma))
    tokens, vector, image = embeds(3, 6), embeds(4), embeds(4, 2, 2)
    cond = {"c_crossattn": [tokens], "vector": vector, "c_concat": [image], "mask": embeds(3)}
    guider = OnCondition(moved)
    sampled(guider, model, cond=cond)
    for options in model.options:
        seen = options["cond"]
        assert torch.equal(seen["c_crossattn"][0], moved(tokens))
        assert torch.equal(seen["vector"], moved(vector))
        assert seen["c_concat"] is cond["c_concat"]
        assert seen["mask"] is cond["mask"]
    assert cond["c_crossattn"] == [tokens]
    assert len(guider.given) == 2 * len(model.options)


@pytest.mark.parametrize("nested", [False, True])
def test_embeddings_given_back_leave_the_very_objects(nested: bool) -> None:
    model = Recorder(lambda x, sigma, **_: MIXTURE(x, sigma))
    cond = {"c_crossattn": [embeds(3, 6)]} if nested else embeds(6)
    sampled(OnCondition(), model, cond=cond)
    assert all(options["cond"] is cond for options in model.options)


@pytest.mark.parametrize(
    "cond",
    [None, torch.arange(len(PROMPTS)), torch.randn(1, 6), {"c_concat": []}, "a cat"],
)
def test_what_cannot_be_reached_is_said_once(cond: Any) -> None:
    model = Recorder(lambda x, sigma, **_: MIXTURE(x, sigma))
    with pytest.warns(GuidanceWarning, match="OnCondition changes prompt embeddings") as caught:
        sampled(OnCondition(moved), model, cond=cond)
    assert len(caught) == 1
    assert all(options["cond"] is cond for options in model.options)


def test_embeddings_of_another_shape_are_an_error() -> None:
    with pytest.raises(ShapeError, match="on_condition of OnCondition must return"):
        sampled(OnCondition(lambda x: x[:, :2]))


# --- on_model


def test_the_network_is_held_from_the_first_evaluation_to_the_last() -> None:
    guider, model = OnModel(), Net()
    sampled(guider, model)
    assert len(guider.entered) == 1
    assert guider.entered[0] is model
    assert guider.held_at_evaluations == [1] * 4
    assert guider.held == 0


@pytest.mark.parametrize(
    "around",
    [
        Around,
        lambda net: Around(Around(net)),
        lambda net: functools.partial(net, cond_scale=1.0),
        lambda net: net.forward,
        lambda net: Recorder(Around(net)),
    ],
)
def test_the_outermost_module_is_found_in_wrappers(around: Callable[[nn.Module], Any]) -> None:
    guider, model = OnModel(), Net()
    sampled(guider, around(model))
    assert guider.entered == [model]


def test_a_denoiser_without_a_module_is_handed_over_itself() -> None:
    guider = OnModel()
    sampled(guider, MIXTURE, cond=MIXTURE.encode(PROMPTS))
    assert guider.entered == [MIXTURE]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["network", "block", "guider", "callback"])
def test_nothing_stays_hooked_after_an_error(error: type[BaseException], place: str) -> None:
    model, guider = Net(), OnModel(scaled)
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error("on purpose")

    if place in ("network", "block"):
        part = model if place == "network" else model.inner
        part.register_forward_pre_hook(fail)
    before = [len(m._forward_hooks) for m in model.modules()]
    failing = [guider, _Failing(fail)] if place == "guider" else [guider]
    wrapped = sparke.wrap(BARE, guider=failing)
    with pytest.raises(error, match="on purpose"):
        wrapped(
            model,
            noise(),
            MIXTURE.sigmas(4),
            extra_args={"cond": embeds(6)},
            disable=True,
            callback=fail if place == "callback" else None,
        )
    assert guider.entered == [model]
    assert guider.held == 0
    assert [len(m._forward_hooks) for m in model.modules()] == before
    assert guider.finished == []


class _Failing(Probe):
    def __init__(self, fail: Callable[[], None]) -> None:
        super().__init__()
        self.fail = fail

    def __call__(self, state: Any) -> Tensor:
        self.fail()
        return super().__call__(state)


def test_hooks_act_and_are_gone_afterwards() -> None:
    model = Net()
    bare = sampled(Probe(), model)
    halved = sampled(OnModel(scaled), model)
    assert not torch.allclose(bare, halved)
    assert torch.equal(sampled(Probe(), model), bare)


# --- on_evaluation, again


@pytest.mark.parametrize(("scale", "branches"), [(None, ("cond",)), (1.0, ("cond",)), (3.0, ())])
def test_each_call_of_the_network_is_announced(
    scale: float | None, branches: tuple[str, ...]
) -> None:
    guider, model = OnEvaluation(), Recorder(Net())
    extra = {} if scale is None else {"cond_scale": scale}
    sampled(guider, model, **extra)
    assert [e.branches for e in guider.told] == [branches] * 4
    assert [e.step.sigma for e in guider.told] == pytest.approx(model.sigmas)
    assert {e.batch for e in guider.told} == {len(PROMPTS)}


def test_a_second_look_is_made_now_and_announced() -> None:
    guider, model = OnEvaluation(again=True, conditional=True), Recorder(Net())
    sampled(guider, model, cond_scale=3.0)
    assert [e.branches for e in guider.told] == [(), ("cond",), ("cond",)] * 4
    assert [o["cond_scale"] for o in model.options] == [3.0, 1.0, 1.0] * 4
    for seen, conditional in zip(guider.seen_again, guider.conditionals, strict=True):
        assert seen is not None
        assert torch.equal(seen, conditional)


def test_without_guidance_the_prediction_is_reused_but_not_by_a_second_look() -> None:
    guider, model = OnEvaluation(again=True, conditional=True), Recorder(Net())
    sampled(guider, model, cond_scale=1.0)
    assert model.calls == 8
    assert guider.conditionals[0] is guider.states[0].denoised


def test_a_second_look_sees_what_hooks_do_meanwhile() -> None:
    class Weak(OnModel):
        """Halves the network's answers during a second look only."""

        factor = 1.0

        def __init__(self) -> None:
            super().__init__(lambda module: _held(module, self))
            self.pairs: list[tuple[Tensor, Tensor]] = []

        def __call__(self, state: Any) -> Tensor:
            self.factor = 0.5
            weak = state.again()
            self.factor = 1.0
            self.pairs.append((weak, state.denoised))
            return super().__call__(state)

    guider = Weak()
    bare = sampled(Probe())
    assert torch.equal(sampled(guider), bare)
    assert guider.pairs
    for weak, whole in guider.pairs:
        assert torch.equal(weak, 0.5 * whole)


@contextlib.contextmanager
def _held(module: nn.Module, guider: Any) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, out: out * guider.factor)
    try:
        yield
    finally:
        handle.remove()


def test_a_second_look_has_its_condition_made_anew() -> None:
    class Switching(OnCondition):
        on = True

        def on_condition(self, prompt_embeds: Tensor, step: Any, mask: Any = None) -> Tensor:
            return moved(prompt_embeds) if self.on else prompt_embeds

        def __call__(self, state: Any) -> Tensor:
            self.on = False
            self.seen = state.again()
            self.on = True
            return super().__call__(state)

    guider, net = Switching(), Net()
    sampled(guider, net)
    last = guider.states[-1]
    sigma = torch.full((len(PROMPTS),), last.step.sigma)
    torch.testing.assert_close(guider.seen, net(last.x, sigma, embeds(6)))
    assert not torch.allclose(guider.seen, last.denoised)


# --- on_encoder


def test_a_sampler_has_nothing_to_encode_and_says_so() -> None:
    guider = OnEncoder(lambda _: pytest.fail("there is no encoder"))
    with pytest.warns(GuidanceWarning, match="OnEncoder has prompts encoded a second time"):
        sampled(guider)
    assert torch.equal(guider.seen_again[0], guider.conditionals[0])  # type: ignore[arg-type]


# --- idle hooks, and none


def test_idle_hooks_are_neither_called_nor_missed() -> None:
    class Idle(OnNoise, OnEncoder):
        idle = frozenset({"noise", "encoder"})

        def __init__(self) -> None:
            OnNoise.__init__(self, lambda _: pytest.fail("on_noise of an idle guider"))
            OnEvaluation.__init__(self)

    assert torch.equal(sampled(Idle()), sampled(Probe()))


@every
def test_hooks_that_change_nothing_are_bit_identical(name: str) -> None:
    class Everything(OnNoise, OnCondition, OnModel, OnEvaluation):
        def __init__(self) -> None:
            OnNoise.__init__(self)
            OnCondition.__init__(self)
            OnModel.__init__(self)
            OnEvaluation.__init__(self)

    bare = samplers.of(name)
    guider = Everything()
    ours = run(sparke.wrap(bare, guider=guider), cond_scale=3.0, steps=5)
    assert torch.equal(ours, run(bare, cond_scale=3.0, steps=5))
    assert guider.told
    assert guider.entered == [MIXTURE]
