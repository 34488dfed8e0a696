"""The volume a sample adds to a bank, by a determinantal point process."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparke import checks
from sparke.kernels import normalize
from sparke.protocols import Features
from sparke.scores import _kernel, _kernel_score, _spectral

__all__ = ["DPP", "build"]


@dataclass(frozen=True)
class DPP(_kernel_score.KernelScore):
    r"""Logarithm of the volume a sample adds to a bank, relative to one unlike everything.

    A determinantal point process with kernel matrix L gives a set the likelihood
    $\mathcal{L} = \det L / \det(L + I)$ (as in DiverseFlow, arXiv 2504.07894). With
    $L_{X \cup z}$ that of the bank with the sample added,

    $$s(z) = \log \mathcal{L}(X \cup z) - \log \mathcal{L}(X) + \log 2$$

    is 0 for a sample at right angles to all rows and falls without bound towards a duplicate;
    `jitter` on the diagonal of L keeps it finite there (about ``log(3 jitter)``). Among batch mates
    its gradient is exactly that of the likelihood of the whole batch in each sample.

    With k the sample's kernels and $\tau$ the jitter, in closed form,
    $s = \log S_0 - \log S_1 + \text{const}$,
    $S_a = 1 + a + \tau - k^T (L_X + (a + \tau) I)^{-1} k$, and the gradient needs two solves, O(b
    n^3) in float64: at most `max_rows` rows, the newest, are used (a rule reads its bandwidth off
    all). A row's weight plays no part beyond hiding it.

    It is not the published method, only its likelihood: a DiversityGuider normalises each sample's
    direction and has its own schedule. The method is the guider of the same name. Where a bank
    fills the space it can reach, no volume is left to add and the direction tells little.

    Attributes:
        kernel: ``"gaussian"`` or ``"cosine"``.
        bandwidth: of the Gaussian kernel, or a rule.
        jitter: above 0.
        max_rows: rows of the bank used at most.

    Raises:
        ArgumentError: unknown kernel, bandwidth or jitter not above 0, max_rows below 1.
    """

    jitter: float = 1e-4
    max_rows: int = 64

    def __post_init__(self) -> None:
        checks.positive("jitter", self.jitter)
        checks.whole("max_rows", self.max_rows)
        super().__post_init__()

    def __call__(self, query: Features, bank: Features) -> Tensor:
        """(b,) scores of b query rows (b, d) against n bank rows (n, d); 0 for an empty bank."""
        _kernel.check_selection(query, bank)
        if not len(bank):
            return query.x.sum(-1) * 0
        width = self._squared.width(query, bank)
        return _spectral.over_newest(self._value, query, bank, width, self.max_rows)

    def direction(self, query: Features, bank: Features) -> Tensor:
        """(b, d) gradient of the score in ``query.x``, in closed form."""
        _kernel.check_selection(query, bank)
        if not len(bank):
            return torch.zeros_like(query.x)
        width = self._squared.width(query, bank)
        return _spectral.over_newest(self._direction, query, bank, width, self.max_rows)

    def _value(self, query: Features, bank: Features, width: _spectral.Width) -> Tensor:
        z = _spectral.wide(query).x
        rows = bank.x.to(z)
        edge, inner = self._kernels(z, rows, width, bank)
        (_, low), (_, high) = _left_over(edge, inner, self.jitter)
        apart = math.log1p(self.jitter) - math.log(2 + self.jitter)
        return (low.log() - high.log() - apart).to(query.x)

    def _direction(self, query: Features, bank: Features, width: _spectral.Width) -> Tensor:
        z = _spectral.wide(query).x
        rows = bank.x.to(z)
        edge, inner = self._kernels(z, rows, width, bank)
        (inside, low), (outside, high) = _left_over(edge, inner, self.jitter)
        # What lowers the score, per kernel.
        share = 2 * (inside / low[:, None] - outside / high[:, None])
        if self.kernel == "cosine":
            unit = normalize(z)
            towards = torch.where(_seen(z, bank), share, 0.0) @ normalize(rows)
            towards = towards - (towards * unit).sum(-1, keepdim=True) * unit
            length = z.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(query.x.dtype).tiny ** 0.5)
            away: Tensor = (-towards / length).to(query.x)
            return away
        pull = share * edge / _like(width, z) ** 2
        return torch.stack([p @ (q - rows) for p, q in zip(pull, z, strict=True)]).to(query.x)

    def _kernels(
        self, z: Tensor, rows: Tensor, width: _spectral.Width, bank: Features
    ) -> tuple[Tensor, Tensor]:
        """(b, n) to the queries and (b, n, n) among the rows, those hidden from a query alone."""
        if self.kernel == "cosine":
            unit = normalize(rows)
            edge, inner = normalize(z) @ unit.mT, (unit @ unit.mT).expand(len(z), -1, -1)
        else:
            scale = -2 * _like(width, z).expand(len(z), 1) ** 2
            # Exact differences: duplicates must be just that, or L is no kernel matrix any more.
            edge = (_apart(z, rows).square() / scale).exp()
            inner = (_apart(rows, rows).square() / scale[..., None]).exp()
        seen = _seen(z, bank)
        one = torch.eye(len(rows), dtype=z.dtype, device=z.device)
        both = seen[:, :, None] & seen[:, None, :]
        return torch.where(seen, edge, 0.0), torch.where(both, inner, one)


def _like(width: _spectral.Width, z: Tensor) -> Tensor:
    return torch.as_tensor(width, dtype=z.dtype, device=z.device)


def _seen(query: Tensor, bank: Features) -> Tensor:
    return _kernel.given_weight(Features(query), bank).isfinite()


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _left_over(edge: Tensor, inner: Tensor, jitter: float) -> list[tuple[Tensor, Tensor]]:
    """For L and L + I: (b, n) solutions for the edge, and (b,) what of the sample they leave."""
    one = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    found = []
    for shift in (jitter, 1 + jitter):
        factor, failed = torch.linalg.cholesky_ex(inner + shift * one)
        part = torch.cholesky_solve(edge[..., None], factor).squeeze(-1)
        left = 1 + shift - (edge * part).sum(-1)
        # Never a silent number from a factorisation that failed.
        found.append((part, torch.where(failed == 0, left, torch.nan)))
    return found


build = DPP
