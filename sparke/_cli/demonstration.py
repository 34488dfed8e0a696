"""`sparke demo`: both halves, the sheet, the figures and the table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import sparke
from sparke._cli import files, sampling
from sparke._cli.figures import HALVES, Half, judged, report
from sparke._cli.sampling import Sampler, Settings
from sparke._cli.sheet import Row, contact_sheet
from sparke.models import emoji

PROMPTS = (
    "woman health worker",
    "dog face",
    "santa claus",
    "octopus",
    "old woman",
    "tulip",
    "man firefighter",
    "pizza",
)
TITLES = ("unguided", "sparke.wrap(sampler)")


@sampling.one_thread()
def run(
    console: Console,
    prompts: Sequence[str],
    *,
    out: Path,
    n: int,
    settings: Settings,
    seed: int,
    options: dict[str, Any],
    force: bool,
) -> None:
    """Draw, judge, write, show.

    Args:
        console: of the table and the names of the files.
        prompts: what to draw; each must be one of the judge's concepts.
        out: folder of the files.
        n: pictures to a prompt and half.
        settings: of the sampler.
        seed: of the noise, which both halves share.
        options: of `sparke.wrap`.
        force: whether to replace the files of an earlier run.
    """
    sparke.score(options["score"])
    model, judge = emoji.load(), emoji.load_judge()
    prompts = sampling.checked_prompts(model, prompts)
    judge.ids(prompts)
    generator = torch.Generator().manual_seed(seed)
    noise = [sampling.noise(model, n, generator) for _ in prompts]

    def half(shown: Progress, title: str, sampler: Callable[[], Sampler]) -> Half:
        task = shown.add_task(f"{title:<20}", total=len(prompts) * settings.steps)
        started, images = time.perf_counter(), []
        for prompt, x in zip(prompts, noise, strict=True):
            latents = sampling.draw(
                sampler(), model, prompt, x, settings, lambda: shown.advance(task)
            )
            images.append(model.decode(latents))
        return judged(judge, torch.stack(images), prompts, time.perf_counter() - started)

    # A new memory for each prompt: the figures show what one batch gains.
    with sampling.progress() as shown:
        bare = sampling.bare_sampler(shown)
        files.folder(out)
        samplers = (lambda: bare, lambda: sparke.wrap(bare, **options))
        halves = {
            name: half(shown, title, sampler)
            for name, title, sampler in zip(HALVES, TITLES, samplers, strict=True)
        }
        told = {"sampler": f"k_diffusion {sampling.SAMPLER}", "steps": settings.steps}
        told |= {"cfg": settings.cfg, "seed": seed, "n": n, "prompts": prompts, **options}
        shown.add_task(f"{'writing':<20}", total=None)
        written = _write(out, _sheet(prompts, halves, told), report(told, prompts, halves), force)
    console.print(_table(halves, len(prompts), n))
    for path in written:
        console.print(files.shown(path), soft_wrap=True, markup=False, highlight=False)


def _sheet(prompts: Sequence[str], halves: dict[str, Half], told: dict[str, Any]) -> bytes:
    left, right = (halves[name] for name in HALVES)
    rows = [
        Row(
            prompt,
            (left.images[i], right.images[i]),
            (left.prompts[i].effective_modes, right.prompts[i].effective_modes),
        )
        for i, prompt in enumerate(prompts)
    ]
    strength = f"score {told['score']}" + (f", scale {told['scale']:g}" if "scale" in told else "")
    facts = (
        f"CFG {told['cfg']:g}",
        f"{sampling.SAMPLER}, {told['steps']} steps",
        strength,
        f"seed {told['seed']}",
        f"sparke {sparke.__version__}, emoji model",
    )
    line = "   |   ".join(facts)
    return files.png(contact_sheet(rows, "Same prompts, same noise", line, TITLES))


def _write(out: Path, sheet: bytes, figures: dict[str, Any], force: bool) -> list[Path]:
    """The two files, under the first name that is free for both."""
    text = json.dumps(figures, indent=2) + "\n"
    contents = {"contact-sheet{}.png": sheet, "demo{}.json": text.encode()}
    for number in count(1):
        suffix = "" if number == 1 else f"-{number}"
        paths = {out / name.format(suffix): data for name, data in contents.items()}
        if not force and any(path.exists() or path.is_symlink() for path in paths):
            continue
        try:
            with files.uninterrupted():
                files.create_all(paths, replace=force)
        except FileExistsError:
            continue
        return list(paths)
    raise AssertionError


def _table(halves: dict[str, Half], prompts: int, n: int) -> Table:
    table = Table(
        title=f"{prompts} prompt{'s' * (prompts != 1)}, {n} pictures each, the same noise",
        title_style="",
        title_justify="left",
    )
    table.add_column("")
    for title in TITLES:
        table.add_column(title, justify="right")
    overall = [halves[name].overall for name in HALVES]
    table.add_row("effective modes", *(f"{one.effective_modes:.2f}" for one in overall))
    table.add_row("Vendi score", *(f"{one.vendi:.2f}" for one in overall))
    table.add_row("right name, nearest picture", *(f"{one.name_accuracy:.1%}" for one in overall))
    table.add_row("right name, CNN", *(f"{one.name_accuracy_cnn:.1%}" for one in overall))
    table.add_row("seconds", *(f"{halves[name].seconds:.1f}" for name in HALVES))
    return table
