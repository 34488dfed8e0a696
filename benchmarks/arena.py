"""Every method on the same noise, swept over its strength: python -m benchmarks.arena [--quick].

On the trained model and on an exact mixture, at CFG 1, 3, 6 with 25 and 6 steps, in two ways: one
picture at a time, with memory of the earlier ones of its prompt, and 16 of one prompt at once,
without memory. Methods that know no memory, or no batch, run in the way they know; those that know
neither make the same pictures either way and stand in both tables.

A point is a method at a strength: effective modes against fidelity (right names by the mean of two
judges, or the share of samples near a mode of their own prompt). It stands on the front where no
other has more of the one and no less of the other. Points below fidelity 0.95 are drawn and not
counted. "behind" is what the default of sparke lacks, in modes, to the best point of any method
that is at least as faithful; 0: it stands on the front. "front behind" is the most that any such
point lies above all points of sparke that are as faithful; "not reached" where none is. A standard
error of modes is 0.3 to 0.4 on the trained model, from one seed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from statistics import mean
from typing import Any

import torch

from benchmarks import _arena_plot, _limits, _report
from benchmarks._arena_methods import METHODS
from benchmarks._progress import in_processes
from benchmarks.bed import Bed
from benchmarks.emoji_bed import EmojiBed
from benchmarks.mixture_bed import MixtureBed
from sparke.errors import GuidanceWarning

BEDS = ("emoji", "mixture")
WAYS = ("sequential", "batches")
CELLS = [(cfg, steps) for steps in (25, 6) for cfg in (1.0, 3.0, 6.0)]
FAITHFUL = 0.95
ERROR = 0.003
"""Two samples of 768: fidelities this close are the same."""
OURS = "sparke"
Job = tuple[str, str, float, int, str, float, int]
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One method at one strength in one cell."""

    bed: str
    way: str
    cfg: float
    steps: int
    method: str
    strength: float
    modes: float
    fidelity: float
    default: bool


@cache
def bed(name: str, seed: int) -> Bed:
    """A test bed, once in a process."""
    return (
        EmojiBed()
        if name == "emoji"
        else MixtureBed("structured", problem=seed, sampler="sample_euler")
    )


def run(job: Job) -> tuple[float, float]:
    """Effective modes and fidelity of one method in one cell, from one seed."""
    torch.set_num_threads(1)
    name, way, cfg, steps, method, strength, seed = job
    with warnings.catch_warnings():
        # What a method cannot do here shows in its figures.
        warnings.simplefilter("ignore", GuidanceWarning)
        here = bed(name, seed)
        figures = getattr(here, way)(lambda: METHODS[method].make(strength, here), cfg, steps, seed)
    return figures.modes, (figures.names + figures.names_cnn) / 2


def jobs(seeds: int, quick: bool) -> list[Job]:
    """All of them; what neither remembers nor looks at its batch runs one way only."""
    cells = CELLS[:1] if quick else CELLS
    return [
        (name, way, cfg, steps, method, strength, seed)
        for name in BEDS
        for cfg, steps in cells
        for method, told in METHODS.items()
        for strength in ((told.default,) if quick else told.strengths)
        for way in (told.ways or WAYS[:1])
        for seed in range(seeds)
    ]


def points(found: dict[Job, tuple[float, float]]) -> list[Point]:
    """Means over seeds; a method that knows neither way stands in both."""
    made = []
    for key in dict.fromkeys(job[:-1] for job in found):
        name, way, cfg, steps, method, strength = key
        values = [value for job, value in found.items() if job[:-1] == key]
        modes, fidelity = (mean(column) for column in zip(*values, strict=True))
        told = METHODS[method]
        for in_way in WAYS if told.ways == () else (way,):
            default = strength == told.default
            made.append(Point(name, in_way, cfg, steps, method, strength, modes, fidelity, default))
    return made


def behind(point: Point, others: Iterable[Point]) -> tuple[float, str]:
    """Modes a point lacks to the best at least as faithful, and whose that is."""
    best = max(
        (o for o in others if o.fidelity >= max(point.fidelity, FAITHFUL)),
        key=lambda o: o.modes,
        default=point,
    )
    return max(0.0, best.modes - point.modes), f"{best.method} {best.strength:g}"


