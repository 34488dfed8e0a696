"""k-diffusion's samplers, called alike, on the exact mixture of two dimensions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from k_diffusion import sampling
from torch import Tensor

from sparke.models.mixture import GaussianMixture

Sampler = Callable[..., Tensor]

ALL = (
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
)
MIXTURE = GaussianMixture.planar()
PROMPTS = MIXTURE.prompts


def of(name: str) -> Sampler:
    found: Sampler = getattr(sampling, name)
    return found


def schedule(sampler: Sampler, mixture: GaussianMixture, steps: int) -> dict[str, Any]:
    """The noise levels in the form this sampler takes them."""
    names = inspect.signature(sampler).parameters
    if "sigmas" in names:
        return {"sigmas": mixture.sigmas(steps)}
    ends: dict[str, Any] = {"sigma_min": mixture.sigma_min, "sigma_max": mixture.sigma_max}
    return {**ends, "n": steps} if "n" in names else ends


def run(
    sampler: Sampler,
    model: Any = MIXTURE,
    *,
    prompts: Sequence[str] = PROMPTS,
    cond_scale: float = 1.0,
    steps: int = 8,
    seed: int = 0,
    mixture: GaussianMixture = MIXTURE,
    **options: Any,
) -> Tensor:
    """Samples of these prompts; `seed` sets both the start and the noise of the way."""
    extra = {"cond": mixture.encode(prompts), "cond_scale": cond_scale}
    torch.manual_seed(seed)
    x = mixture.sigma_max * torch.randn(len(prompts), *mixture.latent_shape)
    levels = schedule(sampler, mixture, steps)
    return sampler(model, x, **levels, **{"extra_args": extra, "disable": True, **options})


def white(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A noise sampler of the shape k-diffusion takes; its own tree is slow."""
    return lambda sigma, sigma_next: torch.randn_like(x)


class Recorder:
    """A denoiser that writes down how it was called."""

    def __init__(self, model: Any = MIXTURE) -> None:
        self.model = model
        self.sigmas: list[float] = []
        self.options: list[dict[str, Any]] = []

    @property
    def calls(self) -> int:
        return len(self.sigmas)

    def __call__(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        self.sigmas.append(float(sigma.reshape(-1)[0]))
        self.options.append(options)
        out: Tensor = self.model(x, sigma, **options)
        return out


class FailsAt:
    """A denoiser whose n-th call raises."""

    def __init__(self, n: int, error: BaseException) -> None:
        self.left, self.error = n, error

    def __call__(self, x: Tensor, sigma: Tensor, **options: Any) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return MIXTURE(x, sigma, **options)
