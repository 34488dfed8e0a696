"""`sparke scores` and `sparke guiders`: read off their own descriptions.

Plugins appear as ours do.
"""

from __future__ import annotations

import inspect
import re
import typing
from importlib.metadata import entry_points
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import sparke
from sparke import _discover, guidance
from sparke.errors import SparkeError
from sparke.guidance._hooks import HOOKS

PAPER = re.compile(
    r"arXiv[: ]\s*(?:\d{4}\.\d{4,5})|\b(?:NeurIPS|ICML|ICLR|CVPR|ICCV|ECCV|TMLR|AISTATS)\s+\d{4}"
)


def show_scores(console: Console) -> None:
    """Print the table of scores."""
    table = Table()
    for column in ("score", "what it counts as different", "paper", "package"):
        table.add_column(column, no_wrap=column == "score")
    packages = _packages("sparke.scores")
    for name in sparke.scores():
        try:
            line, papers = described(type(sparke.score(name)))
        except SparkeError as error:
            line, papers = f"cannot be used: {error}", []
        table.add_row(*map(Text, (name, line, "\n".join(papers), packages.get(name, "sparke"))))
    console.print(table)


def show_guiders(console: Console) -> None:
    """Print the table of guiders."""
    table = Table()
    for column in ("guider", "what it does", "paper", "hooks", "package"):
        table.add_column(column, no_wrap=column in ("guider", "hooks"))
    packages = _packages(guidance.GROUP)
    for name in guidance.names():
        try:
            made_by = _discover.factory(guidance, "guider", name, guidance.GROUP)
            line, papers = described(made_by)
            used = hooks(made_by)
        except SparkeError as error:
            line, papers, used = f"cannot be used: {error}", [], []
        cells = (name, line, "\n".join(papers), "\n".join(used), packages.get(name, "sparke"))
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print("A score's name is one too: a DiversityGuider of that score; see sparke scores.")


def described(thing: Any) -> tuple[str, list[str]]:
    """First line of a description, and the papers it names, in their order."""
    text = inspect.getdoc(thing) or "(no description)"
    papers = (" ".join(found.split()) for found in PAPER.findall(text))
    return text.partition("\n")[0], list(dict.fromkeys(papers))


def hooks(made_by: Any) -> list[str]:
    """The hooks of what a factory makes, as far as its class or annotation tells."""
    if not isinstance(made_by, type):
        try:
            made_by = typing.get_type_hints(made_by).get("return")
        except (NameError, TypeError):
            return []
    return [f"on_{name}" for name in HOOKS if callable(getattr(made_by, f"on_{name}", None))]


def _packages(group: str) -> dict[str, str]:
    """Names that plugins add, each with the package it is from."""
    entries = entry_points(group=group)
    return {entry.name: entry.dist.name if entry.dist else "?" for entry in entries}
