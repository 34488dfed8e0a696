"""The seam with k-diffusion itself: all thirteen samplers, on an exact denoiser."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from k_diffusion import sampling
from torch import Tensor, nn

import sparke
from sparke.errors import (
    ArgumentError,
    MissingPrompts,
    ShapeError,
    UnsupportedTarget,
)
from sparke.memory import RingMemory
from sparke.models.mixture import GaussianMixture
from sparke.protocols import Features, Run, State, Step
from tests import samplers
from tests.samplers import MIXTURE, PROMPTS, FailsAt, Recorder, Sampler, run, white

# torchsde, under the SDE samplers, warns of a last bit of rounding.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning")
Figures = tuple[float, float]
"""Effective modes, averaged over prompts, and the share of faithful samples."""
Setting = Callable[..., Figures]
every = pytest.mark.parametrize("name", samplers.ALL)
HALF = (torch.float16, torch.bfloat16)


class Counting(RingMemory):
    """A memory that counts how often it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.commits = 0

    def commit(self, items: Features) -> None:
        self.commits += 1
        super().commit(items)


class Watching:
    """A guider that pushes nothing and keeps what it was shown."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.states: list[State] = []
        self.finished: list[Tensor] = []

    @property
    def steps(self) -> list[Step]:
        return [state.step for state in self.states]

    def begin(self, run: Run) -> None:
        self.run = run

    def __call__(self, state: State) -> Tensor:
        self.states.append(state)
        return torch.zeros_like(state.denoised)

    def finish(self, x: Tensor) -> None:
        self.finished.append(x)


def filled(seed: int = 9, rows: int = 3) -> RingMemory:
    """A memory with exact draws of every prompt."""
    memory = RingMemory()
    prompts = PROMPTS * rows
    x = MIXTURE.sample(prompts, torch.Generator().manual_seed(seed))
    memory.commit(Features(x, MIXTURE.encode(prompts)))
    return memory


def started(prompts: list[str] = PROMPTS, dtype: torch.dtype = torch.float32) -> Tensor:
    return (MIXTURE.sigma_max * torch.randn(len(prompts), 2)).to(dtype)


def embeds() -> Tensor:
    return MIXTURE.encode(PROMPTS)


def test_these_are_all_the_samplers_there_are() -> None:
    assert tuple(sorted(n for n in vars(sampling) if n.startswith("sample_"))) == samplers.ALL


# --- the wrapped sampler is the sampler ------------------------------------------------------


@every
def test_the_signature_gains_one_keyword_and_nothing_else(name: str) -> None:
    bare = samplers.of(name)
    wrapped = sparke.wrap(bare)
    before = list(inspect.signature(bare).parameters.values())
    *after, added = inspect.signature(wrapped).parameters.values()
    assert after == before
    assert (added.name, added.kind, added.default) == (
        "prompt_embeds",
        inspect.Parameter.KEYWORD_ONLY,
        None,
    )
    assert (wrapped.__name__, wrapped.__doc__) == (bare.__name__, bare.__doc__)


@every
def test_no_strength_is_bit_identical(name: str) -> None:
    bare = samplers.of(name)
    wrapped = sparke.wrap(bare, memory=filled(), scale=0)
    for seed in range(2):
        ours = run(wrapped, cond_scale=3.0, steps=6, seed=seed)
        assert torch.equal(ours, run(bare, cond_scale=3.0, steps=6, seed=seed))


@every
def test_nothing_to_repel_is_bit_identical(name: str) -> None:
    bare = samplers.of(name)
    ours = run(sparke.wrap(bare, in_batch=False), cond_scale=3.0, steps=6)
    assert torch.equal(ours, run(bare, cond_scale=3.0, steps=6))


@every
def test_one_sample_and_an_empty_memory_is_bit_identical(name: str) -> None:
    bare = samplers.of(name)
    ours = run(sparke.wrap(bare), prompts=PROMPTS[:1], cond_scale=3.0, steps=6)
    assert torch.equal(ours, run(bare, prompts=PROMPTS[:1], cond_scale=3.0, steps=6))


@every
def test_guided_samples_are_others_finite_and_repeatable(name: str) -> None:
    bare = samplers.of(name)
    first, second = (run(sparke.wrap(bare, memory=filled()), cond_scale=3.0) for _ in range(2))
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, second)
    assert not torch.allclose(first, run(bare, cond_scale=3.0), atol=1e-2)


@every
def test_the_callback_sees_what_it_saw_before(name: str) -> None:
    bare = samplers.of(name)
    seen: dict[str, list[dict[str, Any]]] = {"bare": [], "wrapped": []}
    out = {
        "bare": run(bare, callback=seen["bare"].append),
        "wrapped": run(sparke.wrap(bare, memory=filled()), callback=seen["wrapped"].append),
    }
    assert not torch.equal(out["bare"], out["wrapped"])
    keys = set(seen["bare"][0])
    assert all(set(info) == keys for info in seen["wrapped"])
    if name == "sample_dpm_adaptive":
        # This one finds its own noise levels; guidance must not make it crawl.
        assert 3 <= len(seen["wrapped"]) <= 2 * len(seen["bare"])
        return
    for ours, theirs in zip(seen["wrapped"], seen["bare"], strict=True):
        assert ours["i"] == theirs["i"]
        assert float(ours["sigma"]) == float(theirs["sigma"])


@pytest.mark.parametrize("name", [n for n in samplers.ALL if n != "sample_dpm_adaptive"])
def test_the_callback_is_shown_the_guided_estimate(name: str) -> None:
    shown: list[Tensor] = []
    recorded: list[Tensor] = []

    def model(x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        recorded.append(MIXTURE(x, sigma, **options))
        return recorded[-1]

    wrapped = sparke.wrap(samplers.of(name), memory=filled())
    run(wrapped, model, callback=lambda info: shown.append(info["denoised"].clone()))
    # At the highest noise the push is largest; the first evaluation belongs to the first callback.
    assert float((shown[0] - recorded[0]).norm(dim=1).max()) > 0.1


def test_arguments_by_position_and_by_name_arrive() -> None:
    x, sigmas = started(), MIXTURE.sigmas(6)
    extra = {"cond": embeds()}
    for wrapped, expected in (
        (sparke.wrap(sampling.sample_euler, scale=0), sampling.sample_euler),
        (sparke.wrap(sampling.sample_heun, scale=0), sampling.sample_heun),
    ):
        torch.manual_seed(1)
        ours = wrapped(MIXTURE, x, sigmas, extra, None, True, 2.0, 0.1, 50.0, 1.01)
        torch.manual_seed(1)
        theirs = expected(MIXTURE, x, sigmas, extra, None, True, 2.0, 0.1, 50.0, 1.01)
        assert torch.equal(ours, theirs)
        torch.manual_seed(1)
        assert not torch.equal(ours, expected(MIXTURE, x, sigmas, extra, None, True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sample_lms", {"order": 2}),
        ("sample_euler_ancestral", {"eta": 0.3, "s_noise": 0.9}),
        ("sample_dpmpp_2m_sde", {"solver_type": "heun", "eta": 0.5}),
        ("sample_dpmpp_sde", {"r": 0.4}),
        ("sample_dpm_fast", {"eta": 0.5}),
        ("sample_dpm_adaptive", {"rtol": 0.02, "order": 2}),
    ],
)
def test_a_samplers_own_options_arrive(name: str, options: dict[str, Any]) -> None:
    bare = samplers.of(name)
    wrapped = sparke.wrap(bare, scale=0)
    ours = run(wrapped, **options)
    assert torch.equal(ours, run(bare, **options))
    assert not torch.equal(ours, run(bare))


def test_a_noise_sampler_arrives() -> None:
    levels: list[tuple[float, float]] = []

    def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        levels.append((float(sigma), float(sigma_next)))
        return torch.zeros(len(PROMPTS), 2)

    run(sparke.wrap(sampling.sample_dpmpp_2m_sde), noise_sampler=noise, steps=6)
    assert len(levels) == 5


def test_a_sampler_that_returns_more_than_samples_still_does() -> None:
    bare = sampling.sample_dpm_adaptive
    wrapped = sparke.wrap(bare, memory=filled())
    before = len(wrapped.memory)
    x, info = run(wrapped, return_info=True)
    assert set(info) == set(run(bare, return_info=True)[1])
    kept = wrapped.memory.features.x[before:]
    assert torch.equal(kept, x)


# --- memory -----------------------------------------------------------------------------------


@every
def test_what_is_returned_is_what_is_kept(name: str) -> None:
    memory = Counting()
    wrapped = sparke.wrap(samplers.of(name), memory=memory)
    made = [run(wrapped, seed=seed, steps=6) for seed in range(3)]
    assert memory.commits == 3
    kept = memory.features
    assert torch.equal(kept.x, torch.cat(made))
    assert kept.cond is not None
    assert torch.equal(kept.cond, embeds().repeat(3, 1))


@every
def test_a_call_that_fails_leaves_memory_and_the_next_call_alone(name: str) -> None:
    memory, error = Counting(), RuntimeError("out of memory")
    wrapped = sparke.wrap(samplers.of(name), memory=memory)
    first = run(wrapped, steps=6)
    assert memory.commits == 1
    with pytest.raises(RuntimeError) as caught:
        run(wrapped, FailsAt(3, error), steps=6)
    assert caught.value is error
    assert memory.commits == 1
    assert torch.equal(memory.features.x, first)
    after = run(wrapped, seed=1, steps=6)
    unbroken = sparke.wrap(samplers.of(name))
    run(unbroken, steps=6)
    assert torch.equal(after, run(unbroken, seed=1, steps=6))


@pytest.mark.parametrize("name", ["sample_euler", "sample_dpmpp_2m_sde", "sample_dpm_adaptive"])
def test_stopping_by_keyboard_keeps_nothing(name: str) -> None:
    memory = Counting()
    wrapped = sparke.wrap(samplers.of(name), memory=memory)
    with pytest.raises(KeyboardInterrupt):
        run(wrapped, FailsAt(2, KeyboardInterrupt()))

    def stop(info: dict[str, Any]) -> None:
        if info["i"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(wrapped, callback=stop)
    assert (memory.commits, len(memory)) == (0, 0)


def test_two_samplers_can_share_a_memory() -> None:
    memory = RingMemory()
    euler = sparke.wrap(sampling.sample_euler, memory=memory)
    heun = sparke.wrap(sampling.sample_heun, memory=memory)
    first = run(euler)
    second = run(heun)
    assert euler.memory is heun.memory is memory
    assert torch.equal(memory.features.x, torch.cat([first, second]))


def test_the_callers_tensors_are_left_as_they_were() -> None:
    x, sigmas, cond = started(), MIXTURE.sigmas(6), embeds()
    before = x.clone(), sigmas.clone(), cond.clone()
    extra = {"cond": cond, "cond_scale": 3.0}
    wrapped = sparke.wrap(sampling.sample_dpmpp_2m, memory=filled())
    wrapped(MIXTURE, x, sigmas, extra_args=extra, disable=True)
    assert all(torch.equal(a, b) for a, b in zip((x, sigmas, cond), before, strict=True))
    assert list(extra) == ["cond", "cond_scale"]
    assert extra["cond"] is cond
    assert extra["cond_scale"] == 3.0


def test_one_row_at_a_time_or_all_at_once_against_the_same_memory() -> None:
    for name in ("sample_euler", "sample_heun", "sample_dpmpp_2m", "sample_lms"):
        wrapped = functools.partial(sparke.wrap, samplers.of(name), in_batch=False)
        x, sigmas = started(), MIXTURE.sigmas(10)
        together = wrapped(memory=filled())(
            MIXTURE, x, sigmas, extra_args={"cond": embeds()}, disable=True
        )
        for i in range(len(x)):
            extra = {"cond": embeds()[i : i + 1]}
            alone = wrapped(memory=filled())(
                MIXTURE, x[i : i + 1], sigmas, extra_args=extra, disable=True
            )
            torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=2e-3)


# --- where in the schedule --------------------------------------------------------------------


def watched(name: str, steps: int = 6, **options: Any) -> list[Step]:
    guider = Watching()
    run(sparke.wrap(samplers.of(name), guider=guider), steps=steps, **options)
    return guider.steps


@pytest.mark.parametrize("name", ["sample_euler", "sample_dpmpp_2m", "sample_lms"])
def test_one_evaluation_per_step_knows_its_step_and_the_next_noise(name: str) -> None:
    steps, sigmas = watched(name), MIXTURE.sigmas(6).tolist()
    assert [s.index for s in steps] == list(range(6))
    assert [s.sigma for s in steps] == pytest.approx(sigmas[:-1])
    assert [s.sigma_next for s in steps] == pytest.approx(sigmas[1:])
    assert {s.total for s in steps} == {6}


def test_the_second_evaluation_of_a_step_has_a_next_noise_too() -> None:
    heun, sigmas = watched("sample_heun"), MIXTURE.sigmas(6).tolist()
    # Each corrector evaluates at the next step's noise, as that step itself does after it.
    assert [s.index for s in heun] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [s.sigma_next for s in heun] == pytest.approx([sigmas[s.index + 1] for s in heun])
    middle = watched("sample_dpm_2")
    assert [s.sigma_next for s in middle[::2]] == pytest.approx(sigmas[1:])
    assert [s.sigma_next for s in middle[1::2]] == pytest.approx(sigmas[1:-1])


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2"])
def test_churn_does_not_change_the_next_noise(name: str) -> None:
    churned = watched(name, s_churn=2.0)
    still = watched(name)
    assert churned[0].sigma > 1.3 * still[0].sigma
    first = slice(None, None, 2 if name != "sample_euler" else 1)
    expected = [s.sigma_next for s in still[first]]
    assert [s.sigma_next for s in churned[first]] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["sample_dpm_fast", "sample_dpm_adaptive"])
def test_samplers_without_a_table_have_steps_too(name: str) -> None:
    steps = watched(name, steps=9)
    assert all(0 <= s.sigma_next < s.sigma for s in steps)
    assert steps[0].sigma == pytest.approx(MIXTURE.sigma_max, rel=1e-4)
    again = {s.sigma: s.sigma_next for s in steps}
    assert all(again[s.sigma] == s.sigma_next for s in steps)
    if name == "sample_dpm_fast":
        assert len(steps) == 9
        assert {s.total for s in steps} == {9}
        # Nearly all noise of an evaluation is still there at the next one.
        assert all(s.sigma_next > 0.2 * s.sigma for s in steps[:-1])
    else:
        assert {s.total for s in steps} == {None}


def test_a_run_is_described_before_it_begins() -> None:
    guider = Watching()
    wrapped = sparke.wrap(sampling.sample_euler, guider=guider)
    run(wrapped)
    assert guider.run is not None
    assert guider.run.shape == (8, 2)
    assert guider.run.dtype == torch.float32
    assert guider.run.cond is not None
    assert torch.equal(guider.run.cond, embeds())
    assert guider.run.sigma_data == pytest.approx(MIXTURE.sigma_data)

    class Outer:
        inner_model = MIXTURE

        def __call__(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
            return MIXTURE(x, sigma, **options)

    run(wrapped, Outer())
    assert guider.run.sigma_data == pytest.approx(MIXTURE.sigma_data)
    run(wrapped, lambda x, sigma, **options: MIXTURE(x, sigma, **options))
    assert guider.run.sigma_data is None


def test_a_guider_is_shown_the_evaluation_as_it_is() -> None:
    guider = Watching()
    run(sparke.wrap(sampling.sample_euler, guider=guider), cond_scale=3.0)
    for state in guider.states:
        sigma, cond = state.step.sigma, embeds()
        assert torch.equal(state.denoised, MIXTURE(state.x, sigma, cond=cond, cond_scale=3.0))
        assert state.conditional is not None
        assert torch.equal(state.conditional(), MIXTURE(state.x, sigma, cond=cond))
        assert state.evaluate is not None
        other = state.x + 1
        assert torch.equal(state.evaluate(other), MIXTURE(other, sigma, cond=cond, cond_scale=3.0))
    assert len(guider.finished) == 1


def test_the_conditional_prediction_costs_nothing_where_guidance_is_off() -> None:
    for options in ({"cond": embeds()}, {"cond": embeds(), "cond_scale": 1.0}):
        guider, model = Watching(), Recorder()
        run(sparke.wrap(sampling.sample_euler, guider=guider), model, extra_args=options)
        calls = model.calls
        for state in guider.states:
            assert state.conditional is not None
            assert torch.equal(state.conditional(), state.denoised)
        assert model.calls == calls


# --- classifier-free guidance -----------------------------------------------------------------


def scales(wrapped: Sampler, model: Recorder | None = None, **options: Any) -> dict[float, float]:
    """The guidance scale the denoiser saw at each noise level."""
    model = model or Recorder()
    run(wrapped, model, **{"cond_scale": 4.0, "steps": 20, **options})
    found: dict[float, set[float]] = {}
    for sigma, seen in zip(model.sigmas, model.options, strict=True):
        found.setdefault(sigma, set()).add(seen["cond_scale"])
    assert all(len(values) == 1 for values in found.values())
    return {sigma: values.pop() for sigma, values in found.items()}


def test_by_default_guidance_is_off_at_high_noise_only() -> None:
    for name in ("sample_euler", "sample_heun", "sample_dpm_adaptive"):
        seen = sorted(scales(sparke.wrap(samplers.of(name))).items(), reverse=True)
        values = [value for _, value in seen]
        switch = values.index(4.0)
        assert values == [1.0] * switch + [4.0] * (len(values) - switch)
        lowest_off, highest_on = seen[switch - 1][0], seen[switch][0]
        assert lowest_off > 0.5 * MIXTURE.sigma_data
        assert highest_on < 10 * MIXTURE.sigma_data


def test_the_interval_scales_with_the_data() -> None:
    small = scales(sparke.wrap(sampling.sample_euler, sigma_data=0.2, guider=None))
    large = scales(sparke.wrap(sampling.sample_euler, sigma_data=5.0, guider=None))
    assert list(small.values()).count(1.0) > list(large.values()).count(1.0) > 0


def test_an_interval_of_ones_own_is_kept_to() -> None:
    seen = scales(sparke.wrap(sampling.sample_euler, cfg_interval=(0.5, 7.0)))
    assert {sigma: value for sigma, value in seen.items() if value == 4.0}
    for sigma, value in seen.items():
        assert value == (4.0 if 0.5 < sigma <= 7.0 else 1.0)
    seen = scales(sparke.wrap(sampling.sample_euler, cfg_interval=None))
    assert set(seen.values()) == {4.0}


def test_guidance_stays_on_while_there_is_nothing_to_repel() -> None:
    wrapped = sparke.wrap(sampling.sample_euler, in_batch=False)
    assert set(scales(wrapped).values()) == {4.0}
    # The first call filled the memory.
    assert set(scales(wrapped).values()) == {1.0, 4.0}
    assert set(scales(sparke.wrap(sampling.sample_euler, scale=0)).values()) == {4.0}
    assert set(scales(sparke.wrap(sampling.sample_euler), prompts=PROMPTS[:1]).values()) == {4.0}


@pytest.mark.parametrize("keyword", ["cond_scale", "guidance_scale", "cfg_scale"])
def test_the_scale_is_found_under_its_usual_names(keyword: str) -> None:
    seen: list[dict[str, Any]] = []

    def model(x: Tensor, sigma: Tensor, cond: Tensor, **options: Any) -> Tensor:
        seen.append(options)
        return MIXTURE(x, sigma, cond=cond, cond_scale=options[keyword])

    extra = {"cond": embeds(), keyword: 4.0, "other": "kept"}
    run(sparke.wrap(sampling.sample_euler), model, extra_args=extra)
    assert {options[keyword] for options in seen} == {1.0, 4.0}
    assert {options["other"] for options in seen} == {"kept"}


def test_a_denoiser_without_a_scale_is_called_as_before() -> None:
    model = Recorder()
    wrapped = sparke.wrap(sampling.sample_euler, memory=filled())
    run(wrapped, model, extra_args={"cond": embeds()})
    assert model.calls == 8
    assert all(set(options) == {"cond"} for options in model.options)


def test_a_scale_that_is_no_number_is_left_alone() -> None:
    seen, scale = [], torch.full((8, 1), 3.0)

    def model(x: Tensor, sigma: Tensor, cond: Tensor, cond_scale: Tensor) -> Tensor:
        seen.append(cond_scale)
        of_all = MIXTURE(x, sigma)
        return of_all + cond_scale * (MIXTURE(x, sigma, cond=cond) - of_all)

    extra = {"cond": embeds(), "cond_scale": scale}
    run(sparke.wrap(sampling.sample_euler, memory=filled()), model, extra_args=extra)
    assert len(seen) == 8
    assert all(given is scale for given in seen)


# --- prompts ----------------------------------------------------------------------------------


def kept_cond(wrapped: Sampler, model: Any = MIXTURE, **options: Any) -> Tensor:
    """The prompts that end up in memory, which are those the score compared."""
    run(wrapped, model, **options)
    found: Tensor = wrapped.memory.features.cond  # type: ignore[attr-defined]
    return found


def unprompted(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    return MIXTURE(x, sigma)


def test_prompts_are_taken_from_the_hosts_own_conditioning() -> None:
    assert torch.equal(kept_cond(sparke.wrap(sampling.sample_euler)), embeds())


def test_prompts_may_be_given_once_or_per_call() -> None:
    once, later = torch.randn(8, 5), torch.randn(8, 5)
    wrapped = sparke.wrap(sampling.sample_euler, prompt_embeds=once)
    assert torch.equal(kept_cond(wrapped), once)
    assert torch.equal(kept_cond(wrapped, prompt_embeds=later)[8:], later)


def test_prompts_may_be_a_function_of_the_extra_arguments() -> None:
    def extract(extra: Mapping[str, Any]) -> Tensor:
        found: Tensor = extra["cond"]["c_crossattn"]
        return found

    wrapped = sparke.wrap(sampling.sample_euler, prompt_embeds=extract)
    given = torch.randn(8, 5)
    found = kept_cond(wrapped, unprompted, extra_args={"cond": {"c_crossattn": given}})
    assert torch.equal(found, given)


def test_tokens_are_averaged_over_their_mask() -> None:
    tokens = torch.randn(8, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]] * 2)
    plain = [sum(tokens[i, t] for t in range(4)) / 4 for i in range(8)]
    masked = [
        sum(tokens[i, t] for t in range(4) if mask[i, t]) / int(mask[i].sum()) for i in range(8)
    ]
    found = kept_cond(sparke.wrap(sampling.sample_euler), prompt_embeds=tokens)
    torch.testing.assert_close(found, torch.stack([torch.as_tensor(row) for row in plain]))
    found = kept_cond(sparke.wrap(sampling.sample_euler), prompt_embeds=(tokens, mask))
    torch.testing.assert_close(found, torch.stack([torch.as_tensor(row) for row in masked]))
    found = kept_cond(sparke.wrap(sampling.sample_euler), prompt_embeds=(tokens, mask.bool()))
    torch.testing.assert_close(found, torch.stack([torch.as_tensor(row) for row in masked]))


def test_one_row_of_prompts_serves_all_samples() -> None:
    row = torch.randn(1, 5)
    found = kept_cond(sparke.wrap(sampling.sample_euler), prompt_embeds=row)
    assert torch.equal(found, row.expand(8, -1))


@pytest.mark.parametrize("dtype", HALF)
def test_prompts_in_half_precision_are_kept_in_single(dtype: torch.dtype) -> None:
    given = torch.randn(8, 5).to(dtype)
    found = kept_cond(sparke.wrap(sampling.sample_euler), prompt_embeds=given)
    assert torch.equal(found, given.float())


def test_prompts_decide_who_repels_whom() -> None:
    # Rows of one bank, twice the same picture; only the prompts differ.
    near = embeds()[:1].expand(8, -1)
    far = torch.nn.functional.normalize(torch.randn(8, 32), dim=1)
    memory = RingMemory()
    memory.commit(Features(MIXTURE.means[0], embeds()[:1].expand(6, -1)))
    pushed, ignored = (
        run(
            sparke.wrap(sampling.sample_euler, memory=copy.deepcopy(memory), in_batch=False),
            unprompted,
            extra_args={},
            prompt_embeds=cond,
        )
        for cond in (near, far)
    )
    bare = run(sampling.sample_euler, unprompted, extra_args={})
    assert not torch.allclose(pushed, bare, atol=1e-2)
    torch.testing.assert_close(ignored, bare, rtol=0, atol=1e-3)


BAD_PROMPTS: list[tuple[Any, type[Exception], str]] = [
    (torch.zeros(7, 5), ShapeError, "7 rows for a batch of 8"),
    (torch.zeros(8), ShapeError, r"\(8,\)"),
    (torch.zeros(8, 2, 2, 2), ShapeError, r"\(8, 2, 2, 2\)"),
    (torch.zeros(8, 5, dtype=torch.long), ShapeError, "int64"),
    ([[1.0] * 5] * 8, ShapeError, "list"),
    (torch.full((8, 5), torch.nan), ShapeError, "finite"),
    ((torch.zeros(8, 4, 5), torch.ones(8, 3)), ShapeError, r"\(8, 4\)"),
    (lambda extra: torch.zeros(3, 5), ShapeError, "3 rows"),
    (lambda extra: extra["nothing"], KeyError, "nothing"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD_PROMPTS)
@pytest.mark.parametrize("per_call", [True, False])
def test_wrong_prompts_are_an_error_before_the_first_evaluation(
    given: Any, error: type[Exception], message: str, per_call: bool
) -> None:
    model = Recorder()
    wrapped = sparke.wrap(sampling.sample_euler, prompt_embeds=None if per_call else given)
    with pytest.raises(error, match=message):
        run(wrapped, model, **({"prompt_embeds": given} if per_call else {}))
    assert model.calls == 0


@pytest.mark.parametrize("extra", [None, {}, {"cond": torch.arange(8)}, {"cond": {"c": 1}}])
def test_a_score_that_needs_prompts_and_has_none_says_so_first(extra: Any) -> None:
    model = Recorder(unprompted)
    for score in ("cond-rke", "cond-vendi"):
        with pytest.raises(MissingPrompts, match="prompt_embeds"):
            run(sparke.wrap(sampling.sample_euler, score), model, extra_args=extra)
    assert model.calls == 0
    run(sparke.wrap(sampling.sample_euler, "rke"), model, extra_args=extra)
    assert model.calls == 8


def test_prompts_of_another_encoder_than_memorys_are_an_error_before_the_first_evaluation() -> None:
    model = Recorder()
    wrapped = sparke.wrap(sampling.sample_euler, memory=filled())
    with pytest.raises(ShapeError, match="text encoder"):
        run(wrapped, model, prompt_embeds=torch.randn(8, 5))
    assert model.calls == 0


# --- errors before the first evaluation -------------------------------------------------------


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        (torch.tensor([0.0, 1.0, 10.0]), "descend"),
        (torch.tensor([10.0, 1.0, 1.0, 0.0]), "descend"),
        (torch.tensor([10.0, 1.0, -1.0]), "descend"),
        (torch.tensor([torch.nan, 1.0, 0.0]), "descend"),
        (torch.tensor([torch.inf, 1.0, 0.0]), "descend"),
        (torch.tensor([10.0]), "at least two"),
        (torch.ones(2, 2), "1-D"),
    ],
)
def test_noise_levels_that_do_not_descend(sigmas: Tensor, message: str) -> None:
    model = Recorder()
    with pytest.raises(ArgumentError, match=message):
        sparke.wrap(sampling.sample_euler)(
            model, started(), sigmas, extra_args={"cond": embeds()}, disable=True
        )
    assert model.calls == 0


@pytest.mark.parametrize("ends", [(80.0, 0.03), (0.0, 80.0), (-1.0, 80.0), (0.03, torch.inf)])
@pytest.mark.parametrize("name", ["sample_dpm_fast", "sample_dpm_adaptive"])
def test_noise_levels_without_an_order(name: str, ends: tuple[float, float]) -> None:
    model = Recorder()
    count = {"n": 6} if name == "sample_dpm_fast" else {}
    with pytest.raises(ArgumentError, match="sigma_min < sigma_max"):
        sparke.wrap(samplers.of(name))(
            model, started(), *ends, extra_args={"cond": embeds()}, disable=True, **count
        )
    assert model.calls == 0


def test_memory_of_latents_of_another_size() -> None:
    model, memory = Recorder(), RingMemory()
    memory.commit(Features(torch.randn(4, 3), embeds()[:4]))
    with pytest.raises(ShapeError, match="width 3"):
        run(sparke.wrap(sampling.sample_euler, memory=memory), model)
    assert (model.calls, len(memory)) == (0, 4)


@pytest.mark.parametrize("x", [torch.zeros(8), "noise", None])
def test_a_start_that_is_no_batch(x: Any) -> None:
    model = Recorder()
    with pytest.raises(ShapeError, match="x must be"):
        sparke.wrap(sampling.sample_euler)(model, x, MIXTURE.sigmas(4))
    assert model.calls == 0


def test_a_missing_argument_is_the_samplers_own_error() -> None:
    with pytest.raises(TypeError, match="sigmas"):
        sparke.wrap(sampling.sample_euler)(MIXTURE, started())
    with pytest.raises(TypeError, match="nonsense"):
        run(sparke.wrap(sampling.sample_euler), nonsense=1)


# --- any function of that shape ---------------------------------------------------------------


def my_sampler(model: Any, x: Tensor, sigmas: Tensor, *, extra_args: Any = None) -> Tensor:
    """Euler, at home."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i].expand(len(x)), **(extra_args or {}))
        x = denoised + sigmas[i + 1] / sigmas[i] * (x - denoised)
    return x


