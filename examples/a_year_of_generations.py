"""A year of sessions that share one memory on disk, against a year without.

    python examples/a_year_of_generations.py --out year
    python examples/a_year_of_generations.py --out year   # the same again: goes on where it stopped

Every week the same prompts are asked for again, one picture of each, in a session that knows
nothing of those before it but the folder `year/memory`: it opens the folder, draws, and the wrapped
pipeline commits what it drew, all of the week or nothing. Beside it two other years are drawn from
the same noise: one by the bare pipeline, and one guided, but forgetting everything each week.

The folder is also all the script needs to go on: the number of rows in it tells which week is next.
Stop it whenever you like (Ctrl-C, or pull the plug), start it again, and the year ends with the
same memory as one that was never interrupted.

Prints, at the end of each quarter, for what was drawn until then:

- modes: effective number of different pictures of a prompt (exp of the entropy of what was drawn;
  pictures of something else do not count), the mean over prompts, for the three years. Pictures of
  earlier weeks are read back from the memory.
- rows and MB of the memory on disk.
- cost: time of a session with the memory (opening, drawing, committing) in units of the bare
  pipeline's, the median over the quarter; a dash for weeks drawn by an earlier start.

and at the end the modes of each prompt. It draws with the small emoji model that ships with sparke,
on the CPU, and downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from pictures import ends_in_a_line, load_pipeline, look, whole
from torch import Tensor

import sparke
from sparke.memory import DiskMemory
from sparke.models import emoji

YEARS = ("bare", "forgetting", "remembering")
QUARTER = 13


def session(pipe: Any, year: str, folder: Path, week: int, options: argparse.Namespace) -> float:
    """One week: draw a picture of each prompt, keep it, and tell the seconds it took."""
    start = time.perf_counter()
    memory = DiskMemory(folder)
    if year == "remembering":
        guided = sparke.wrap(pipe, memory=memory)  # the one line that a year of memory needs
    else:
        guided = sparke.wrap(pipe) if year == "forgetting" else pipe
    latents: Tensor = guided(
        options.prompts,
        num_inference_steps=options.steps,
        guidance_scale=options.cfg,
        generator=torch.Generator().manual_seed(options.seed + week),
        output_type="latent",  # a year of your own would leave this out, and save the pictures
    ).images
    if year != "remembering":
        memory.commit(sparke.Features(latents.flatten(1)))  # kept to be counted, never looked at
    return time.perf_counter() - start


def modes(pipe: Any, folder: Path, weeks: int, options: argparse.Namespace) -> list[float]:
    """Effective modes of each prompt in the first `weeks` weeks of a year."""
    count = len(options.prompts)
    latents = DiskMemory(folder).rows(0, weeks * count).x
    # For a pipeline with a VAE: pipe.vae.decode(latents / pipe.vae.config.scaling_factor), and in
    # place of the judge's modes the Vendi score of an encoder's features.
    seen = look(pipe.transformer.model.decode(latents), options.prompts * weeks)
    return [seen[place::count].effective_modes() for place in range(count)]


def same_year(options: argparse.Namespace) -> None:
    """Refuse to go on with another year than the one in the folder."""
    told = {key: getattr(options, key) for key in ("prompts", "steps", "cfg", "seed")}
    path = options.out / "year.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept != told:
            raise SystemExit(f"{path} is of a year with {kept}, not {told}; give another --out")
        return
    with whole(path) as file:
        file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def run(options: argparse.Namespace) -> None:
    same_year(options)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=None)  # a bar where there is a terminal
    folders = {year: options.out / ("memory" if year == YEARS[-1] else year) for year in YEARS}
    count = len(options.prompts)
    costs: list[float] = []
    print(
        f"{'week':>4}"
        + "".join(f"{year:>13}" for year in YEARS)
        + f"{'rows':>7}{'MB':>7}{'cost':>7}"
    )
    with pipe.progress_bar(total=options.weeks) as bar:
        pipe.set_progress_bar_config(disable=True)
        for week in range(options.weeks):
            seconds = {
                year: session(pipe, year, folder, week, options)
                for year, folder in folders.items()
                if len(DiskMemory(folder)) <= week * count
            }
            bar.update()
            if len(seconds) == len(YEARS):
                costs.append(seconds["remembering"] / seconds["bare"])
            if (week + 1) % QUARTER and week + 1 != options.weeks:
                continue
            found = {y: modes(pipe, folder, week + 1, options) for y, folder in folders.items()}
            size = sum(file.stat().st_size for file in folders["remembering"].iterdir()) / 1e6
            means = "".join(f"{mean(found[year]):13.2f}" for year in YEARS)
            cost = f"{median(costs):7.2f}" if costs else f"{'-':>7}"
            print(f"{week + 1:4}{means}{(week + 1) * count:7}{size:7.2f}{cost}", flush=True)
            costs.clear()

    print(f"\n{'':24}" + "".join(f"{year:>13}" for year in YEARS))
    for place, prompt in enumerate(options.prompts):
        print(f"{prompt:24}" + "".join(f"{found[year][place]:13.2f}" for year in YEARS))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompts", nargs="+", default=list(emoji.EVALUATION_PROMPTS[:8]))
    parser.add_argument("--weeks", type=int, default=52)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=6.0, help="scale of classifier-free guidance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("year"), help="folder of the three years")
    options = parser.parse_args(arguments)
    if options.weeks < 1:
        parser.error(f"--weeks must be 1 or more, got {options.weeks}")
    with ends_in_a_line("interrupted; the same command goes on from here"):
        run(options)


if __name__ == "__main__":
    main()
