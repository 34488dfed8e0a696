"""How the default was chosen: python -m benchmarks.sweep [--quick] [--only NAME].

Every setting runs on the trained model and on exact mixtures, on cells of guidance scale x steps,
one at a time with memory and 16 at once, with the same noise. A setting is a set of options of
`DiversityGuider`; sigmas are in units of the bed's `sigma_data`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks import _report
from benchmarks.bed import Bed, Figures
from benchmarks.emoji_bed import EmojiBed
from benchmarks.mixture_bed import MixtureBed
from sparke import DiversityGuider
from sparke.kernels import QuantileRule
from sparke.schedules import RemainingNoise


@dataclass(frozen=True)
class Setting:
    """One point of the sweep. The defaults are those of the library."""

    scale: float = 0.4
    lowest: float = 0.3
    handover: float = 1.6
    power: float = 1.0
    factor: float = 0.5
    keep_residual: bool = True
    gate: bool = True
    reads: str = "denoised"
    cfg_off: bool = True

    def guider(self, sigma_data: float) -> DiversityGuider:
        return DiversityGuider(
            scale=self.scale,
            schedule=RemainingNoise(self.lowest * sigma_data, power=self.power),
            keep_residual=self.keep_residual,
            gate=self.gate,
            reads=self.reads,
            cfg_interval=(0.0, self.handover * sigma_data) if self.cfg_off else None,
            bandwidth=QuantileRule(factor=self.factor),
        )


HERE = Setting()
SETTINGS: dict[str, Setting | None] = {
    "unguided": None,
    "default": HERE,
    "scale 0.2": replace(HERE, scale=0.2),
    "scale 1": replace(HERE, scale=1.0),
    "scale 2": replace(HERE, scale=2.0),
    "lowest 1.6": replace(HERE, lowest=1.6),
    "handover 1": replace(HERE, handover=1.0),
    "handover 2.8": replace(HERE, handover=2.8),
    "power 0": replace(HERE, power=0.0),
    "factor 0.35": replace(HERE, factor=0.35),
    "factor 0.7": replace(HERE, factor=0.7),
    "residual free": replace(HERE, keep_residual=False),
    "no gate": replace(HERE, gate=False),
    "CFG left on": replace(HERE, cfg_off=False),
    "CFG on, reads conditional": replace(HERE, cfg_off=False, reads="conditional"),
    "interval alone": replace(HERE, scale=1e-9),
}

BEDS: dict[str, Callable[[], Bed]] = {
    "emoji": EmojiBed,
    "planar": MixtureBed,
    "structured": lambda: MixtureBed("structured"),
}
CELLS: dict[str, list[tuple[float, int]]] = {
    "emoji": [(1, 25), (6, 25), (1, 4)],
    "planar": [(1, 30), (3, 30), (1, 8)],
    "structured": [(1, 12)],
}


def measure(name: str, bed: Bed, setting: Setting | None, seeds: int) -> list[dict[str, Any]]:
    """One row per cell and way of generating, averaged over seeds."""
    rows = []
    sigma_data = bed.model.sigma_data

    def make() -> DiversityGuider | None:
        return None if setting is None else setting.guider(sigma_data)

    for cfg, steps in CELLS[name]:
        for way in ("sequential", "batches"):
            runs = [getattr(bed, way)(make, float(cfg), steps, seed) for seed in range(seeds)]
            rows.append({"bed": name, "cfg": cfg, "steps": steps, "way": way} | mean(runs))
    return rows


def mean(runs: list[Figures]) -> dict[str, Any]:
    """Means over seeds."""
    return {
        key: sum(asdict(run)[key] for run in runs) / len(runs)
        for key in ("modes", "names", "names_cnn")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--beds", nargs="*", default=list(BEDS))
    parser.add_argument("--only", nargs="*", help="names of settings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="sweep")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows: list[dict[str, Any]] = []
    for bed_name in args.beds:
        bed = BEDS[bed_name]()
        for label, setting in SETTINGS.items():
            if args.only and label not in args.only:
                continue
            start = time.perf_counter()
            found = [{"setting": label} | r for r in measure(bed_name, bed, setting, args.seeds)]
            rows += found
            cells = " ".join(
                f"{r['cfg']}/{r['steps']}{r['way'][0]} {r['modes']:.2f} {r['names']:.3f}"
                for r in found
            )
            print(
                f"{bed_name:10} {label:32} {cells}  {time.perf_counter() - start:.0f}s", flush=True
            )
    _report.write(args.out, {"seeds": args.seeds, "rows": rows})


if __name__ == "__main__":
    main()
