"""How many modes of a mixture a batch of eight samples reaches, with and without guidance.

The denoiser is smalldiffusion's ideal one, exact for the data it is given: 2,000 points around
eight centres, the most frequent of which holds 40 % of them. Nothing is trained.
"""

from __future__ import annotations

import argparse
from typing import Any

import smalldiffusion
import sparke
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

SHARES = (0.40, 0.20, 0.12, 0.09, 0.07, 0.05, 0.04, 0.03)
BATCH, STEPS, SPREAD = 8, 30, 0.2


def centres() -> Tensor:
    """Eight points on a circle of radius 4."""
    angle = torch.arange(8) * torch.pi / 4
    return 4 * torch.stack([angle.cos(), angle.sin()], 1)


def data(n: int = 2000) -> Tensor:
    """(n, 2) points, in shares, around the centres."""
    g = torch.Generator().manual_seed(0)
    mode = torch.multinomial(torch.tensor(SHARES), n, replacement=True, generator=g)
    return centres()[mode] + SPREAD * torch.randn(n, 2, generator=g)


def measure(sampler: Any, model: Any, batches: int, name: str) -> tuple[float, float]:
    """Modes in a batch, and the share of samples within three spreads of a mode, on average."""
    sigmas = smalldiffusion.ScheduleLogLinear(200, sigma_min=0.02, sigma_max=20)
    table = sigmas.sample_sigmas(STEPS)
    reached, faithful = 0, 0.0
    for seed in tqdm(range(batches), desc=name, leave=False):
        torch.manual_seed(seed)
        *_, x = sampler(model, table, batchsize=BATCH)
        distance, mode = torch.cdist(x, centres()).min(1)
        near = distance < 3 * SPREAD
        reached += len(mode[near].unique())
        faithful += float(near.float().mean())
        if hasattr(sampler, "memory"):
            sampler.memory.clear()  # each batch by itself
    return reached / batches, faithful / batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=100)
    batches = parser.parse_args().batches
    model = smalldiffusion.IdealDenoiser(data())
    samplers: dict[str, Any] = {"bare": smalldiffusion.samples}
    for score, scale in (("neighbours", 0.4), ("neighbours", 1.0), ("rke", 0.4), ("rke", 1.0)):
        wrapped = sparke.wrap(smalldiffusion.samples, score=score, scale=scale)
        samplers[f"{score}, scale {scale}"] = wrapped
    print(f"{'sampler':<24}{'modes of 8':>12}{'faithful':>10}   ({batches} batches of {BATCH})")
    for name, sampler in samplers.items():
        modes, faithful = measure(sampler, model, batches, name)
        print(f"{name:<24}{modes:>12.2f}{faithful:>10.1%}")


if __name__ == "__main__":
    main()
