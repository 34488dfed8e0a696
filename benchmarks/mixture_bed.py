"""Exact Gaussian mixtures as a test bed, in the same two settings as the trained model."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import sparke
from benchmarks.emoji_bed import Figures, MakeGuider
from sparke.models.mixture import GaussianMixture

with warnings.catch_warnings():
    # The host's own dependencies warn at import.
    warnings.simplefilter("ignore")
    from k_diffusion import sampling


class MixtureBed:
    """A mixture, and (a) one at a time with memory, (b) 16 of one prompt at once.

    Args:
        kind: ``"planar"`` (2-D) or ``"structured"`` (4096-d).
        problem: seed of the mixture itself.
        sampler: a ``sample_*`` of k-diffusion.
    """

    def __init__(
        self, kind: str = "planar", problem: int = 0, sampler: str = "sample_dpmpp_2m"
    ) -> None:
        self.model = getattr(GaussianMixture, kind)(problem)
        self.sampler = getattr(sampling, sampler)

    def sequential(
        self, make: MakeGuider, cfg: float, steps: int, seed: int, rounds: int = 48
    ) -> Figures:
        """(a): each prompt's samples one after another, each repelled by those before it."""
        guider = make()
        if isinstance(guider, sparke.DiversityGuider):
            guider.in_batch = False
        prompts = self.model.prompts
        noise = self._noise(seed, rounds, len(prompts))
        made = [self._run(guider, noise[r], prompts, cfg, steps, seed + r) for r in range(rounds)]
        return self.judged(torch.stack(made, 1).flatten(0, 1), rounds)

    def batches(
        self, make: MakeGuider, cfg: float, steps: int, seed: int, size: int = 16, groups: int = 3
    ) -> Figures:
        """(b): batches of one prompt, each batch on its own, without memory of the others."""
        prompts = self.model.prompts
        noise = self._noise(seed, groups * size, len(prompts))
        made = []
        for p, prompt in enumerate(prompts):
            for g in range(groups):
                x = noise[g * size : (g + 1) * size, p]
                made.append(self._run(make(), x, [prompt] * size, cfg, steps, seed + g))
        return self.judged(torch.cat(made), groups * size)

    def judged(self, x: Tensor, each: int) -> Figures:
        """Effective modes, and the share of samples near a mode of their prompt as "names"."""
        prompts = [p for p in self.model.prompts for _ in range(each)]
        verdict = self.model.judge(x, prompts)
        faithful = float(verdict.faithful.double().mean())
        return Figures(self.model.effective_modes(verdict, prompts), faithful, faithful)

    def _noise(self, seed: int, rounds: int, prompts: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (rounds, prompts, *self.model.latent_shape)
        noise: Tensor = torch.randn(shape, generator=generator) * self.model.sigma_max
        return noise

    def _run(
        self,
        guider: sparke.Guider | None,
        x: Tensor,
        prompts: list[str],
        cfg: float,
        steps: int,
        seed: int,
    ) -> Tensor:
        sampler = self.sampler
        if guider is not None:
            sampler = sparke.wrap(sampler, guider=guider)
        extra = {"cond": self.model.encode(prompts), "cond_scale": cfg}
        # Ancestral samplers draw from the global generator.
        torch.manual_seed(seed)
        with torch.no_grad():
            out: Tensor = sampler(
                self.model, x, self.model.sigmas(steps), extra_args=extra, disable=True
            )
        return out
