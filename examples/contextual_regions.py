"""Four regions, one exemplar set each: contextualized Vendi score guidance, measured.

    python examples/contextual_regions.py

c-VSG (arXiv 2406.04551) was made for pictures of everyday things in different regions of the
world: a model asked for "a house" draws the houses of one region, and asked for a region draws one
house over and over. Here four drawing styles of the emoji model stand in for four regions. Its
exemplars are real pictures of each style, in three of six skin tones; what guidance compares is
the picture averaged over 2x2 pixels, where c-VSG takes CLIP features. All of it is on this
machine: nothing is downloaded.

Two questions, one table each. When the prompt does not name the region, does the exemplar set
bring it about? And when the prompt names it, do the pictures stay there and still differ? Columns:

- in region: share of pictures that the judge places in the region wanted.
- modes: effective number of different pictures in the region, of at most 6 for each thing drawn;
  the mean over regions and the region with the fewest. What is drawn elsewhere counts nothing.
- not seen: share of the pictures in the region that show none of its exemplars' skin tones.
- names: share of pictures that show what the prompt asked for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pictures import ends_in_a_line
from torch import Tensor
from torch.nn.functional import avg_pool2d

import sparke
from sparke.guidance.cvsg import CVSG
from sparke.models import emoji

REGIONS = ("noto", "blob", "twemoji", "fluent")
THINGS = ("woman health worker", "man firefighter", "princess", "thumbs up")
SEEN_TONES = ("yellow", "medium", "dark")
STEPS = 15


@dataclass(frozen=True)
class Row:
    """What one method did."""

    method: str
    in_region: float
    modes: float
    fewest: float
    not_seen: float
    names: float
    seconds: float


class World:
    """The model, its judge, and the exemplars of each region."""

    def __init__(self) -> None:
        self.pipe = emoji.pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        self.model: emoji.EmojiModel = self.pipe.transformer.model
        self.judge = emoji.load_judge()
        self.exemplars = {region: self._exemplars(region) for region in REGIONS}

    def features(self, latents: Tensor) -> Tensor:
        """Latents -> rows: the picture at half its size, not clamped, so that gradients pass."""
        pixels = self.model.latent_mean + latents @ self.model.basis.T
        return avg_pool2d(pixels.unflatten(1, (3, 32, 32)), 2).flatten(1)

    def _exemplars(self, region: str) -> sparke.Features:
        known, prompts, images = self.judge.references, [], []
        for thing in THINGS:
            of_thing = known.name == self.judge.prompts.index(thing)
            of_region = known.style == self.judge.styles.index(region)
            for i in (of_thing & of_region).nonzero().squeeze(1).tolist():
                if self.judge.tones[int(known.tone[i])] in SEEN_TONES:
                    images.append(known.images[i].flatten())
                    prompts.append(f"{thing} style:{region}")
        return sparke.Features(torch.stack(images), self.model.encode(prompts))

    def draw(
        self, prompts: list[str], guider: sparke.Guider | None, scale: float, rounds: int
    ) -> Tensor:
        """(rounds, b, 320) pictures, each round remembering those before it."""
        pipe = self.pipe if guider is None else sparke.wrap(self.pipe, guider=guider)
        drawn = []
        for number in range(rounds):
            result = pipe(
                prompts,
                num_inference_steps=STEPS,
                guidance_scale=scale,
                generator=torch.Generator().manual_seed(100 + number),
                output_type="latent",
            )
            drawn.append(result.images)
        return torch.stack(drawn)

    def judged(self, method: str, drawn: Tensor, seconds: float) -> Row:
        """The figures of pictures of each thing in each region, in that order."""
        rounds = len(drawn)
        verdict = self.judge(self.model.decode(drawn.flatten(0, 1)))
        wanted = torch.tensor([self.judge.styles.index(r) for r in REGIONS for _ in THINGS])
        thing = self.judge.ids([t for _ in REGIONS for t in THINGS])
        inside = (verdict.style.view(rounds, -1) == wanted) & (
            verdict.name.view(rounds, -1) == thing
        )
        modes = torch.zeros(len(REGIONS) * len(THINGS))
        for place in range(len(modes)):
            found = verdict.mode.view(rounds, -1)[inside[:, place], place]
            share = found.bincount().double() / max(len(found), 1)
            modes[place] = (-torch.xlogy(share, share).sum()).exp() if len(found) else 0.0
        of_region = modes.view(len(REGIONS), len(THINGS)).mean(1)
        seen = torch.tensor([self.judge.tones.index(t) for t in SEEN_TONES])
        tones = verdict.tone.view(rounds, -1)[inside]
        return Row(
            method=method,
            in_region=float(inside.double().mean()),
            modes=float(of_region.mean()),
            fewest=float(of_region.min()),
            not_seen=float((~torch.isin(tones, seen)).double().mean()) if len(tones) else 0.0,
            names=self.judge.name_accuracy(verdict, thing.repeat(rounds))[0],
            seconds=seconds / drawn.shape[:2].numel(),
        )

    def guiders(self, context: list[str] | None) -> dict[str, Callable[[], sparke.Guider | None]]:
        """By the name of the method; without a context, the nearest exemplar's prompt tells it."""

        def cvsg(**options: float | str) -> Callable[[], sparke.Guider]:
            settings: dict[str, Any] = {
                "features": self.features,
                "context": context,
                "in_batch": False,
                **options,
            }
            return lambda: CVSG(self.exemplars, **settings)

        return {
            "unguided": lambda: None,
            "Vendi score guidance (beta 0)": cvsg(beta=0.0),
            "c-VSG as published": cvsg(),
            "c-VSG, scale 0.1": cvsg(scale=0.1),
            "c-VSG, gentle": cvsg(displaces="denoised"),
            "the same, of cond-rke": cvsg(displaces="denoised", score="cond-rke"),
        }


def compare(world: World, *, named: bool, scale: float, rounds: int) -> list[Row]:
    """Every method from the same noise.

    Args:
        world: the model and its regions.
        named: whether prompts name the region. If not, each sample is told its own.
        scale: of classifier-free guidance.
        rounds: batches of one picture for each thing in each region.
    """
    places = [(region, thing) for region in REGIONS for thing in THINGS]
    prompts = [f"{thing} style:{region}" if named else thing for region, thing in places]
    context = None if named else [region for region, _ in places]
    rows = []
    for method, make in world.guiders(context).items():
        start = time.perf_counter()
        drawn = world.draw(prompts, make(), scale, rounds)
        rows.append(world.judged(method, drawn, time.perf_counter() - start))
    return rows


def show(title: str, rows: list[Row]) -> None:
    """Print a table."""
    print(f"\n{title}\n")
    print(f"{'':30} in region  modes  fewest  not seen  names  ms/picture")
    for row in rows:
        print(
            f"{row.method:30} {row.in_region:9.2f} {row.modes:6.2f} {row.fewest:7.2f} "
            f"{row.not_seen:9.2f} {row.names:6.2f} {1000 * row.seconds:11.0f}"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=6, help="pictures of each thing and region")
    options = parser.parse_args(arguments)
    with ends_in_a_line():
        world = World()
        show(
            "The prompt does not name the region (guidance scale 3)",
            compare(world, named=False, scale=3.0, rounds=options.rounds),
        )
        show(
            "The prompt names the region (guidance scale 6)",
            compare(world, named=True, scale=6.0, rounds=options.rounds),
        )


if __name__ == "__main__":
    main()
