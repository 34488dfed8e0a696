"""Contextualized Vendi score guidance against loops in float64, and for what it is for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from k_diffusion import sampling
from torch import Tensor

import sparke
from sparke.errors import (
    ArgumentError,
    GuidanceWarning,
    MissingPrompts,
    NonFiniteGuidance,
    ShapeError,
    UnknownName,
)
from sparke.guidance.cvsg import CVSG
from sparke.memory import RingMemory
from sparke.memory.reference import ReferenceMemory
from sparke.models.mixture import GaussianMixture
from sparke.protocols import Features, Run, State, Step
from sparke.schedules import Constant
from sparke.scores import Vendi
from sparke.testing import check_guider
from tests.samplers import MIXTURE, PROMPTS, Recorder, run

F64 = torch.float64
STEP = Step(index=0, sigma=3.0, sigma_next=2.0, total=8)
OFF = Step(index=1, sigma=2.5, sigma_next=2.0, total=8)


def rows(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def remembering(x: Tensor, cond: Tensor | None = None) -> RingMemory:
    memory = RingMemory()
    memory.commit(Features(x, cond))
    return memory


def started(
    guider: CVSG, x: Tensor, cond: Tensor | None = None, origin: Tensor | None = None
) -> CVSG:
    guider.begin(Run(x.shape, x.device, x.dtype, cond, sigma_data=1.0, cond_origin=origin))
    return guider


def at(
    x: Tensor, denoised: Tensor, cond: Tensor | None = None, step: Step = STEP, **more: Any
) -> State:
    return State(x, denoised, step, cond, **more)


# --- the push, written out --------------------------------------------------------------------

Kernel = Callable[[list[float], list[float]], float]


def by_angle(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(v * v for v in a)) * math.sqrt(sum(v * v for v in b))
    return sum(v * w for v, w in zip(a, b, strict=True)) / lengths


def gaussian(h: float) -> Kernel:
    def kernel(a: list[float], b: list[float]) -> float:
        return math.exp(-sum((v - w) ** 2 for v, w in zip(a, b, strict=True)) / (2 * h**2))

    return kernel


def vendi(bank: list[list[float]], z: list[float], kernel: Kernel) -> float:
    """exp of the entropy of the eigenvalues of K/n over the bank with z."""
    every = [*bank, z]
    matrix = np.array([[kernel(a, b) for b in every] for a in every]) / len(every)
    return math.exp(-sum(v * math.log(v) for v in np.linalg.eigvalsh(matrix) if v > 1e-14))


def slope(f: Callable[[list[float]], float], z: list[float], h: float = 1e-5) -> list[float]:
    found = []
    for i in range(len(z)):
        ahead, behind = list(z), list(z)
        ahead[i] += h
        behind[i] -= h
        found.append((f(ahead) - f(behind)) / (2 * h))
    return found


def ascent(
    z: list[float],
    made: list[list[float]],
    exemplars: list[list[float]],
    beta: float,
    kernel: Kernel,
) -> list[float]:
    """The gradient of V(M, z) - beta V(E, z), at length 1."""

    def objective(y: list[float]) -> float:
        return vendi(made, y, kernel) - beta * vendi(exemplars, y, kernel)

    found = slope(objective, z)
    length = math.sqrt(sum(v * v for v in found))
    return [v / length for v in found]


def lists(x: Tensor) -> list[list[float]]:
    found: list[list[float]] = x.double().tolist()
    return found


@pytest.mark.parametrize("kernel", ["cosine", "gaussian"])
@pytest.mark.parametrize("beta", [2.0, 0.5, 0.0])
def test_the_published_push_is_the_formula(kernel: str, beta: float) -> None:
    x, denoised = 3 * rows(4, 5, 0, F64), rows(4, 5, 1, F64)
    made, exemplars = rows(6, 5, 2), rows(3, 5, 3)
    wide: dict[str, Any] = {"kernel": "gaussian", "bandwidth": 1.7}
    options = wide if kernel == "gaussian" else {}
    guider = CVSG(Features(exemplars), remembering(made), beta=beta, in_batch=False, **options)
    ours = started(guider, x)(at(x, denoised))
    how = gaussian(1.7) if kernel == "gaussian" else by_angle
    expected = []
    for noisy, z in zip(lists(x), lists(denoised), strict=True):
        length = 0.05 * math.sqrt(sum(v * v for v in noisy)) * 3.0 / (3.0 - 2.0)
        push = ascent(z, lists(made), lists(exemplars), beta, how)
        expected.append([length * v for v in push])
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=F64), rtol=1e-5, atol=1e-5)
    assert not bool(guider(at(x, denoised, step=OFF)).any())


def test_mates_count_as_made() -> None:
    x, denoised = rows(3, 5, 0, F64), rows(3, 5, 1, F64)
    exemplars = rows(3, 5, 3)
    ours = started(CVSG(Features(exemplars)), x)(at(x, denoised))
    expected = []
    for i, (noisy, z) in enumerate(zip(lists(x), lists(denoised), strict=True)):
        mates = [row for j, row in enumerate(lists(denoised)) if j != i]
        length = 0.05 * math.sqrt(sum(v * v for v in noisy)) * 3.0
        expected.append([length * v for v in ascent(z, mates, lists(exemplars), 2.0, by_angle)])
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=F64), rtol=1e-5, atol=1e-5)


def test_the_gentle_push_is_as_long_as_the_noise_that_remains() -> None:
    x, denoised, exemplars = 3 * rows(4, 5, 0, F64), rows(4, 5, 1, F64), rows(3, 5, 3)
    guider = CVSG(Features(exemplars), displaces="denoised", in_batch=False)
    ours = started(guider, x)(at(x, denoised))
    for noisy, z, found in zip(lists(x), lists(denoised), lists(ours), strict=True):
        push = ascent(z, [], lists(exemplars), 2.0, by_angle)
        length = 2.0 * 2.0 * (2.0 / 3.0)  # scale, sigma_next, sigma_next / sigma
        residual = [a - b for a, b in zip(noisy, z, strict=True)]
        moved = [a - length * b for a, b in zip(residual, push, strict=True)]
        kept = math.hypot(*residual) / math.hypot(*moved)
        expected = [a - kept * b for a, b in zip(residual, moved, strict=True)]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert not bool(guider(at(x, denoised, step=Step(7, 0.2, 0.1))).any())


def test_any_score_is_the_objective() -> None:
    """RKE's increment: -log of the mean squared kernel, over what was made and over exemplars."""
    x, denoised = rows(2, 5, 0, F64), rows(2, 5, 1, F64)
    made, exemplars = rows(4, 5, 2), rows(3, 5, 3)
    guider = CVSG(
        Features(exemplars), remembering(made), score="rke", bandwidth=1.7, in_batch=False
    )
    ours = started(guider, x)(at(x, denoised))
    kernel = gaussian(1.7)

    def value(bank: list[list[float]], y: list[float]) -> float:
        return -math.log(sum(kernel(row, y) ** 2 for row in bank) / len(bank))

    for noisy, z, found in zip(lists(x), lists(denoised), lists(ours), strict=True):

        def objective(y: list[float]) -> float:
            return value(lists(made), y) - 2 * value(lists(exemplars), y)

        g = slope(objective, z)
        length = 0.05 * math.hypot(*noisy) * 3.0 / math.hypot(*g)
        assert found == pytest.approx([length * v for v in g], rel=1e-5, abs=1e-5)


