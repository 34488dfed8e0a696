"""What EDDY does to one sample's law and to a batch: python -m benchmarks.eddy_marginals.

1e5 particles in independent batches, on a mixture of six modes in two dimensions whose denoiser is
known, started from exact draws of the noisy density. Each form is compared with as many exact draws
of the mixture: chi-squared on the modes' shares, and Kolmogorov-Smirnov on eight projections,
Bonferroni-corrected. Coverage is the mean share of the six modes that a batch finds. Planted to
fail: the divergence with the opposite sign, as the paper prints it, and none at all; and the exact
form from starts that are not independent.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from benchmarks import _report
from sparke.guidance import _eddy
from sparke.models.mixture import GaussianMixture

HIGH, LOW, RHO = 20.0, 0.03, 7.0
AXES = 8
FORMS = {"exact": 1.0, "no divergence": 0.0, "printed sign": -1.0}


@dataclass(frozen=True)
class Job:
    """One row: which form, how strongly, in batches of which size and in how many Heun steps."""

    form: str
    batch: int
    scale: float
    steps: int = 80
    antithetic: bool = False


JOBS = [
    *(Job("unguided", batch, 0.0) for batch in (2, 4, 16)),
    *(Job("exact", batch, scale) for batch in (2, 4, 16) for scale in (1.0, 3.0)),
    *(Job("no divergence", batch, scale) for batch in (2, 4, 16) for scale in (1.0, 3.0)),
    *(Job("printed sign", batch, scale) for batch in (2, 4, 16) for scale in (1.0, 3.0)),
    Job("unguided", 2, 0.0, antithetic=True),
    Job("exact", 2, 1.0, antithetic=True),
    *(
        Job(form, 4, scale, steps)
        for steps in (30, 15)
        for form, scale in (("unguided", 0.0), ("exact", 1.0))
    ),
]


class Modes:
    """The first prompt of the planar mixture, by itself."""

    def __init__(self) -> None:
        mixture = GaussianMixture.planar()
        self.means, self.weights, self.std = mixture.means[0], mixture.weights[0], mixture.std
        self.sigma_data = mixture.sigma_data

    def denoised(self, x: Tensor, sigma: float) -> Tensor:
        """(..., 2) posterior means."""
        total = sigma**2 + self.std**2
        logits = (x @ self.means.mT - self.means.square().sum(1) / 2) / total + self.weights.log()
        mean = torch.softmax(logits, -1) @ self.means
        return (self.std**2 * x + sigma**2 * mean) / total

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, 2) exact draws."""
        modes = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.means[modes] + self.std * torch.randn(n, 2, generator=generator)

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to the nearest mode and its number."""
        distance, mode = torch.cdist(x, self.means).min(-1)
        return distance, mode


def sampled(modes: Modes, job: Job, particles: int, seed: int) -> Tensor:
    """(batches, batch, 2) finished samples, by Heun's method."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(particles // job.batch, job.batch, 2, generator=generator)
    if job.antithetic:
        noise[:, 1::2] = -noise[:, ::2]
    x = modes.sample(noise[..., 0].numel(), generator).view_as(noise) + HIGH * noise
    weight = (1 - torch.eye(job.batch)) / (job.batch - 1)

    def slope(x: Tensor, sigma: float) -> Tensor:
        residual = modes.denoised(x, sigma) - x
        if job.scale == 0:
            return -residual / sigma
        width = math.sqrt(2 * (sigma**2 + modes.sigma_data**2))
        moved = _eddy.drift(x, residual, weight, sigma, width, FORMS[job.form])
        return -(residual + job.scale * moved) / sigma

    rungs = torch.linspace(HIGH ** (1 / RHO), LOW ** (1 / RHO), job.steps, dtype=torch.float64)
    levels = [*(rungs**RHO).tolist(), 0.0]
    for sigma, after in pairwise(levels):
        first = slope(x, sigma)
        ahead = x + (after - sigma) * first
        x = ahead if after == 0 else x + (after - sigma) * (first + slope(ahead, after)) / 2
    return x


def p_values(modes: Modes, ours: Tensor, exact: Tensor) -> tuple[float, float]:
    """Of the modes' shares, and of the projections together, for (n, 2) and (m, 2) samples."""
    counts = [torch.bincount(modes.nearest(x)[1], minlength=6) for x in (ours, exact)]
    shares = stats.chi2_contingency(torch.stack(counts).numpy()).pvalue
    least = 1.0
    for turn in range(AXES):
        angle = math.pi * turn / AXES
        axis = torch.tensor([math.cos(angle), math.sin(angle)])
        least = min(least, stats.ks_2samp((ours @ axis).numpy(), (exact @ axis).numpy()).pvalue)
    return float(shares), min(1.0, AXES * float(least))


def row(modes: Modes, job: Job, particles: int, seed: int) -> dict[str, Any]:
    """The figures of one job."""
    started = perf_counter()
    made = sampled(modes, job, particles, seed)
    seconds = perf_counter() - started
    flat = made.flatten(0, 1)
    exact = modes.sample(len(flat), torch.Generator().manual_seed(seed + 1))
    shares, projections = p_values(modes, flat, exact)
    distance, mode = modes.nearest(flat)
    found = torch.zeros(len(made), 6).scatter_(1, mode.view(len(made), -1), 1.0)
    heavy = mode == int(modes.weights.argmax())
    return {
        "form": job.form + (", antithetic starts" if job.antithetic else ""),
        "batch": job.batch,
        "scale": job.scale,
        "steps": job.steps,
        "heavy mode": float(heavy.double().mean()),
        "p, shares": shares,
        "p, projections": projections,
        "coverage": float(found.mean()),
        "faithful": float((distance <= 3 * modes.std).double().mean()),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--particles", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    modes, rows = Modes(), []
    for number, job in enumerate(JOBS):
        rows.append(row(modes, job, args.particles, args.seed + 2 * number))
        print(rows[-1], flush=True)
    _report.show(f"one sample's law and a batch's coverage, {args.particles} particles", rows)
    _report.write("eddy_marginals", {"particles": args.particles, "seed": args.seed, "rows": rows})


if __name__ == "__main__":
    main()
