"""diffusers' schedulers in one form: where the noise stands, what a model output says of x0.

Every scheduler treated here keeps a sample = alpha x0 + sigma eps and reads the denoised estimate
off the model's output linearly,

    denoised = skip * sample + out * model_output,

so that moving denoised by d is moving the output by d / out. diffusers is never imported; the
families are told apart by what their schedulers carry.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparke.backends import _ladder
from sparke.errors import UnsupportedTarget
from sparke.protocols import Step

__all__ = ["Level", "Reading", "fresh_noise", "is_scheduler", "stepping", "supported"]

LEAST_ALPHA = 1e-3
"""Flow models start from pure noise, where noise over signal has no number; this bounds it."""
FLOW_NAMES = ("FlowMatch", "FlowMap", "LTXEulerAncestralRF", "MiniMaxH3")
STOCHASTIC = ("Ancestral", "DDPM", "LCM", "SDE", "SASolver", "UnCLIP", "SCM", "CMStochastic")
"""Parts of the names of schedulers that add fresh noise at each step."""


@dataclass(frozen=True)
class Level:
    """One noise level of a scheduler.

    Attributes:
        alpha: share of the clean sample.
        sigma: of unit noise.
        skip: share of the sample in the denoised estimate.
        out: share of the model's output in it.
    """

    alpha: float
    sigma: float
    skip: float
    out: float

    @property
    def scale(self) -> float:
        """What one unit of the clean sample measures in the scheduler's sample."""
        return max(self.alpha, LEAST_ALPHA)

    @property
    def noise(self) -> float:
        """Noise over signal, the sigma of [Step][sparke.protocols.Step]."""
        return self.sigma / self.scale

    def denoised(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The estimate of the clean sample, both given in float32 or better."""
        return self.skip * sample + self.out * model_output

    def moved(self, model_output: Tensor, delta: Tensor) -> Tensor:
        """The model's output for which `denoised` is moved by `delta`."""
        return model_output + delta / self.out if self.out else model_output


def is_scheduler(value: object) -> bool:
    """Whether `value` takes steps as diffusers' schedulers do."""
    return callable(getattr(value, "step", None)) and hasattr(value, "set_timesteps")


def supported(scheduler: Any) -> bool:
    """Whether the denoised estimate can be read off this scheduler's model outputs."""
    return _family(scheduler) is not None


class Reading:
    """The noise levels of one run, by position in ``scheduler.timesteps``.

    Args:
        scheduler: after ``set_timesteps``.

    Raises:
        UnsupportedTarget: its model outputs are not linear in the clean sample, or not read here.
    """

    def __init__(self, scheduler: Any) -> None:
        family = _family(scheduler)
        if family is None:
            raise UnsupportedTarget(
                f"scheduler {type(scheduler).__name__} cannot be guided: sparke reads a denoised "
                "estimate off the model's output, and this one has none that it knows (discrete "
                "tokens, or a parametrisation of its own). Give the pipeline another scheduler."
            )
        self.timesteps = scheduler.timesteps
        self.times = [float(t) for t in self.timesteps.reshape(-1).tolist()]
        self.levels = family(scheduler, self.times)
        # These name the clean end as a time of its own, at which no step is taken.
        self._steps = len(self.times) - (family in (_trigonometric, _wuerstchen))
        noises = {level.noise for level in self.levels[: self._steps] if level.noise > 0}
        self._ladder = _ladder.Ladder([*sorted(noises, reverse=True), 0.0])
        self._last = -1

    def is_of(self, scheduler: Any) -> bool:
        """Whether the scheduler still has the time table this was read from."""
        return scheduler.timesteps is self.timesteps

    def position(self, scheduler: Any, timestep: Any) -> int:
        """Where in the time table the step about to be taken stands."""
        if getattr(scheduler, "step_index", None) is None and hasattr(
            scheduler, "_init_step_index"
        ):
            scheduler._init_step_index(timestep)  # as its step would
        known = getattr(scheduler, "step_index", None)
        if known is not None:
            at = int(known)
        else:
            at = self._found(float(torch.as_tensor(timestep).reshape(-1)[0]), self._last + 1)
        self._last = at
        return min(at, len(self.levels) - 1)

    def upcoming(self, scheduler: Any, hint: Callable[[], float | None]) -> int:
        """The same while the model is being evaluated, before the scheduler is told.

        Args:
            scheduler: whose time table this is.
            hint: tells the time the model was given, if known: t, t / 1000 or (1000 - t) / 1000;
                asked at most once per run, as reading it makes a device wait.
        """
        at = getattr(scheduler, "step_index", None)
        if at is None and self._last >= 0 and not hasattr(scheduler, "step_index"):
            at = self._last + 1
        if at is None:
            at = getattr(scheduler, "begin_index", None)
        if at is None:
            at = self._first_like(hint())
        return min(int(at), len(self.levels) - 1)

    def step(self, at: int) -> Step:
        """The step at a position of the time table, in noise over signal."""
        return self._ladder(self.levels[at].noise)

    def is_last(self, at: int) -> bool:
        """Whether a step from here ends at the clean sample."""
        return at == self._steps - 1

    def _first_like(self, time: float | None) -> int:
        known = () if time is None else (time, time * 1000, 1000 - time * 1000)
        for i, t in enumerate(self.times):
            if any(math.isclose(t, k, rel_tol=1e-3, abs_tol=1e-6) for k in known):
                return i
        return 0

    def _found(self, time: float, expected: int) -> int:
        # Time tables may name a time twice (PNDM); the next one in turn comes first.
        order = [*range(expected, len(self.times)), *range(min(expected, len(self.times)))]
        return next((i for i in order if math.isclose(self.times[i], time, abs_tol=1e-6)), expected)


Watcher: TypeAlias = Callable[[Callable[..., Any], inspect.BoundArguments], Any]


@contextmanager
def stepping(scheduler: Any, watcher: Watcher) -> Iterator[None]:
    """Let `watcher` take the scheduler's steps, given the step function and its arguments.

    The scheduler is of a subclass of its own class and name meanwhile, so that copies which
    pipelines make of it step by themselves, unwatched.
    """
    kind, held = type(scheduler), vars(scheduler)
    # The signature must stay: pipelines look into it for `eta` and `generator`.
    if "step" in held:  # somebody else's replacement on the instance
        before = held["step"]
        bare = inspect.signature(before)

        @functools.wraps(before)
        def on_instance(*args: Any, **kwargs: Any) -> Any:
            return watcher(before, bare.bind(*args, **kwargs))

        held["step"] = on_instance
        try:
            yield
        finally:
            held["step"] = before
        return

    signature = inspect.signature(kind.step)

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not scheduler:
            return kind.step(self, *args, **kwargs)
        return watcher(kind.step, signature.bind(self, *args, **kwargs))

    names: dict[str, Any] = {
        "step": step,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    if not hasattr(kind, "scale_model_input"):  # some pipelines ask unless the type is exact
        names["scale_model_input"] = lambda _self, sample, *_args, **_kwargs: sample
    scheduler.__class__ = type(kind.__name__, (kind,), names)
    try:
        yield
    finally:
        scheduler.__class__ = kind


def fresh_noise(scheduler: Any, arguments: Mapping[str, Any]) -> float:
    """The share of fresh noise in each step, eta in the terms of DDIM: 0 for ODE solvers.

    Args:
        scheduler: which takes the steps.
        arguments: of the pipeline's call, of which ``eta`` is read where steps take one.
    """
    name, config = type(scheduler).__name__, scheduler.config
    takes = inspect.signature(scheduler.step).parameters
    if "eta" in takes:
        value = arguments.get("eta")
        value = takes["eta"].default if value is None else value
        return float(value) if isinstance(value, (int, float)) else 0.0
    told = str(config.get("algorithm_type", "")).startswith("sde")
    told = told or bool(config.get("stochastic_sampling", False))
    return 1.0 if told or any(part in name for part in STOCHASTIC) else 0.0


Family: TypeAlias = Callable[[Any, list[float]], list[Level]]


def _family(scheduler: Any) -> Family | None:
    name = type(scheduler).__name__
    if "Inverse" in name or "RePaint" in name:
        return None
    if hasattr(scheduler, "_alpha_cumprod"):
        return _wuerstchen  # has no time table until it is set
    if not hasattr(scheduler, "timesteps"):
        return None
    if hasattr(scheduler, "precondition_outputs"):
        return _preconditioned
    if hasattr(scheduler, "get_scalings_for_boundary_condition") and name.startswith("CM"):
        return _consistency
    if name.startswith("SCM"):
        return _trigonometric
    if name.startswith("IPNDM"):
        return _by_table
    if any(flow in name for flow in FLOW_NAMES):
        return _flow
    if scheduler.config.get("stages", 1) != 1:
        return None  # Helios: sigmas start anew in each stage, towards that stage's end
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        return _by_sigma
    if hasattr(scheduler, "alphas_cumprod"):
        return _exploding if hasattr(scheduler, "sigmas") else _by_time
    return None


def _level(alpha: float, sigma: float, prediction: str) -> Level:
    """The level at which a model predicts this quantity."""
    norm = math.hypot(alpha, sigma)
    signal = max(alpha, LEAST_ALPHA)
    pair = {
        "epsilon": (1 / signal, -sigma / signal),
        # The Euler family keeps alpha 1 and a model that saw the sample scaled to unit variance.
        "v_prediction": (alpha / norm**2, -sigma / norm),
        "sample": (0.0, 1.0),
        "flow_prediction": (1.0, -sigma),
    }
    kind = {"original_sample": "sample", "v-prediction": "v_prediction"}.get(prediction, prediction)
    if kind not in pair:
        raise UnsupportedTarget(
            f"prediction_type={prediction!r} is not one of {', '.join(pair)}; the denoised "
            "estimate cannot be read off such outputs."
        )
    return Level(alpha, sigma, *pair[kind])


def _prediction(scheduler: Any) -> str:
    return str(getattr(scheduler.config, "prediction_type", None) or "epsilon")


def _by_time(scheduler: Any, times: list[float]) -> list[Level]:
    """DDIM, DDPM, LCM, TCD, PNDM, UnCLIP: alpha and sigma by the training time."""
    shares = scheduler.alphas_cumprod.tolist()
    kind = _prediction(scheduler)
    found = []
    for time in times:
        share = shares[min(max(round(time), 0), len(shares) - 1)]
        found.append(_level(share**0.5, max(1 - share, 0.0) ** 0.5, kind))
    return found


def _sigmas(scheduler: Any, times: list[float]) -> list[float]:
    """The noise level at which the model is evaluated, by position."""
    sigmas = [float(s) for s in scheduler.sigmas.tolist()]
    levels = sigmas[: len(times)]
    between = getattr(scheduler, "sigmas_interpol", None)
    if between is not None:  # KDPM2 evaluates every other time between two levels
        back = 1 if hasattr(scheduler, "sigmas_up") else 0
        levels[1::2] = [float(between[i - back]) for i in range(1, len(levels), 2)]
    elif hasattr(scheduler, "mid_point_sigma"):  # so does DPMSolverSDE, at the geometric mean
        levels[1::2] = [
            math.sqrt(sigmas[i - 1] * sigmas[i]) or sigmas[i - 1] for i in range(1, len(levels), 2)
        ]
    return levels


def _exploding(scheduler: Any, times: list[float]) -> list[Level]:
    """Euler, Heun, LMS, KDPM2: samples are x0 + sigma eps."""
    kind = _prediction(scheduler)
    return [_level(1.0, sigma, kind) for sigma in _sigmas(scheduler, times)]


def _by_sigma(scheduler: Any, times: list[float]) -> list[Level]:
    """The DPM-Solver family, UniPC, DEIS, SASolver: alpha and sigma as they compute them."""
    kind, found = _prediction(scheduler), []
    for told in scheduler.sigmas[: len(times)]:
        alpha, sigma = (float(part) for part in scheduler._sigma_to_alpha_sigma_t(told))
        level = _level(alpha, sigma, kind)
        if kind == "flow_prediction":  # read with the table's own number, whatever the scaling
            level = Level(alpha, sigma, 1.0, -float(told))
        found.append(level)
    return found


def _flow(scheduler: Any, times: list[float]) -> list[Level]:
    """Flow matching: samples are (1 - sigma) x0 + sigma eps, models predict eps - x0."""
    sigmas = _sigmas(scheduler, times)
    if scheduler.config.get("invert_sigmas", False):  # Mochi: the table names the share of signal
        return [Level(s, 1 - s, 1.0, 1 - s) for s in sigmas]
    if type(scheduler).__name__.startswith("MiniMaxH3"):  # predicts x0 - eps
        return [Level(1 - s, s, 1.0, s) for s in sigmas]
    return [_level(1 - s, s, "flow_prediction") for s in sigmas]


def _preconditioned(scheduler: Any, times: list[float]) -> list[Level]:
    """EDM schedulers, which precondition the model themselves (arXiv 2206.00364, table 1)."""
    data = float(scheduler.config.sigma_data)
    found = []
    for sigma in _sigmas(scheduler, times):
        total = sigma**2 + data**2
        out = sigma * data / total**0.5
        if _prediction(scheduler) == "v_prediction":
            out = -out
        found.append(Level(1.0, sigma, data**2 / total, out))
    return found


def _consistency(scheduler: Any, times: list[float]) -> list[Level]:
    """Consistency models: the boundary scalings of arXiv 2303.01469."""
    found = []
    for sigma in _sigmas(scheduler, times):
        skip, out = scheduler.get_scalings_for_boundary_condition(
            scheduler.sigmas.new_tensor(sigma)
        )
        found.append(Level(1.0, sigma, float(skip), float(out)))
    return found


def _trigonometric(scheduler: Any, times: list[float]) -> list[Level]:
    """TrigFlow (SANA-Sprint): times are angles, samples are cos(t) x0 + sin(t) sigma_data eps."""
    data = float(scheduler.config.get("sigma_data", 0.5))
    return [Level(math.cos(t), data * math.sin(t), math.cos(t), -math.sin(t)) for t in times]


def _by_table(scheduler: Any, times: list[float]) -> list[Level]:
    """IPNDM: alpha and sigma by position, models predict v."""
    pairs = zip(scheduler.alphas.tolist(), scheduler.betas.tolist(), strict=True)
    return [_level(alpha, sigma, "v_prediction") for alpha, sigma in pairs][: len(times)]


def _wuerstchen(scheduler: Any, times: list[float]) -> list[Level]:
    """Stable Cascade: the share of signal is a function of a time in [0, 1]."""
    found = []
    for time in scheduler.timesteps:
        share = float(scheduler._alpha_cumprod(time.reshape(1), time.device).reshape(-1)[0])
        found.append(_level(share**0.5, max(1 - share, 0.0) ** 0.5, "epsilon"))
    return found
