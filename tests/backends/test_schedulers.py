"""Readings of diffusers' schedulers, held against what the schedulers say of x0 themselves."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from diffusers import schedulers as hosts
from torch import Tensor

from sparke.backends import _schedulers
from sparke.backends._schedulers import Reading, stepping
from sparke.errors import UnsupportedTarget

# torchsde, under the SDE schedulers, warns of a last bit of rounding.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning")

SHAPE = (2, 4, 3, 3)
STEPS = 6
SHARED: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
_EVS = ("epsilon", "v_prediction", "sample")
_EV = _EVS[:2]
_EVSF = (*_EVS, "flow_prediction")
PREDICTIONS: dict[str, tuple[str, ...]] = {
    "CMStochasticIterativeScheduler": (),
    "CogVideoXDDIMScheduler": _EVS,
    "CogVideoXDPMScheduler": _EVS,
    "CosineDPMSolverMultistepScheduler": _EV,
    "DDIMParallelScheduler": _EVS,
    "DDIMScheduler": _EVS,
    "DDPMParallelScheduler": _EVS,
    "DDPMScheduler": _EVS,
    "DDPMWuerstchenScheduler": (),
    "DEISMultistepScheduler": _EVS,
    "DPMSolverMultistepScheduler": _EVSF,
    "DPMSolverSDEScheduler": _EV,
    "DPMSolverSinglestepScheduler": _EVSF,
    "EDMDPMSolverMultistepScheduler": _EV,
    "EDMEulerScheduler": _EV,
    "EulerAncestralDiscreteScheduler": _EV,
    "EulerDiscreteScheduler": _EVS,
    "FlowMapEulerDiscreteScheduler": (),
    "FlowMatchEulerDiscreteScheduler": (),
    "FlowMatchHeunDiscreteScheduler": (),
    "FlowMatchLCMScheduler": (),
    "HeunDiscreteScheduler": _EVS,
    "IPNDMScheduler": (),
    "KDPM2AncestralDiscreteScheduler": _EV,
    "KDPM2DiscreteScheduler": _EV,
    "LCMScheduler": _EVS,
    "LMSDiscreteScheduler": _EVS,
    "LTXEulerAncestralRFScheduler": (),
    "MiniMaxH3Scheduler": (),
    "PNDMScheduler": _EV,
    "SASolverScheduler": _EVSF,
    "SCMScheduler": (),
    "TCDScheduler": _EVS,
    "UnCLIPScheduler": ("epsilon", "sample"),
    "UniPCMultistepScheduler": _EVSF,
}
"""What each scheduler whose outputs are read takes for a prediction."""
VARIANTS: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "to-sigma-min": {"final_sigmas_type": "sigma_min"},
}
REFUSED = (
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "ConsistencyDecoderScheduler",
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "HeliosScheduler",
    "KarrasVeScheduler",
    "PiflowScheduler",
    "RePaintScheduler",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
    "VQDiffusionScheduler",
)
"""Discrete tokens, the other way round, or a parametrisation of their own."""
UNTRIED = ("HeliosDMDScheduler", "RFD4ProteinaScheduler", "SchedulerMixin")


def kind_of(name: str) -> Any:
    return getattr(hosts, name, None) or getattr(diffusers, name)


def takes(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


@dataclass(frozen=True)
class Case:
    """One scheduler, how it is built and how its time table is made."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    times: dict[str, Any] = field(default_factory=lambda: {"num_inference_steps": STEPS})

    def __str__(self) -> str:
        told = [*self.config.items(), *self.times.items()]
        words = [f"{k}={v}" for k, v in told if (k, v) != ("num_inference_steps", STEPS)]
        return "-".join([self.name, *words]).replace("_", "")

    def make(self) -> Any:
        known = takes(kind_of(self.name).__init__)
        config = {k: v for k, v in SHARED.items() if k in known} | self.config
        if self.name == "UnCLIPScheduler":
            del config["beta_schedule"]  # knows one only
        if self.name.startswith("KDPM2"):
            config["num_train_timesteps"] = 100  # it makes a table of all of them when built
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some correct impossible options, and say so
            return kind_of(self.name)(**config)

    def started(self) -> Any:
        scheduler = self.make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            more = {"intermediate_timesteps": None} if "SCM" in self.name else {}
            scheduler.set_timesteps(**{**more, **self.times})
        return scheduler


