"""Several methods on the same prompt and the same noise, in one table.

    python examples/comparing_methods.py "woman health worker" -n 32

Every method draws one batch from the same seed, at its default strength (`python -m
benchmarks.arena` sweeps the strengths, over many prompts). A line of METHODS is all that another
one needs, your own included. Prints, the most varied first:

- modes: effective number of different pictures (exp of the entropy of what was drawn; pictures of
  something else do not count).
- Vendi: effective number of different pictures as an encoder sees them, at one bandwidth for all.
- similarity: mean cosine of the pairs of the batch to the same encoder; lower is more varied.
- names: share of pictures that show what was asked for.
- cost: time in units of the pipeline's own.

Writes a contact sheet, a row for each method in the order of the table. It draws with the small
emoji model that ships with sparke, on the CPU, and downloads nothing.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pictures import (
    Figures,
    contact_sheet,
    draw,
    ends_in_a_line,
    figures,
    load_pipeline,
    look,
    pixels,
    whole,
)
from PIL import Image

import sparke

BARE = "without"
SHOWN = 16
"""Pictures of a method on the sheet."""
METHODS: dict[str, dict[str, Any]] = {
    # name in the table: arguments of sparke.wrap
    "sparke": {},
    "sparke, few-step": {"schedule": "few-step"},
    "cond-vendi": {"score": "cond-vendi"},
    "interval": {"guider": "interval"},
    "CADS": {"guider": "cads"},
    "CADS, then sparke": {"guider": ["cads", "cond-rke"]},
    "particle": {"guider": "particle"},
    "SPELL": {"guider": "spell"},
    "DPP": {"guider": "dpp"},
    # Your own, an object with begin(run), __call__(state) and finish(x):
    #     "mine": {"guider": MyGuider()},
}


@dataclass(frozen=True)
class Row:
    """What one method did."""

    method: str
    images: list[Image.Image]
    figures: Figures
    cost: float


def compare(options: argparse.Namespace) -> list[Row]:
    """A row for each method, the most modes first."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=None)  # a bar where there is a terminal
    drawn: dict[str, list[Image.Image]] = {}
    seconds: dict[str, float] = {}
    with pipe.progress_bar(total=2 + len(options.methods)) as bar:
        pipe.set_progress_bar_config(disable=True)
        draw(pipe, options)  # the first call of a process is slower than those that follow
        bar.update()
        for method in (BARE, *options.methods):
            guided = pipe if method == BARE else sparke.wrap(pipe, **METHODS[method])
            start = time.perf_counter()
            drawn[method] = draw(guided, options)
            seconds[method] = time.perf_counter() - start
            bar.update()

    seen = {method: look(pixels(images), [options.prompt]) for method, images in drawn.items()}
    rows = [
        Row(method, drawn[method], found, seconds[method] / seconds[BARE])
        for method, found in figures(seen).items()
    ]
    return sorted(rows, key=lambda row: -row.figures.modes)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("prompt", nargs="?", default="woman health worker")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("-n", type=int, default=32, help="pictures of each method")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=6.0, help="scale of classifier-free guidance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("comparing_methods.png"))
    parser.add_argument("--force", action="store_true", help="replace the sheet of an earlier run")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} is there already; give --force or another --out")
    with ends_in_a_line():
        rows = compare(options)
        print(f"{'method':18}{'modes':>7}{'Vendi':>7}{'similarity':>12}{'names':>7}{'cost':>7}")
        for row in rows:
            of = row.figures
            print(
                f"{row.method:18}{of.modes:7.1f}{of.vendi:7.1f}{of.similarity:12.2f}"
                f"{of.names:7.2f}{row.cost:7.2f}"
            )
        shown = {f"{row.method}: {row.figures.modes:.1f} modes": row.images[:SHOWN] for row in rows}
        with whole(options.out) as file:
            contact_sheet(shown, side=80, label=22).save(file, "PNG")
        print(f"\n{options.out}")


if __name__ == "__main__":
    main()
