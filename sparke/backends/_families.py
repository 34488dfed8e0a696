"""The families of diffusers' schedulers, as noise levels of one form.

Every scheduler treated here keeps a sample = alpha x0 + sigma eps and reads the denoised estimate
off the model's output linearly,

    denoised = skip * sample + out * model_output,

so that moving denoised by d is moving the output by d / out. The families are told apart by what
their schedulers carry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from sparke.errors import UnsupportedTarget

__all__ = ["ENDING_CLEAN", "LEAST_ALPHA", "Level", "family_of", "names_of"]

LEAST_ALPHA = 1e-3
"""Flow models start from pure noise, where noise over signal has no number; this bounds it."""
FLOW_NAMES = ("FlowMatch", "FlowMap", "LTXEulerAncestralRF", "MiniMaxH3")


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


Family: TypeAlias = Callable[[Any, list[float]], list[Level]]


def family_of(scheduler: Any) -> Family | None:
    name = names_of(scheduler)
    if "Inverse" in name or "RePaint" in name:
        return None
    if hasattr(scheduler, "_alpha_cumprod"):
        return _wuerstchen  # has no time table until it is set
    if not hasattr(scheduler, "timesteps"):
        return None
    if hasattr(scheduler, "precondition_outputs"):
        return _preconditioned
    if "CMStochasticIterative" in name:
        return _consistency
    if "SCMScheduler" in name:
        return _trigonometric
    if "IPNDMScheduler" in name:
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


def names_of(scheduler: Any) -> str:
    """What the scheduler is called, and what its class derives from."""
    return " ".join(kind.__name__ for kind in type(scheduler).__mro__)


def _level(alpha: float, sigma: float, prediction: str) -> Level:
    """The level at which a model predicts this quantity."""
    norm = math.hypot(alpha, sigma)
    signal = max(alpha, 1e-8)  # where there is none, models that predict noise say nothing of x0
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
    if "MiniMaxH3" in names_of(scheduler):  # predicts x0 - eps
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


ENDING_CLEAN = (_trigonometric, _wuerstchen)
"""Families that name the clean end as a time of its own, at which no step is taken."""
