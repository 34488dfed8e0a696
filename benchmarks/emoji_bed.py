"""The trained model as a test bed: two ways people generate, judged by modes and names."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import sparke
from sparke.models import emoji
from sparke.protocols import Guider

with warnings.catch_warnings():
    # The host's own dependencies warn at import.
    warnings.simplefilter("ignore")
    from k_diffusion import sampling as sampling

MakeGuider = Callable[[], Guider | None]
PROMPTS = list(emoji.EVALUATION_PROMPTS)


@dataclass(frozen=True)
class Figures:
    """Effective modes per prompt and share of right names, by nearest image and by CNN."""

    modes: float
    names: float
    names_cnn: float


class EmojiBed:
    """Model, judge, and the two settings (a) one at a time with memory, (b) 16 at once."""

    def __init__(
        self, device: str = "cpu", weights: str | None = None, judge: str | None = None
    ) -> None:
        self.model = emoji.load(device, weights=weights)
        self.judge = emoji.load_judge(device, weights=judge)
        self.device = device

    def sequential(
        self, make: MakeGuider, cfg: float, steps: int, seed: int, rounds: int = 48
    ) -> Figures:
        """(a): each prompt's samples one after another, each repelled by those before it.

        The prompts of a round run side by side with in_batch off, which equals single runs (a
        batch against fixed memory is its rows one by one; tested) and is 16 times as fast.
        """
        guider = make()
        if isinstance(guider, sparke.DiversityGuider):
            guider.in_batch = False
        embeds = self.model.encode(PROMPTS)
        noise = self._noise(seed, rounds, len(PROMPTS))
        made = [self._run(guider, noise[r], embeds, cfg, steps) for r in range(rounds)]
        return self.judged(torch.stack(made, 1).flatten(0, 1), rounds)

    def batches(
        self, make: MakeGuider, cfg: float, steps: int, seed: int, size: int = 16, groups: int = 3
    ) -> Figures:
        """(b): batches of one prompt, each batch on its own, without memory of the others."""
        noise = self._noise(seed, groups * size, len(PROMPTS))
        made = []
        for p, embeds in enumerate(self.model.encode(PROMPTS)):
            for g in range(groups):
                x = noise[g * size : (g + 1) * size, p]
                made.append(self._run(make(), x, embeds.expand(size, -1), cfg, steps))
        return self.judged(torch.cat(made), groups * size)

    def judged(self, latents: Tensor, each: int) -> Figures:
        verdict = self.judge(self.model.decode(latents))
        ids = self.judge.ids(PROMPTS).repeat_interleave(each)
        modes = self.judge.effective_modes(verdict, ids)
        return Figures(modes, *self.judge.name_accuracy(verdict, ids))

    def _noise(self, seed: int, rounds: int, prompts: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (rounds, prompts, *self.model.latent_shape)
        return torch.randn(shape, generator=generator).to(self.device) * self.model.sigma_max

    def _run(
        self, guider: Guider | None, x: Tensor, embeds: Tensor, cfg: float, steps: int
    ) -> Tensor:
        sampler = sampling.sample_dpmpp_2m
        if guider is not None:
            sampler = sparke.wrap(sampler, guider=guider)
        extra = {"cond": embeds, "cond_scale": cfg}
        with torch.no_grad():
            out: Tensor = sampler(
                self.model, x, self.model.sigmas(steps), extra_args=extra, disable=True
            )
        return out
