"""`check_backend`: our backends pass, and backends broken in one way each do not."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import sparke
from sparke.backends import diffusers, k_diffusion
from sparke.errors import ArgumentError, GuidanceWarning
from sparke.guidance import having
from sparke.guidance._hooks import HOOKS
from sparke.protocols import Run, State, Step
from sparke.testing import check_backend
from tests import samplers
from tests.backends import tiny

PROMPTS = samplers.PROMPTS[:3]


@pytest.mark.parametrize(
    ("name", "cond_scale"),
    [
        ("sample_euler", 3.0),
        ("sample_euler_ancestral", 1.0),
        ("sample_heun", 1.0),
        ("sample_dpmpp_2m", 3.0),
        ("sample_dpm_fast", 1.0),
        ("sample_dpm_adaptive", 1.0),
    ],
)
def test_k_diffusions_samplers_conform(name: str, cond_scale: float) -> None:
    options: dict[str, Any] = {"prompts": PROMPTS, "steps": 4, "cond_scale": cond_scale}

    def call(sampler: samplers.Sampler) -> Tensor:
        return samplers.run(sampler, **options)

    check_backend(
        k_diffusion,
        samplers.of(name),
        call,
        watch=[samplers.MIXTURE],
        hooks=["noise", "condition", "model", "evaluation", "guidance_scale"],
    )


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_diffusers_pipelines_conform(name: str) -> None:
    pipe = tiny.ALL[name].make()

    def call(one: Any) -> Tensor:
        return tiny.latents(one(**tiny.ALL[name].arguments(["a cat", "a dog"])))

    parts = [part for part in pipe.components.values() if part is not None]
    check_backend(diffusers, pipe, call, watch=parts, hooks=["noise", "condition", "model"])


# Somebody else's: a small host in the shape of a generator, and what it takes to guide it.

SIGMAS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.1)
MODES = torch.tensor([[3.0, 0.0], [-3.0, 1.0]])


class Model:
    """The posterior mean of two points, with a switch that calls read."""

    def __init__(self) -> None:
        self.offset = 0.0

    def clean(self, x: Tensor, sigma: float) -> Tensor:
        share: Tensor = torch.softmax(-torch.cdist(x, MODES).square() / 2 / sigma**2, 1)
        return share @ MODES + self.offset


MODEL = Model()


def sample(model: Any, n: int = 3) -> Iterator[Tensor]:
    """Ancestral steps down SIGMAS."""
    x = SIGMAS[0] * torch.randn(n, 2)
    for sigma, lower in itertools.pairwise(SIGMAS):
        mean = model.clean(x, sigma)
        down = 0.9 * lower
        x = mean + down / sigma * (x - mean) + (lower**2 - down**2) ** 0.5 * torch.randn(n, 2)
        yield x


def call(sampler: Any) -> Tensor:
    *_, x = sampler(MODEL)
    return cast(Tensor, x)


class Good:
    """The least that conforms; each flaw below is one departure from it."""

    flaw = ""

    def accepts(self, target: object) -> bool:
        return self.flaw == "greedy" or target is sample

    def attach(self, target: Any, guider: sparke.Guider, **options: Any) -> Any:
        flaw, prompt_embeds = self.flaw, options["prompt_embeds"]

        @functools.wraps(target)
        def sampler(model: Any, n: int = 3) -> Iterator[Tensor]:
            shape = torch.Size((n, 2))
            cond = None if flaw == "no prompts" else prompt_embeds
            run = Run(shape, torch.device("cpu"), torch.float32, cond)
            if flaw == "wrong shape":
                run = replace(run, shape=torch.Size((1, 2)))
            begun: list[bool] = []

            def clean(x: Tensor, sigma: float) -> Tensor:
                if not begun or flaw == "begins often":
                    guider.begin(run)
                    begun.append(True)
                denoised = type(model).clean(model, x, sigma)
                step = Step(SIGMAS.index(sigma), sigma, SIGMAS[SIGMAS.index(sigma) + 1], 5)
                state = State(x, denoised, step, cond, evaluate=evaluation(x, sigma))
                if flaw == "draws":
                    torch.randn(1)
                if flaw == "rising":
                    state = replace(state, step=replace(step, sigma=1 / sigma, sigma_next=0.0))
                moved = guider(state)
                gain = {"reversed": -1.0, "half": 0.5, "much": 2.0}.get(flaw, 1.0)
                out: Tensor = denoised + gain * moved
                return out

            def evaluation(x: Tensor, sigma: float) -> Any:
                if flaw == "detached":
                    return lambda z: type(model).clean(model, z, sigma).detach()
                if flaw == "another":
                    return lambda z: type(model).clean(model, z, sigma) + 1
                return lambda z: type(model).clean(model, z, sigma)

            if flaw == "unlike":
                torch.manual_seed(1)
            model.clean = clean  # patched for the run, and given back
            try:
                x = torch.zeros(n, 2)
                for x in target(model, n):
                    if flaw == "finishes each":
                        guider.finish(x)
                    yield x
            except RuntimeError:
                if flaw != "swallows":
                    raise
            else:
                if flaw != "never finishes":
                    guider.finish(x + 1 if flaw == "finishes others" else x)
            finally:
                if flaw == "finishes anyway":
                    guider.finish(x)
                if flaw != "leaves its patch":
                    del model.clean
            if flaw == "finishes twice":
                guider.finish(x)

        wrapped: Any = sampler
        if flaw == "another kind":
            wrapped = lambda model, n=3: sampler(model, n)  # noqa: E731
        if flaw == "another signature":
            wrapped = lambda model, *rest: (yield from sampler(model, *rest))  # noqa: E731
        if flaw != "no attributes":
            wrapped.guider, wrapped.memory = guider, getattr(guider, "memory", None)
        if flaw == "marks the target":
            target.touched = len
        return wrapped


def tell(guider: sparke.Guider) -> None:
    for hook in HOOKS.values():
        if having(guider, hook):
            warnings.warn(f"{hook.__name__} is not called", GuidanceWarning, stacklevel=2)


class Warned(Good):
    """It says which hooks it does not call."""

    def attach(self, target: Any, guider: sparke.Guider, **options: Any) -> Any:
        tell(guider)
        return super().attach(target, guider, **options)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    for thing in (MODEL, sample):
        vars(thing).pop("clean", None)
        vars(thing).pop("touched", None)


def test_the_least_that_conforms_conforms() -> None:
    before = torch.get_rng_state()
    check_backend(Warned(), sample, call, watch=[MODEL])
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_are_called_or_told_of() -> None:
    with pytest.raises(AssertionError, match="on_noise is not called: a GuidanceWarning"):
        check_backend(Good(), sample, call)
    with pytest.raises(AssertionError, match="on_model was promised"):
        check_backend(Warned(), sample, call, hooks=["model"])
    with pytest.raises(ArgumentError, match=r"hooks must be among .*'noise'.*got \['nose'\]"):
        check_backend(Warned(), sample, call, hooks=["nose"])


@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        ("greedy", r"accepts\(None\) must be False, got True"),
        ("another kind", "isgeneratorfunction"),
        ("another signature", "keep the signature"),
        ("no attributes", "attribute `guider`"),
        ("marks the target", "touched of a function is another"),
        ("unlike", "bit for bit"),
        ("draws", "bit for bit|torch's generator"),
        ("begins often", r"begin\(\) must come once"),
        ("never finishes", r"finish\(\) must come once"),
        ("finishes twice", r"finish\(\) must come once"),
        ("finishes each", r"finish\(\) must come once"),
        ("finishes others", "must receive the finished samples"),
        ("finishes anyway", r"finish\(\) must come once"),
        ("wrong shape", r"Run.shape must be that of the samples, \(3, 2\)"),
        ("rising", "first state must have the most noise"),
        ("no prompts", "prompt_embeds given to attach"),
        ("reversed", "must lead there"),
        ("half", "must lead there"),
        ("much", "must lead there"),
        ("detached", "differentiable function of x"),
        ("another", "must be state.denoised"),
        ("leaves its patch", "must leave the host as it was; clean of a Model is another"),
        ("swallows", "RuntimeError in begin of the guider must come through"),
    ],
)
def test_a_backend_with_one_flaw_does_not_conform(
    monkeypatch: pytest.MonkeyPatch, flaw: str, said: str
) -> None:
    monkeypatch.setattr(Good, "flaw", flaw)
    with pytest.raises(AssertionError, match=said):
        check_backend(Warned(), sample, call, watch=[MODEL])


class Late(Warned):
    """It finishes in a ``finally``, where nothing was wrong until somebody left early."""

    def attach(self, target: Any, guider: sparke.Guider, **options: Any) -> Any:
        tell(guider)
        inner = super().attach(target, Quiet(guider), **options)

        @functools.wraps(inner)
        def sampler(*args: Any, **kwargs: Any) -> Iterator[Tensor]:
            x = torch.zeros(3, 2)
            ok = True
            try:
                for x in inner(*args, **kwargs):
                    yield x
            except BaseException as error:
                ok = isinstance(error, GeneratorExit)
                raise
            finally:
                if ok:
                    guider.finish(x)

        wrapped: Any = sampler
        wrapped.guider, wrapped.memory = guider, getattr(guider, "memory", None)
        return wrapped


class Quiet:
    """A guider whose samples somebody else finishes."""

    def __init__(self, guider: sparke.Guider) -> None:
        self.begin, self.call = guider.begin, guider

    def __call__(self, state: State) -> Tensor:
        return self.call(state)

    def finish(self, x: Tensor) -> None:
        pass


def test_a_run_left_early_is_not_finished() -> None:
    with pytest.raises(AssertionError, match="left early must not finish"):
        check_backend(Late(), sample, call)


def test_what_is_no_backend_and_what_is_no_call() -> None:
    with pytest.raises(AssertionError, match=r"no Backend: it lacks accepts\(target\)"):
        check_backend(cast(Any, object()), sample, call)
    with pytest.raises(AssertionError, match="must be True, got False"):
        check_backend(Warned(), len, call)
    with pytest.raises(AssertionError, match="same samples each time"):
        check_backend(Warned(), sample, lambda s: call(s) + next(COUNT))
    with pytest.raises(AssertionError, match=r"return the finished samples \(b, ...\), got list"):
        check_backend(Warned(), sample, lambda s: cast(Any, list(s(MODEL))))
    with pytest.raises(AssertionError, match=r"accepts\(.*Good.attach.*\) must be False, got True"):
        check_backend(Both(), sample, call, refuses=[Good.attach])


COUNT = itertools.count()


class Both(Warned):
    def accepts(self, target: object) -> bool:
        return target in (sample, Good.attach)
