"""Guided against bare sampling, end to end: python -m benchmarks.overhead [--quick].

The model that ships with sparke through a sampler of k-diffusion and through its diffusers
pipeline, 25 steps at CFG 6: bare, at scale 0, and guided by memories of several sizes whose rows
all belong to the prompt, the costliest case. All ways take turns; a figure is the shortest run of
each. The network takes a few milliseconds a call, a hundredth of the smallest of those in use, so
the milliseconds added to a step say more than the ratio; what they are next to a full-size UNet is
the question of ``benchmarks.diffusers_cost``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sparke
from benchmarks import _limits, _report
from benchmarks.emoji_bed import EmojiBed, PipelineBed
from sparke.protocols import Features

PROMPT, CFG, STEPS = "waving hand", 6.0, 25
Way = tuple[str, int]


class Discarding:
    """A memory that keeps what it was filled with, so that each run finds the same rows."""

    def __init__(self, bed: EmojiBed, rows: int) -> None:
        self.kept = sparke.memory.RingMemory(capacity=max(rows, 1))
        if rows:
            x = torch.randn(rows, *bed.model.latent_shape).flatten(1) * bed.model.sigma_data
            self.kept.commit(Features(x, bed.model.encode([PROMPT]).expand(rows, -1)))
        self.select = self.kept.select

    def __len__(self) -> int:
        return len(self.kept)

    def commit(self, items: Features) -> None:
        """Leave it out."""


def ways(bed: EmojiBed, batch: int, sizes: list[int]) -> dict[Way, Callable[[], Tensor]]:
    """Each way to sample a batch, to be called for one run of it."""
    noise = torch.randn(batch, *bed.model.latent_shape, generator=torch.Generator().manual_seed(0))
    x, prompts = noise * bed.model.sigma_max, [PROMPT] * batch
    guiders: dict[Way, sparke.Guider | None] = {("bare", 0): None}
    guiders["scale 0", 0] = sparke.DiversityGuider(memory=Discarding(bed, 0), scale=0)
    for rows in sizes:
        guiders["guided", rows] = sparke.DiversityGuider(memory=Discarding(bed, rows))
    return {
        way: partial(bed.run, guider, x, prompts, CFG, STEPS) for way, guider in guiders.items()
    }


def table(host: str, batch: int, seconds: Mapping[Way, float]) -> list[dict[str, Any]]:
    """One line for each way, against the bare one."""
    bare = seconds["bare", 0]
    return [
        {
            "host": host,
            "batch": batch,
            "way": name,
            "rows in memory": rows,
            "ms": took * 1e3,
            "against bare": took / bare,
            "ms added to a step": (took - bare) / STEPS * 1e3,
        }
        for (name, rows), took in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, one batch size")
    args = parser.parse_args()
    if args.quick:
        args.repeats = 2

    beds = {
        "k-diffusion, DPM++ 2M": EmojiBed(),
        "diffusers, DPM-Solver": PipelineBed("DPMSolverMultistepScheduler"),
    }
    rows: list[dict[str, Any]] = []
    for host, bed in beds.items():
        for batch in (1,) if args.quick else (1, 16):
            sizes = [0, 1000, 10_000]
            found = _limits.side_by_side(ways(bed, batch, sizes), args.repeats)
            rows += table(host, batch, found)
    _report.show(f"end to end, {STEPS} steps, CFG {CFG:g}", rows)
    _report.write("overhead", {"steps": STEPS, "guidance_scale": CFG, "rows": rows})


if __name__ == "__main__":
    main()
