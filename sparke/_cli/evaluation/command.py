"""The options of `sparke eval`."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparke._cli.evaluation.asked import Asked
from sparke._cli.evaluation.run import run
from sparke._cli.options import place


def _bandwidth(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not a finite number above 0.")
    return value


def _kernel(value: str) -> str:
    if value not in ("gaussian", "cosine"):
        raise typer.BadParameter(f"{value!r} is neither gaussian nor cosine.")
    return value


def evaluate(
    context: typer.Context,
    sets: Annotated[
        list[Path],
        typer.Argument(
            metavar="SET...",
            parser=place,
            help="Folders of pictures, or features in .safetensors or .npy files; the first is "
            "what the others are compared with.",
        ),
    ],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            parser=place,
            help="csv with the columns file and prompt; once for all sets, or once for each.",
        ),
    ] = None,
    prompts_from_names: Annotated[
        bool,
        typer.Option(
            "--prompts-from-names",
            help="Read prompts from names as sparke generate gives them: old-woman-0001.png.",
        ),
    ] = False,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What compares pictures: pixels (crude; the default), emoji, timm:NAME, "
            "timm:FOLDER, transformers:NAME, transformers:FOLDER, module:function or "
            "file.py:function.",
        ),
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What compares prompts: transformers:FOLDER, module:function, ...; without one, "
            "equal texts are one prompt.",
        ),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the encoder's weights if they are not here.")
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="SET",
            parser=place,
            help="Real or earlier pictures: adds novelty (KEN), relative RKE, precision, recall, "
            "density and coverage.",
        ),
    ] = None,
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            parser=place,
            help="csv with the columns file and label: adds effective modes.",
        ),
    ] = None,
    kernel: Annotated[
        str, typer.Option(callback=_kernel, help="gaussian or cosine, between features.")
    ] = "gaussian",
    bandwidth: Annotated[
        float | None,
        typer.Option(
            callback=_bandwidth,
            help="Of the gaussian kernel, one for all sets; half the median distance if not given.",
        ),
    ] = None,
    random_features: Annotated[
        int | None,
        typer.Option(
            min=16,
            max=16384,
            help="Approximate Vendi, KEN and relative RKE of the gaussian kernel; 1024 where a set "
            "has over 5000 pictures, else exact, if not given.",
        ),
    ] = None,
    nearest: Annotated[
        int, typer.Option(min=1, max=1000, help="k of precision, recall, density and coverage.")
    ] = 5,
    per_prompt: Annotated[
        int | None,
        typer.Option(min=1, help="Take the first so many pictures of each prompt of every set."),
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, max=50, help="Nearest pairs shown of each set.")] = 6,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=4096, help="Side in pixels of what your own function gets; 224 if not given."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Pictures encoded at once.")] = 32,
    device: Annotated[
        str, typer.Option(help="Of the encoder: cpu, cuda, ...; auto takes a GPU if there is one.")
    ] = "auto",
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=place,
            help="The report; sparke-eval.html, or the next free number, if not given.",
        ),
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Only the table.")] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=place, help="Every number, for programs.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Measure how varied folders of pictures are, and what changed from the first to the others.

    Prints a table and writes a report, one HTML file that explains every number and shows the
    pictures that are most alike.
    """
    run(
        Console(),
        Asked(
            paths=sets,
            command=_command(context),
            prompts=prompts or (),
            prompts_from_names=prompts_from_names,
            text_encoder=text_encoder,
            labels=labels or (),
            reference=reference,
            nearest=nearest,
            encoder=encoder,
            image_size=image_size,
            download=download,
            kernel=kernel,
            bandwidth=bandwidth,
            random_features=random_features,
            per_prompt=per_prompt,
            pairs=pairs,
            batch=batch,
            device=device,
            report=report,
            write_report=not no_report,
            json=json,
            force=force,
        ),
    )


def _command(context: typer.Context) -> str:
    """What was typed, put together again from the options that were."""
    words = ["sparke", "eval"]
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        value: Any = context.params.get(parameter.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        flag = parameter.opts[0] if parameter.param_type_name == "option" else None
        for one in values:
            words += [str(one)] if flag is None else [flag] if one is True else [flag, str(one)]
    return shlex.join(words)
