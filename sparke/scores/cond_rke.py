"""Rényi kernel entropy of order 2, given the prompts: SPARKE's score."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from sparke.protocols import Features, Selection
from sparke.scores import _kernel, _kernel_score

__all__ = ["CondRKE", "build"]


@dataclass(frozen=True)
class CondRKE(_kernel_score.PromptKernelScore):
    r"""How much a sample would raise the conditional RKE of a bank, given the prompts.

    $$\text{Cond-RKE}(X \mid T) = \frac{\|K_T\|_F^2}{\|K_X \circ K_T\|_F^2}$$

    (SPARKE, arXiv 2506.10173) counts distinct samples among those of similar prompts. Adding z with
    prompt p adds $1 + 2\sum_i k_T(t_i, p)^2 k(x_i, z)^2$ below the line. The score is the negative
    logarithm of the weighted mean of those terms,

    $$s(z) = -\log \frac{\sum_i w_i\, k(x_i, z)^2}{\sum_i w_i}, \qquad
      w_i = k_T(t_i, p)^2 = e^{-\|\hat t_i - \hat p\|^2 / s_T^2},$$

    with embeddings L2-normalised, as published. Its gradient is attention over the bank, O(b n d):
    $\frac{2}{s^2}(z - \sum_i p_i x_i)$, $p = \operatorname{softmax}(\log k^2 + \log w)$. The
    weights do not change while a sample is generated; a bank that carries ``log_weight`` (what
    [Memory.select][sparke.protocols.Memory] returns) is taken at its word.

    It is not the conditional RKE of a set: that is
    [metrics.cond_rke][sparke.metrics.cond_rke].

    Attributes:
        kernel: ``"gaussian"`` or ``"cosine"``, on samples.
        bandwidth: s of the unsquared Gaussian kernel, in the units of the features (published: 0.8
            on L2-normalised latents), or a rule.
        cond_bandwidth: s_T on L2-normalised prompt embeddings (published: 0.3 to 0.35 for CLIP).

    Raises:
        ArgumentError: unknown kernel, bandwidth not above 0.
        MissingPrompts: query or bank comes without prompt embeddings.
    """

    across: ClassVar[bool] = True
    """Rows on other ranks are read too."""

    def __call__(self, query: Features, bank: Features) -> Tensor:
        """(b,) scores of b query rows (b, d) against n bank rows (n, d); 0 for an empty bank."""
        return self._squared.value(*self._weighted(query, bank))

    def direction(self, query: Features, bank: Features) -> Tensor:
        """(b, d) gradient of the score in ``query.x``, in closed form."""
        return self.direction_and_crowding(query, bank)[0]

    def crowding(self, query: Features, bank: Features) -> Tensor:
        r"""(b,) $2S/(1+2S)$, $S = \sum_i w_i k(x_i, z)^2$: the others' share of the increment."""
        return self._squared.crowding(*self._weighted(query, bank))

    def direction_and_crowding(self, query: Features, bank: Features) -> tuple[Tensor, Tensor]:
        """Both from one pass over the bank."""
        return self._squared.pull(*self._weighted(query, bank))

    def _weighted(self, query: Features, bank: Features) -> tuple[Features, Features, Tensor]:
        _kernel.check_selection(query, bank)
        if isinstance(bank, Selection) and bank.log_weight is not None:
            return query, bank, _kernel.given_weight(query, bank)
        _kernel.need_prompts("cond-rke", query, bank)
        if query.cond is None or bank.cond is None:
            return query, bank, _kernel.given_weight(query, bank)
        weight = self.log_weight(query.cond, bank.cond).to(query.x)
        if isinstance(bank, Selection):
            return query, replace(bank, log_weight=weight), weight
        return query, Selection(bank.x, bank.cond, weight), weight


build = CondRKE
