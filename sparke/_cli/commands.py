"""What the command line offers: ``app``, and its options."""

from __future__ import annotations

import math
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import sparke
from sparke._cli import demonstration, generation, listing
from sparke._cli.evaluation.command import evaluate
from sparke._cli.options import place
from sparke._cli.sampling import Settings

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MOST_PROMPTS = 64


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparke {sparke.__version__}")
        raise typer.Exit


Cfg = Annotated[
    float,
    typer.Option(min=0, max=1000, callback=_finite, help="Classifier-free guidance scale."),
]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Steps of the sampler.")]
ScoreName = Annotated[str, typer.Option(help="What counts as different; see sparke scores.")]
Scale = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=100,
        callback=_finite,
        help="Strength of the push; 0 is none, the library's own if not given.",
    ),
]
MOST_SEED = 2**63 - 1


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Different pictures from the same prompt: diversity guidance for diffusion samplers.

    The pictures are drawn by the small emoji model that comes along, on the CPU.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)
        context.fail("A command is missing, such as sparke demo")


@app.command()
def demo(
    more: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="PROMPT...")] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROMPT...",
            help="What to draw, e.g. --prompts pizza 'old woman'; eight of ours if not given.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", parser=place, help="Where the files go.")
    ] = Path("demo"),
    n: Annotated[int, typer.Option("-n", min=1, max=64, help="Pictures to a prompt.")] = 16,
    cfg: Cfg = 6.0,
    steps: Steps = 25,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the noise.")] = 0,
    score: ScoreName = "cond-rke",
    scale: Scale = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the files of an earlier demo.")
    ] = False,
) -> None:
    """Draw the same prompts from the same noise with and without sparke, side by side.

    Writes a contact sheet, DIR/contact-sheet.png, and its figures, DIR/demo.json. Where these are
    already, numbers are added: DIR/contact-sheet-2.png.
    """
    asked = [*(prompts or []), *(more or [])] or list(demonstration.PROMPTS)
    demonstration.run(
        Console(),
        _few(asked),
        out=out,
        n=n,
        settings=Settings(steps, cfg),
        seed=seed,
        options=_options(score, scale),
        force=force,
    )


@app.command()
def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(metavar="PROMPT...", help="What to draw, e.g. 'woman health worker'."),
    ],
    n: Annotated[int, typer.Option("-n", min=1, max=10_000, help="Pictures to a prompt.")] = 16,
    out: Annotated[
        Path, typer.Option(metavar="DIR", parser=place, help="Where the pictures go.")
    ] = Path("out"),
    memory: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=place,
            help="Keep away from what this file remembers, and add to it; made if not there.",
        ),
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="Pictures the memory holds, the newest; as the file says, or 4096.",
        ),
    ] = None,
    cfg: Cfg = 6.0,
    steps: Steps = 25,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_SEED, help="Of the noise; drawn by lot if not given."),
    ] = None,
    score: ScoreName = "cond-rke",
    scale: Scale = None,
    batch: Annotated[
        int, typer.Option(min=1, max=1024, help="Pictures drawn at once, which repel each other.")
    ] = 16,
    size: Annotated[
        int, typer.Option(min=16, max=2048, help="Side of a picture in pixels; the model's is 32.")
    ] = 128,
) -> None:
    """Draw pictures that differ from each other, and from those of earlier calls.

    Each picture is a file of its own, DIR/woman-health-worker-0001.png and so on; numbers go on
    from the files that are there, and no file is ever replaced. After an error or Ctrl-C there
    are no new pictures and the memory is as it was.
    """
    generation.run(
        Console(),
        _few(prompts),
        out=out,
        n=n,
        batch=batch,
        size=size,
        settings=Settings(steps, cfg),
        seed=secrets.randbelow(2**31) if seed is None else seed,
        options=_options(score, scale),
        memory_file=memory,
        capacity=capacity,
    )


app.command("eval")(evaluate)


@app.command("prompts")
def list_prompts() -> None:
    """List what the emoji model can draw: its prompts, and the words they are made of."""
    listing.show_prompts(Console())


@app.command()
def scores() -> None:
    """List the scores: what each one counts as different, and where it is from."""
    listing.show_scores(Console())


@app.command()
def guiders() -> None:
    """List the guiders: what each one does, where it is from, and which hooks it uses."""
    listing.show_guiders(Console())


@app.command()
def memories() -> None:
    """List the memories: where finished samples are kept."""
    listing.show_memories(Console())


@app.command()
def backends() -> None:
    """List the backends: what kinds of samplers and pipelines can be wrapped."""
    listing.show_backends(Console())


def _few(prompts: list[str]) -> list[str]:
    if len(prompts) > MOST_PROMPTS:
        raise typer.BadParameter(f"{len(prompts)} prompts; at most {MOST_PROMPTS} are taken.")
    return prompts


def _options(score: str, scale: float | None) -> dict[str, Any]:
    """For `sparke.wrap`; what was not given is left to it."""
    return {"score": score} if scale is None else {"score": score, "scale": scale}
