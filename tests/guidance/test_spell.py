"""SPELL against shields written as loops, its promise, and what it shields from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from k_diffusion import sampling

import sparke
from sparke.errors import (
    ArgumentError,
    GuidanceWarning,
    MissingPrompts,
    NonFiniteGuidance,
    ShapeError,
)
from sparke.guidance.spell import SPELL
from sparke.memory import RingMemory
from sparke.protocols import Features, Selection, State, Step
from sparke.testing import check_guider
from tests import samplers
from tests.float64 import F64, Rows, close, rows
from tests.guidance.states import STEP, pushed, remembering
from tests.oracles import distance
from tests.samplers import MIXTURE, PROMPTS, run

R = 1.7


def state(n: int = 4, d: int = 3, step: Step = STEP) -> State:
    return State(step.sigma * rows(n, d, 0), rows(n, d, 1), step)


def repelled(z: list[float], shields: Rows, r: float, strength: float) -> list[float]:
    total = [0.0] * len(z)
    for y in shields:
        apart = distance(z, y)
        excess = max(r / apart - 1, 0.0)
        total = [t + strength * excess * (a - b) for t, a, b in zip(total, z, y, strict=True)]
    return total


@pytest.mark.parametrize("strength", [1.0, 1.6])
def test_batch_memory_and_protected_rows_all_shield(strength: float) -> None:
    at, bank, protected = state(), rows(6, 3, 2, torch.float32), rows(5, 3, 3)
    guider = SPELL(remembering(bank), radius=R, scale=strength, protected=protected)
    estimates = at.denoised.tolist()
    expected = []
    for i, z in enumerate(estimates):
        mates = [y for j, y in enumerate(estimates) if j != i]
        shields = [*bank.double().tolist(), *mates, *protected.tolist()]
        expected.append(repelled(z, shields, R, strength))
    assert all(any(v) for v in expected)
    close(pushed(guider, at), expected)


def test_each_kind_of_shield_can_be_left_out() -> None:
    at, bank = state(), rows(6, 3, 2, torch.float32)
    estimates = at.denoised.tolist()
    from_mates = [
        repelled(z, [y for j, y in enumerate(estimates) if j != i], R, 1.6)
        for i, z in enumerate(estimates)
    ]
    from_memory = [repelled(z, bank.double().tolist(), R, 1.6) for z in estimates]
    close(pushed(SPELL(radius=R), at), from_mates)
    close(pushed(SPELL(remembering(bank), radius=R, in_batch=False), at), from_memory)
    assert not bool(pushed(SPELL(radius=R, in_batch=False), at).any())


@pytest.mark.parametrize(
    "kind", [lambda x: x, Features, lambda x: Selection(x), lambda x: x[:, None], remembering]
)
def test_a_protected_set_comes_in_many_shapes(kind: Any) -> None:
    at, protected = state(), rows(5, 3, 3, torch.float32)
    ours = pushed(SPELL(radius=R, protected=kind(protected), in_batch=False), at)
    close(ours, [repelled(z, protected.double().tolist(), R, 1.6) for z in at.denoised.tolist()])
    assert bool(ours.any())


def test_a_protected_selection_may_weigh_its_rows() -> None:
    at, protected = state(), rows(5, 3, 3)
    weight = torch.zeros(4, 5).double()
    weight[:, [0, 3]] = -math.inf
    given_ = Selection(protected, None, weight)
    ours = pushed(SPELL(radius=R, protected=given_, in_batch=False), at)
    kept = protected[[1, 2, 4]].tolist()
    close(ours, [repelled(z, kept, R, 1.6) for z in at.denoised.tolist()])
    with pytest.raises(ShapeError, match="log_weight"):
        pushed(SPELL(radius=R, protected=given_), state(3))


# --- its promise ------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    radius=st.floats(0.01, 50),
    share=st.floats(1e-4, 0.9999),
    strength=st.floats(1.0, 3.0),
    d=st.integers(1, 40),
)
def test_one_row_is_left_at_the_radius_or_farther(
    seed: int, radius: float, share: float, strength: float, d: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    row, ray = (torch.randn(1, d, generator=g, dtype=F64) for _ in range(2))
    estimate = row + share * radius * ray / ray.norm()
    at = State(estimate, estimate, STEP)
    guider = SPELL(radius=radius, scale=strength, protected=row)
    moved = estimate + pushed(guider, at)
    assert float((moved - row).norm()) >= radius * (1 - 1e-9)
    # Outwards along the ray, by no more than the strength asks for.
    depth = radius - float((estimate - row).norm())
    assert float((moved - estimate).norm()) == pytest.approx(strength * depth, rel=1e-6)


def test_an_estimate_outside_all_shields_is_not_touched() -> None:
    at = state()
    far = rows(5, 3, 3, torch.float32) + 100
    delta = pushed(SPELL(remembering(far), radius=R, protected=far, in_batch=False), at)
    assert torch.equal(delta, torch.zeros_like(delta))
    single = state(1)
    assert torch.equal(pushed(SPELL(radius=R), single), torch.zeros(1, 3, dtype=F64))


def test_finished_samples_stay_out_of_the_protected_shield() -> None:
    # Eulers last step lands on the estimate, so the promise is kept to the end.
    heavy = MIXTURE.means[0, MIXTURE.weights[0].argmax()]
    prompts, radius = [PROMPTS[0]] * 24, 1.0
    bare = run(sampling.sample_euler, prompts=prompts, steps=16)
    guider = SPELL(radius=radius, protected=heavy[None], in_batch=False)
    wrapped = sparke.wrap(sampling.sample_euler, guider=guider)
    ours = run(wrapped, prompts=prompts, steps=16)
    assert int(((bare - heavy).norm(dim=1) < radius).sum()) > 8
    assert float((ours - heavy).norm(dim=1).min()) >= radius * (1 - 1e-5)


def test_no_radius_is_a_quarter_of_the_distance_of_independent_samples() -> None:
    at = state(4, 50)
    # Two draws of standard deviation 2 in 50 dimensions are about 20 apart.
    expected = pushed(SPELL(radius=0.25 * 20), at)
    close(pushed(SPELL(), at, sigma_data=2.0), expected)
    close(pushed(SPELL(sigma_data=2.0), at, sigma_data=1.0), expected)
    close(pushed(SPELL(), at, sigma_data=None), pushed(SPELL(radius=2.5), at))


def test_below_its_lowest_sigma_it_is_off() -> None:
    at = state()
    assert not bool(pushed(SPELL(radius=R, lo=2.0), at, sigma_data=1.6).any())
    assert bool(pushed(SPELL(radius=R, lo=2.0), at, sigma_data=1.5).any())


# --- prompts ----------------------------------------------------------------------------------


def test_rows_of_other_prompts_do_not_shield() -> None:
    at, bank = state(), rows(6, 3, 2, torch.float32)
    cond, kept = torch.eye(2)[[0, 1, 1, 0]], torch.eye(2)[[0, 0, 1, 1, 1, 0]]
    estimates, memory = at.denoised.tolist(), bank.double().tolist()
    expected = []
    for i, z in enumerate(estimates):
        mine = [j for j in range(4) if j != i and torch.equal(cond[i], cond[j])]
        rows_ = [y for y, p in zip(memory, kept, strict=True) if torch.equal(p, cond[i])]
        expected.append(repelled(z, [*rows_, *(estimates[j] for j in mine)], R, 1.6))
    close(pushed(SPELL(remembering(bank, kept), radius=R), at, cond=cond), expected)
    everyone = pushed(SPELL(remembering(bank, kept), radius=R, prompt_aware=False), at, cond=cond)
    close(everyone, pushed(SPELL(remembering(bank), radius=R), at))


def test_protected_rows_shield_whatever_the_prompt() -> None:
    at, protected = state(), rows(5, 3, 3, torch.float32)
    bare = pushed(SPELL(radius=R, protected=remembering(protected), in_batch=False), at)
    known = remembering(protected, torch.eye(5))
    ours = pushed(SPELL(radius=R, protected=known, in_batch=False), at, cond=10 * torch.eye(4, 5))
    close(ours, bare)


def test_a_memory_without_prompts_is_read_where_prompts_do_not_count() -> None:
    at, bank, cond = state(), rows(6, 3, 2, torch.float32), torch.eye(4)
    with pytest.raises(MissingPrompts, match="prompt_aware=False"):
        pushed(SPELL(remembering(bank), radius=R), at, cond=cond)
    ours = pushed(SPELL(remembering(bank), radius=R, prompt_aware=False), at, cond=cond)
    close(ours, pushed(SPELL(remembering(bank), radius=R), at))
    with pytest.raises(MissingPrompts, match="this run has none"):
        pushed(SPELL(remembering(bank, torch.eye(6))), at)


# --- what it remembers ------------------------------------------------------------------------


def test_finished_samples_shield_the_next_run() -> None:
    guider, at = SPELL(radius=R, in_batch=False), state(1)
    assert not bool(pushed(guider, at).any())
    finished = at.denoised + 0.1
    guider.finish(finished)
    close(pushed(guider, at), [repelled(at.denoised[0].tolist(), finished.tolist(), R, 1.6)], 1e-6)


def test_memory_grows_by_each_run_and_holds_prompts() -> None:
    wrapped: Any = sparke.wrap(sampling.sample_euler, guider=SPELL())
    x = run(wrapped)
    run(wrapped, seed=1)
    kept = wrapped.memory.features
    assert len(kept) == 16
    assert torch.equal(kept.x[:8], x)
    assert torch.equal(kept.cond[:8], MIXTURE.encode(PROMPTS))


def test_memory_that_grows_meanwhile_belongs_to_the_next_run() -> None:
    memory, at = remembering(rows(6, 3, 2)), state()
    guider = SPELL(memory, radius=R)
    first = pushed(guider, at)
    memory.commit(Features(at.denoised.float() + 0.01))
    assert torch.equal(guider(at), first)


def test_a_batch_against_fixed_memory_is_its_rows_one_by_one() -> None:
    at, bank = state(), rows(6, 3, 2)
    together = pushed(SPELL(remembering(bank), radius=R, in_batch=False), at)
    for i in range(4):
        row = slice(i, i + 1)
        alone = replace(at, x=at.x[row], denoised=at.denoised[row])
        guider = SPELL(remembering(bank), radius=R, in_batch=False)
        close(pushed(guider, alone), together[row])


def test_finished_samples_that_are_not_finite_are_not_kept() -> None:
    guider, at = SPELL(), state()
    pushed(guider, at)
    finished = at.denoised.clone()
    finished[2] = math.nan
    with pytest.warns(GuidanceWarning, match="1 of 4"):
        guider.finish(finished)
    assert len(guider.memory) == 3


# --- laws -------------------------------------------------------------------------------------


def test_the_order_of_the_batch_does_not_matter() -> None:
    at, order, bank = state(5), torch.tensor([3, 0, 4, 1, 2]), rows(6, 3, 2)
    mixed = replace(at, x=at.x[order], denoised=at.denoised[order])
    ours = pushed(SPELL(remembering(bank), radius=R), mixed)
    close(ours, pushed(SPELL(remembering(bank), radius=R), at)[order])


def test_samples_that_coincide_stay_finite() -> None:
    at = state()
    same = replace(at, denoised=at.denoised[:1].repeat(4, 1))
    delta = pushed(SPELL(remembering(at.denoised[:1]), radius=R, protected=at.denoised[:1]), same)
    assert bool(delta.isfinite().all())
    assert float(delta.norm(dim=1).max()) <= 1.6 * R * 1.001


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_half_precision_it_is_the_same_up_to_rounding(dtype: torch.dtype) -> None:
    at, bank = state(), rows(6, 3, 2)
    half = replace(at, x=at.x.to(dtype), denoised=at.denoised.to(dtype))
    ours = pushed(SPELL(remembering(bank), radius=R), half)
    exact = pushed(SPELL(remembering(bank), radius=R), replace(at, denoised=half.denoised.double()))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=0.01, atol=0.01)


def test_a_broken_sample_is_warned_of_once_a_run() -> None:
    at, guider = state(), SPELL(remembering(rows(6, 3, 2)), radius=R)
    at.denoised[1] = math.nan
    for _ in range(2):
        with pytest.warns(GuidanceWarning, match="for 1 of 4"):
            first = pushed(guider, at)
        assert torch.equal(guider(at), first)  # pytest would make an error of a second warning
    at.denoised[3] = math.nan
    with pytest.warns(GuidanceWarning, match="for 2 of 4"):
        guider(at)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sample_that_breaks_goes_on_unguided_and_the_others_guided(value: float) -> None:
    at, memory = state(), remembering(rows(6, 3, 2))
    at.denoised[1] = value
    with pytest.warns(GuidanceWarning, match=r"step 2 \(sigma 3\) for 1 of 4"):
        delta = pushed(SPELL(memory, radius=R), at)
    rest = [0, 2, 3]
    alone = replace(at, x=at.x[rest], denoised=at.denoised[rest])
    assert not bool(delta[1].any())
    close(delta[rest], pushed(SPELL(memory, radius=R), alone))
    with pytest.raises(NonFiniteGuidance, match="step 2"):
        pushed(SPELL(memory, radius=R, nonfinite="raise"), at)


def test_outside_a_run_it_pushes_nothing() -> None:
    guider, at = SPELL(remembering(rows(6, 3, 2)), radius=R), state()
    assert not bool(guider(at).any())
    pushed(guider, at)
    guider.finish(at.denoised)
    assert not bool(guider(at).any())


@pytest.mark.parametrize("name", ["sample_dpmpp_2m", "sample_heun", "sample_euler_ancestral"])
def test_no_strength_is_bit_identical(name: str) -> None:
    bare = samplers.of(name)
    wrapped: Any = sparke.wrap(bare, guider=SPELL(scale=0, protected=torch.zeros(3, 2)))
    for seed in range(2):
        ours = run(wrapped, cond_scale=3.0, seed=seed)
        assert torch.equal(ours, run(bare, cond_scale=3.0, seed=seed))
    assert len(wrapped.memory) == 16


def test_it_conforms() -> None:
    check_guider(SPELL())
    check_guider(SPELL(protected=torch.randn(5, 4, 4, 4), prompt_aware=False), cond_width=None)
    check_guider(SPELL(RingMemory(4, torch.float16)), shape=(1, 7))


@pytest.mark.parametrize(
    "options",
    [
        {"memory": 3},
        {"protected": "paintings"},
        {"protected": [torch.zeros(2, 3)]},
        {"radius": 0},
        {"scale": -1},
        {"lo": math.inf},
        {"sigma_data": 0},
        {"nonfinite": "hide"},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        SPELL(**options)


def test_rows_of_another_width_are_refused_when_the_run_begins() -> None:
    at = state()
    with pytest.raises(ShapeError, match="width 4"):
        pushed(SPELL(remembering(rows(2, 4, 0))), at)
    with pytest.raises(ShapeError, match="protected must hold rows of 3"):
        pushed(SPELL(protected=rows(2, 4, 0)), at)


def test_a_protected_set_that_is_no_rows_is_told_by_its_type_or_shape() -> None:
    given_: Any = [torch.zeros(2, 3)]
    with pytest.raises(ArgumentError, match=r"got list\.$"):
        SPELL(protected=given_)
    for flat in (torch.zeros(3), torch.tensor(1.0)):
        with pytest.raises(
            ShapeError, match=r"protected must be latents \(n, ...\).*latents\[None"
        ):
            SPELL(protected=flat)


@pytest.mark.parametrize("kind", [lambda x: x, Features, Selection])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_protected_row_that_is_not_finite_shields_nothing_and_is_refused(
    kind: Any, bad: float
) -> None:
    protected = rows(5, 3, 3, torch.float32)
    protected[2, 1] = bad
    with pytest.raises(ArgumentError, match=r"protected must be finite; row 2 of 5.*Drop"):
        pushed(SPELL(protected=kind(protected)), state())


def test_sixteen_at_once_and_one_at_a_time_reach_more_modes() -> None:
    prompts = [PROMPTS[0]] * 16 + [PROMPTS[4]] * 16

    def modes(guider: SPELL | None, runs: int) -> float:
        sampler: Any = sampling.sample_dpmpp_2m
        if guider is not None:
            sampler = sparke.wrap(sampler, guider=guider)
        size = len(prompts) // runs
        made = [run(sampler, prompts=prompts[i::runs], steps=20, seed=i) for i in range(runs)]
        told = [p for i in range(runs) for p in prompts[i::runs]]
        assert all(len(x) == size for x in made)
        return MIXTURE.effective_modes(MIXTURE.judge(torch.cat(made), told), told)

    assert modes(SPELL(radius=0.5), 1) > modes(None, 1) + 0.5
    assert modes(SPELL(radius=0.5, in_batch=False), 16) > modes(None, 16) + 0.5
