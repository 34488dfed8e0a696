"""New pictures that are unlike those in a folder of mine.

    python examples/novelty_against_my_folder.py my-pictures --prompt "woman health worker"
    python examples/novelty_against_my_folder.py             # draws itself a folder to begin with

Draws one batch twice from the same noise, first by the bare pipeline and then guided away from the
pictures of the folder ("novelty", the form of SPARKE for fixed references, arXiv 2506.10173).
A caption in a .txt file beside each picture says what it shows, and only pictures of like captions
then matter; without captions all do. Prints for each new picture which of the folder's is nearest
in features of the judge, which did not guide, and how far that is, before and after; then

- distance: to the nearest picture of the folder, the mean over new pictures.
- repeated: share of new pictures that show the same as some picture of the folder.
- KEN: entropy of the modes that are more frequent among the new pictures than in the folder (arXiv
  2402.17287), of 0 where there is nothing new.
- names: share of pictures that show what was asked for.

Writes novelty.png, a row of each batch and below each picture the nearest of the folder. It draws
with the small emoji model that ships with sparke, on the CPU, and downloads nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from pictures import SIDE, contact_sheet, draw, ends_in_a_line, load_pipeline, look, pixels, whole
from PIL import Image, ImageOps

import sparke
from sparke.images import reference_images

PICTURES = (".jpeg", ".jpg", ".png", ".webp")


def reference(pipe: Any, files: list[Path]) -> sparke.Features:
    """The pictures as clean latents of the pipeline, and their captions as its prompts."""
    # With a pipeline that has a VAE: return reference_images(files, pipe)
    encode = pipe.transformer.model.encode_images
    return reference_images(files, pipe, encode=encode, height=SIDE, width=SIDE)


def files_of(folder: Path) -> list[Path]:
    """The pictures of the folder, by name."""
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not found:
        raise SystemExit(f"{folder} has no pictures in it ({', '.join(PICTURES)})")
    return found


def made_files(pipe: Any, options: argparse.Namespace) -> list[Path]:
    """Pictures with their captions, drawn by the bare pipeline."""
    files: list[Path] = []
    for image in draw(pipe, options, n=options.known, seed=options.seed + 1):
        files.append(options.out / "my-pictures" / f"{len(files):02}.png")
        with whole(files[-1]) as file:
            image.save(file, "PNG")
        with whole(files[-1].with_suffix(".txt")) as file:
            file.write_text(options.prompt, encoding="utf-8")
    return files


def opened(file: Path) -> Image.Image:
    """The picture of a file, laid on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def run(options: argparse.Namespace) -> None:
    bare = load_pipeline()
    bare.set_progress_bar_config(disable=None)  # a bar where there is a terminal
    files = files_of(options.folder) if options.folder else made_files(bare, options)

    # The two lines that novelty needs: the folder as latents, and the pipeline wrapped.
    away = reference(bare, files)
    guided = sparke.wrap(bare, guider="novelty", reference=away, scale=options.scale, in_batch=True)

    drawn = {"without": draw(bare, options), "with": draw(guided, options)}
    pictures = [opened(file) for file in files]
    known = look(pixels(pictures), [options.prompt])
    seen = {name: look(pixels(images), [options.prompt]) for name, images in drawn.items()}
    far = {name: torch.cdist(one.features, known.features) for name, one in seen.items()}

    print(f"{'picture':>7}   nearest of the folder, without        with")
    for i in range(options.n):
        told = (
            f"{files[int(d[i].argmin())].name:>21} {float(d[i].min()):6.2f}" for d in far.values()
        )
        print(f"{i:7}   " + "   ".join(told))

    bandwidth = sparke.metrics.shared_bandwidth(
        known.features, *(s.features for s in seen.values())
    )
    print(f"\n{'':8}{'distance':>9}{'repeated':>10}{'KEN':>7}{'names':>7}")
    rows = {}
    for name, one in seen.items():
        repeated = float(torch.isin(one.modes, known.modes).double().mean())
        ken = sparke.metrics.ken(one.features, known.features, bandwidth=bandwidth)
        names = float(one.right.double().mean())
        distance = float(far[name].amin(1).mean())
        print(f"{name:8}{distance:9.2f}{repeated:10.2f}{ken:7.2f}{names:7.2f}")
        rows[f"{name} novelty guidance"] = drawn[name]
        rows[f"nearest of the folder to these, {name}"] = [pictures[i] for i in far[name].argmin(1)]
    with whole(options.out / "novelty.png") as file:
        contact_sheet(rows).save(file, "PNG")
    print(f"\n{options.out / 'novelty.png'}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, help="of pictures; drawn if left out")
    parser.add_argument("--prompt", default="woman health worker")
    parser.add_argument("-n", type=int, default=16, help="new pictures")
    parser.add_argument("--known", type=int, default=16, help="pictures of a folder drawn here")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=6.0, help="scale of classifier-free guidance")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of novelty; 0 is none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("novelty"), help="folder of what is made")
    parser.add_argument("--force", action="store_true", help="replace what an earlier run made")
    options = parser.parse_args(arguments)
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} is there already; give --force or another --out")
    with ends_in_a_line():
        run(options)


if __name__ == "__main__":
    main()
