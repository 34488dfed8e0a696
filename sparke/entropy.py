"""Rényi entropies of kernel matrices, safe to differentiate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError

__all__ = ["check_order", "entropy", "renyi"]


def check_order(order: float) -> float:
    """`order` as a float above 0 (infinity included)."""
    number = checks.number(order)
    if number is None or not number > 0:
        raise ArgumentError(f"order must be above 0 (1: Vendi, 2: RKE, inf: 1/max), got {order!r}.")
    return number


def entropy(k: Tensor, order: float = 1.0) -> Tensor:
    r"""(..., n, n) positive semi-definite, trace 1 -> (...), Rényi entropy of the eigenvalues.

    $$H_q = \frac{1}{1-q} \log \sum_i \lambda_i^q, \quad H_1 = -\sum_i \lambda_i \log \lambda_i,
      \quad H_\infty = -\log \max_i \lambda_i$$

    exp(H_1) is the Vendi score (arXiv 2210.02410), exp(H_q) its order-q form (arXiv 2310.12952),
    exp(H_2) is RKE. The gradient is the spectral function's own, $V\,h'(\Lambda)\,V^T$: it divides
    by no gap between eigenvalues, so repeated ones do no harm, and it stays finite at zero, where
    a kernel matrix cannot leave its null space to first order.

    Eigenvalues below ``n eps`` of the matrix's dtype count as zero: rounding makes as much of
    nothing. Orders below 1 weigh the smallest most; give them a matrix computed in float64.
    """
    if check_order(order) == 2.0:
        return -torch.log(k.square().sum((-2, -1)))
    value: Tensor = _Entropy.apply(k, float(order))
    return value


def renyi(probabilities: Tensor, order: float) -> Tensor:
    """(..., k) summing to 1, zeros allowed -> (...), their Rényi entropy of an order."""
    if order == 1.0:
        of_each: Tensor = torch.special.xlogy(probabilities, probabilities)
        return -of_each.sum(-1)
    if math.isinf(order):
        return -probabilities.amax(-1).log()
    # In logarithms, for a large order takes small probabilities to 0.
    return (order * probabilities.log()).logsumexp(-1) / (1 - order)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, order: float) -> Tensor:
        values, vectors = torch.linalg.eigh(k)
        # Below this, an eigenvalue is rounding error of a matrix of trace 1.
        floor = k.shape[-1] * torch.finfo(k.dtype).eps
        values = values.clamp_min(floor)
        ctx.order = order
        ctx.save_for_backward(values, vectors)
        return renyi(torch.where(values > floor, values, 0.0), order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        values, vectors = ctx.saved_tensors
        q = ctx.order
        if q == 1.0:
            slope = -(values.log() + 1)
        elif math.isinf(q):
            # Tied leaders share the subgradient.
            top = values >= values.amax(-1, keepdim=True) * (1 - 1e-6)
            slope = top / (-top.sum(-1, keepdim=True) * values.amax(-1, keepdim=True))
        else:
            slope = q * values.pow(q - 1) / ((1 - q) * values.pow(q).sum(-1, keepdim=True))
        return grad[..., None, None] * ((vectors * slope[..., None, :]) @ vectors.mT), None