class Solver:
    def __call__(self, model: Any, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
        return my_sampler(model, x, sigmas, extra_args=options["extra_args"])

    def method(self, model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None) -> Tensor:
        return my_sampler(model, x, sigmas, extra_args=extra_args)


@pytest.mark.parametrize(
    "target",
    [
        my_sampler,
        Solver(),
        Solver().method,
        functools.partial(my_sampler),
        lambda model, x, sigmas, extra_args: my_sampler(model, x, sigmas, extra_args=extra_args),
    ],
)
def test_any_function_of_that_shape_is_a_sampler(target: Callable[..., Tensor]) -> None:
    wrapped = sparke.wrap(target, memory=filled())
    assert inspect.signature(wrapped).parameters["prompt_embeds"].default is None
    names = list(inspect.signature(wrapped).parameters)
    assert names[:3] == ["model", "x", "sigmas"]
    x, sigmas, extra = started(), MIXTURE.sigmas(8), {"cond": embeds()}
    ours = wrapped(MIXTURE, x, sigmas, extra_args=extra, prompt_embeds=embeds())
    expected = sparke.wrap(sampling.sample_euler, memory=filled())(
        MIXTURE, x, sigmas, extra_args=extra, disable=True
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "target",
    [
        MIXTURE,
        RingMemory,
        Solver,
        3,
        "sample_euler",
        None,
        sampling.get_sigmas_karras,
        lambda x, model, sigmas: x,
        lambda model, x: x,
        lambda model, x, timesteps: x,
        print,
    ],
)
def test_anything_else_is_not(target: Any) -> None:
    with pytest.raises(UnsupportedTarget, match="cannot be wrapped"):
        sparke.wrap(target)


def test_wrapping_twice_is_an_error() -> None:
    once = sparke.wrap(sampling.sample_euler)
    with pytest.raises(ArgumentError, match="wrapped"):
        sparke.wrap(once)


# --- models -----------------------------------------------------------------------------------


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))
        self.sigma_data = MIXTURE.sigma_data

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor, cond_scale: float = 1.0) -> Tensor:
        return MIXTURE(x, sigma, cond=cond, cond_scale=cond_scale) + self.shift


