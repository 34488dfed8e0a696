"""The drift of EDDY: in closed form on latents, by finite differences through features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparke.guidance import _vectors
from sparke.kernels import squared_distances

__all__ = ["Pairs", "drift", "estimated", "spread"]

Rows = Callable[[Tensor], Tensor]


def drift(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    sigma: float,
    bandwidth: float,
    divergence: float = 1.0,
) -> Tensor:
    r"""(..., b, d) $\sigma^2 (c \operatorname{div} A_i + A_i \nabla \log p(x_i))$, $c = 1$.

    With $k_{ij}$ the Gaussian kernel, $\delta = x_i - x_j$, $R_i = \sigma^2 \nabla \log p(x_i)$ and
    $v_{ij} = R_j$, the sum over mates is $\sum_j \alpha_{ij} \delta + \beta_{ij} R_j$, where

    $$\alpha_{ij} = k_{ij} \Bigl( \frac{R_j \cdot R_i}{h^2}
      - \sigma^2 \frac{\delta \cdot R_j}{h^4} \Bigr), \qquad
      \beta_{ij} = k_{ij} \Bigl( -\frac{\delta \cdot R_i}{h^2}
      + \sigma^2 \frac{\|\delta\|^2}{h^4} - \sigma^2 \frac{d - 1}{h^2} \Bigr).$$

    Args:
        x: (..., b, d) noisy samples; leading dimensions are batches of their own.
        residual: (..., b, d) denoised - x.
        weight: (..., b, b) of j for i, 0 on the diagonal.
        sigma: noise level.
        bandwidth: h.
        divergence: c, 1 for a drift that leaves p as it is.
    """
    x = x - x.mean(-2, keepdim=True)
    wide, d = bandwidth**2, x.shape[-1]
    gram, toward = x @ x.mT, residual @ x.mT  # toward: i, j -> R_i . x_j
    length, own = (m.diagonal(dim1=-2, dim2=-1) for m in (gram, toward))
    squared = (length[..., :, None] + length[..., None, :] - 2 * gram).clamp_min(0)
    kernel = weight * torch.exp(-squared / (2 * wide))
    delta_i = own[..., :, None] - toward  # delta . R_i
    delta_j = toward.mT - own[..., None, :]  # delta . R_j
    noise = divergence * sigma**2 / wide
    alpha = kernel * (residual @ residual.mT - noise * delta_j) / wide
    beta = kernel * (noise * (squared - (d - 1) * wide) - delta_i) / wide
    return alpha.sum(-1, keepdim=True) * x - alpha @ x + beta @ residual


@dataclass(frozen=True)
class Pairs:
    """A Gaussian kernel between samples as some features see them.

    Attributes:
        y: (b, ...) what the features read.
        rows: y -> (b, m) features, differentiable.
        seen: (b, m) features of `y`, the mates stand still there.
        weight: (b, b) of j for i, 0 on the diagonal.
        bandwidth: of the features.
    """

    y: Tensor
    rows: Rows
    seen: Tensor
    weight: Tensor
    bandwidth: float

    def values(self, y: Tensor) -> Tensor:
        """(b, b) weighted kernel of row i, moved to y_i, with mate j where it was."""
        with torch.no_grad():
            return self._values(y)

    def gradient(self, y: Tensor, coefficients: Tensor) -> Tensor:
        """(b, ...) gradient in y_i of the sum over j of coefficients (b, b) times values."""
        leaf = y.detach().clone().requires_grad_()
        with torch.enable_grad():
            total = (coefficients * self._values(leaf)).sum()
        (found,) = torch.autograd.grad(total, leaf)
        return _vectors.working(found)

    def _values(self, y: Tensor) -> Tensor:
        rows = _vectors.working(self.rows(y))
        squared = squared_distances(rows - self.seen.mean(0), self.seen - self.seen.mean(0))
        return self.weight * torch.exp(-squared / (2 * self.bandwidth**2))


def estimated(
    pairs: Pairs,
    residual: Tensor,
    probes: Iterable[Tensor],
    sigma: float,
    *,
    step: float,
    jacobian: float = 1.0,
    divergence: bool = True,
) -> Tensor:
    r"""(b, ...) the same drift for any features, by finite differences.

    First derivatives along a residual are central differences of the kernel; $\nabla^2 k\, v$ is a
    central difference of its gradient, one for each mate; $\Delta k$ is Hutchinson's mean of
    $z^T \nabla^2 k\, z$, a second difference of the kernel, over probes z of random signs.

    Args:
        pairs: the kernel.
        residual: (b, ...) denoised - x.
        probes: (b, ...) tensors of random signs.
        sigma: noise level.
        step: length of one finite difference, per sample.
        jacobian: multiple of the identity that stands for the derivative of what the features read
            in the noisy sample.
        divergence: False leaves div A out, and with it all but two finite differences.
    """
    flat = residual.flatten(1)
    back = pairs.gradient(pairs.y, flat @ flat.mT)  # sum over j of grad k (R_j . R_i)
    size = _vectors.norm(residual)
    ahead = step * _vectors.unit(residual)
    slope = (pairs.values(pairs.y + ahead) - pairs.values(pairs.y - ahead)) / (2 * step)
    along = _vectors.rowwise(size, slope) * slope  # grad k . R_i
    total = (along @ flat).view_as(residual) - back
    if not divergence:
        return jacobian * total
    curved = _laplacian(pairs, probes, step) @ flat
    curved = curved - _hessian_times(pairs, residual, step).flatten(1)
    moved: Tensor = jacobian * total + (sigma * jacobian) ** 2 * curved.view_as(residual)
    return moved


def _laplacian(pairs: Pairs, probes: Iterable[Tensor], step: float) -> Tensor:
    """(b, b) Laplacians of the kernel in y_i, by Hutchinson."""
    here, count = 2 * pairs.values(pairs.y), 0
    total = torch.zeros_like(here)
    pace = step / math.sqrt(pairs.y[0].numel())
    for probe in probes:
        move = pace * probe
        total += pairs.values(pairs.y + move) + pairs.values(pairs.y - move) - here
        count += 1
    return total / (count * pace**2)


def _hessian_times(pairs: Pairs, residual: Tensor, step: float) -> Tensor:
    """(b, ...) sum over mates j of the kernel's Hessian in y_i times R_j."""
    b = len(residual)
    one, place = torch.eye(b).to(pairs.weight), torch.arange(b, device=residual.device)
    total = torch.zeros_like(residual)
    for shift in range(1, b):
        mate = (place + shift) % b
        if not bool(pairs.weight[place, mate].any()):
            continue
        toward = residual[mate]
        move = step * _vectors.unit(toward)
        ahead = pairs.gradient(pairs.y + move, one[mate])
        behind = pairs.gradient(pairs.y - move, one[mate])
        total += _vectors.norm(toward) * (ahead - behind) / (2 * step)
    return total


def spread(rows: Tensor, mates: Tensor) -> float:
    """Median distance between samples that are mates, 0 if there are none."""
    apart = squared_distances(rows - rows.mean(0), rows - rows.mean(0))[mates]
    return float(apart.median().sqrt()) if len(apart) else 0.0