def test_captions_of_exemplars_weigh_them() -> None:
    x, denoised, cond = rows(1, 5, 0), rows(1, 5, 1), torch.tensor([[1.0, 0.0]])
    exemplars, captions = rows(2, 5, 3), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    options: dict[str, Any] = {"score": "cond-rke", "bandwidth": 1.7, "cond_bandwidth": 0.1}
    both = started(CVSG(Features(exemplars, captions), **options), x, cond)(at(x, denoised, cond))
    one = CVSG(Features(exemplars[:1], captions[:1]), **options)
    torch.testing.assert_close(both, started(one, x, cond)(at(x, denoised, cond)))


# --- what it reads ----------------------------------------------------------------------------


def test_it_reads_the_prediction_before_guidance() -> None:
    x, denoised, seen = rows(2, 5, 0), rows(2, 5, 1), rows(2, 5, 4)
    exemplars = Features(rows(3, 5, 3))

    def push(reads: str, denoised: Tensor) -> Tensor:
        state = at(x, denoised, conditional=lambda: seen)
        return started(CVSG(exemplars, reads=reads), x)(state)

    assert torch.equal(push("conditional", denoised), push("denoised", seen))
    assert not torch.equal(push("conditional", denoised), push("denoised", denoised))


def test_features_are_compared_and_their_gradient_brought_back() -> None:
    x, denoised, exemplars = rows(2, 5, 0, F64), rows(2, 5, 1, F64), rows(3, 2, 3)
    matrix = rows(5, 2, 4, F64)
    guider = CVSG(Features(exemplars), features=lambda z: z @ matrix.to(z), in_batch=False)
    ours = started(guider, x)(at(x, denoised))
    for noisy, z, found in zip(lists(x), lists(denoised), lists(ours), strict=True):

        def objective(y: list[float]) -> float:
            row = [sum(a * b for a, b in zip(y, column, strict=True)) for column in lists(matrix.T)]
            return -2 * vendi(lists(exemplars), row, by_angle)

        g = slope(objective, z)
        length = 0.05 * math.hypot(*noisy) * 3.0 / math.hypot(*g)
        assert found == pytest.approx([length * v for v in g], rel=1e-4, abs=1e-6)
    guider.finish(x)
    assert isinstance(guider.memory, RingMemory)
    assert torch.equal(guider.memory.features.x, (x @ matrix).float())


