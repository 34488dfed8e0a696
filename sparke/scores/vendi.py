"""The Vendi score, without prompts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparke import checks
from sparke.entropy import check_order, entropy
from sparke.protocols import Features
from sparke.scores import _kernel, _kernel_score, _spectral

__all__ = ["Vendi", "build"]


@dataclass(frozen=True)
class Vendi(_kernel_score.KernelScore):
    r"""Effective number of distinct samples in a bank with one sample added.

    $$V_q(X \cup z) = \exp H_q\left(\tfrac{1}{n+1} K_{X \cup z}\right), \qquad
      H_1 = -\sum_i \lambda_i \log \lambda_i$$

    (arXiv 2210.02410; order q: arXiv 2310.12952) over the eigenvalues of the kernel matrix: 1 when
    all samples are alike, n + 1 when all differ. Order 2 is RKE, order infinity looks at the
    largest cluster only.

    Each evaluation solves an (n+1) x (n+1) eigenproblem per query, O(n^3): at most `max_rows` rows,
    the newest, are used (a rule reads its bandwidth off all). It is not linear in the memory, and
    it has no closed-form direction here (autograd is used); for long histories use RKE.

    Attributes:
        kernel: ``"gaussian"`` or ``"cosine"``.
        bandwidth: of the Gaussian kernel, or a rule.
        order: q above 0, infinity included; below 1 all is computed in float64.
        max_rows: rows of the bank used at most.

    Raises:
        ArgumentError: unknown kernel, bandwidth or order not above 0, max_rows below 1.
    """

    order: float = 1.0
    max_rows: int = 256

    def __post_init__(self) -> None:
        check_order(self.order)
        checks.whole("max_rows", self.max_rows)
        super().__post_init__()

    def __call__(self, query: Features, bank: Features) -> Tensor:
        """(b,) effective numbers, 1 for an empty bank."""
        _kernel.check_selection(query, bank)
        if not len(bank):
            return query.x.sum(-1) * 0 + 1
        width = self._squared.width(query, bank)
        return _spectral.over_newest(self._value, query, bank, width, self.max_rows)

    def _value(self, query: Features, bank: Features, width: _spectral.Width) -> Tensor:
        exact = _spectral.enough_digits(query, self.order)
        k = _spectral.sample_kernels(exact, bank, self.kernel, width)
        return entropy(_spectral.over_seen(k, bank), self.order).exp().to(query.x)


build = Vendi
