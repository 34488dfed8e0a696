"""Exact Gaussian mixtures as a test bed."""

from __future__ import annotations

from torch import Tensor

from benchmarks.bed import Bed, Figures
from sparke.models.mixture import GaussianMixture


class MixtureBed(Bed):
    """A mixture and its judge.

    Args:
        kind: ``"planar"`` (2-D) or ``"structured"`` (4096-d).
        problem: seed of the mixture itself.
        sampler: a ``sample_*`` of k-diffusion.
    """

    def __init__(
        self, kind: str = "planar", problem: int = 0, sampler: str = "sample_dpmpp_2m"
    ) -> None:
        model = getattr(GaussianMixture, kind)(problem)
        super().__init__(model, model.prompts, sampler)

    def judged(self, x: Tensor, prompts: list[str]) -> Figures:
        """Effective modes, and the share of samples near a mode of their prompt as "names"."""
        verdict = self.model.judge(x, prompts)
        faithful = float(verdict.faithful.double().mean())
        return Figures(self.model.effective_modes(verdict, prompts), faithful, faithful)
