"""The diversity guider against loops in float64, and through Euler's method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

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
from sparke.guidance import DiversityGuider
from sparke.memory import RingMemory
from sparke.models.mixture import GaussianMixture
from sparke.protocols import Features, Requires, Run, State, Step
from sparke.schedules import Constant, NoiseLevel, RemainingNoise
from tests.float64 import F64, Rows, rows
from tests.guidance.states import STEP, remembering
from tests.samplers import MIXTURE, PROMPTS, Recorder, run

H = 1.7


def started(guider: DiversityGuider, x: Tensor, cond: Tensor | None = None) -> DiversityGuider:
    run_ = Run(x.shape, x.device, x.dtype, cond, sigma_data=1.0)
    guider.begin(run_)
    return guider


def at(x: Tensor, denoised: Tensor, cond: Tensor | None = None, **fields: Any) -> State:
    return State(x, denoised, fields.pop("step", STEP), cond, **fields)


def rke(memory: RingMemory | None = None, **options: Any) -> DiversityGuider:
    """Without rules: a fixed bandwidth and a push of length 1."""
    settings: dict[str, Any] = {
        "bandwidth": H,
        "schedule": Constant(1.0),
        "scale": 1.0,
        "keep_residual": False,
        **options,
    }
    return DiversityGuider("rke", memory, **settings)


# --- the push, written out --------------------------------------------------------------------


def pushed_from(z: list[float], bank: Rows, weights: list[float], h: float) -> list[float]:
    """a m / |m|: away from the bank's attention-weighted mean, as long as it is crowded there."""
    squared = []
    for row, weight in zip(bank, weights, strict=True):
        distance2 = sum((a - b) ** 2 for a, b in zip(z, row, strict=True))
        kernel = math.exp(-distance2 / (2 * h**2))
        squared.append(weight * kernel**2)
    mass = sum(squared)
    mean = [
        sum(s * row[i] for s, row in zip(squared, bank, strict=True)) / mass for i in range(len(z))
    ]
    away = [a - b for a, b in zip(z, mean, strict=True)]
    length = math.sqrt(sum(v * v for v in away))
    crowding = 2 * mass / (1 + 2 * mass)
    return [crowding * v / length for v in away]


def at_most_one(v: list[float]) -> list[float]:
    length = math.sqrt(sum(a * a for a in v))
    return [a / max(length, 1.0) for a in v]


def prompt_weight(p: list[float], t: list[float], s: float = 0.35) -> float:
    def unit(u: list[float]) -> list[float]:
        return [a / math.sqrt(sum(b * b for b in u)) for a in u]

    distance2 = sum((a - b) ** 2 for a, b in zip(unit(p), unit(t), strict=True))
    return math.exp(-distance2 / (2 * s**2)) ** 2


