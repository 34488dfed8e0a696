"""Where the noise stands at a time of a diffusers scheduler, and what it wants to hear of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparke.errors import ArgumentError, UnsupportedTarget

__all__ = ["Level", "Levels"]

_LEAST_SIGMA = 1e-6
"""Noise below this is not seen in float32, and has no logarithm at 0."""


@dataclass(frozen=True)
class Level:
    """One noise level: the network is shown ``alpha x0 + sigma eps``.

    The model output for which a scheduler reads the denoised estimate D off a sample x is
    ``of_sample x + of_denoised D``.
    """

    alpha: float
    sigma: float
    of_sample: float
    of_denoised: float

    def ratio(self, most: float) -> float:
        """Noise over signal, the sigma of EDM, at most `most`."""
        return most if self.sigma >= most * self.alpha else self.sigma / self.alpha


class Levels:
    """The noise levels of a scheduler by time.

    Variance preserving schedulers, and those of the Euler family, which scale their samples to unit
    variance for the network, know alpha from a table, between whose entries log(sigma / alpha) is
    interpolated as they do it themselves. Flow matching names sigma = t / n and alpha = 1 - sigma
    (arXiv 2210.02747). EDM schedulers (arXiv 2206.00364, table 1) take 0.25 log sigma as the time
    and scale samples by 1 / sqrt(sigma^2 + sigma_data^2). A scheduler that rounds the times of a
    run, as the DPM-Solvers do, goes on with its unrounded sigmas; those are taken where they are
    known, since at sigma 100 the rounding would add a hundred times itself to the estimate.

    Args:
        scheduler: of diffusers; with the times of a run after ``set_timesteps``.

    Raises:
        UnsupportedTarget: no scheduler of these kinds.
        ArgumentError: it expects a prediction that is not known here, or clips what it reads.
    """

    def __init__(self, scheduler: Any) -> None:
        config = getattr(scheduler, "config", {})
        self.is_flow = "FlowMatch" in type(scheduler).__name__ or bool(
            config.get("use_flow_sigmas", False)
        )
        self._preconditioned = hasattr(scheduler, "precondition_outputs")
        if not (self.is_flow or self._preconditioned or hasattr(scheduler, "alphas_cumprod")):
            raise UnsupportedTarget(
                f"scheduler {type(scheduler).__name__} cannot run the emoji model: it must be "
                "variance preserving, of the Euler family, flow matching or EDM. Try "
                "DPMSolverMultistepScheduler, EulerDiscreteScheduler or "
                "FlowMatchEulerDiscreteScheduler."
            )
        self.prediction = _prediction(scheduler, self.is_flow, self._preconditioned)
        self._data = float(config.get("sigma_data", 1.0))
        self._train = int(config.get("num_train_timesteps", 1000))
        self._table: Any = None
        if not self.is_flow and not self._preconditioned:
            kept = np.asarray(scheduler.alphas_cumprod.double().cpu())
            self._table = 0.5 * (np.log1p(-kept) - np.log(kept))
        self._sigmas = self._known(scheduler)

    def __call__(self, time: float) -> Level:
        """The level at a time."""
        named = self._sigmas.get(time)
        sigma = max(self._at(time) if named is None else named, _LEAST_SIGMA)
        if self.is_flow:
            return _level(max(1 - sigma, 0.0), sigma, self.prediction)
        if not self._preconditioned:
            alpha = 1 / math.hypot(1, sigma)
            return _level(alpha, sigma * alpha, self.prediction)
        total = sigma**2 + self._data**2
        skip, out = self._data**2 / total, sigma * self._data / math.sqrt(total)
        out = -out if self.prediction == "v_prediction" else out
        alpha = 1 / math.sqrt(total)
        return Level(alpha, sigma * alpha, -skip / (alpha * out), 1 / out)

    def _at(self, time: float) -> float:
        if self.is_flow:
            return time / self._train
        if self._preconditioned:
            return math.exp(4 * time)
        return math.exp(np.interp(time, np.arange(len(self._table)), self._table))

    def _known(self, scheduler: Any) -> dict[float, float]:
        """The scheduler's own sigmas, where they are those of their times but for rounding."""
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None:
            return {}
        found: dict[float, float] = {}
        for time, sigma in zip(scheduler.timesteps.tolist(), _floats(sigmas), strict=False):
            if abs(self._time(sigma) - time) <= 1:
                found.setdefault(time, sigma)
        return found

    def _time(self, sigma: float) -> float:
        if self.is_flow:
            return sigma * self._train
        log = math.log(max(sigma, _LEAST_SIGMA))
        if self._preconditioned:
            return 0.25 * log
        return float(np.interp(log, self._table, np.arange(len(self._table))))


def _level(alpha: float, sigma: float, prediction: str) -> Level:
    pair = {
        "epsilon": (1 / sigma, -alpha / sigma),
        "v_prediction": (alpha / sigma, -1 / sigma),
        "flow_prediction": (1 / sigma, -1 / sigma),
        "sample": (0.0, 1.0),
    }[prediction]
    return Level(alpha, sigma, *pair)


def _prediction(scheduler: Any, is_flow: bool, preconditioned: bool) -> str:
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("clip_sample", False) or config.get("thresholding", False):
        raise ArgumentError(
            f"{name} must have clip_sample=False and thresholding=False: the latents of the emoji "
            "model lie outside [-1, 1]. Make it with from_config(..., clip_sample=False)."
        )
    told = str(config.get("prediction_type", "flow_prediction" if is_flow else "epsilon"))
    if "FlowMatch" in name:
        return "flow_prediction"  # nothing else is read, whatever a copied config says
    known = ["epsilon", "v_prediction"]
    known += [] if preconditioned else ["sample"]
    known += ["flow_prediction"] if is_flow else []
    if told not in known:
        raise ArgumentError(
            f"prediction_type of {name} must be one of {', '.join(known)}; got {told!r}."
        )
    return told


def _floats(values: Any) -> Sequence[float]:
    found: Sequence[float] = values.reshape(-1).tolist()
    return found