@pytest.mark.parametrize("name", ["sample_euler", "sample_dpm_fast"])
def test_a_module_is_a_model(name: str) -> None:
    bare = samplers.of(name)
    model = Module()
    ours = run(sparke.wrap(bare, memory=filled()), model, cond_scale=3.0)
    expected = run(sparke.wrap(bare, memory=filled()), cond_scale=3.0)
    torch.testing.assert_close(ours, expected)
    assert not ours.requires_grad
    assert model.shift.grad is None


def test_a_samplers_view_of_the_model_is_the_models() -> None:
    seen: dict[str, Any] = {}

    def curious(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None) -> Tensor:
        seen["shift"] = model.shift
        seen["missing"] = hasattr(model, "no_such_thing")
        seen["copied"] = copy.copy(model)
        return my_sampler(seen["copied"], x, sigmas, extra_args=extra_args)

    model = Module()
    memory = filled()
    x, sigmas, extra = started(), MIXTURE.sigmas(8), {"cond": embeds()}
    ours = sparke.wrap(curious, memory=memory)(model, x, sigmas, extra_args=extra)
    assert seen["shift"] is model.shift
    assert seen["missing"] is False
    expected = sparke.wrap(my_sampler, memory=filled())(model, x, sigmas, extra_args=extra)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpmpp_2m"])