def walk(scheduler: Any, begin: int = 0) -> list[Any]:
    """The times a pipeline takes steps at; some tables name the clean end as a time of its own."""
    times = list(scheduler.timesteps)[begin:]
    ends = hasattr(scheduler, "_alpha_cumprod") or type(scheduler).__name__ == "SCMScheduler"
    return times[:-1] if ends else times


class Loop:
    """A pipeline's loop with answers that are a random linear function of the sample."""

    def __init__(self, scheduler: Any, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.generator = torch.Generator().manual_seed(seed)
        sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
        self.sample = sigma * torch.randn(SHAPE, generator=self.generator)
        self.before: Any = None
        self.old: Tensor | None = None

    def answer(self, t: Any) -> Tensor:
        if hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(self.sample, self.time(t))
        noise = torch.randn(SHAPE, generator=self.generator)
        return noise + 0.3 * self.sample / self.sample.std()

    def time(self, t: Any) -> Any:
        return t.expand(len(self.sample)) if hasattr(self.scheduler, "_alpha_cumprod") else t

    def call(self, scheduler: Any, t: Any, answer: Tensor, sample: Tensor) -> Any:
        """One step of any scheduler; the generator is not used up."""
        state = torch.Generator()
        state.set_state(self.generator.get_state())
        extra: dict[str, Any] = {"generator": state} if "generator" in takes(scheduler.step) else {}
        if "timestep_back" in takes(scheduler.step):
            extra |= {"old_pred_original_sample": self.old, "timestep_back": self.before}
        return scheduler.step(
            model_output=answer, timestep=self.time(t), sample=sample, return_dict=True, **extra
        )

    def step(self, t: Any, answer: Tensor) -> None:
        result = self.call(self.scheduler, t, answer, self.sample)
        self.sample = result[0] if isinstance(result, tuple) else result.prev_sample
        if isinstance(result, tuple):
            self.old, self.before = result[1], t
        torch.randn(SHAPE, generator=self.generator)


def copied(scheduler: Any) -> Any:
    """Without torchsde's tree, which does not survive copying; a copy grows its own."""
    held = vars(scheduler)
    tree = held.get("noise_sampler")
    if tree is not None:
        scheduler.noise_sampler = None
    found = copy.deepcopy(scheduler)
    if tree is not None:
        scheduler.noise_sampler = tree
    return found


def own_x0(loop: Loop, t: Any, answer: Tensor) -> Tensor:
    """x0 in the scheduler's own words, from copies, so that nothing moves."""
    scheduler, sample = copied(loop.scheduler), loop.sample
    name = type(scheduler).__name__
    if name in FORMULAS:
        return FORMULAS[name](scheduler, loop.time(t), sample, answer)
    if hasattr(scheduler, "convert_model_output"):
        if scheduler.step_index is None:
            scheduler._init_step_index(t)
        found: Tensor = scheduler.convert_model_output(answer, sample=sample)
        noisy = str(scheduler.config.get("algorithm_type", "")) in (
            "deis",
            "dpmsolver",
            "sde-dpmsolver",
        )
        if noisy or getattr(scheduler, "predict_x0", True) is False:  # it converts to the noise
            sigma = scheduler.sigmas[scheduler.step_index]
            alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
            found = (sample - sigma * found) / alpha
        return found
    result = loop.call(scheduler, t, answer, sample)
    if isinstance(result, tuple):
        return torch.as_tensor(result[1])
    if name == "LCMScheduler":
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        return torch.as_tensor((result.denoised - skip * sample) / out)
    found = result.pred_original_sample
    assert found is not None
    return found


def by_share(scheduler: Any, t: Any, sample: Tensor, answer: Tensor) -> Tensor:
    """alpha_bar of DDPM (arXiv 2006.11239, eq. 15) and v (arXiv 2202.00512, appendix D)."""
    share: Tensor = scheduler.alphas_cumprod[int(t)]
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (sample - (1 - share).sqrt() * answer) / share.sqrt()
    if kind == "v_prediction":
        return share.sqrt() * sample - (1 - share).sqrt() * answer
    assert kind == "sample"
    return answer


def by_cosine(scheduler: Any, t: Tensor, sample: Tensor, answer: Tensor) -> Tensor:
    """The cosine schedule of arXiv 2102.09672, eq. 17, as Wuerstchen (arXiv 2306.00637) has it."""
    s = scheduler.config.s
    start = math.cos(s / (1 + s) * math.pi / 2) ** 2
    found = math.cos((float(t[0]) + s) / (1 + s) * math.pi / 2) ** 2 / start
    share = float(min(max(found, 0.0001), 0.9999))
    return (sample - math.sqrt(1 - share) * answer) / math.sqrt(share)


def by_flow(scheduler: Any, t: Any, sample: Tensor, answer: Tensor) -> Tensor:
    """Rectified flow (arXiv 2209.03003): x = (1 - s) x0 + s eps, the model says eps - x0."""
    return sample - float(t) / 1000 * answer


def by_inverted_flow(scheduler: Any, t: Any, sample: Tensor, answer: Tensor) -> Tensor:
    """The same with time from noise to data, and a model that says x0 - eps."""
    return sample + (1 - float(t) / 1000) * answer


def flow(scheduler: Any, t: Any, sample: Tensor, answer: Tensor) -> Tensor:
    inverted = scheduler.config.get("invert_sigmas")
    return (by_inverted_flow if inverted else by_flow)(scheduler, t, sample, answer)


def by_clean_time(scheduler: Any, t: Any, sample: Tensor, answer: Tensor) -> Tensor:
    """The documentation of MiniMaxH3Scheduler.step: x0 = x_t + (1 - t) * v."""
    return sample + (1 - float(t)) * answer


def by_angle(scheduler: Any, t: Any, sample: Tensor, answer: Tensor) -> Tensor:
    """v of arXiv 2202.00512, time in quarter turns."""
    angle = float(t) * math.pi / 2
    return math.cos(angle) * sample - math.sin(angle) * answer


def by_boundary(scheduler: Any, t: Any, sample: Tensor, answer: Tensor) -> Tensor:
    """Consistency models, arXiv 2303.01469, appendix C."""
    at = [float(time) for time in scheduler.timesteps].index(float(t))
    config, sigma = scheduler.config, float(scheduler.sigmas[at])
    data, least = float(config.sigma_data), float(config.sigma_min)
    skip = data**2 / ((sigma - least) ** 2 + data**2)
    return skip * sample + (sigma - least) * data / math.hypot(sigma, data) * answer


def by_preconditioning(scheduler: Any, t: Any, sample: Tensor, answer: Tensor) -> Tensor:
    at = [float(time) for time in scheduler.timesteps].index(float(t))
    found: Tensor = scheduler.precondition_outputs(sample, answer, scheduler.sigmas[at])
    return found


FORMULAS: dict[str, Callable[[Any, Any, Tensor, Tensor], Tensor]] = {
    "CMStochasticIterativeScheduler": by_boundary,
    "CosineDPMSolverMultistepScheduler": by_preconditioning,
    "DDPMWuerstchenScheduler": by_cosine,
    "EDMDPMSolverMultistepScheduler": by_preconditioning,
    "EDMEulerScheduler": by_preconditioning,
    "FlowMapEulerDiscreteScheduler": by_flow,
    "FlowMatchEulerDiscreteScheduler": flow,
    "FlowMatchHeunDiscreteScheduler": by_flow,
    "FlowMatchLCMScheduler": by_flow,
    "IPNDMScheduler": by_angle,
    "LTXEulerAncestralRFScheduler": by_flow,
    "MiniMaxH3Scheduler": by_clean_time,
    "PNDMScheduler": by_share,
    "TCDScheduler": by_share,
}
SPECIAL = (
    Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    Case("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    Case("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
    Case(
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True},
        {"num_inference_steps": STEPS, "mu": 0.8},
    ),
    Case("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    Case("FlowMatchEulerDiscreteScheduler", {}, {"sigmas": [1.0, 0.7, 0.3]}),
    Case("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    Case("FlowMatchLCMScheduler", {"shift": 3.0}),
    Case("LTXEulerAncestralRFScheduler", {"eta": 0.0}),
    Case("MiniMaxH3Scheduler", {"shift": 3.0}),
    Case("SCMScheduler", {}, {"num_inference_steps": 2, "intermediate_timesteps": 1.3}),
    Case("PNDMScheduler", {"skip_prk_steps": True}),
    Case("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}),
    Case("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}),
    Case("DDIMScheduler", {}, {"num_inference_steps": 1}),
    Case("DDPMScheduler", {"variance_type": "fixed_large"}),
    Case("DDPMScheduler", {}, {"timesteps": [900, 333, 20]}),
    Case("LCMScheduler", {}, {"num_inference_steps": 4, "original_inference_steps": 50}),
    Case("TCDScheduler", {"prediction_type": "v_prediction"}),
    Case(
        "EulerDiscreteScheduler",
        {
            "timestep_type": "continuous",
            "sigma_max": 60.0,
            "sigma_min": 0.03,
            "use_karras_sigmas": True,
            "prediction_type": "v_prediction",
        },
    ),
    Case("EulerDiscreteScheduler", {}, {"num_inference_steps": 1}),
    Case("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    Case(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    Case(
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    Case("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    Case("DPMSolverMultistepScheduler", {"euler_at_final": True, "solver_order": 3}),
    Case("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}),
    Case("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    Case("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    Case(
        "UniPCMultistepScheduler",
        {
            "solver_order": 3,
            "flow_shift": 3.0,
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
        },
    ),
    Case("EDMEulerScheduler", {"prediction_type": "v_prediction"}),
    Case("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential"}),
)


def cases() -> list[Case]:
    found = [Case(name, {"prediction_type": p}) for name, ps in PREDICTIONS.items() for p in ps]
    found += [Case(name) for name, predictions in PREDICTIONS.items() if not predictions]
    for name, predictions in PREDICTIONS.items():
        known = takes(kind_of(name).__init__)
        found += [Case(name, config) for config in VARIANTS.values() if set(config) <= known]
        # torchsde cannot end where it has no noise left.
        found = [
            c
            for c in found
            if (c.name, c.config) != ("CosineDPMSolverMultistepScheduler", VARIANTS["to-sigma-min"])
        ]
        if "use_flow_sigmas" in known:
            flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            found.append(Case(name, flow))
        if "rescale_betas_zero_snr" in known:
            zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            found += [Case(name, {**zero, "prediction_type": p}) for p in predictions[1:3]]
    return [*found, *(case for case in SPECIAL if case not in found)]


ALL = cases()
every = pytest.mark.parametrize("case", ALL, ids=str)


def scale_of(level: Any, sample: Tensor, answer: Tensor) -> float:
    """What rounding is measured against: the size of the terms that make up x0."""
    terms = abs(level.skip) * sample.abs().max() + abs(level.out) * answer.abs().max()
    return float(terms) + 1e-3


@every
def test_the_denoised_estimate_is_the_schedulers_own(case: Case) -> None:
    loop = Loop(case.started())
    reading = Reading(loop.scheduler)
    times = walk(loop.scheduler)
    for i, t in enumerate(times):
        answer = loop.answer(t)
        own = own_x0(loop, t, answer)
        at = reading.position(loop.scheduler, loop.time(t))
        assert at == i
        level = reading.levels[at]
        near = 2e-4 * scale_of(level, loop.sample, answer)
        read = level.denoised(answer, loop.sample)
        torch.testing.assert_close(read, own.to(read), rtol=0, atol=near, msg=f"step {i} at {t}")

        delta = torch.randn(SHAPE, generator=loop.generator)
        if level.out:
            moved = level.moved(answer, delta)
            by = own_x0(loop, t, moved) - own
            near = 2e-4 * scale_of(level, loop.sample, moved)
            torch.testing.assert_close(by.to(delta), delta, rtol=0, atol=near, msg=f"moved at {i}")
            answer = moved
        loop.step(t, answer)
        assert loop.sample.isfinite().all()
        assert reading.is_last(at) == (i == len(times) - 1)


@every
def test_levels_descend_to_clean(case: Case) -> None:
    scheduler = case.started()
    reading = Reading(scheduler)
    steps = [reading.step(i) for i in range(len(walk(scheduler)))]
    for step in steps:
        assert math.isfinite(step.sigma)
        assert step.sigma > step.sigma_next >= 0 or step.sigma == 0
    assert steps[-1].sigma_next == 0 or case.name.startswith("SCM")
    sigmas = [step.sigma for step in steps]
    if "PNDM" not in case.name:  # its half steps come back
        assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(sigmas))
    for step in steps:
        below = [s for s in sigmas if s < step.sigma * (1 - 1e-3)]
        assert step.sigma_next == pytest.approx(max(below, default=0.0), rel=1e-3, abs=1e-6)


def test_every_scheduler_of_diffusers_is_read_or_refused() -> None:
    """A scheduler that diffusers adds shows up here."""
    given: dict[str, dict[str, Any]] = {
        "AmusedScheduler": {"mask_token_id": 5},
        "VQDiffusionScheduler": {"num_vec_classes": 8},
    }
    for name in sorted(dir(hosts)):
        kind = getattr(hosts, name)
        if not inspect.isclass(kind) or not hasattr(kind, "step"):
            continue
        if name in PREDICTIONS:
            assert _schedulers.supported(Case(name).make()), name
        elif name in REFUSED:
            scheduler = kind(**given.get(name, {}))
            assert not _schedulers.supported(scheduler), name
            with pytest.raises(UnsupportedTarget, match=name):
                Reading(scheduler)
        else:
            assert name in UNTRIED, f"{name} is new"


@pytest.mark.parametrize("prediction", ["score", "velocity"])
def test_an_unknown_prediction_type_is_refused(prediction: str) -> None:
    scheduler = hosts.DDIMScheduler(prediction_type=prediction)
    scheduler.set_timesteps(3)
    with pytest.raises(UnsupportedTarget, match=prediction):
        Reading(scheduler)


# --- an exact denoiser: what is read along a whole trajectory is its estimate


MEAN, STD = 1.5, 0.4
EXACT = (
    Case("DDIMScheduler"),
    Case("PNDMScheduler"),
    Case("PNDMScheduler", {"skip_prk_steps": True}),
    Case("TCDScheduler"),
    Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    Case("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    Case("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    Case("FlowMatchLCMScheduler"),
    Case("LTXEulerAncestralRFScheduler"),
    Case("MiniMaxH3Scheduler"),
    Case("IPNDMScheduler"),
    Case("DDPMWuerstchenScheduler"),
    Case("HeunDiscreteScheduler"),
    Case("KDPM2DiscreteScheduler"),
    Case("KDPM2AncestralDiscreteScheduler"),
    Case("DPMSolverSDEScheduler"),
    Case(
        "UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    ),
)


def shares(scheduler: Any, t: Any) -> tuple[float, float]:
    """alpha and sigma of the variance-preserving or flow process at a time the model is told."""
    time, name = float(t), type(scheduler).__name__
    if name == "IPNDMScheduler":
        return math.cos(time * math.pi / 2), math.sin(time * math.pi / 2)
    if name == "DDPMWuerstchenScheduler":
        s = scheduler.config.s
        start = math.cos(s / (1 + s) * math.pi / 2) ** 2
        share = math.cos((time + s) / (1 + s) * math.pi / 2) ** 2 / start
        share = min(max(share, 0.0001), 0.9999)
        return share**0.5, (1 - share) ** 0.5
    if name == "MiniMaxH3Scheduler" or scheduler.config.get("invert_sigmas"):
        clean = time if name == "MiniMaxH3Scheduler" else time / 1000
        return clean, 1 - clean
    if "Flow" in name or "RF" in name or scheduler.config.get("use_flow_sigmas"):
        return 1 - time / 1000, time / 1000
    table = scheduler.alphas_cumprod
    low = int(time)
    high = min(low + 1, len(table) - 1)
    # Between training times the noise level is interpolated in its logarithm.
    noise = ((1 - table) / table).sqrt().log()
    sigma = float((noise[low] + (noise[high] - noise[low]) * (time - low)).exp())
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def test_readings_along_a_trajectory_are_an_exact_denoisers_estimates() -> None:
    for case in EXACT:
        scheduler = case.started()
        loop, reading = Loop(scheduler), Reading(scheduler)
        exploding = hasattr(scheduler, "sigmas") and hasattr(scheduler, "alphas_cumprod")
        exploding = exploding and not hasattr(scheduler, "_sigma_to_alpha_sigma_t")
        for i, t in enumerate(walk(scheduler)):
            alpha, sigma = shares(scheduler, t)
            model_input = loop.sample / math.hypot(1, sigma / alpha) if exploding else loop.sample
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(loop.sample, t)
                near = 2e-3 * float(scaled.abs().max())
                torch.testing.assert_close(model_input, scaled, rtol=0, atol=near)
                model_input = scaled
            total = alpha**2 * STD**2 + sigma**2
            exact = MEAN + alpha * STD**2 / total * (model_input - alpha * MEAN)
            eps = (model_input - alpha * exact) / max(sigma, 1e-12)
            if "IPNDM" in case.name:
                answer = alpha * eps - sigma * exact
            elif "MiniMax" in case.name or case.config.get("invert_sigmas"):
                answer = exact - eps
            elif "Flow" in case.name or "RF" in case.name or "use_flow_sigmas" in case.config:
                answer = eps - exact
            else:
                answer = eps
            at = reading.position(scheduler, loop.time(t))
            assert reading.step(at).sigma == pytest.approx(sigma / max(alpha, 1e-3), rel=5e-3)
            read = reading.levels[at].denoised(answer, loop.sample)
            rounding = 1e-5 * scale_of(reading.levels[at], loop.sample, answer)
            near = rounding + 5e-3 * float(exact.abs().max())
            torch.testing.assert_close(read, exact, rtol=0, atol=near, msg=f"{case} at {i}")
            loop.step(t, answer)
        if "KDPM2" not in case.name:  # with few training times they do not start from pure noise
            assert float(loop.sample.mean()) == pytest.approx(MEAN, abs=0.35), str(case)


# --- positions


POSITIONS = (
    Case("DDIMScheduler", {"steps_offset": 1}),
    Case("DDPMScheduler"),
    Case("EulerDiscreteScheduler"),
    Case("DPMSolverMultistepScheduler"),
    Case("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    Case("HeunDiscreteScheduler"),
    Case("KDPM2DiscreteScheduler"),
    Case("KDPM2AncestralDiscreteScheduler"),
    Case("DPMSolverSDEScheduler"),
    Case("LCMScheduler"),
    Case("PNDMScheduler"),
    Case("PNDMScheduler", {"skip_prk_steps": True}),
    Case("FlowMatchEulerDiscreteScheduler"),
    Case("FlowMatchHeunDiscreteScheduler"),
    Case("UniPCMultistepScheduler"),
)


@pytest.mark.parametrize("case", POSITIONS, ids=str)
@pytest.mark.parametrize("tells", [True, False], ids=["begin-index", "no-begin-index"])
@pytest.mark.parametrize("first", [0, 3])
def test_positions_before_and_in_each_step(case: Case, tells: bool, first: int) -> None:
    scheduler = case.started()
    for again in range(2):
        if again:
            scheduler.set_timesteps(num_inference_steps=STEPS + 1)
        reading = Reading(scheduler)
        assert reading.is_of(scheduler)
        begin = first * getattr(scheduler, "order", 1)
        times = walk(scheduler, begin)
        if tells and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        loop = Loop(scheduler)
        asked: list[float] = []
        table = [float(v) for v in scheduler.timesteps]
        # Which of two equal times comes first, only a scheduler that counts can tell.
        alike = [v for v in table if math.isclose(v, table[begin], rel_tol=1e-3)]
        clear = len(alike) == 1 or (tells and hasattr(scheduler, "begin_index"))
        for i, t in enumerate(times):

            def hint(t: Any = t, asked: list[float] = asked) -> float:
                asked.append(float(t))
                return float(t) / 1000 if "Flow" in case.name else float(t)

            expected, at = begin + i, reading.upcoming(scheduler, hint)
            if clear:
                assert at == expected
            assert float(scheduler.timesteps[at]) == pytest.approx(float(t), rel=1e-3)
            at = reading.position(scheduler, t)
            if clear:
                assert at == expected
            assert float(scheduler.timesteps[at]) == float(t)
            assert reading.is_last(at) == (i == len(times) - 1)
            # Answered after the position is asked for: scaling the input tells the scheduler.
            loop.step(t, loop.answer(t))
        assert len(asked) <= 1
        state = scheduler.timesteps
        scheduler.set_timesteps(num_inference_steps=STEPS)
        assert scheduler.timesteps is not state
        assert not reading.is_of(scheduler)


@pytest.mark.parametrize("scale", [lambda t: t, lambda t: t / 1000, lambda t: (1000 - t) / 1000])
def test_the_first_position_is_told_by_the_time_the_model_gets(
    scale: Callable[[float], float],
) -> None:
    scheduler = hosts.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        assert Reading(scheduler).upcoming(scheduler, functools.partial(scale, t)) == i


# --- stepping


def bare_run(scheduler: Any, seed: int = 0) -> Tensor:
    scheduler.set_timesteps(num_inference_steps=STEPS)
    loop = Loop(scheduler, seed)
    for t in walk(scheduler):
        loop.step(t, loop.answer(t))
    return loop.sample


def passing(step: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
    return step(*bound.args, **bound.kwargs)


STEPPED = ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler")
stepped = pytest.mark.parametrize("name", STEPPED)


@stepped
def test_stepping_leaves_no_trace(name: str) -> None:
    scheduler = Case(name).make()
    bare = bare_run(scheduler)
    kind, names = type(scheduler), set(vars(scheduler))
    with stepping(scheduler, passing):
        assert torch.equal(bare_run(scheduler), bare)
    assert type(scheduler) is kind
    assert set(vars(scheduler)) == names
    assert torch.equal(bare_run(scheduler), bare)


@stepped
def test_stepping_looks_the_same_from_outside(name: str) -> None:
    scheduler = Case(name).make()
    kind, signature = type(scheduler), inspect.signature(scheduler.step)
    with stepping(scheduler, passing):
        assert inspect.signature(scheduler.step) == signature
        assert inspect.signature(type(scheduler).step) == inspect.signature(kind.step)
        assert isinstance(scheduler, kind)
        assert type(scheduler).__name__ == name
        assert type(scheduler).__module__ == kind.__module__
        assert isinstance(type(scheduler).from_config(scheduler.config), kind)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_stepping_ends_with_an_error(error: type[BaseException]) -> None:
    scheduler = hosts.DDIMScheduler()
    kind, names = type(scheduler), set(vars(scheduler))

    def failing(step: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        raise error

    with pytest.raises(error), stepping(scheduler, failing):
        bare_run(scheduler)
    assert type(scheduler) is kind
    assert set(vars(scheduler)) == names


@stepped
def test_copies_made_meanwhile_step_unwatched(name: str) -> None:
    scheduler = Case(name).make()
    bare = bare_run(Case(name).make())
    seen: list[int] = []

    def counting(step: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        seen.append(1)
        return step(*bound.args, **bound.kwargs)

    with stepping(scheduler, counting):
        scheduler.set_timesteps(num_inference_steps=3)
        before = scheduler.timesteps
        inner = copy.deepcopy(scheduler)
        assert torch.equal(bare_run(inner), bare)
        assert not seen
        assert scheduler.timesteps is before
    assert torch.equal(bare_run(inner), bare)
    assert not seen


@stepped
def test_a_replaced_step_is_watched_and_put_back(name: str) -> None:
    scheduler = Case(name).make()
    bare = bare_run(scheduler)
    own, calls, seen = scheduler.step, [], []

    @functools.wraps(own)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    def watching(step: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        seen.append(set(bound.arguments))
        return step(*bound.args, **bound.kwargs)

    scheduler.step = replacement
    signature = inspect.signature(replacement)
    with stepping(scheduler, watching):
        assert inspect.signature(scheduler.step) == signature
        assert torch.equal(bare_run(scheduler), bare)
    assert len(calls) == len(seen) == STEPS
    assert all({"model_output", "timestep", "sample"} <= names for names in seen)
    assert scheduler.step is replacement


def test_stepping_nests() -> None:
    scheduler = hosts.DDIMScheduler()
    order: list[str] = []

    def told(word: str) -> Callable[..., Any]:
        def watcher(step: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
            order.append(word)
            return step(*bound.args, **bound.kwargs)

        return watcher

    with stepping(scheduler, told("outer")):
        with stepping(scheduler, told("inner")):
            bare_run(scheduler)
        assert order == ["inner", "outer"] * STEPS
        order.clear()
        bare_run(scheduler)
        assert order == ["outer"] * STEPS
    assert type(scheduler) is hosts.DDIMScheduler


@pytest.mark.parametrize(
    ("case", "arguments", "share"),
    [
        (Case("DDIMScheduler"), {}, 0.0),
        (Case("DDIMScheduler"), {"eta": 0.7}, 0.7),
        (Case("DDIMScheduler"), {"eta": None}, 0.0),
        (Case("TCDScheduler"), {"eta": 0.3}, 0.3),
        (Case("EulerDiscreteScheduler"), {"eta": 0.7}, 0.0),
        (Case("EulerAncestralDiscreteScheduler"), {"eta": 0.0}, 1.0),
        (Case("KDPM2AncestralDiscreteScheduler"), {}, 1.0),
        (Case("DDPMScheduler"), {}, 1.0),
        (Case("DDPMWuerstchenScheduler"), {}, 1.0),
        (Case("LCMScheduler"), {}, 1.0),
        (Case("FlowMatchLCMScheduler"), {}, 1.0),
        (Case("DPMSolverSDEScheduler"), {}, 1.0),
        (Case("SASolverScheduler"), {}, 1.0),
        (Case("DPMSolverMultistepScheduler"), {}, 0.0),
        (Case("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}), {}, 1.0),
        (Case("CosineDPMSolverMultistepScheduler"), {}, 1.0),
        (Case("FlowMatchEulerDiscreteScheduler"), {}, 0.0),
        (Case("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}), {}, 1.0),
        (Case("LTXEulerAncestralRFScheduler"), {}, 1.0),
        (Case("LTXEulerAncestralRFScheduler", {"eta": 0.0}), {}, 0.0),
        (Case("UniPCMultistepScheduler"), {}, 0.0),
    ],
    ids=str,
)
def test_fresh_noise(case: Case, arguments: dict[str, Any], share: float) -> None:
    scheduler = case.make()
    assert _schedulers.fresh_noise(scheduler, arguments) == share
    with stepping(scheduler, passing):
        assert _schedulers.fresh_noise(scheduler, arguments) == share


@pytest.mark.parametrize(
    "name", sorted({c.name for c in ALL} - {"CosineDPMSolverMultistepScheduler"})
)
def test_schedulers_said_to_add_no_noise_add_none(name: str) -> None:
    """Two runs of different random numbers are alike exactly where the share is 0."""
    case = Case(name)

    def run(seed: int) -> Tensor:
        scheduler = case.started()
        loop = Loop(scheduler)
        torch.manual_seed(seed)
        for t in walk(scheduler):
            answer = 0.1 * loop.sample
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(loop.sample, loop.time(t))
            loop.generator.manual_seed(seed)
            loop.step(t, answer)
        return loop.sample

    noisy = _schedulers.fresh_noise(case.started(), {}) > 0
    assert torch.equal(run(1), run(2)) != noisy
