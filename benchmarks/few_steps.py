"""Flow and distilled models in 4 to 8 steps: python -m benchmarks.few_steps.

The trained model sampled as flow models are, by Euler steps evenly spaced in flow time and shifted
towards noise (shift 3), where the first step or two decide the picture. At CFG 1, and as a
guidance-distilled model: CFG 3 and 6 inside the denoiser, out of anybody's reach. Unguided, with
the default and with schedule="few-step"; 16 prompts x 48 samples, means over seeds.
"""

from __future__ import annotations

import argparse
from functools import cache
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import sparke
from benchmarks import _report
from benchmarks._progress import in_processes
from benchmarks.bed import Figures
from benchmarks.emoji_bed import EmojiBed
from benchmarks.grid import KEYS

SHIFT = 3.0
SCHEDULES: dict[str, str | None] = {"default": None, "few-step": "few-step"}
Job = tuple[str, str, float, int, int]


class Distilled:
    """A denoiser with its guidance scale inside, sampled on a flow model's noise levels."""

    def __init__(self, model: Any, scale: float) -> None:
        self._model, self._scale = model, scale
        self.sigma_data, self.sigma_max = model.sigma_data, model.sigma_max
        self.latent_shape, self.encode, self.decode = model.latent_shape, model.encode, model.decode

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor, **_: Any) -> Tensor:
        denoised: Tensor = self._model(x, sigma, cond=cond, cond_scale=self._scale)
        return denoised

    def sigmas(self, steps: int) -> Tensor:
        """Noise over signal, t / (1 - t), at times t from the model's highest level to 0."""
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        t = SHIFT * t / (1 + (SHIFT - 1) * t)
        t = t.clamp(max=self.sigma_max / (1 + self.sigma_max))
        return (t / (1 - t)).float()


@cache
def bed(scale: float) -> EmojiBed:
    """The model with this scale inside, once in a process."""
    made = EmojiBed("sample_euler")
    made.model = Distilled(made.model, scale)
    return made


def run(job: Job) -> Figures:
    """One guider, one way, one scale inside, one number of steps, one seed."""
    torch.set_num_threads(1)
    guider, way, scale, steps, seed = job

    def make() -> sparke.Guider | None:
        if guider == "unguided":
            return None
        return sparke.DiversityGuider(schedule=SCHEDULES[guider])

    figures: Figures = getattr(bed(scale), way)(make, 1.0, steps, seed)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()

    cells = [(scale, steps) for scale in (1.0, 3.0, 6.0) for steps in (4, 6, 8)]
    guiders = ("unguided", *SCHEDULES)
    todo: list[Job] = [
        (guider, way, scale, steps, seed)
        for scale, steps in cells
        for way in ("sequential", "batches")
        for guider in guiders
        for seed in range(args.seeds)
        if not (guider == "unguided" and way == "batches")  # the same samples
    ]
    done = in_processes(run, todo, args.jobs)
    rows: list[dict[str, Any]] = []
    for scale, steps in cells:
        line: dict[str, Any] = {"scale inside": scale, "steps": steps}
        for guider, way in [("unguided", "sequential")] + [
            (guider, way) for way in ("sequential", "batches") for guider in SCHEDULES
        ]:
            found = [f for j, f in done.items() if j[:4] == (guider, way, scale, steps)]
            modes, *names = (mean(getattr(f, key) for f in found) for key in KEYS)
            column = guider if guider == "unguided" else f"{guider}, {way}"
            line[column] = f"{modes:.2f} {names[0]:.3f}/{names[1]:.3f}"
        rows.append(line)
    _report.show(f"modes and names, {args.seeds} seeds", rows)
    _report.write("few_steps", {"seeds": args.seeds, "shift": SHIFT, "rows": rows})


if __name__ == "__main__":
    main()
