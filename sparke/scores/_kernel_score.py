"""What the scores of a kernel have in common: its options, their rules, and the crowding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from sparke import checks
from sparke.kernels import KERNELS, QuantileRule, prompt_log_weight
from sparke.protocols import Features, Requires
from sparke.scores import _kernel

__all__ = ["KernelScore", "PromptKernelScore"]

S = TypeVar("S", bound="KernelScore")


@dataclass(frozen=True)
class KernelScore:
    """Options of a kernel on samples. It has no value: each score's own file says what that is.

    Attributes:
        kernel: ``"gaussian"`` or ``"cosine"``.
        bandwidth: of the Gaussian kernel, or a rule.

    Raises:
        ArgumentError: unknown kernel, bandwidth not above 0.
    """

    kernel: str = "gaussian"
    bandwidth: _kernel.Bandwidth = QuantileRule()

    def __post_init__(self) -> None:
        checks.choice("kernel", self.kernel, KERNELS)
        _kernel.check_bandwidth("bandwidth", self.bandwidth)

    @property
    def requires(self) -> Requires:
        """Nothing."""
        return Requires()

    def crowding(self, query: Features, bank: Features) -> Tensor:
        r"""(b,) $2S/(1+2S)$, $S = \sum_j w_j k(x_j, z)^2$: the others' share of what z adds.

        That is, to the double sum of squared kernels that [RKE][sparke.scores.rke.RKE] is made of.
        """
        _kernel.check_selection(query, bank)
        return self._squared.crowding(query, bank, _kernel.given_weight(query, bank))

    def calibrate(self: S, bank: Features) -> S:
        """The same score with a rule's bandwidth read off this bank."""
        return _kernel.calibrated(self, "bandwidth", bank)

    @property
    def _squared(self) -> _kernel.SquaredKernel:
        return _kernel.SquaredKernel(self.kernel, self.bandwidth)


@dataclass(frozen=True)
class PromptKernelScore(KernelScore):
    """The same with a kernel on prompts beside it.

    Attributes:
        kernel: ``"gaussian"`` or ``"cosine"``, on samples.
        bandwidth: of the Gaussian kernel on samples, or a rule.
        cond_bandwidth: of the Gaussian kernel on L2-normalised prompt embeddings.

    Raises:
        ArgumentError: unknown kernel, bandwidth not above 0.
    """

    cond_bandwidth: float = 0.35

    def __post_init__(self) -> None:
        checks.positive("cond_bandwidth", self.cond_bandwidth)
        super().__post_init__()

    @property
    def requires(self) -> Requires:
        """Prompt embeddings."""
        return Requires(cond=True)

    def log_weight(self, query_cond: Tensor, bank_cond: Tensor) -> Tensor:
        """(b, c), (n, c) -> (b, n) logarithms of the squared prompt kernel."""
        return prompt_log_weight(query_cond, bank_cond, self.cond_bandwidth)