def close(ours: Tensor, expected: Any, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(
        ours.double(), torch.as_tensor(expected, dtype=F64), rtol=tolerance, atol=tolerance
    )


def test_the_push_from_memory_is_the_formula() -> None:
    x, denoised, bank = rows(4, 3, 0), rows(4, 3, 1), rows(6, 3, 2, torch.float32)
    guider = started(rke(remembering(bank), scale=0.7, schedule=NoiseLevel(), in_batch=False), x)
    expected = [
        [0.7 * 3.0 * v for v in pushed_from(z, bank.tolist(), [1.0] * 6, H)]
        for z in denoised.tolist()
    ]
    ours = guider(at(x, denoised))
    assert ours.dtype == F64
    close(ours, expected)


def test_the_push_from_batch_mates_is_the_formula() -> None:
    x, denoised = rows(4, 3, 0), rows(4, 3, 1)
    ours = started(rke(), x)(at(x, denoised))
    expected = []
    for i, z in enumerate(denoised.tolist()):
        mates = [row for j, row in enumerate(denoised.tolist()) if j != i]
        expected.append(pushed_from(z, mates, [1.0] * 3, H))
    close(ours, expected)


def test_two_banks_add_up_to_at_most_one() -> None:
    x, denoised, bank = rows(4, 3, 0), 0.3 * rows(4, 3, 1), rows(6, 3, 2, torch.float32)
    denoised[3] += 3
    sums, expected = [], []
    for i, z in enumerate(denoised.tolist()):
        mates = [row for j, row in enumerate(denoised.tolist()) if j != i]
        both = zip(
            pushed_from(z, bank.tolist(), [1.0] * 6, H),
            pushed_from(z, mates, [1.0] * 3, H),
            strict=True,
        )
        sums.append([a + b for a, b in both])
        expected.append(at_most_one(sums[-1]))
    lengths = torch.tensor(sums).norm(dim=1)
    assert float(lengths.min()) < 1 < float(lengths.max())
    close(started(rke(remembering(bank)), x)(at(x, denoised)), expected)


def test_prompts_weigh_rows_and_mates() -> None:
    x, denoised, bank = rows(4, 3, 0), rows(4, 3, 1), rows(6, 3, 2, torch.float32)
    cond = torch.nn.functional.normalize(rows(4, 2, 3, torch.float32), dim=1)
    kept = torch.nn.functional.normalize(rows(6, 2, 4, torch.float32), dim=1)
    guider = DiversityGuider(
        "cond-rke",
        remembering(bank, kept),
        bandwidth=H,
        schedule=Constant(1.0),
        scale=1.0,
        keep_residual=False,
    )
    ours = started(guider, x, cond)(at(x, denoised, cond))
    expected = []
    for i, (z, p) in enumerate(zip(denoised.tolist(), cond.tolist(), strict=True)):
        others = [j for j in range(4) if j != i]
        from_memory = pushed_from(z, bank.tolist(), [prompt_weight(p, t) for t in kept.tolist()], H)
        from_mates = pushed_from(
            z,
            [denoised[j].tolist() for j in others],
            [prompt_weight(p, cond[j].tolist()) for j in others],
            H,
        )
        both = [a + b for a, b in zip(from_memory, from_mates, strict=True)]
        expected.append(at_most_one(both))
    close(ours, expected, 1e-5)


def test_a_raw_direction_is_the_gradient() -> None:
    x, denoised, bank = rows(4, 3, 0), rows(4, 3, 1), rows(6, 3, 2, torch.float32)
    guider = rke(
        remembering(bank), direction="raw", scale=0.5, schedule=Constant(0.8), in_batch=False
    )
    ours = started(guider, x)(at(x, denoised))
    leaf = denoised.clone().requires_grad_()
    kernel = torch.stack(
        [
            torch.stack([torch.exp(-(z - y.double()).square().sum() / (2 * H**2)) for y in bank])
            for z in leaf
        ]
    )
    (gradient,) = torch.autograd.grad((-kernel.square().mean(1).log()).sum(), leaf)
    close(ours, (0.5 * 0.8) ** 2 * gradient)


def test_without_its_gate_a_push_has_full_length_however_far() -> None:
    x, denoised, bank = rows(4, 3, 0), rows(4, 3, 1) + 40, rows(6, 3, 2, torch.float32)
    state = at(x, denoised)
    options: dict[str, Any] = {"memory": remembering(bank), "in_batch": False}
    gated = started(rke(**options), x)(state)
    free = started(rke(**options, gate=False), x)(state)
    assert float(gated.norm(dim=1).max()) < 1e-12
    torch.testing.assert_close(free.norm(dim=1), torch.ones(4, dtype=F64))


def test_by_default_the_push_is_no_larger_than_the_noise_and_none_at_low_noise() -> None:
    x, denoised, cond = rows(8, 2, 0), rows(8, 2, 1), rows(1, 5, 3, torch.float32).expand(8, -1)
    guider = started(DiversityGuider(sigma_data=1.0, keep_residual=False), x, cond)
    for sigma in (80.0, 20.0, 5.0):
        step = Step(0, sigma, 0.8 * sigma, 10)
        length = guider(at(x, denoised, cond, step=step)).norm(dim=1)
        assert 0 < float(length.max()) <= 2 * sigma
    assert not bool(guider(at(x, denoised, cond, step=Step(8, 0.05, 0.04, 10))).any())
    assert not bool(guider(at(x, denoised, cond, step=Step(9, 5.0, 0.0, 10))).any())


# --- what it reads ----------------------------------------------------------------------------


def test_it_reads_what_it_is_told_to() -> None:
    x, denoised, conditional = rows(4, 3, 0), rows(4, 3, 1), rows(4, 3, 5)
    bank = rows(6, 3, 2, torch.float32)
    for reads, read in (("denoised", denoised), ("conditional", conditional), ("noisy", x)):
        guider = started(rke(remembering(bank), reads=reads, in_batch=False), x)
        ours = guider(at(x, denoised, conditional=lambda: conditional))
        close(ours, [pushed_from(z, bank.tolist(), [1.0] * 6, H) for z in read.tolist()])


def test_without_a_conditional_prediction_it_reads_the_denoised() -> None:
    x, denoised, bank = rows(4, 3, 0), rows(4, 3, 1), rows(6, 3, 2, torch.float32)
    guider = started(rke(remembering(bank), reads="conditional", in_batch=False), x)
    close(
        guider(at(x, denoised)),
        [pushed_from(z, bank.tolist(), [1.0] * 6, H) for z in denoised.tolist()],
    )


@pytest.mark.parametrize(("reads", "calls"), [("denoised", 8), ("noisy", 8), ("conditional", 16)])
def test_reading_the_conditional_prediction_costs_an_evaluation(reads: str, calls: int) -> None:
    model = Recorder()
    guider = DiversityGuider(reads=reads, schedule=NoiseLevel(), cfg_interval=None)
    run(sparke.wrap(sampling.sample_euler, guider=guider), model, cond_scale=3.0)
    assert model.calls == calls


def test_features_are_compared_and_their_gradient_brought_back() -> None:
    x, denoised, bank = rows(4, 3, 0), rows(4, 3, 1), rows(6, 2, 2, torch.float32)
    matrix = rows(3, 2, 6)
    guider = rke(
        remembering(bank),
        features=lambda z: z.flatten(1) @ matrix.to(z),
        in_batch=False,
        direction="raw",
    )
    ours = started(guider, x)(at(x, denoised))
    expected = []
    for z in (denoised @ matrix).tolist():
        squared = [
            math.exp(-sum((a - b) ** 2 for a, b in zip(z, y, strict=True)) / H**2)
            for y in bank.tolist()
        ]
        mean = [
            sum(s * y[i] for s, y in zip(squared, bank.tolist(), strict=True)) / sum(squared)
            for i in range(2)
        ]
        gradient = [2 / H**2 * (a - b) for a, b in zip(z, mean, strict=True)]
        expected.append(
            [sum(float(matrix[j, i]) * gradient[i] for i in range(2)) for j in range(3)]
        )
    close(ours, expected)


def test_features_are_what_memory_keeps() -> None:
    guider = rke(features=lambda z: z.flatten(1)[:, :1] * 2)
    x = rows(4, 3, 0, torch.float32)
    started(guider, x).finish(x)
    assert isinstance(guider.memory, RingMemory)
    assert torch.equal(guider.memory.features.x, 2 * x[:, :1])


@pytest.mark.parametrize("wrong", [lambda z: z.flatten(), lambda z: z[:2].flatten(1)])
def test_features_of_another_shape_are_an_error(wrong: Callable[[Tensor], Tensor]) -> None:
    x = rows(4, 3, 0)
    with pytest.raises(ShapeError, match="features must return"):
        started(rke(features=wrong), x)(at(x, x))


def test_the_jacobian_is_that_of_the_denoiser() -> None:
    mixture = GaussianMixture.planar(dtype=F64)
    x, prompts = 3 * rows(4, 2, 0), PROMPTS[:4]
    cond, bank = mixture.encode(prompts), rows(6, 2, 2, torch.float32)

    def evaluate(z: Tensor) -> Tensor:
        return mixture(z, STEP.sigma, cond=cond)

    options: dict[str, Any] = {"direction": "raw", "in_batch": False}
    state = at(x, evaluate(x), evaluate=evaluate)
    plain = started(rke(remembering(bank), **options), x)(state)
    ours = started(rke(remembering(bank), jacobian=True, **options), x)(state)
    whole = torch.autograd.functional.jacobian(evaluate, x)
    expected = torch.stack([whole[i, :, i].T @ plain[i] for i in range(4)])
    assert not torch.allclose(plain, expected, atol=1e-2)
    torch.testing.assert_close(ours, expected)


def test_the_jacobian_needs_a_second_evaluation() -> None:
    x = rows(4, 3, 0)
    with pytest.raises(ArgumentError, match="evaluated again"):
        started(rke(jacobian=True), x)(at(x, x))
    with pytest.raises(ArgumentError, match="reads="):
        rke(jacobian=True, reads="noisy")


def test_keeping_the_residual_keeps_its_length_and_the_direction() -> None:
    x, denoised, bank = 3 * rows(4, 3, 0), rows(4, 3, 1), rows(6, 3, 2, torch.float32)
    options: dict[str, Any] = {"scale": 2.0, "in_batch": False}
    state = at(x, denoised)
    plain = started(rke(remembering(bank), **options), x)(state)
    ours = started(rke(remembering(bank), keep_residual=True, **options), x)(state)
    before, after = x - denoised, x - (denoised + ours)
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    along = torch.nn.functional.cosine_similarity(after, before - plain)
    torch.testing.assert_close(along, torch.ones(4, dtype=F64))
    assert float((before - after).norm(dim=1).min()) > 0.01


def test_a_score_without_a_closed_form_is_differentiated() -> None:
    class Plain:
        requires = Requires()

        def __call__(self, query: Features, bank: Features) -> Tensor:
            apart = (query.x[:, None] - bank.x.to(query.x)[None]).square().sum(-1)
            return -torch.exp(-apart / H**2).mean(1).log()

    x, denoised, bank = rows(4, 3, 0), rows(4, 3, 1), rows(6, 3, 2, torch.float32)
    options: dict[str, Any] = {
        "direction": "raw",
        "schedule": Constant(1.0),
        "scale": 1.0,
        "in_batch": False,
        "keep_residual": False,
    }
    ours = started(DiversityGuider(Plain(), remembering(bank), **options), x)
    with torch.no_grad():
        found = ours(at(x, denoised))
    torch.testing.assert_close(
        found, started(rke(remembering(bank), **options), x)(at(x, denoised))
    )


def test_constants_are_read_off_memory_once_a_run_and_never_off_mates() -> None:
    banks: list[Features] = []

    class Learned:
        requires = Requires()

        def __init__(self, towards: float) -> None:
            self.towards = towards

        def __call__(self, query: Features, bank: Features) -> Tensor:
            return self.towards * query.x.sum(1)

        def calibrate(self, bank: Features) -> Learned:
            banks.append(bank)
            return Learned(-1.0)

    x, bank = rows(4, 3, 0, torch.float32), rows(6, 3, 2, torch.float32)
    options: dict[str, Any] = {"schedule": Constant(), "scale": 1.0, "keep_residual": False}
    from_mates = started(DiversityGuider(Learned(1.0), **options), x)
    assert bool((from_mates(at(x, x)) > 0).all())
    assert banks == []
    options = {**options, "in_batch": False}
    from_memory = started(DiversityGuider(Learned(1.0), remembering(bank), **options), x)
    for _ in range(3):
        assert bool((from_memory(at(x, x)) < 0).all())
    (read,) = banks
    assert torch.equal(read.x, bank)


@pytest.mark.parametrize("score", ["rke", "vendi", "cond-rke", "cond-vendi"])
@pytest.mark.parametrize("in_batch", [True, False])
def test_every_score_pushes_apart(score: str, in_batch: bool) -> None:
    x, cond = rows(6, 3, 0, torch.float32), rows(1, 5, 3, torch.float32).expand(6, -1)
    denoised = 0.15 * rows(6, 3, 1, torch.float32)
    # Memory around one point: away from it is outward.
    memory = None if in_batch else remembering(0.1 * rows(20, 3, 2), cond[:1].expand(20, -1))
    guider = DiversityGuider(
        score, memory, schedule=Constant(0.05), scale=1.0, in_batch=in_batch, keep_residual=False
    )
    delta = started(guider, x, cond)(at(x, denoised, cond))
    moved = denoised + delta
    if in_batch:
        assert float(torch.pdist(moved).mean()) > float(torch.pdist(denoised).mean())
    else:
        assert float(moved.norm(dim=1).mean()) > float(denoised.norm(dim=1).mean()) + 0.01


# --- laws -------------------------------------------------------------------------------------


def remembered(seed: int = 9, count: int = 3) -> tuple[Tensor, Tensor]:
    prompts = PROMPTS * count
    x = MIXTURE.sample(prompts, torch.Generator().manual_seed(seed))
    return x, MIXTURE.encode(prompts)


def a_state(n: int = 8, sigma: float = 4.0) -> State:
    x = sigma * rows(n, 2, 0, torch.float32) + MIXTURE.means[:n].mean(1)
    cond = MIXTURE.encode(PROMPTS[:n])
    step = Step(3, sigma, 0.8 * sigma, 10)
    return State(x, MIXTURE(x, sigma, cond=cond), step, cond)


def pushed(guider: DiversityGuider, state: State) -> Tensor:
    assert state.cond is not None
    return started(guider, state.x, state.cond)(state)


def test_a_batch_against_fixed_memory_is_its_rows_one_by_one() -> None:
    memory, state = remembering(*remembered()), a_state()
    together = pushed(DiversityGuider(memory=memory, in_batch=False), state)
    assert float(together.norm(dim=1).min()) > 0
    for i in range(8):
        assert state.cond is not None
        row = slice(i, i + 1)
        alone = replace(state, x=state.x[row], denoised=state.denoised[row], cond=state.cond[row])
        ours = pushed(DiversityGuider(memory=memory, in_batch=False), alone)
        torch.testing.assert_close(ours, together[row], rtol=1e-4, atol=1e-5)


def test_the_order_of_memory_does_not_matter() -> None:
    (x, cond), state = remembered(), a_state()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    ours = pushed(DiversityGuider(memory=remembering(x, cond)), state)
    assert float(ours.norm(dim=1).min()) > 0
    other = pushed(DiversityGuider(memory=remembering(x[order], cond[order])), state)
    torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-5)


