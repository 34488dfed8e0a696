"""Which hooks of a guider reach which of the tiny pipelines, found by calling them.

``python -m tests.backends.reach --write`` renews the table in docs/pipelines.md.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

import sparke
from tests.backends import tiny
from tests.backends.hooks import OnCondition, OnEncoder, OnModel, OnNoise, scaled

__all__ = ["NAMES", "PAGE", "Row", "page", "row", "section"]

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
BEGIN, END = "<!-- hooks: begin -->", "<!-- hooks: end -->"
NAMES = tuple(name for name in tiny.ALL if name != "sd-v")  # the class of sd once more
PROMPTS = ["a red fox", "blueprint of a steam engine"]
NO = "-"
HEAD = (
    "Pipeline",
    "`on_noise`",
    "`on_condition`",
    "`on_model`",
    "`on_evaluation`",
    "`again`",
    "`on_encoder`",
)


class Looking(OnNoise, OnCondition, OnModel, OnEncoder):
    """All hooks, changing nothing but the second encoding."""

    def __init__(self) -> None:
        OnNoise.__init__(self)
        OnCondition.__init__(self)
        OnModel.__init__(self)
        OnEncoder.__init__(self, scaled)


@dataclass(frozen=True)
class Row:
    """What reached one pipeline, in words; "-" where nothing did.

    Attributes:
        name: its class.
        noise: ``on_noise``.
        condition: ``on_condition``, tokens or a pooled vector, and whether with a mask.
        model: ``on_model``.
        evaluation: ``on_evaluation``, the branches of a step's calls.
        again: ``State.again``.
        encoder: ``on_encoder``, how many encoders.
    """

    name: str
    noise: str
    condition: str
    model: str
    evaluation: str
    again: str
    encoder: str


def row(name: str) -> Row:
    """One tiny pipeline called once."""
    pipe, guider = tiny.shared(name), Looking()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sparke.errors.GuidanceWarning)
        torch.manual_seed(0)
        sparke.wrap(pipe, guider=guider)(**tiny.ALL[name].arguments(PROMPTS, num_inference_steps=2))
    first = guider.told[0].step
    # The first look is the host's, the one after the step's calls is our own.
    branches = [e.branches for e in guider.told if e.step == first][:-1]
    inputs = (
        ("tokens" if embeds.ndim == 3 else "pooled") + (" and mask" if mask is not None else "")
        for embeds, mask, step in zip(guider.given, guider.masks, guider.steps, strict=True)
        if step == first
    )
    return Row(
        name=type(pipe).__name__,
        noise="yes" if guider.noises else NO,
        condition=", ".join(dict.fromkeys(inputs)) or NO,
        model="yes" if guider.entered else NO,
        evaluation=", then ".join(" + ".join(names) for names in branches) or NO,
        again=NO if guider.seen_again[0] is None else "yes",
        encoder=str(len(guider.encoders)) if guider.encoders else NO,
    )


def section(rows: Iterable[Row]) -> str:
    """What stands between the two comments of the page."""
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    lines += [_line([f"`{row.name}`", *astuple(row)[1:]]) for row in rows]
    return "\n\n" + "\n".join(lines) + "\n\n"


def page() -> str:
    """The page with what this installation's pipelines do."""
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return head + BEGIN + section(map(row, NAMES)) + END + rest.split(END)[1]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.backends.reach", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew docs/pipelines.md")
    if parser.parse_args(arguments).write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(section(map(row, NAMES)).strip() + "\n")


if __name__ == "__main__":
    main()