def test_half_precision_goes_in_and_out_as_without(name: str, dtype: torch.dtype) -> None:
    bare = samplers.of(name)

    def shown(sampler: Sampler) -> tuple[Tensor, list[torch.dtype]]:
        dtypes: list[torch.dtype] = []
        torch.manual_seed(0)
        x, sigmas = started(dtype=dtype), MIXTURE.sigmas(8).to(dtype)
        out = sampler(
            MIXTURE,
            x,
            sigmas,
            extra_args={"cond": embeds()},
            callback=lambda info: dtypes.append(info["denoised"].dtype),
            disable=True,
        )
        return out, dtypes

    wrapped = sparke.wrap(bare, memory=filled())
    ours, dtypes = shown(wrapped)
    plain, expected = shown(bare)
    assert (ours.dtype, dtypes) == (plain.dtype, expected)
    assert dtype in dtypes
    assert bool(torch.isfinite(ours).all())
    assert not torch.equal(ours, plain)
    assert wrapped.memory.features.x.dtype == torch.float32  # type: ignore[attr-defined]


def test_latents_of_any_shape() -> None:
    def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        return MIXTURE(x.reshape(len(x), 2), sigma).reshape(x.shape)

    torch.manual_seed(0)
    x = 80 * torch.randn(8, 1, 2, 1)
    wrapped = sparke.wrap(sampling.sample_euler, "rke")
    out = wrapped(model, x, MIXTURE.sigmas(8), disable=True)
    flat = sparke.wrap(sampling.sample_euler, "rke")(
        model, x.flatten(1), MIXTURE.sigmas(8), disable=True
    )
    assert out.shape == x.shape
    torch.testing.assert_close(out.flatten(1), flat)
    assert wrapped.memory.features.x.shape == (8, 2)


