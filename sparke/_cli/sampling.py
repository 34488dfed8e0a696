"""The emoji model and the sampler both commands draw with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, SparkeError
from sparke.models import emoji

SAMPLER = "sample_dpmpp_2m"
LONGEST_PROMPT = 200

Sampler = Callable[..., Tensor]
Tick = Callable[[], None]


@dataclass(frozen=True)
class Settings:
    """What a picture depends on beside its prompt and its noise."""

    steps: int
    cfg: float


def bare_sampler(shown: Progress) -> Sampler:
    """k-diffusion's DPM-Solver++(2M); importing it takes seconds.

    Raises:
        MissingHost: k-diffusion is not there, or something it needs.
    """
    task = shown.add_task("loading", total=None)
    named = checks.host("k-diffusion", "draws the pictures", "k-diffusion")
    with named, warnings.catch_warnings():
        # Its own dependencies warn at import.
        warnings.simplefilter("ignore")
        from k_diffusion import sampling
    shown.remove_task(task)
    sampler: Sampler = getattr(sampling, SAMPLER)
    return sampler


def checked_prompts(model: emoji.EmojiModel, prompts: Sequence[str]) -> list[str]:
    """The prompts, each once and with single spaces.

    Raises:
        ArgumentError: there is none, one is empty or too long, or says two styles or tones.
        UnknownWords: the model does not know a word.
    """
    tidy = list(dict.fromkeys(" ".join(prompt.lower().split()) for prompt in prompts))
    if not tidy or not all(tidy):
        raise ArgumentError("an empty prompt asks for nothing; try 'woman health worker'.")
    for prompt in tidy:
        if len(prompt) > LONGEST_PROMPT:
            raise ArgumentError(
                f"a prompt is {len(prompt)} characters long, at most {LONGEST_PROMPT} are taken: "
                f"{prompt[:40]!r}..."
            )
    model.encode(tidy)
    return tidy


def noise(model: emoji.EmojiModel, count: int, generator: torch.Generator) -> Tensor:
    """(count, 320) noise at the level where sampling starts."""
    return torch.randn(count, *model.latent_shape, generator=generator) * model.sigma_max


@torch.no_grad()
def draw(
    sampler: Sampler,
    model: emoji.EmojiModel,
    prompt: str,
    start: Tensor,
    settings: Settings,
    tick: Tick,
) -> Tensor:
    """Sample (b, 320) latents of one prompt from (b, 320) noise.

    Raises:
        SparkeError: what comes out is not finite.
    """

    def callback(_: dict[str, Any]) -> None:
        tick()

    embeds = model.encode([prompt]).expand(len(start), -1)
    latents = sampler(
        model,
        start,
        model.sigmas(settings.steps),
        extra_args={"cond": embeds, "cond_scale": settings.cfg},
        callback=callback,
        disable=True,
    )
    if not bool(torch.isfinite(latents).all()):
        raise SparkeError(
            f"sampling {prompt!r} ended in numbers that are not finite; lower --cfg or --scale."
        )
    return latents


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: the model is too small for two.

    On idle cores one is as fast; where others work too, threads that wait for each other at every
    layer take forty times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on stderr, none where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=40),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    # By the stream itself: FORCE_COLOR makes rich take a log file for a terminal.
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=not is_terminal) as shown:
        yield shown
