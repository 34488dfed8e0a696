"""Particle Guidance: the noisy samples of one batch repel each other (arXiv 2310.13102)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparke import checks
from sparke.guidance import _samples
from sparke.protocols import Run, State

__all__ = ["Particle"]

LATENTS, FEATURES = (30.0, 1.0), (8.0, 3.0)
"""Published coefficient and lowest sigma, on latents and on features of the estimate."""
DIMENSIONS = 4 * 64 * 64
"""Of the latents the coefficient was published for: Stable Diffusion 1.5 at 512 pixels."""
HIGHEST = 14.61
"""The highest noise level of that model."""


class Particle:
    r"""Particle Guidance with a fixed potential, as its authors run it (arXiv 2310.13102).

    A joint potential over the n samples of a batch,
    $\log \Phi = -\frac{\alpha}{2} \sum_{ij} k(z_i, z_j)$, adds its gradient to each sample's
    score. With a Gaussian kernel on the noisy latents z and the median heuristic,

    $$\hat\epsilon_i \leftarrow \hat\epsilon_i - c\, \sigma \sum_{j \ne i}
      \frac{2 w_{ij}}{h_i} (z_i - z_j), \qquad w_{ij} = e^{-\|z_i - z_j\|^2 / h_i}, \qquad
      h_i = \frac{\operatorname{median}_j \|z_i - z_j\|^2}{\log n},$$

    at noise levels $\sigma \ge 1$. The published z are those of Stable Diffusion, which keep
    variance 1: $z = x / \sqrt{1 + \sigma^2}$ for $x = x_0 + \sigma\epsilon$. The estimate is
    $D = x - \sigma\hat\epsilon$, so the same update displaces it by

    $$D_i \leftarrow D_i + c\, \sigma^2 \sqrt{1 + \sigma^2} \sum_{j \ne i}
      \frac{2 w_{ij}}{h_i} (x_i - x_j)$$

    with w and h now taken of x, which changes neither w nor the direction. In data of standard
    deviation S, sigma is in units of S. That model's noise ends at 14.6: above it the displacement
    is held at what it is there, or flow models, whose sigma has no end, would be torn apart.

    Read on `features` of the estimate (published: DINO of the decoded picture), the gradient is
    brought back to the estimate by J, and the published update has no factor sigma:
    $D_i \leftarrow D_i + c\, \sigma\sqrt{1 + \sigma^2}\; J^T \sum_j 2 w_{ij} (f_i - f_j) / h_i$.

    The coefficient was published for latents of 16384 numbers. The push it gives, compared with the
    noise, falls with the number of dimensions d, so on latents it is multiplied by d/16384, which
    makes one number serve all sizes and is the published update at that size.

    Where this differs from the published code: its h divides by log(n - 1), which makes h infinite
    and the guidance nothing for two samples; the paper's log n is used. Samples of other prompts in
    the batch, which the authors do not have, do not count (`prompt_aware`).

    What it is not: earlier batches are not remembered, and with a fixed potential neither the
    batch nor one sample of it keeps the model's distribution. Its cost is O(n^2 d) a step, without
    a call of the denoiser; on features, their evaluation and backward pass.

    Args:
        scale: the coefficient c; published 30 on latents, 8 on features, which are the defaults. 0
            leaves the host bit-identical.
        features: latents (b, ...) -> (b, d) rows, differentiable; None compares noisy latents.
        lo: lowest sigma pushed at, in units of `sigma_data`; published 1 on latents, 3 on features.
        sigma_data: standard deviation per dimension of the data in the host's units; the host's own
            figure if None, else 1.
        prompt_aware: only samples of one prompt repel each other, where prompts are known.
        nonfinite: ``"warn"`` and go on unguided, or ``"raise"``.

    Raises:
        ArgumentError: a number is negative or not finite; at ``begin``, a batch of one.
    """

    def __init__(
        self,
        scale: float | None = None,
        *,
        features: Callable[[Tensor], Tensor] | None = None,
        lo: float | None = None,
        sigma_data: float | None = None,
        prompt_aware: bool = True,
        nonfinite: str = "warn",
    ) -> None:
        coefficient, lowest = LATENTS if features is None else FEATURES
        self.scale = checks.positive("scale", coefficient if scale is None else scale, zero=True)
        self.lo = checks.positive("lo", lowest if lo is None else lo, zero=True)
        self.features, self.prompt_aware = features, prompt_aware
        self.sigma_data = None if sigma_data is None else checks.positive("sigma_data", sigma_data)
        self.nonfinite = checks.choice("nonfinite", nonfinite, ("warn", "raise"))
        self._unit = 1.0
        self._mates: Tensor | None = None
        self._told: set[int] = set()

    def __repr__(self) -> str:
        reads = "noisy latents" if self.features is None else "features of denoised"
        return f"Particle(scale={self.scale}, lo={self.lo}, reads {reads})"

    def begin(self, run: Run) -> None:
        """Find who repels whom.

        Raises:
            ArgumentError: the batch has one sample, which has nobody to be repelled by.
        """
        self._mates, self._told = None, set()
        if self.scale == 0:
            return
        _samples.several("Particle Guidance", run)
        self._unit = self.sigma_data or run.sigma_data or 1.0
        self._mates = _samples.alike(run, prompt_aware=self.prompt_aware)

    def __call__(self, state: State) -> Tensor:
        """Displacement of ``state.denoised``, (b, ...) in its dtype; zeros below `lo`.

        Raises:
            NonFiniteGuidance: it is not finite and `nonfinite` is ``"raise"``.
        """
        sigma = state.step.sigma / self._unit
        if self._mates is None or sigma < self.lo:
            return torch.zeros_like(state.denoised)
        base = state.x if self.features is None else state.denoised
        rows, pull = _samples.read(base, self.features)
        rows, mates, good = _samples.sound(rows, self._mates)
        away = torch.where(good[:, None], _potential_gradient(rows, mates), torch.nan)
        level = min(sigma, HIGHEST)
        strength = self.scale * self._unit**2 * level * math.sqrt(1 + level**2)
        if self.features is None:
            strength *= sigma * rows.shape[1] / DIMENSIONS
        delta = _samples.checked(strength * pull(away), state.step, self.nonfinite, self._told)
        return delta.to(state.denoised.dtype)

    def finish(self, x: Tensor) -> None:
        """Keep nothing."""
        self._mates = None


def _potential_gradient(rows: Tensor, mates: Tensor) -> Tensor:
    """(b, d) sums of 2 w_ij (x_i - x_j) / h_i over the mates of i."""
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    others = mates.sum(1, keepdim=True)
    ordered = torch.where(mates, distance, torch.inf).sort(1).values
    # The lower of the two in the middle, as the authors' median takes it.
    median = ordered.gather(1, (others - 1).clamp_min(0) // 2)
    width = torch.where(others > 0, median.square() / (others + 1).to(rows).log(), 1.0)
    # Where most coincide the width is 0: only those push that do not, and they are too far to.
    width = width.clamp_min(torch.finfo(rows.dtype).tiny ** 0.5)
    push = 2 * torch.exp(-distance.square() / width) / width
    # What coincides gives no direction, and must not be a rounding error times a huge number.
    push = torch.where(mates & (distance > 0), push, 0.0)
    return torch.stack([p @ (row - rows) for p, row in zip(push, rows, strict=True)])


build = Particle