def test_the_jacobian_is_that_of_the_denoiser() -> None:
    mixture = GaussianMixture.planar(dtype=F64)
    x, prompts = 3 * rows(4, 2, 0, F64), PROMPTS[:4]
    cond, exemplars = mixture.encode(prompts), Features(rows(3, 2, 2))

    def evaluate(z: Tensor) -> Tensor:
        return mixture(z, STEP.sigma, cond=cond)

    options: dict[str, Any] = {"in_batch": False, "kernel": "gaussian", "bandwidth": 1.7}
    ours = started(CVSG(exemplars, jacobian=True, **options), x, cond)(
        at(x, evaluate(x), cond, evaluate=evaluate)
    )
    for i in range(4):
        one = slice(i, i + 1)
        plain = started(CVSG(exemplars, **options), x[one], cond[one])
        direction = plain(at(x[one], evaluate(x)[one], cond[one]))[0]
        whole = torch.autograd.functional.jacobian(evaluate, x)[i, :, i]
        pulled = whole.T @ direction
        length = 0.05 * x[i].norm() * 3.0
        torch.testing.assert_close(ours[i], length * pulled / pulled.norm())
    with pytest.raises(ArgumentError, match="evaluated again"):
        started(CVSG(exemplars, jacobian=True, **options), x, cond)(at(x, x, cond))


# --- contexts ---------------------------------------------------------------------------------

NORTH, SOUTH = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
SETS = {
    "north": Features(rows(3, 5, 10), NORTH.expand(3, -1) + 0.1 * rows(3, 3, 11)),
    "south": Features(rows(4, 5, 12), SOUTH.expand(4, -1) + 0.1 * rows(4, 3, 13)),
}
BARE = {name: Features(rows.x) for name, rows in SETS.items()}
WANTED = ["south", "north", "south"]
COND = torch.stack([SOUTH, NORTH, SOUTH]) + 0.1 * rows(3, 3, 14)


def by_prompt(cond: Tensor) -> list[str]:
    return ["north" if row[0] > row[1] else "south" for row in cond.tolist()]