def table(made: list[Point], name: str, way: str) -> list[Row]:
    """A line for each method: its best faithful point in every cell of one bed, one way."""
    rows = []
    cells = list(dict.fromkeys((p.cfg, p.steps) for p in made))
    here = [p for p in made if (p.bed, p.way) == (name, way)]
    for method in dict.fromkeys(p.method for p in here):
        row: Row = {"method": method}
        for cfg, steps in cells:
            own = [p for p in here if (p.method, p.cfg, p.steps) == (method, cfg, steps)]
            best = max(
                (p for p in own if p.fidelity >= FAITHFUL), key=lambda p: p.modes, default=None
            )
            told = "-" if best is None else f"{best.modes:.2f} {best.fidelity:.3f}"
            if best is not None and len(own) > 1:
                told += f" ({best.strength:g})"
            row[f"CFG {cfg:g}, {steps} steps"] = told
        rows.append(row)
    return rows


def verdicts(made: list[Point]) -> list[Row]:
    """Where the default of sparke stands in each cell, and the front of its scales."""
    rows = []
    for key in dict.fromkeys((p.bed, p.way, p.cfg, p.steps) for p in made):
        here = [p for p in made if (p.bed, p.way, p.cfg, p.steps) == key]
        others = [p for p in here if not p.method.startswith(OURS)]
        default = next((p for p in here if p.method == OURS and p.default), None)
        plain = next((p for p in here if p.method == "unguided"), None)
        if default is None or plain is None:
            continue
        lacks, whose = behind(default, others)
        gaps = [front_gap(o, here) for o in others if o.fidelity >= FAITHFUL]
        gap = "not reached" if None in gaps else max((g for g in gaps if g), default=0.0)
        rows.append(
            {
                "bed": key[0],
                "way": key[1],
                "CFG": key[2],
                "steps": key[3],
                "unguided": f"{plain.modes:.2f} {plain.fidelity:.3f}",
                "default": f"{default.modes:.2f} {default.fidelity:.3f}",
                "behind": lacks,
                "to": whose if lacks else "",
                "front behind": gap,
            }
        )
    return rows


def front_gap(other: Point, here: list[Point]) -> float | None:
    """Modes by which another's point lies above all of ours that are as faithful, or nearly.

    None where none of ours is.
    """
    least = other.fidelity - ERROR
    ours = [p.modes for p in here if p.method.startswith(OURS) and p.fidelity >= least]
    return max(0.0, other.modes - max(ours)) if ours else None


def times(repeats: int) -> list[Row]:
    """Each method at its default against the bare sampler, 16 at once, 25 steps, CFG 3."""
    torch.set_num_threads(1)
    here = bed("emoji", 0)
    x, prompts = here.noise(0, 16), [here.prompts[0]] * 16
    runs = {}
    for name, told in METHODS.items():
        guider = told.make(told.default, here)
        runs[name] = lambda guider=guider: here.run(guider, x, prompts, 3.0, 25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuidanceWarning)
        seconds = _limits.side_by_side(runs, repeats)
    bare = seconds["unguided"]
    return [
        {"method": name, "ms a sample": took / 16 * 1e3, "against unguided": took / bare}
        for name, took in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one cell, default strengths")
    args = parser.parse_args()

    start = time.perf_counter()
    todo = sorted(jobs(args.seeds, args.quick), key=lambda job: -job[3])
    made = points(in_processes(run, todo, args.jobs))
    for name in BEDS:
        for way in WAYS:
            _report.show(
                f"{name}, {way}: most modes at fidelity {FAITHFUL}", table(made, name, way)
            )
    judged = verdicts(made)
    _report.show("the default of sparke against every other method", judged)
    took = times(2 if args.quick else 5)
    _report.show("time, 16 at once, 25 steps, CFG 3", took)
    print(f"\n{len(todo)} runs in {time.perf_counter() - start:.0f} s")
    if not args.quick:
        content = {"seeds": args.seeds, "points": [asdict(p) for p in made]}
        _report.write("arena", {**content, "verdicts": judged, "times": took})
        _arena_plot.draw([asdict(p) for p in made])


if __name__ == "__main__":
    main()
