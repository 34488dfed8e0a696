"""What the examples share: the pipeline that draws, the judge of what is drawn, and files.

Your own pipeline goes into `load_pipeline`, and an encoder that you trust into `look`; then every
example draws and judges with those. Copy this file with the example that you adapt: a script finds
the modules that lie beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

import sparke
from sparke.models import emoji

SIDE = 32
"""Of the pictures that are judged, in pixels."""


def load_pipeline() -> Any:
    """The pipeline that draws; any of diffusers', SDXL and Flux among them."""
    # Your own, for example:
    #     return diffusers.StableDiffusionXLPipeline.from_pretrained(
    #         "stabilityai/stable-diffusion-xl-base-1.0", torch_dtype=torch.float16
    #     ).to("cuda")
    return emoji.pipeline()


def draw(
    pipe: Any, options: argparse.Namespace, *, n: int | None = None, seed: int | None = None
) -> list[Image.Image]:
    """A batch; a seed is the same noise whether the pipeline is wrapped or not."""
    images: list[Image.Image] = pipe(
        options.prompt,
        num_images_per_prompt=options.n if n is None else n,
        num_inference_steps=options.steps,
        guidance_scale=options.cfg,
        generator=torch.Generator().manual_seed(options.seed if seed is None else seed),
    ).images
    return images


@dataclass(frozen=True)
class Seen:
    """What a judge sees in n pictures: features (n, d), modes (n,) and names right or not (n,)."""

    features: Tensor
    modes: Tensor
    right: Tensor

    def __getitem__(self, rows: slice) -> Seen:
        return Seen(self.features[rows], self.modes[rows], self.right[rows])

    def effective_modes(self) -> float:
        """Effective number of different pictures among those that show what was asked for."""
        if not self.right.any():
            return 0.0
        return sparke.metrics.effective_modes(self.modes[self.right])


def pixels(images: list[Image.Image]) -> Tensor:
    """Pictures of any size -> (n, 3, SIDE, SIDE) in [-1, 1], cut to the middle square."""
    squares = [ImageOps.fit(image.convert("RGB"), (SIDE, SIDE)) for image in images]
    stacked = np.stack([np.asarray(square) for square in squares])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


def look(pictures: Tensor, prompts: list[str]) -> Seen:
    """Judge (n, 3, SIDE, SIDE) pictures of n prompts, or of one, by what did not guide them."""
    # For photographs: features of CLIP or DINO, and no figures of modes and names.
    judge = emoji.load_judge()
    verdict = judge(pictures)
    return Seen(judge.features(pictures), verdict.mode, verdict.name == judge.ids(prompts))


@dataclass(frozen=True)
class Figures:
    """Of a batch: effective modes, Vendi score, mean cosine of the pairs, share of right names."""

    modes: float
    vendi: float
    similarity: float
    names: float


def figures(seen: dict[str, Seen]) -> dict[str, Figures]:
    """The figures of each batch, at one bandwidth, so that they can be compared."""
    bandwidth = sparke.metrics.shared_bandwidth(*(one.features for one in seen.values()))
    return {
        name: Figures(
            modes=one.effective_modes(),
            vendi=sparke.metrics.vendi(one.features, bandwidth=bandwidth),
            similarity=sparke.metrics.in_batch_similarity(one.features),
            names=float(one.right.double().mean()),
        )
        for name, one in seen.items()
    }


def contact_sheet(
    rows: dict[str, list[Image.Image]], *, side: int = 96, label: int = 24
) -> Image.Image:
    """A row of square pictures under each label, both of so many pixels in height."""
    columns = max(len(images) for images in rows.values())
    sheet = Image.new("RGB", (columns * side, len(rows) * (side + label)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (text, images) in enumerate(rows.items()):
        top = row * (side + label)
        pen.text((6, top + 5), text, fill="black", font_size=14)
        for column, image in enumerate(images):
            tile = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
            sheet.paste(tile, (column * side, top + label))
    return sheet


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write, which takes its place at `path` when it is complete, or never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def ends_in_a_line(interrupted: str = "interrupted") -> Iterator[None]:
    """One line and no traceback, where something is refused and at Ctrl-C (exit code 130)."""
    try:
        yield
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
    except (sparke.SparkeError, OSError) as error:
        sys.exit(str(error))
