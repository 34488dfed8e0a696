"""One prompt, one batch, the same noise: with sparke and without.

    python examples/batch_variety.py "woman health worker" -n 16

Draws the batch twice from the same seed, first by the pipeline as it is and then by the same one
wrapped, and writes a contact sheet of both. Prints for each of the two:

- modes: effective number of different pictures (exp of the entropy of what was drawn), which needs
  to know what there is to draw: the emoji model's judge does.
- Vendi: effective number of different pictures as an encoder sees them, at one bandwidth for both.
- similarity: mean cosine of the pairs of the batch to the same encoder; lower is more varied.
- names: share of pictures that show what was asked for. Variety at its expense is no gain.

It draws with the small emoji model that ships with sparke, on the CPU, and downloads nothing. To
draw with your own model, change `load_pipeline` in pictures.py, and give `look`, beside it, an
encoder that you trust.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pictures import (
    contact_sheet,
    draw,
    ends_in_a_line,
    figures,
    load_pipeline,
    look,
    pixels,
    whole,
)

import sparke


def run(options: argparse.Namespace) -> None:
    bare = load_pipeline()
    bare.set_progress_bar_config(disable=None)  # a bar where there is a terminal
    guided = sparke.wrap(bare, scale=options.scale)  # the one line that sparke needs

    drawn = {"without sparke": draw(bare, options), "with sparke": draw(guided, options)}
    seen = {name: look(pixels(images), [options.prompt]) for name, images in drawn.items()}
    print(f"{options.prompt!r}, {options.n} pictures, CFG {options.cfg:g}, seed {options.seed}\n")
    print(f"{'':16}{'modes':>7}{'Vendi':>7}{'similarity':>12}{'names':>7}")
    for name, of in figures(seen).items():
        print(f"{name:16}{of.modes:7.1f}{of.vendi:7.1f}{of.similarity:12.2f}{of.names:7.2f}")

    with whole(options.out) as file:
        contact_sheet(drawn).save(file, "PNG")
    print(f"\n{options.out}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("prompt", nargs="?", default="woman health worker")
    parser.add_argument("-n", type=int, default=16, help="pictures in the batch")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=6.0, help="scale of classifier-free guidance")
    parser.add_argument("--scale", type=float, default=0.4, help="strength of sparke; 0 is none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("batch_variety.png"))
    parser.add_argument("--force", action="store_true", help="replace the sheet of an earlier run")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} is there already; give --force or another --out")
    with ends_in_a_line():
        run(options)


if __name__ == "__main__":
    main()
