"""What the Vendi family shares: kernel matrices of a bank with one query added, per query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from sparke.kernels import gaussian, kernel_matrix, normalize
from sparke.protocols import Features, Selection

Width: TypeAlias = float | Tensor


def wide(query: Features) -> Features:
    """The queries in float64, on the CPU where their device has none."""
    device = torch.device("cpu") if query.x.device.type == "mps" else query.x.device
    x, cond = query.x, query.cond
    return Features(x.to(device).double(), None if cond is None else cond.to(device).double())


def enough_digits(query: Features, order: float) -> Features:
    """The queries in the dtype that an entropy of this order wants its kernels in.

    Below order 1 the smallest eigenvalues count most. Those of a kernel matrix in float32 are lost
    below ``n eps``: of 257 standard normal rows in a plane, bandwidth 1, order 0.5 lost 2.7 % of
    its value and order 0.9 0.35 %.
    """
    return wide(query) if order < 1 else query


def over_newest(
    value: Callable[[Features, Features, Width], Tensor],
    query: Features,
    bank: Features,
    width: Width,
    most: int,
) -> Tensor:
    """(b,) values, each over the `most` rows that weigh most to it, the newest among equals."""
    if len(bank) <= most:
        return value(query, bank, width)
    if not isinstance(bank, Selection) or bank.log_weight is None:
        cond = None if bank.cond is None else bank.cond[-most:]
        return value(query, replace(bank, x=bank.x[-most:], cond=cond), width)
    kept = torch.argsort(bank.log_weight, dim=-1, stable=True)[:, -most:].sort(-1).values
    # Queries that look at the same rows, as those of one prompt do, go together.
    choices, which = torch.unique(kept, dim=0, return_inverse=True)
    values, places = [], []
    for number, rows in enumerate(choices):
        here = (which == number).nonzero().squeeze(1)
        seen = replace(
            bank,
            x=bank.x[rows],
            cond=None if bank.cond is None else bank.cond[rows],
            log_weight=bank.log_weight[here][:, rows],
        )
        asked = Features(query.x[here], None if query.cond is None else query.cond[here])
        if isinstance(width, Tensor) and width.ndim and len(width) == len(query):
            values.append(value(asked, seen, width[here]))
        else:
            values.append(value(asked, seen, width))
        places.append(here)
    return torch.cat(values)[torch.cat(places).argsort()]


def bordered(inner: Tensor, edge: Tensor) -> Tensor:
    """(n, n) among the bank and (b, n) to the queries -> (b, n+1, n+1), ones on the diagonal."""
    b, n = edge.shape
    top = torch.cat([inner.expand(b, n, n), edge[:, :, None]], -1)
    bottom = torch.cat([edge, edge.new_ones(b, 1)], -1)
    return torch.cat([top, bottom[:, None]], -2)


def sample_kernels(query: Features, bank: Features, kernel: str, width: Width) -> Tensor:
    """(b, n+1, n+1) kernels of the samples; a bandwidth per query makes matrices per query."""
    rows = bank.x.to(query.x)
    width = width.to(rows.device) if isinstance(width, Tensor) else width
    if kernel == "cosine":
        return bordered(kernel_matrix(rows, rows, kernel), kernel_matrix(query.x, rows, kernel))
    edge = gaussian(query.x, rows, width)
    inner_width = width[..., None] if isinstance(width, Tensor) else width
    return bordered(gaussian(rows, rows, inner_width), edge)


def prompt_kernels(query: Tensor, bank: Tensor, bandwidth: float) -> Tensor:
    """(b, n+1, n+1) Gaussian kernels of L2-normalised prompt embeddings."""
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    q, rows = normalize(query), normalize(bank.to(query))
    return bordered(gaussian(rows, rows, bandwidth), gaussian(q, rows, bandwidth))


def over_seen(k: Tensor, bank: Features) -> Tensor:
    """Kernels over n, rows hidden from a query (weight -inf) taken out of both."""
    weight = bank.log_weight if isinstance(bank, Selection) else None
    if weight is None:
        return k / k.shape[-1]
    weight = weight.to(k.device)
    seen = torch.cat([weight.isfinite(), weight.new_ones(len(weight), 1, dtype=torch.bool)], -1)
    mask = seen[:, :, None] & seen[:, None, :]
    return torch.where(mask, k, 0.0) / seen.sum(-1)[:, None, None]
