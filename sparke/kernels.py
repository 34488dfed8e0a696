r"""Similarity of rows: kernels, their squares in log form, and rules for the bandwidth.

All kernels are normalised, k(u, u) = 1. The Gaussian kernel is

$$k(u, v) = \exp\left(-\frac{\|u - v\|^2}{2 s^2}\right)$$

with bandwidth s. Scores of order 2 (RKE, and SPARKE, arXiv 2506.10173) square it: $k^2$ is again
Gaussian, with bandwidth $s/\sqrt 2$. Every `bandwidth` in sparke is the s of the unsquared kernel,
as published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError
from sparke.protocols import Features, Selection

__all__ = [
    "KERNELS",
    "QuantileRule",
    "cosine",
    "gaussian",
    "kernel_matrix",
    "normalize",
    "prompt_log_weight",
    "squared_distances",
]

KERNELS = ("gaussian", "cosine")
RELEVANT = math.log(0.1)
"""Rows whose log prompt weight is above this count as rows of the same prompt."""
SAMPLED_ROWS = 256
"""At most this many rows are compared pairwise when a bandwidth is read off a bank."""


def normalize(x: Tensor) -> Tensor:
    """Rows of x, (n, d), scaled to unit length; zero rows stay zero."""
    length = x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
    unit: Tensor = x / length
    return unit


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, d), (m, d) -> (n, m) squared Euclidean distances, at least 0, differentiable."""
    a2 = a.square().sum(-1, keepdim=True)
    b2 = torch.linalg.vector_norm(b, dim=-1).square()  # no temporary the size of the bank
    return torch.addmm(a2 + b2, a, b.mT, alpha=-2).clamp_min(0)


def gaussian(a: Tensor, b: Tensor, bandwidth: float | Tensor = 1.0) -> Tensor:
    """(n, d), (m, d) -> (n, m), exp(-|a - b|^2 / (2 bandwidth^2)).

    `bandwidth` may be a tensor that broadcasts to (n, m); one is taken at its word.
    """
    if not isinstance(bandwidth, Tensor):
        checks.positive("bandwidth", bandwidth)
    return torch.exp(squared_distances(a, b) / (-2 * bandwidth**2))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(n, d), (m, d) -> (n, m), cosine of the angle between rows; 0 where a row is zero."""
    return normalize(a) @ normalize(b).mT


def kernel_matrix(
    a: Tensor, b: Tensor, kernel: str = "gaussian", bandwidth: float | Tensor = 1.0
) -> Tensor:
    """(n, d), (m, d) -> (n, m) similarities by the name of the kernel."""
    checks.choice("kernel", kernel, KERNELS)
    return cosine(a, b) if kernel == "cosine" else gaussian(a, b, bandwidth)


def prompt_log_weight(query_cond: Tensor, bank_cond: Tensor, bandwidth: float) -> Tensor:
    r"""(b, c), (n, c) -> (b, n), $\log k_T(p, t_j)^2 = -\|\hat p - \hat t_j\|^2 / s_T^2$.

    The published prompt kernel of SPARKE (arXiv 2506.10173): Gaussian on L2-normalised prompt
    embeddings, squared as the image kernel is.
    """
    dtype = torch.promote_types(query_cond.dtype, torch.float32)
    queries, rows = normalize(query_cond.to(dtype)), normalize(bank_cond.to(dtype))
    return -squared_distances(queries, rows) / bandwidth**2


@dataclass(frozen=True)
class QuantileRule:
    """Bandwidth from the data: `factor` times a quantile of distances.

    Among the rows of a bank whose prompt matters to the query, the `rows` quantile of their
    pairwise distances, read once per generation. Among batch mates, which sharpen while they are
    being generated, the `mates` quantile of the query's distances to them at this noise level.

    With the squared kernel, ``factor=0.5`` is a Gaussian of standard deviation 0.35 times the
    quantile.

    Attributes:
        rows: quantile in (0, 1] among finished rows.
        mates: quantile in (0, 1] among batch mates.
        factor: multiplies the quantile, above 0.
    """

    rows: float = 0.75
    mates: float = 0.5
    factor: float = 0.5

    def __post_init__(self) -> None:
        checks.positive("factor", self.factor)
        for name in ("rows", "mates"):
            if checks.positive(name, getattr(self, name)) > 1:
                raise ArgumentError(f"{name} must be a quantile in (0, 1], got {self.__dict__}.")

    def __call__(self, query: Features, bank: Features) -> Tensor:
        """(b, 1) bandwidths, constant under differentiation."""
        with torch.no_grad():
            dtype = torch.promote_types(query.x.dtype, torch.float32)
            x, bank = query.x.detach().to(dtype), replace(bank, x=bank.x.detach().to(dtype))
            if isinstance(bank, Selection) and bank.mates:
                scale = _mates_scale(x, bank, self.mates)
            else:
                scale = _rows_scale(x.shape[0], bank, self.rows)
            # A bank of identical rows has distance 0; any positive bandwidth then serves.
            return (self.factor * scale).clamp_min(1e-6)


def _log_weight(bank: Features, queries: int) -> Tensor:
    weight = bank.log_weight if isinstance(bank, Selection) else None
    return bank.x.new_zeros(queries, len(bank)) if weight is None else weight


def _mates_scale(x: Tensor, bank: Selection, quantile: float) -> Tensor:
    distance = squared_distances(x, bank.x).sqrt()
    weight = _log_weight(bank, x.shape[0])
    relevant = weight > RELEVANT
    # A sample without mates of its own prompt still needs some scale: all mates give one.
    relevant = torch.where(relevant.any(-1, keepdim=True), relevant, weight > -torch.inf)
    seen = torch.where(relevant, distance, torch.nan)
    return torch.nan_to_num(torch.nanquantile(seen, quantile, dim=-1, keepdim=True), nan=1.0)


def _rows_scale(queries: int, bank: Features, quantile: float) -> Tensor:
    if len(bank) == 0:
        return bank.x.new_ones(queries, 1)
    masks, which = torch.unique(_log_weight(bank, queries) > RELEVANT, dim=0, return_inverse=True)
    scales = torch.stack([_pairwise_quantile(bank.x, mask, quantile) for mask in masks])
    return scales[which, None]


def _pairwise_quantile(x: Tensor, mask: Tensor, quantile: float) -> Tensor:
    rows = mask.nonzero().squeeze(1)
    if len(rows) < 3:
        # Too few of this prompt to tell a distance; the whole bank is the next best witness.
        rows = torch.arange(len(x), device=x.device)
    rows = rows[-SAMPLED_ROWS:]
    if len(rows) > 1:
        scale: Tensor = torch.pdist(x[rows]).quantile(quantile)
    else:
        # One row: independent rows of its length would be this far from it.
        scale = x[rows[0]].norm() * math.sqrt(2)
    return scale
