"""What every test bed shares: two ways people generate, from the same noise, judged alike."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparke
from sparke.protocols import Guider

with warnings.catch_warnings():
    # The host's own dependencies warn at import.
    warnings.simplefilter("ignore")
    from k_diffusion import sampling

MakeGuider = Callable[[], Guider | None]


@dataclass(frozen=True)
class Figures:
    """Effective modes per prompt and share of right names, by two judges where there are two."""

    modes: float
    names: float
    names_cnn: float


class Bed(ABC):
    """A model with prompts, and the two settings (a) one at a time with memory, (b) 16 at once.

    Args:
        model: called as k-diffusion calls its models; it knows its sigmas and prompt embeddings.
        prompts: those to generate.
        sampler: a ``sample_*`` of k-diffusion.
    """

    def __init__(self, model: Any, prompts: list[str], sampler: str = "sample_dpmpp_2m") -> None:
        self.model, self.prompts = model, prompts
        self.sampler = getattr(sampling, sampler)

    @abstractmethod
    def judged(self, x: Tensor, prompts: list[str]) -> Figures:
        """The figures of (n, ...) samples of n prompts."""

    def sequential(
        self, make: MakeGuider, cfg: float, steps: int, seed: int, rounds: int = 48
    ) -> Figures:
        """(a): each prompt's samples one after another, each repelled by those before it.

        The prompts of a round run side by side with in_batch off, which equals single runs (a
        batch against fixed memory is its rows one by one; tested) and is as many times as fast.
        """
        guider = make()
        for member in getattr(guider, "guiders", (guider,)):
            if hasattr(member, "in_batch"):
                setattr(member, "in_batch", False)  # noqa: B010  a Guider need not have it
        noise = self.noise(seed, rounds * len(self.prompts)).unflatten(0, (rounds, -1))
        made = [
            self.run(guider, noise[r], self.prompts, cfg, steps, seed + r) for r in range(rounds)
        ]
        return self.judged(torch.cat(made), self.prompts * rounds)

    def batches(
        self, make: MakeGuider, cfg: float, steps: int, seed: int, size: int = 16, groups: int = 3
    ) -> Figures:
        """(b): batches of one prompt, each batch on its own, without memory of the others."""
        noise = self.noise(seed, groups * size * len(self.prompts))
        noise = noise.unflatten(0, (groups * size, -1))
        made, told = [], []
        for p, prompt in enumerate(self.prompts):
            for g in range(groups):
                x = noise[g * size : (g + 1) * size, p]
                made.append(self.run(make(), x, [prompt] * size, cfg, steps, seed + g))
                told += [prompt] * size
        return self.judged(torch.cat(made), told)

    def noise(self, seed: int, rows: int) -> Tensor:
        """(rows, ...) noise of the highest level."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((rows, *self.model.latent_shape), generator=generator)
        return noise * float(self.model.sigma_max)

    def run(
        self,
        guider: Guider | None,
        x: Tensor,
        prompts: list[str],
        cfg: float,
        steps: int,
        seed: int = 0,
    ) -> Tensor:
        """Samples of these prompts from noise x; `seed` is for samplers that draw noise."""
        sampler = self.sampler
        if guider is not None:
            sampler = sparke.wrap(sampler, guider=guider)
        extra = {"cond": self.model.encode(prompts), "cond_scale": cfg}
        torch.manual_seed(seed)
        with torch.no_grad():
            out: Tensor = sampler(
                self.model, x, self.model.sigmas(steps), extra_args=extra, disable=True
            )
        return out
