"""The Vendi score, given the prompts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparke import checks
from sparke.entropy import check_order, entropy
from sparke.protocols import Features, Selection
from sparke.scores import _kernel, _kernel_score, _spectral

__all__ = ["CondVendi", "build"]


@dataclass(frozen=True)
class CondVendi(_kernel_score.PromptKernelScore):
    r"""Effective number of distinct samples per prompt in a bank with one sample added.

    $$\text{Cond-Vendi}_q(X \cup z \mid T \cup p) =
      \exp\left(H_q(\tfrac{1}{n+1} K_X \circ K_T) - H_q(\tfrac{1}{n+1} K_T)\right)$$

    (arXiv 2506.10173, after arXiv 2411.02817), with $K_X$ and $K_T$ the kernel matrices of samples
    and of L2-normalised prompt embeddings, z and p included. Prompts alone explain the second term;
    what is left is variety at equal prompts.

    O(n^3) per evaluation and query, so at most `max_rows` rows are used, those whose prompts matter
    most, the newest among equals. For long histories use cond-rke.

    Attributes:
        kernel: ``"gaussian"`` or ``"cosine"``, on samples.
        bandwidth: of the Gaussian kernel on samples, or a rule.
        cond_bandwidth: of the Gaussian kernel on L2-normalised prompt embeddings.
        order: q above 0, infinity included; below 1 all is computed in float64.
        max_rows: rows of the bank used at most.

    Raises:
        ArgumentError: unknown kernel, bandwidth or order not above 0, max_rows below 1.
        MissingPrompts: query or bank comes without prompt embeddings.
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
        _kernel.need_prompts("cond-vendi", query, bank)
        if not len(bank) or query.cond is None or bank.cond is None:
            return query.x.sum(-1) * 0 + 1
        bank = self._weighted(query, bank)
        width = self._squared.width(query, bank)
        return _spectral.over_newest(self._value, query, bank, width, self.max_rows)

    def _value(self, query: Features, bank: Features, width: _spectral.Width) -> Tensor:
        exact = _spectral.enough_digits(query, self.order)
        assert exact.cond is not None
        assert bank.cond is not None
        k_x = _spectral.sample_kernels(exact, bank, self.kernel, width)
        k_t = _spectral.prompt_kernels(exact.cond, bank.cond, self.cond_bandwidth).to(k_x)
        joint = entropy(_spectral.over_seen(k_x * k_t, bank), self.order)
        found = (joint - entropy(_spectral.over_seen(k_t, bank), self.order)).exp()
        return found.to(query.x)

    def crowding(self, query: Features, bank: Features) -> Tensor:
        r"""(b,) $2S/(1+2S)$, as [CondRKE][sparke.scores.cond_rke.CondRKE]'s."""
        _kernel.check_selection(query, bank)
        bank = self._weighted(query, bank)
        return self._squared.crowding(query, bank, _kernel.given_weight(query, bank))

    def _weighted(self, query: Features, bank: Features) -> Features:
        if isinstance(bank, Selection) and bank.log_weight is not None:
            return bank
        if query.cond is None or bank.cond is None:
            return bank
        return Selection(bank.x, bank.cond, self.log_weight(query.cond, bank.cond))


build = CondVendi
