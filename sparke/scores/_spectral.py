"""What the Vendi family shares: kernel matrices of a bank with one query added, per query."""

from __future__ import annotations

import torch
from torch import Tensor

from sparke.kernels import gaussian, kernel_matrix, normalize
from sparke.protocols import Features, Selection
from sparke.scores import _kernel


def newest(bank: Features, most: int) -> Features:
    """At most `most` rows: those that weigh most to any query, the newest among equals."""
    if len(bank) <= most:
        return bank
    weight = bank.log_weight if isinstance(bank, Selection) else None
    if weight is None:
        keep = torch.arange(len(bank) - most, len(bank), device=bank.x.device)
    else:
        order = torch.argsort(weight.amax(0), stable=True)
        keep = order[-most:].sort().values
    cond = None if bank.cond is None else bank.cond[keep]
    if not isinstance(bank, Selection):
        return Features(bank.x[keep], cond)
    return Selection(bank.x[keep], cond, None if weight is None else weight[:, keep], bank.mates)


def bordered(inner: Tensor, edge: Tensor) -> Tensor:
    """(n, n) among the bank and (b, n) to the queries -> (b, n+1, n+1), ones on the diagonal."""
    b, n = edge.shape
    top = torch.cat([inner.expand(b, n, n), edge[:, :, None]], -1)
    bottom = torch.cat([edge, edge.new_ones(b, 1)], -1)
    return torch.cat([top, bottom[:, None]], -2)


def sample_kernels(
    query: Features, bank: Features, kernel: str, bandwidth: _kernel.Bandwidth
) -> Tensor:
    """(b, n+1, n+1) kernels of the samples; a bandwidth per query makes matrices per query."""
    rows = bank.x.to(query.x)
    if kernel == "cosine":
        return bordered(kernel_matrix(rows, rows, kernel), kernel_matrix(query.x, rows, kernel))
    width = _kernel.width_of(bandwidth, query, bank)
    edge = gaussian(query.x, rows, width)
    inner_width = width[..., None] if isinstance(width, Tensor) else width
    return bordered(gaussian(rows, rows, inner_width), edge)


def prompt_kernels(query: Tensor, bank: Tensor, bandwidth: float) -> Tensor:
    """(b, n+1, n+1) Gaussian kernels of L2-normalised prompt embeddings."""
    q, rows = normalize(query), normalize(bank.to(query))
    return bordered(gaussian(rows, rows, bandwidth), gaussian(q, rows, bandwidth))


def over_seen(k: Tensor, bank: Features) -> Tensor:
    """Kernels over n, rows hidden from a query (weight -inf) taken out of both."""
    weight = bank.log_weight if isinstance(bank, Selection) else None
    if weight is None:
        return k / k.shape[-1]
    seen = torch.cat([weight.isfinite(), weight.new_ones(len(weight), 1, dtype=torch.bool)], -1)
    mask = seen[:, :, None] & seen[:, None, :]
    return torch.where(mask, k, 0.0) / seen.sum(-1)[:, None, None]