@pytest.mark.parametrize(
    ("sets", "context"),
    [
        (SETS, None),
        (BARE, WANTED),
        (BARE, by_prompt),
        (BARE, {"north": NORTH, "south": SOUTH}),
        (SETS, {"north": torch.stack([NORTH, -NORTH]), "south": SOUTH}),
    ],
)
def test_each_sample_goes_by_its_own_context(sets: dict[str, Features], context: Any) -> None:
    x, denoised = rows(3, 5, 0), rows(3, 5, 1)
    guider = CVSG(sets, context=context, in_batch=False)
    ours = started(guider, x, COND)(at(x, denoised, COND))
    for i, name in enumerate(WANTED):
        one = slice(i, i + 1)
        alone = started(CVSG(BARE[name], in_batch=False), x[one], COND[one])
        torch.testing.assert_close(ours[one], alone(at(x[one], denoised[one], COND[one])))


def test_one_name_is_for_all_and_may_change_between_runs() -> None:
    x, denoised = rows(3, 5, 0), rows(3, 5, 1)
    guider = CVSG(SETS, context="north", in_batch=False)
    first = started(guider, x, COND)(at(x, denoised, COND))
    guider.contexts.context = "south"
    second = started(guider, x, COND)(at(x, denoised, COND))
    for found, name in ((first, "north"), (second, "south")):
        alone = started(CVSG(BARE[name], in_batch=False), x, COND)
        torch.testing.assert_close(found, alone(at(x, denoised, COND)))


def test_prompts_are_compared_from_their_origin() -> None:
    """Encoders say much the same of any prompt; what differs decides."""
    far, x = torch.tensor([50.0, 50.0, 50.0]), rows(2, 5, 0)
    told = {"north": far + NORTH, "south": far + SOUTH}
    cond = far + torch.stack([0.1 * NORTH, 3 * SOUTH + NORTH])
    guider = CVSG(BARE, context=told, in_batch=False)
    run_ = Run(x.shape, x.device, x.dtype, cond, cond_origin=far)
    named = {int(i): s for rows_, s in guider.contexts.of(run_) for i in rows_}
    assert named[0] is guider.contexts.sets["north"]
    assert named[1] is guider.contexts.sets["south"]


