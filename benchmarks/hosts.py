"""The default through diffusers, beside k-diffusion: python -m benchmarks.hosts.

The cells of ``benchmarks.grid`` (CFG 1, 3, 6 x 25, 8, 4 steps; one at a time with memory, 16 at
once) on the same model from the same noise, through the diffusers pipeline with three schedulers
and through the k-diffusion sampler each of them corresponds to. Figures are means over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from statistics import mean, stdev
from typing import Any

import torch

import sparke
from benchmarks import _report
from benchmarks._progress import in_processes
from benchmarks.bed import Figures
from benchmarks.emoji_bed import EmojiBed, PipelineBed
from benchmarks.grid import KEYS, SAMPLES

BEDS: dict[str, Callable[[], EmojiBed]] = {
    "sample_dpmpp_2m": EmojiBed,
    "DPMSolverMultistep": lambda: PipelineBed("DPMSolverMultistepScheduler"),
    "sample_euler": lambda: EmojiBed("sample_euler"),
    "EulerDiscrete": lambda: PipelineBed("EulerDiscreteScheduler"),
    "FlowMatchEuler": lambda: PipelineBed("FlowMatchEulerDiscreteScheduler"),
}
PEERS = {
    "DPMSolverMultistep": "sample_dpmpp_2m",
    "EulerDiscrete": "sample_euler",
    "FlowMatchEuler": "sample_euler",
}
CELLS = [(float(cfg), steps) for steps in (25, 8, 4) for cfg in (1, 3, 6)]
WAYS = ("sequential", "batches")
Job = tuple[str, bool, str, float, int, int]


@cache
def bed(host: str) -> EmojiBed:
    """Each host once in a process."""
    return BEDS[host]()


def run(job: Job) -> Figures:
    """One host, guided or not, one way, one cell, one seed."""
    torch.set_num_threads(1)
    host, guided, way, cfg, steps, seed = job
    make = sparke.DiversityGuider if guided else lambda: None
    figures: Figures = getattr(bed(host), way)(make, cfg, steps, seed)
    return figures


def row(host: str, way: str, cell: tuple[float, int], done: dict[Job, Figures]) -> dict[str, Any]:
    """A line of the table: this host, its peer, and whether the default did harm."""
    cfg, steps = cell

    def values(name: str, guided: bool, key: str) -> list[float]:
        wanted = (name, guided, way, cfg, steps)
        return [getattr(f, key) for job, f in done.items() if job[:5] == wanted]

    line: dict[str, Any] = {"way": way, "host": host, "cfg": cfg, "steps": steps}
    harm = []
    for key in KEYS:
        plain, sparked = values(host, False, key), values(host, True, key)
        error = max(stdev(plain) if len(plain) > 1 else 0.0, 0.0 if key == "modes" else 1 / SAMPLES)
        line[key], line[f"{key} sparke"] = mean(plain), mean(sparked)
        if key == "modes":
            line["modes +-"] = error
            line["of k-diffusion's"] = mean(sparked) / mean(values(PEERS[host], True, key))
        if error:
            harm.append((mean(sparked) - mean(plain)) / error)
    line["least change, in errors"] = min(harm)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()

    todo = [
        (host, guided, way, cfg, steps, seed)
        for host in BEDS
        for guided in (False, True)
        for way in WAYS
        for cfg, steps in CELLS
        for seed in range(args.seeds)
    ]
    done = in_processes(run, todo, args.jobs)
    rows = [row(host, way, cell, done) for way in WAYS for host in PEERS for cell in CELLS]
    for way in WAYS:
        _report.show(f"{way}, {args.seeds} seeds", [r for r in rows if r["way"] == way])
    _report.write("hosts", {"seeds": args.seeds, "rows": rows})


if __name__ == "__main__":
    main()
