"""What the default does on the trained model, cell by cell: python -m benchmarks.grid.

CFG 1, 3, 6 x 25, 8, 4 steps; 16 prompts x 48 samples; (a) one at a time with memory, (b) 16 of one
prompt at once. Unguided, the default (no option set) and the published update start from the same
noise. Figures are means over seeds; +- is the standard error of a single unguided run, measured
over its seeds, and at least that of one sample in a share.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import torch

import sparke
from benchmarks import _report
from benchmarks._progress import in_processes
from benchmarks.bed import Figures
from benchmarks.emoji_bed import PROMPTS, EmojiBed

KEYS = ("modes", "names", "names_cnn")
SAMPLES = 48 * len(PROMPTS)
GUIDERS: dict[str, Callable[[], sparke.Guider | None]] = {
    "unguided": lambda: None,
    "default": sparke.DiversityGuider,
    # Its authors' frequency is every 10th of 50 steps; the same share of ours is every 5th of 25.
    "published": lambda: sparke.DiversityGuider.published(every=5),
}
Job = tuple[str, str, float, int, int]


def run(job: Job) -> Figures:
    """One cell, one way, one guider, one seed."""
    torch.set_num_threads(1)
    guider, way, cfg, steps, seed = job
    figures: Figures = getattr(EmojiBed(), way)(GUIDERS[guider], cfg, steps, seed)
    return figures


def jobs(seeds: int) -> list[Job]:
    """All of them; the published update knows no batch mates, so it runs one at a time only."""
    cells = [(float(cfg), steps) for steps in (25, 8, 4) for cfg in (1, 3, 6)]
    return [
        (guider, way, cfg, steps, seed)
        for cfg, steps in cells
        for way in ("sequential", "batches")
        for guider in GUIDERS
        for seed in range(seeds)
        if not (guider == "published" and way == "batches")
    ]


def row(way: str, cfg: float, steps: int, found: dict[str, list[Figures]]) -> dict[str, Any]:
    """A line of the table: means, errors, and whether the default did harm."""
    line: dict[str, Any] = {"way": way, "cfg": cfg, "steps": steps}
    harm = []
    for key in KEYS:
        plain = [getattr(f, key) for f in found["unguided"]]
        error = max(stdev(plain), 0.0 if key == "modes" else 1 / SAMPLES)
        line[key] = mean(plain)
        line[f"{key} +-"] = error
        for guider in ("default", "published"):
            if guider in found:
                line[f"{key} {guider}"] = mean(getattr(f, key) for f in found[guider])
        change = (line[f"{key} default"] - line[key]) / error if error else math.inf
        harm.append(change)
    line["least change, in errors"] = min(harm)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()

    todo = jobs(args.seeds)
    done = in_processes(run, todo, args.jobs, chunksize=4)
    rows = []
    for way in ("sequential", "batches"):
        for cfg, steps in sorted({(j[2], j[3]) for j in todo}, key=lambda c: (-c[1], c[0])):
            found: dict[str, list[Figures]] = {}
            for job, figures in done.items():
                if job[1:4] == (way, cfg, steps):
                    found.setdefault(job[0], []).append(figures)
            rows.append(row(way, cfg, steps, found))
    for way in ("sequential", "batches"):
        _report.show(f"{way}, {args.seeds} seeds", [r for r in rows if r["way"] == way])
    _report.write("grid", {"seeds": args.seeds, "ceiling": ceiling(), "rows": rows})


def ceiling(draws: int = 20) -> float:
    """Effective modes of 48 uniform draws from the real images of each prompt."""
    judge = EmojiBed().judge
    generator = torch.Generator().manual_seed(0)
    values = []
    for prompt in judge.ids(PROMPTS).tolist():
        rows = (judge.references.name == prompt).nonzero().squeeze(1)
        for _ in range(draws):
            drawn = rows[torch.randint(len(rows), (48,), generator=generator)]
            share = drawn.bincount().double() / 48
            values.append(float(-torch.xlogy(share, share).sum()))
    return mean(math.exp(v) for v in values)


if __name__ == "__main__":
    main()