@pytest.mark.parametrize(
    ("exemplars", "options", "error", "message"),
    [
        ({}, {}, ArgumentError, "no set"),
        (BARE, {}, ArgumentError, "'north' have no prompts"),
        (BARE, {"context": "east"}, UnknownName, "east"),
        (BARE, {"context": ["north", "east"]}, UnknownName, "east"),
        (BARE, {"context": {"east": NORTH}}, UnknownName, "east"),
        (BARE, {"context": {"north": "cold"}}, ShapeError, "context"),
        (BARE, {"context": 3}, ArgumentError, "must be a name"),
        (torch.zeros(3), {}, ShapeError, "exemplars must be"),
        (rows(0, 3, 0), {}, ArgumentError, "exemplars has no rows"),
        (rows(2, 3, 0) * math.nan, {}, ArgumentError, "exemplars must be finite; row 0"),
        ({"a": 3, "b": BARE["north"]}, {"context": "b"}, ShapeError, r"exemplars\['a'\] must be"),
        (RingMemory(), {}, ArgumentError, r"exemplars must be fixed.*ReferenceMemory\(memory"),
        (ReferenceMemory(rows(2, 3, 0), history=RingMemory()), {}, ArgumentError, "history"),
        (rows(2, 3, 0), {"beta": -1}, ArgumentError, "beta"),
        (rows(2, 3, 0), {"scale": math.nan}, ArgumentError, "scale"),
        (rows(2, 3, 0), {"reads": "noisy"}, ArgumentError, "reads"),
        (rows(2, 3, 0), {"displaces": "noise"}, ArgumentError, "displaces"),
        (rows(2, 3, 0), {"nonfinite": "skip"}, ArgumentError, "nonfinite"),
        (rows(2, 3, 0), {"sigma_data": 0}, ArgumentError, "sigma_data"),
        (rows(2, 3, 0), {"memory": 3}, ArgumentError, "is no Memory"),
        (
            rows(2, 3, 0),
            {"scael": 1},
            ArgumentError,
            "CVSG nor its score 'vendi' takes scael.*beta",
        ),
        (rows(2, 3, 0), {"score": "vendy"}, UnknownName, "vendi"),
    ],
)
def test_bad_arguments_are_named(
    exemplars: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CVSG(exemplars, **options)


def test_what_cannot_work_is_said_when_the_run_begins() -> None:
    x = rows(3, 5, 0)
    with pytest.raises(MissingPrompts, match="read off its prompt"):
        started(CVSG(SETS), x)
    with pytest.raises(ArgumentError, match="2 contexts for a batch of 3"):
        started(CVSG(BARE, context=["north", "south"]), x)
    with pytest.raises(UnknownName, match="east"):
        started(CVSG(BARE, context=lambda cond: "east"), x, COND)
    with pytest.raises(ShapeError, match="text encoder"):
        started(CVSG(SETS), x, rows(3, 4, 1))
    with pytest.raises(ShapeError, match="width"):
        started(CVSG(Features(rows(2, 4, 0))), x)
    with pytest.raises(MissingPrompts, match="compares prompts"):
        started(CVSG(Features(rows(2, 5, 0)), score="cond-vendi"), x)


# --- as a guider ------------------------------------------------------------------------------


@pytest.mark.parametrize("displaces", ["latents", "denoised"])
def test_it_is_a_guider(displaces: str) -> None:
    sets = {"a": Features(rows(7, 64, 0), rows(7, 5, 1)), "b": Features(rows(3, 64, 2))}
    context = {"a": rows(2, 5, 3), "b": rows(1, 5, 4)}
    check_guider(CVSG(sets, context=context, displaces=displaces, schedule=Constant()))
    check_guider(CVSG(rows(4, 64, 0), displaces=displaces, schedule=Constant()), cond_width=None)


def test_a_batch_is_its_samples_one_by_one() -> None:
    x, denoised, made = rows(3, 5, 0), rows(3, 5, 1), rows(4, 5, 2)
    options: dict[str, Any] = {"in_batch": False, "score": Vendi(bandwidth=1.7)}
    whole = started(CVSG(SETS, remembering(made, rows(4, 3, 5)), **options), x, COND)
    together = whole(at(x, denoised, COND))
    for i in range(3):
        one = slice(i, i + 1)
        alone = started(CVSG(SETS, remembering(made, rows(4, 3, 5)), **options), x[one], COND[one])
        torch.testing.assert_close(alone(at(x[one], denoised[one], COND[one])), together[one])


def test_a_broken_sample_goes_on_unguided_and_its_mates_as_without_it() -> None:
    x, denoised = rows(3, 5, 0), rows(3, 5, 1)
    denoised[1, 2] = math.nan
    guider = started(CVSG(Features(rows(3, 5, 3))), x)
    with pytest.warns(GuidanceWarning, match="1 of 3"):
        ours = guider(at(x, denoised))
    assert torch.equal(guider(at(x, denoised)), ours)  # and it is warned of once
    assert not bool(ours[1].any())
    others = [0, 2]
    alone = started(CVSG(Features(rows(3, 5, 3))), x[others])
    torch.testing.assert_close(ours[others], alone(at(x[others], denoised[others])))
    loud = started(CVSG(Features(rows(3, 5, 3)), nonfinite="raise"), x)
    with pytest.raises(NonFiniteGuidance):
        loud(at(x, denoised))
    with pytest.warns(GuidanceWarning, match="not kept"):
        guider.finish(denoised)
    assert len(guider.memory) == 2


def test_before_a_run_it_does_nothing() -> None:
    x = rows(2, 5, 0)
    assert not bool(CVSG(Features(rows(3, 5, 3)))(at(x, x)).any())


def test_finished_samples_are_kept_with_their_prompts() -> None:
    x = rows(3, 5, 0)
    guider = started(CVSG(SETS, scale=0), x, COND)
    guider.finish(x)
    assert isinstance(guider.memory, RingMemory)
    assert torch.equal(guider.memory.features.x, x)
    assert guider.memory.features.cond is not None
    assert torch.equal(guider.memory.features.cond, COND)


# --- on samplers ------------------------------------------------------------------------------


def exemplars_of(mixture: GaussianMixture) -> Features:
    return Features(rows(6, 2, 0), mixture.encode(PROMPTS[:6]))


@pytest.mark.parametrize("name", ["sample_euler", "sample_dpmpp_2m", "sample_heun"])
@pytest.mark.parametrize("displaces", ["latents", "denoised"])
def test_zero_strength_is_the_bare_sampler(name: str, displaces: str) -> None:
    sampler = getattr(sampling, name)
    bare = run(sampler, cond_scale=3.0)

    def guided(**options: Any) -> Tensor:
        guider = CVSG(exemplars_of(MIXTURE), displaces=displaces, **options)
        return run(sparke.wrap(sampler, guider=guider), cond_scale=3.0)

    assert torch.equal(guided(scale=0), bare)
    assert not torch.equal(guided(), bare)


def test_an_euler_step_moves_the_latents_by_a_fraction_of_their_norm() -> None:
    """As published: x + scale |x| g/|g|, then the sampler's own step."""
    sigmas = MIXTURE.sigmas(8)[:2]
    x = MIXTURE.sigma_max * torch.randn(len(PROMPTS), 2)
    extra = {"cond": MIXTURE.encode(PROMPTS)}
    guider = CVSG(exemplars_of(MIXTURE), scale=0.06)
    ends = [
        sampler(MIXTURE, x, sigmas, extra_args=extra, disable=True)
        for sampler in (sampling.sample_euler, sparke.wrap(sampling.sample_euler, guider=guider))
    ]
    moved = (ends[1] - ends[0]).norm(dim=1)
    torch.testing.assert_close(moved, 0.06 * x.norm(dim=1), rtol=1e-4, atol=1e-4)


def test_it_costs_an_evaluation_where_it_acts() -> None:
    for cond_scale, calls in ((3.0, 8 + 2), (1.0, 8)):
        model = Recorder()
        guider = CVSG(exemplars_of(MIXTURE))
        run(sparke.wrap(sampling.sample_euler, guider=guider), model, cond_scale=cond_scale)
        assert model.calls == calls  # 8 steps, of which the first and the sixth are guided


def test_by_name() -> None:
    memory, exemplars = RingMemory(), exemplars_of(MIXTURE)
    options: dict[str, Any] = {"exemplars": exemplars, "memory": memory, "beta": 1.5}
    sampler: Any = sparke.wrap(sampling.sample_euler, guider="cvsg", score="rke", **options)
    assert isinstance(sampler.guider, CVSG)
    assert sampler.memory is memory
    assert "beta=1.5" in repr(sampler.guider)
    assert "6 rows" in repr(sampler.guider)
    with pytest.raises(ArgumentError, match="exemplars"):
        sparke.wrap(sampling.sample_euler, guider="cvsg")


# --- does it do what it is for ----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "gaussian", "bandwidth": 2.0},
        {"displaces": "denoised", "scale": 0.5},
        {"score": "rke", "bandwidth": 2.0},
    ],
)
def test_the_contextual_term_pulls_towards_the_exemplars(options: dict[str, Any]) -> None:
    """Samples end nearer to exemplars of one mode than they do unguided, and than at beta 0."""
    prompts = [PROMPTS[0]] * 32
    drawn = run(sampling.sample_euler, prompts=prompts, steps=20)
    there = drawn[(drawn - drawn.mean(0)).norm(dim=1).argmax()]  # a place that few go to
    exemplars = Features(there + 0.2 * rows(5, 2, 3))

    def distance(**more: Any) -> float:
        guider = CVSG(exemplars, in_batch=False, schedule=Constant(lo=0.5), **options, **more)
        x = run(sparke.wrap(sampling.sample_euler, guider=guider), prompts=prompts, steps=20)
        return float((x - there).norm(dim=1).mean())

    unguided = float((drawn - there).norm(dim=1).mean())
    assert distance() < 0.9 * unguided
    assert distance(beta=0.0) == pytest.approx(unguided)
