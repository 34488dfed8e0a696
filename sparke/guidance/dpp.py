"""DiverseFlow: a determinantal point process over a batch's estimates (arXiv 2504.07894)."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TypeAlias

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError
from sparke.guidance import _samples, _vectors
from sparke.protocols import Run, State

__all__ = ["DPP"]

JITTER = 1e-4
FLOOR = 0.01
"""Lowest quality weight."""

Quality: TypeAlias = "float | Callable[[Tensor], Tensor] | None"


class DPP:
    r"""DiverseFlow's determinantal point process, on the denoised estimate (arXiv 2504.07894).

    The n estimates of a batch are a draw from a determinantal point process, whose likelihood is
    the volume they span:

    $$\log \mathcal{L} = \log \det L - \log \det (L + I), \qquad
      L_{ij} = q_i q_j \exp\left(-h \frac{\|f_i - f_j\|^2}{\operatorname{median}_{i<j}
      \|f_i - f_j\|^2}\right),$$

    with f the `features` of the estimates (flattened latents if None), h the `spread`, q the
    optional quality. The paper adds $\gamma(t) \nabla \log\mathcal{L}$ to the velocity of a flow,
    gamma being the noise level of the probability path over the norm of the gradient. With the
    estimate $D = x_t + (1 - t) v$ at flow time t (1 is data), and $1 - t = \sigma / (1 + \sigma)$,
    velocity and schedule contribute one factor 1 - t each:

    $$D_i \leftarrow D_i + \text{scale} \cdot \sqrt{d} \left(\frac{\sigma}{1 + \sigma}\right)^2
      \frac{\nabla_i \log\mathcal{L}}
      {\left(\frac{1}{n}\sum_j \|\nabla_j \log\mathcal{L}\|^2\right)^{1/2}}$$

    with sigma, and the displacement, in units of the data's standard deviation S. The square root
    of the number of dimensions d is ours and makes one `scale` serve all sizes: scale is the root
    mean square length of a push at high noise, in standard deviations of the data per dimension.
    Its default was chosen on the model that ships and on exact mixtures.

    The median and the norm are constants of the gradient. Determinants are those of
    ``L + jitter I``, by Cholesky's method in float64: without it the likelihood of two equal
    samples is 0 and its gradient infinite. The sign is the one that raises the likelihood; with
    the minus of the printed equation samples would be drawn together.

    What it is not: it knows the samples of one batch only, not earlier ones (the score of the same
    name reads a memory), and it does not preserve the model's distribution. The volume counts n
    directions, so with many more samples than modes it pushes inside modes too. Its cost is
    O(n^2 d + n^3) a step, without a call of the denoiser unless `jacobian`.

    Args:
        scale: see above; 0 leaves the host bit-identical.
        spread: h, above 0; larger values make only near samples repel each other.
        quality: weights q. A number p in (0, 1) is the paper's constraint: with
            $\hat\epsilon = (x - D)/\sigma$ and $\rho^2$ the p quantile of its squared length for
            true noise (chi-squared, by Wilson and Hilferty's approximation),
            $q = \max(0.01, \exp(\min(0, \rho^2 - \|\hat\epsilon\|^2)))$, whose gradient
            holds samples back until it is at its floor. A function makes weights (b,) above 0 of
            the estimates (b, ...), differentiably. None: all 1.
        features: latents (b, ...) -> (b, d) rows, differentiable; published: a vision transformer
            of the decoded picture.
        jacobian: take the gradient in x, through the denoiser, as the paper writes it: one more
            evaluation and its backward pass, in hosts that allow it. Otherwise in the estimate.
        sigma_data: S in the host's units; the host's own figure if None, else 1.
        jitter: added to the diagonal of L, whose own entries are q squared.
        prompt_aware: only samples of one prompt make a set, where prompts are known.
        nonfinite: ``"warn"`` and go on unguided, or ``"raise"``.

    Raises:
        ArgumentError: an option has a forbidden value; at ``begin``, a batch of one.
    """

    def __init__(
        self,
        scale: float = 0.5,
        *,
        spread: float = 1.0,
        quality: Quality = None,
        features: Callable[[Tensor], Tensor] | None = None,
        jacobian: bool = False,
        sigma_data: float | None = None,
        jitter: float = JITTER,
        prompt_aware: bool = True,
        nonfinite: str = "warn",
    ) -> None:
        self.scale = checks.positive("scale", scale, zero=True)
        self.spread = checks.positive("spread", spread)
        if quality is not None and not callable(quality) and not _is_share(quality):
            raise ArgumentError(
                "quality must be None, a function, or a share of true noise between 0 and 1, got "
                f"{quality!r}."
            )
        self.quality, self.features = quality, features
        self.jacobian, self.prompt_aware = jacobian, prompt_aware
        self.sigma_data = None if sigma_data is None else checks.positive("sigma_data", sigma_data)
        self.jitter = checks.positive("jitter", jitter)
        self.nonfinite = checks.choice("nonfinite", nonfinite, ("warn", "raise"))
        self._unit = 1.0
        self._mates: Tensor | None = None
        self._told: set[int] = set()

    def __repr__(self) -> str:
        return (
            f"DPP(scale={self.scale}, spread={self.spread}, quality={self.quality}, "
            f"jacobian={self.jacobian}, jitter={self.jitter})"
        )

    def begin(self, run: Run) -> None:
        """Find which samples make a set.

        Raises:
            ArgumentError: the batch has one sample.
        """
        self._mates, self._told = None, set()
        if self.scale == 0:
            return
        _samples.several("DiverseFlow's point process", run)
        self._unit = self.sigma_data or run.sigma_data or 1.0
        self._mates = _samples.alike(run, prompt_aware=self.prompt_aware)

    def __call__(self, state: State) -> Tensor:
        """Displacement of ``state.denoised``, (b, ...) in its dtype.

        Raises:
            NonFiniteGuidance: it is not finite and `nonfinite` is ``"raise"``.
            ArgumentError: `jacobian` in a host that cannot be evaluated again.
            ShapeError: `features` or `quality` returned something of another shape.
        """
        sigma = state.step.sigma / self._unit
        if self._mates is None or sigma <= 0:
            return torch.zeros_like(state.denoised)
        gradient = self._gradient(state, self._mates)
        squared = gradient.flatten(1).square().sum(1)
        # A broken sample neither pushes nor counts.
        good = squared.isfinite()
        together = ((self._mates | _diagonal(self._mates)) & good).to(squared)
        size = (together @ torch.where(good, squared, 0.0) / together.sum(1)).sqrt()
        size = size.clamp_min(torch.finfo(size.dtype).tiny ** 0.5)
        length = self.scale * self._unit * math.sqrt(state.denoised[0].numel())
        length /= (1 + 1 / sigma) ** 2
        delta = length * gradient / _vectors.rowwise(size, gradient)
        return _samples.checked(delta, state.step, self.nonfinite, self._told).to(
            state.denoised.dtype
        )

    def finish(self, x: Tensor) -> None:
        """Keep nothing."""
        self._mates = None

    def _gradient(self, state: State, mates: Tensor) -> Tensor:
        """(b, ...) of the log-likelihood; NaN for samples that are not finite themselves."""
        evaluate = _samples.evaluation(state) if self.jacobian else None
        # Samplers run under no_grad and some hosts under inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            x = _vectors.working(state.x.detach().clone())
            mates = mates.clone()
            if evaluate is not None:
                leaf = x.requires_grad_()
                denoised = _vectors.working(evaluate(leaf.to(state.x.dtype)))
            else:
                leaf = _vectors.working(state.denoised.detach().clone()).requires_grad_()
                denoised = leaf
            rows = _samples.rows_of(denoised, self.features)
            noise = (x - denoised) / state.step.sigma
            rows, mates, good = _samples.sound(rows, mates)
            weight = torch.where(good, self._log_quality(denoised, noise), 0.0)
            value = _log_likelihood(rows, weight, mates, self.spread, self.jitter)
            (found,) = torch.autograd.grad(value, leaf)
        return torch.where(_vectors.rowwise(good, found), found, torch.nan)

    def _log_quality(self, denoised: Tensor, noise: Tensor) -> Tensor:
        """(b,) logarithms of the quality weights."""
        if self.quality is None:
            return denoised.new_zeros(len(denoised))
        if callable(self.quality):
            weight = self.quality(denoised)
            checks.shape("quality(denoised)", weight, (len(denoised),))
            return weight.log()
        excess = noise.flatten(1).square().sum(1) - _chi_squared(self.quality, noise[0].numel())
        return (-excess).clamp(math.log(FLOOR), 0.0)


def _log_likelihood(
    rows: Tensor, log_quality: Tensor, mates: Tensor, spread: float, jitter: float
) -> Tensor:
    """Sum over the sets of log det L - log det (L + I), jitter on both diagonals."""
    if rows.device.type == "mps":  # which has no float64
        rows, log_quality, mates = rows.cpu(), log_quality.cpu(), mates.cpu()
    rows, log_quality = rows.double(), log_quality.double()
    one = _diagonal(mates)
    squared = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    sets, which = torch.unique(mates | one, dim=0, return_inverse=True)
    pairs = [squared.detach()[row[:, None] & row & ~one] for row in sets]
    median = torch.stack([p.median() if len(p) else p.new_ones(()) for p in pairs])
    scale = median.clamp_min(torch.finfo(median.dtype).tiny)[which, None]
    kernel = torch.exp(-spread * squared / scale)
    kernel = torch.where(mates, kernel, one.to(kernel))
    kernel = kernel * (log_quality[:, None] + log_quality).exp()
    value = kernel.new_zeros(())
    for shift, sign in ((jitter, 1), (1 + jitter, -1)):
        factor, failed = torch.linalg.cholesky_ex(kernel + shift * one)
        logdet = 2 * factor.diagonal().log().sum()
        value = value + sign * torch.where(failed == 0, logdet, torch.nan)
    return value


def _diagonal(mates: Tensor) -> Tensor:
    return torch.eye(len(mates), dtype=torch.bool, device=mates.device)


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 < value < 1


def _chi_squared(share: float, dimensions: int) -> float:
    """The quantile of a chi-squared variable, by Wilson and Hilferty's cube."""
    part = 2 / (9 * dimensions)
    return dimensions * (1 - part + NormalDist().inv_cdf(share) * math.sqrt(part)) ** 3


build = DPP