def test_under_inference_mode_and_then_without() -> None:
    expected = sparke.wrap(sampling.sample_euler)
    run(expected)
    wrapped = sparke.wrap(sampling.sample_euler)
    with torch.inference_mode():
        run(wrapped)
        first = run(wrapped, seed=1)
    assert torch.equal(first, run(expected, seed=1))
    assert torch.equal(run(wrapped, seed=2), run(expected, seed=2))


# --- what it is for ---------------------------------------------------------------------------


def figures(mixture: GaussianMixture, prompts: list[str], made: list[Tensor]) -> Figures:
    modes, faithful = [], []
    for x in made:
        verdict = mixture.judge(x, prompts)
        modes.append(mixture.effective_modes(verdict, prompts))
        faithful.append(verdict.faithful)
    return sum(modes) / len(modes), float(torch.cat(faithful).float().mean())


def quiet(name: str, batch: int, mixture: GaussianMixture) -> dict[str, Any]:
    """Plain white noise for samplers whose own noise is slow to make."""
    if "sde" not in name:
        return {}
    return {"noise_sampler": white(torch.empty(batch, *mixture.latent_shape))}


def in_batches(name: str, mixture: GaussianMixture, guided: bool, **options: Any) -> Figures:
    """16 samples of a prompt at once, nothing remembered between batches.

    Four prompts that have nothing in common share a call; they do not repel each other.
    """
    prompts = [p for p in mixture.prompts[::2] for _ in range(16)]
    options = {**quiet(name, len(prompts), mixture), **options}
    made = []
    for seed in range(5):
        sampler = sparke.wrap(samplers.of(name)) if guided else samplers.of(name)
        made.append(run(sampler, mixture, mixture=mixture, prompts=prompts, seed=seed, **options))
    return figures(mixture, prompts, made)