def test_the_order_of_the_batch_does_not_matter() -> None:
    state, order = a_state(), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert state.cond is not None
    ours = pushed(DiversityGuider(memory=remembering(*remembered())), state)
    mixed = replace(state, x=state.x[order], denoised=state.denoised[order], cond=state.cond[order])
    other = pushed(DiversityGuider(memory=remembering(*remembered())), mixed)
    torch.testing.assert_close(other, ours[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["cond-rke", "vendi"])
def test_between_begin_and_finish_it_is_a_pure_function(score: str) -> None:
    memory, state = remembering(*remembered()), a_state()
    guider = started(DiversityGuider(score, memory), state.x, state.cond)
    first = guider(state)
    other = replace(state, denoised=state.denoised + 1, step=Step(1, 20.0, 15.0, 10))
    guider(other)
    # Memory that grows meanwhile belongs to the next run.
    memory.commit(Features(*remembered(1)))
    guider.on_guidance_scale(state.step, 3.0)
    assert torch.equal(guider(state), first)


def test_the_state_is_left_as_it_was() -> None:
    state = a_state()
    x, denoised = state.x.clone(), state.denoised.clone()
    for options in ({}, {"keep_residual": True}, {"features": lambda z: z.flatten(1)}):
        delta = pushed(DiversityGuider(memory=remembering(*remembered()), **options), state)
        delta.add_(1)
        assert torch.equal(state.x, x)
        assert torch.equal(state.denoised, denoised)


@pytest.mark.parametrize("keep_residual", [False, True])
def test_the_displacement_is_a_constant_under_differentiation(keep_residual: bool) -> None:
    state = a_state()
    leaf = state.denoised.clone().requires_grad_()
    guider = DiversityGuider(memory=remembering(*remembered()), keep_residual=keep_residual)
    assert not pushed(guider, replace(state, denoised=leaf)).requires_grad


def test_two_runs_with_the_same_history_are_the_same() -> None:
    made = []
    for _ in range(2):
        wrapped = sparke.wrap(sampling.sample_euler)
        made.append([run(wrapped, seed=seed, cond_scale=3.0) for seed in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_zeros_before_it_has_anything_to_repel() -> None:
    state = a_state()
    guider = DiversityGuider(in_batch=False)
    assert not bool(pushed(guider, state).any())
    assert guider.on_guidance_scale(state.step, 3.0) == 3.0
    alone = a_state(1)
    assert not bool(pushed(DiversityGuider(), alone).any())
    never_begun = DiversityGuider(memory=remembering(*remembered()))
    assert not bool(never_begun(state).any())


def test_guidance_scales_inside_and_outside_the_interval() -> None:
    state = a_state()
    guider = started(DiversityGuider(cfg_interval=(0.5, 3.0)), state.x, state.cond)
    levels = {0.4: 1.0, 0.5: 1.0, 0.51: 6.0, 3.0: 6.0, 3.1: 1.0}
    for sigma, expected in levels.items():
        assert guider.on_guidance_scale(Step(0, sigma, 0.1), 6.0) == expected


# --- the published update ---------------------------------------------------------------------


def published_run(
    noise: Tensor,
    prompt: str,
    bank: list[tuple[Tensor, Tensor]],
    mixture: GaussianMixture,
    eta: float,
    every: int,
) -> Tensor:
    """Euler's method; after every n-th step x moves by eta |x| along the published direction.

    One sample at a time. bank: finished samples with their prompts' embeddings.
    """
    cond, sigmas = mixture.encode([prompt]), mixture.sigmas(30)
    x = noise * sigmas[0]
    for i in range(30):
        before = x
        denoised = mixture(x[None], sigmas[i], cond=cond)[0]
        x = x + (sigmas[i + 1] - sigmas[i]) * (x - denoised) / sigmas[i]
        if i % every or not bank:
            continue
        leaf = before.clone().requires_grad_()
        unit = leaf / leaf.norm()
        total = torch.zeros((), dtype=F64)
        for row, prompted in bank:
            image = torch.exp(-(unit - row / row.norm()).square().sum() / (2 * 0.8**2))
            text = torch.exp(
                -(cond[0] / cond[0].norm() - prompted / prompted.norm()).square().sum()
                / (2 * 0.35**2)
            )
            total = total + (image * text) ** 2
        # IRKE grows with the sum; its steepest descent, at the length of x.
        (gradient,) = torch.autograd.grad(total, leaf)
        x = x - eta * before.norm() * gradient / gradient.norm()
    return x


@pytest.mark.parametrize(("eta", "every"), [(0.03, 10), (0.1, 3)])
def test_the_published_update_over_euler_is_what_its_authors_run(eta: float, every: int) -> None:
    mixture = GaussianMixture.planar(dtype=F64)
    guider = DiversityGuider.published(eta=eta, every=every)
    wrapped = sparke.wrap(sampling.sample_euler, guider=guider)
    bank: list[tuple[Tensor, Tensor]] = []
    for seed in range(6):
        prompt = PROMPTS[seed % 2]
        noise = rows(1, 2, seed)
        cond = mixture.encode([prompt])
        expected = published_run(noise[0], prompt, bank, mixture, eta, every)
        ours = wrapped(
            mixture,
            noise * mixture.sigma_max,
            mixture.sigmas(30),
            extra_args={"cond": cond, "cond_scale": 1.0},
            disable=True,
        )
        torch.testing.assert_close(ours[0], expected, rtol=1e-4, atol=1e-4)
        if seed:
            bare = sampling.sample_euler(
                mixture,
                noise * mixture.sigma_max,
                mixture.sigmas(30),
                extra_args={"cond": cond},
                disable=True,
            )
            assert not torch.allclose(ours, bare, atol=1e-3)
        bank.append((ours[0], cond[0]))


def test_the_published_update_keeps_normalised_samples_and_leaves_guidance_scales_alone() -> None:
    guider, model = DiversityGuider.published(), Recorder()
    wrapped = sparke.wrap(sampling.sample_euler, guider=guider)
    x = run(wrapped, model, cond_scale=3.0)
    run(wrapped, model, cond_scale=3.0, seed=1)
    assert {options["cond_scale"] for options in model.options} == {3.0}
    assert isinstance(guider.memory, RingMemory)
    close(guider.memory.features.x[:8], [[v / row.norm() for v in row] for row in x])


def test_a_displacement_of_latents_is_that_of_the_next_ones() -> None:
    x, denoised, bank = rows(4, 3, 0), rows(4, 3, 1), rows(6, 3, 2, torch.float32)
    guider = rke(remembering(bank), displaces="latents", scale=0.1, gate=False, in_batch=False)
    delta = started(guider, x)(at(x, denoised))

    def euler(d: Tensor) -> Tensor:
        return x + (STEP.sigma_next - STEP.sigma) * (x - d) / STEP.sigma

    moved = euler(denoised + delta) - euler(denoised)
    torch.testing.assert_close(moved.norm(dim=1), 0.1 * x.norm(dim=1))


# --- numbers that are none --------------------------------------------------------------------


def broken_row(sigma_below: float, value: float = math.nan) -> Callable[..., Tensor]:
    """A denoiser that fails on sample 1 below a noise level."""

    def model(x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        out = MIXTURE(x, sigma, **options)
        if float(sigma.reshape(-1)[0]) < sigma_below:
            out = out.clone()
            out[1] = value
        return out

    return model


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_breaks_goes_on_unguided_and_the_others_guided(
    in_batch: bool, value: float
) -> None:
    memory, state = remembering(*remembered()), a_state()
    denoised = state.denoised.clone()
    denoised[1] = value
    guider = DiversityGuider(memory=memory, in_batch=in_batch)
    started(guider, state.x, state.cond)
    with pytest.warns(GuidanceWarning, match=r"step 3 \(sigma 4\) for 1 of 8"):
        delta = guider(replace(state, denoised=denoised))
    assert not bool(delta[1].any())
    rest = [i for i in range(8) if i != 1]
    assert state.cond is not None
    without = replace(state, x=state.x[rest], denoised=state.denoised[rest], cond=state.cond[rest])
    expected = pushed(DiversityGuider(memory=memory, in_batch=in_batch), without)
    torch.testing.assert_close(delta[rest], expected, rtol=1e-4, atol=1e-5)


def test_the_warning_is_raised_through_a_sampler_and_names_the_step() -> None:
    wrapped = sparke.wrap(sampling.sample_euler, in_batch=False)
    run(wrapped)
    with pytest.warns(GuidanceWarning) as caught:
        x = run(wrapped, broken_row(20.0), seed=1)
    messages = [str(w.message) for w in caught]
    # sigma 80, 36.1, 14.8: the third evaluation is the first below 20.
    assert "step 2 (sigma" in messages[0]
    assert "1 of 8 samples" in messages[0]
    assert "1 of 8 finished samples" in messages[-1]
    assert not bool(torch.isfinite(x[1]).any())
    kept = wrapped.memory.features
    assert torch.equal(kept.x[8:], x[[0, 2, 3, 4, 5, 6, 7]])
    assert torch.equal(kept.cond[8:], MIXTURE.encode(PROMPTS)[[0, 2, 3, 4, 5, 6, 7]])


def test_or_it_stops_there() -> None:
    guider = DiversityGuider(nonfinite="raise", in_batch=False)
    wrapped = sparke.wrap(sampling.sample_euler, guider=guider)
    run(wrapped)
    model = Recorder(broken_row(20.0))
    with pytest.raises(NonFiniteGuidance, match="step 2"):
        run(wrapped, model, seed=1)
    assert model.calls == 3
    assert len(guider.memory) == 8
    run(wrapped, seed=2)
    assert len(guider.memory) == 16


def test_features_that_break_do_not_break_the_sample() -> None:
    def features(z: Tensor) -> Tensor:
        out = z.flatten(1) * 1.0
        return torch.where(out[:, :1] > 0, torch.full_like(out, torch.nan), out)

    state = a_state()
    some = state.denoised[:, 0] > 0
    assert 0 < int(some.sum()) < 8
    memory = remembering(*remembered())
    guider = started(
        DiversityGuider(memory=memory, features=features, in_batch=False), state.x, state.cond
    )
    with pytest.warns(GuidanceWarning, match=f"{int(some.sum())} of 8"):
        delta = guider(state)
    expected = pushed(DiversityGuider(memory=memory, in_batch=False), state)
    assert not bool(delta[some].any())
    torch.testing.assert_close(delta[~some], expected[~some], rtol=1e-4, atol=1e-5)


def test_finished_samples_that_are_not_finite_are_not_kept() -> None:
    guider, x = rke(), rows(4, 3, 0, torch.float32)
    started(guider, x)
    x[2, 1] = torch.inf
    with pytest.warns(GuidanceWarning, match="1 of 4"):
        guider.finish(x)
    assert isinstance(guider.memory, RingMemory)
    assert torch.equal(guider.memory.features.x, x[[0, 1, 3]])


def test_coinciding_samples_stay_finite() -> None:
    x = torch.ones(4, 3)
    memory = remembering(torch.ones(5, 3))
    for options in ({}, {"keep_residual": True}, {"direction": "raw"}, {"jacobian": True}):
        guider = started(DiversityGuider("rke", memory, schedule=Constant(), **options), x)
        delta = guider(at(x, x.clone(), evaluate=lambda z: z * 1.0))
        assert bool(torch.isfinite(delta).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_the_displacement_has_the_dtype_of_what_it_displaces(dtype: torch.dtype) -> None:
    state = a_state()
    memory = remembering(*remembered())
    expected = pushed(DiversityGuider(memory=memory), state)
    given = replace(state, x=state.x.to(dtype), denoised=state.denoised.to(dtype))
    ours = pushed(DiversityGuider(memory=memory), given)
    assert ours.dtype == dtype
    tolerance = 0.05 if dtype in (torch.float16, torch.bfloat16) else 1e-4
    torch.testing.assert_close(ours.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options",
    [{}, {"jacobian": True}, {"reads": "conditional"}, {"features": lambda z: 2 * z}],
    ids=["default", "jacobian", "conditional", "features"],
)
@pytest.mark.parametrize("score", ["cond-rke", "cond-vendi"])
def test_inference_mode_changes_nothing(score: str, options: dict[str, Any]) -> None:
    made = []
    for mode in (torch.no_grad, torch.inference_mode):
        guider = DiversityGuider(score, remembering(*remembered()), **options)
        with mode():
            made.append(run(sparke.wrap(sampling.sample_euler, guider=guider), cond_scale=3.0))
    assert bool(torch.isfinite(made[0]).all())
    torch.testing.assert_close(made[0], made[1].clone(), rtol=1e-5, atol=1e-5)


# --- what it refuses --------------------------------------------------------------------------


def begun(guider: DiversityGuider, width: int = 2, b: int = 4, c: int | None = 32) -> None:
    cond = None if c is None else torch.randn(b, c)
    guider.begin(Run(torch.Size([b, width]), torch.device("cpu"), torch.float32, cond))


def test_a_run_that_does_not_fit_is_refused_when_it_begins() -> None:
    memory = remembering(*remembered())
    with pytest.raises(ShapeError, match="width 2"):
        begun(DiversityGuider(memory=memory), width=3)
    with pytest.raises(ShapeError, match="text encoder"):
        begun(DiversityGuider(memory=memory), c=5)
    with pytest.raises(MissingPrompts, match="prompt_embeds"):
        begun(DiversityGuider(), c=None)
    with pytest.raises(MissingPrompts, match="memory holds samples with prompts"):
        begun(DiversityGuider("rke", memory), c=None)
    with pytest.raises(MissingPrompts):
        begun(DiversityGuider(memory=remembering(rows(3, 2, 0))))
    begun(DiversityGuider("rke", remembering(rows(3, 2, 0))))


def test_a_score_may_ask_for_a_batch() -> None:
    class Pairs:
        requires = Requires(batch=3)

        def __call__(self, query: Features, bank: Features) -> Tensor:
            return query.x.sum(1)

    with pytest.raises(ArgumentError, match="at least 3, got 2"):
        begun(DiversityGuider(Pairs()), b=2)
    begun(DiversityGuider(Pairs()), b=3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": -1}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"scale": "much"}, "scale"),
        ({"reads": "latents"}, "reads"),
        ({"direction": "up"}, "direction"),
        ({"displaces": "x"}, "displaces"),
        ({"nonfinite": "ignore"}, "nonfinite"),
        ({"sigma_data": 0}, "sigma_data"),
        ({"cfg_interval": "always"}, "cfg_interval"),
        ({"cfg_interval": (2.0, 1.0)}, "cfg_interval"),
        ({"cfg_interval": (1.0,)}, "cfg_interval"),
        ({"memory": []}, "memory"),
        ({"bandwidth": -1.0}, "bandwidth"),
        ({"bandwidth": 0}, "bandwidth"),
        ({"cond_bandwidth": -1.0}, "cond_bandwidth"),
        ({"bandwith": 1.0}, "bandwith"),
        ({"kernel": "linear"}, "kernel"),
    ],
)
def test_a_forbidden_option_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        DiversityGuider(**options)


def test_an_unknown_score_comes_with_near_matches() -> None:
    with pytest.raises(UnknownName, match="cond-rke"):
        DiversityGuider("cond_rk")


def test_a_schedule_of_ones_own() -> None:
    x, denoised, bank = rows(4, 3, 0), rows(4, 3, 1), rows(6, 3, 2, torch.float32)
    asked: list[Step] = []

    def schedule(step: Step) -> float:
        asked.append(step)
        return 0.25

    one, own = (
        started(rke(remembering(bank), schedule=s, in_batch=False), x)(at(x, denoised))
        for s in (Constant(1.0), schedule)
    )
    torch.testing.assert_close(own, 0.25 * one)
    assert set(asked) == {STEP}
    remaining = started(rke(remembering(bank), schedule=RemainingNoise(), in_batch=False), x)
    torch.testing.assert_close(remaining(at(x, denoised)), STEP.sigma_next * one)


@pytest.mark.parametrize(
    ("given", "told", "handover"), [(None, None, 5.42), (None, 0.5, 0.8), (2.0, 0.5, 3.2)]
)
def test_guidance_is_handed_over_at_a_published_level_where_the_spread_is_unknown(
    given: float | None, told: float | None, handover: float
) -> None:
    guider = DiversityGuider("rke", sigma_data=given)
    guider.begin(Run(torch.Size((2, 3)), torch.device("cpu"), torch.float32, sigma_data=told))
    for sigma, scale in ((handover * 0.99, 7.0), (handover * 1.01, 1.0)):
        assert guider.on_guidance_scale(Step(0, sigma, sigma / 2), 7.0) == scale


def test_the_guidance_scale_is_idle_where_it_is_left_alone() -> None:
    assert DiversityGuider().idle == frozenset()
    assert DiversityGuider(cfg_interval=(0.1, 2.0)).idle == frozenset()
    for unused in (DiversityGuider(cfg_interval=None), DiversityGuider(scale=0.0)):
        assert unused.idle == {"guidance_scale"}
