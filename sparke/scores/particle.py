"""Particle Guidance's potential as a score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparke import ops
from sparke.kernels import kernel_matrix, normalize
from sparke.protocols import Features, Selection
from sparke.scores import _kernel, _kernel_score

__all__ = ["Particle", "build"]


@dataclass(frozen=True)
class Particle(_kernel_score.KernelScore):
    r"""How little a sample resembles a bank: minus the sum of its kernels with the rows.

    $$s(z) = -\sum_j w_j\, k(x_j, z)$$

    is what a sample contributes to the fixed joint potential of Particle Guidance,
    $\log \Phi = -\frac{\alpha}{2} \sum_{ij} k(x_i, x_j)$ (arXiv 2310.13102), with alpha 1 and the
    constant for itself left out; w are weights of the rows, 1 unless a selection has others. For
    the Gaussian kernel the gradient is $\frac{1}{s^2} \sum_j w_j k(x_j, z) (z - x_j)$, O(b n d)
    without a matrix among the rows. Unlike [RKE][sparke.scores.rke.RKE]'s logarithm it vanishes
    where everything is far.

    It is not the published method, only its potential: a DiversityGuider normalises the direction,
    reads the estimate and remembers. The method, on noisy latents with its own schedule, is the
    guider of the same name. The published bandwidth is $s^2 = \operatorname{median}^2 / (2 \log n)$
    among n mates; the rule here, half a quantile of distances, is that of n = 7, and works on
    memory as well.

    Attributes:
        kernel: ``"gaussian"`` or ``"cosine"``.
        bandwidth: s of the Gaussian kernel, in the units of the features, or a rule. The cosine
            kernel has none.

    Raises:
        ArgumentError: unknown kernel, bandwidth not above 0.
    """

    def __call__(self, query: Features, bank: Features) -> Tensor:
        """(b,) scores of b query rows (b, d) against n bank rows (n, d); 0 for an empty bank."""
        _kernel.check_selection(query, bank)
        if not len(bank):
            return query.x.sum(-1) * 0
        width = self._squared.width(query, bank)
        k = kernel_matrix(query.x, bank.x.to(query.x), self.kernel, width)
        value: Tensor = -(k * _kernel.given_weight(query, bank).exp()).sum(-1)
        return value

    def direction(self, query: Features, bank: Features) -> Tensor:
        """(b, d) gradient of the score in ``query.x``, in closed form."""
        _kernel.check_selection(query, bank)
        if not len(bank):
            return torch.zeros_like(query.x)
        log_weight = _kernel.given_weight(query, bank)
        if self.kernel == "cosine":
            unit, rows = normalize(query.x), normalize(bank.x.to(query.x))
            towards = log_weight.exp() @ rows
            towards = towards - (towards * unit).sum(-1, keepdim=True) * unit
            length = query.x.norm(dim=-1, keepdim=True)
            off: Tensor = -towards / length.clamp_min(torch.finfo(query.x.dtype).tiny ** 0.5)
            return off
        width = self._squared.width(query, bank)
        norms, center = (bank.norms, bank.center) if isinstance(bank, Selection) else (None, None)
        # The pull squares its kernel: a bandwidth of s sqrt(2) makes that the kernel of s.
        log_sum, mean = ops.pull(
            query.x,
            bank.x.to(query.x.device),
            log_weight,
            width * 2**0.5,
            norms=norms,
            center=center,
        )
        mass = log_sum.to(query.x).exp()[:, None]
        away: Tensor = mass * (query.x - mean.to(query.x)) / width**2
        return away


build = Particle