def over_calls(name: str, mixture: GaussianMixture, guided: bool, **options: Any) -> Figures:
    """One sample of each prompt a call, 28 calls, against memory of the calls before."""
    sampler = sparke.wrap(samplers.of(name)) if guided else samplers.of(name)
    options = {**quiet(name, len(mixture.prompts), mixture), **options}
    made = [run(sampler, mixture, mixture=mixture, seed=seed, **options) for seed in range(28)]
    return figures(mixture, mixture.prompts * 28, [torch.cat(made)])


def assert_more_modes(how: Setting, name: str, mixture: GaussianMixture, **options: Any) -> None:
    """By more than chance explains, at a fidelity of 0.97 within its standard error, 0.01."""
    options = {"steps": 30, **options}
    bare, faithful = how(name, mixture, guided=False, **options)
    guided, kept = how(name, mixture, guided=True, **options)
    told = f"{how.__name__}: {bare:.2f} at {faithful:.3f} -> {guided:.2f} at {kept:.3f}"
    assert kept >= 0.96, told
    assert guided >= bare + 0.2, told


settings = pytest.mark.parametrize("how", [in_batches, over_calls])
few = pytest.mark.parametrize("name", ["sample_dpmpp_2m", "sample_euler_ancestral"])


@every
@settings
def test_more_modes_at_the_same_fidelity(how: Setting, name: str) -> None:
    assert_more_modes(how, name, MIXTURE)


@few
@settings
def test_modes_that_guidance_took_away_come_back(how: Setting, name: str) -> None:
    assert_more_modes(how, name, MIXTURE, cond_scale=3.0)


@few
@settings
def test_more_modes_in_many_dimensions(how: Setting, name: str) -> None:
    assert_more_modes(how, name, GaussianMixture.structured(), steps=12)


def test_an_empty_batch_is_an_error_that_says_so() -> None:
    mixture = GaussianMixture.planar()
    sampler = sparke.wrap(sampling.sample_euler, score="rke")
    with pytest.raises(ArgumentError, match="batch of at least 1, got 0"):
        sampler(mixture, torch.zeros(0, 2), mixture.sigmas(4), disable=True)
