"""Rényi kernel entropy of order 2, without prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparke.protocols import Features
from sparke.scores import _kernel, _kernel_score

__all__ = ["RKE", "build"]


@dataclass(frozen=True)
class RKE(_kernel_score.KernelScore):
    r"""How much a sample would raise the Rényi kernel entropy of a bank (order 2).

    $$\mathrm{RKE}(X) = \frac{1}{\|K/n\|_F^2} = \frac{n^2}{\sum_{ij} k(x_i, x_j)^2}$$

    (Jalali, Li and Farnia, "An Information-Theoretic Evaluation of Generative Models in Learning
    Multi-modal Distributions", NeurIPS 2023) is the effective number of distinct samples. Adding z
    to n rows adds $1 + 2\sum_i k(x_i, z)^2$ to the double sum, and nothing else in it depends on z.
    The score is the negative logarithm of the mean of those terms,

    $$s(z) = -\log \frac{1}{n} \sum_i k(x_i, z)^2,$$

    so that $\mathrm{RKE}(X \cup z) = (n+1)^2 / (\|K\|_F^2 + 1 + 2 n e^{-s(z)})$. The logarithm
    keeps the direction well scaled when everything is far: for the Gaussian kernel it is
    $\frac{2}{s^2}(z - \sum_i p_i x_i)$, a softmax attention over the bank, O(b n d), with no n x n
    matrix (the update of SPARKE, arXiv 2506.10173, in log form and without its prompt weights).

    It is not the RKE of a set (that is [metrics.rke][sparke.metrics.rke]), and prompts play no part
    in it: over many prompts use [CondRKE][sparke.scores.cond_rke.CondRKE].

    Attributes:
        kernel: ``"gaussian"`` or ``"cosine"``.
        bandwidth: s of the unsquared Gaussian kernel, in the units of the features (published: 0.8
            on L2-normalised latents), or a rule. The cosine kernel has none.

    Raises:
        ArgumentError: unknown kernel, bandwidth not above 0.
    """

    across: ClassVar[bool] = True
    """Rows on other ranks are read too."""

    def __call__(self, query: Features, bank: Features) -> Tensor:
        """(b,) scores of b query rows (b, d) against n bank rows (n, d); 0 for an empty bank."""
        _kernel.check_selection(query, bank)
        return self._squared.value(query, bank, _kernel.given_weight(query, bank))

    def direction(self, query: Features, bank: Features) -> Tensor:
        """(b, d) gradient of the score in ``query.x``, in closed form."""
        return self.direction_and_crowding(query, bank)[0]

    def direction_and_crowding(self, query: Features, bank: Features) -> tuple[Tensor, Tensor]:
        """Both from one pass over the bank."""
        _kernel.check_selection(query, bank)
        return self._squared.pull(query, bank, _kernel.given_weight(query, bank))


build = RKE
