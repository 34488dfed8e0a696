"""`sparke scores`, `guiders`, `memories`, `backends`: read off their own descriptions; `prompts`.

Plugins appear as ours do. One that cannot be used is shown with the reason, and so is one that
stands behind a name of ours.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparke._discover import BACKENDS, GUIDERS, MEMORIES, SCORES, Family, Plugin
from sparke.errors import SparkeError
from sparke.guidance._hooks import HOOKS
from sparke.models import emoji

PAPER = re.compile(
    r"arXiv[: ]\s*(?:\d{4}\.\d{4,5})|\b(?:NeurIPS|ICML|ICLR|CVPR|ICCV|ECCV|TMLR|AISTATS)\s+\d{4}"
)


def show_scores(console: Console) -> None:
    """Print the table of scores."""
    _show(console, SCORES, "what it counts as different", "paper", built=True)


def show_guiders(console: Console) -> None:
    """Print the table of guiders."""
    _show(console, GUIDERS, "what it does", "paper", "hooks")
    console.print("A score's name is one too: a DiversityGuider of that score; see sparke scores.")
    console.print(
        'Guiders are used in Python: sparke.wrap(target, guider="cads").',
        markup=False,
        soft_wrap=True,
    )


def show_memories(console: Console) -> None:
    """Print the table of memories."""
    _show(console, MEMORIES, "what it keeps")


def show_backends(console: Console) -> None:
    """Print the table of backends."""
    _show(console, BACKENDS, "what it wraps")


def show_prompts(console: Console) -> None:
    """Print what the emoji model can be asked for."""
    model = emoji.load()
    known = model.vocabulary
    for title, words in (
        ("prompts", model.prompts),
        ("words, of which prompts are made", known.words),
        ("styles, added to a prompt", [f"style:{style}" for style in known.styles]),
        ("skin tones, added to a prompt of people", [f"tone:{tone}" for tone in known.tones]),
    ):
        console.print(Text(f"{len(words)} {title}", style="bold"))
        console.print(Columns([Text(word) for word in sorted(words)], padding=(0, 2)))
        console.print()


def _show(console: Console, family: Family, says: str, *more: str, built: bool = False) -> None:
    """One row for each name: its description, more of it, and the package it is from.

    Args:
        console: where to.
        family: whose.
        says: heading of the description.
        more: further columns, ``"paper"`` and ``"hooks"``.
        built: whether an object can be made without options, and is, to see that it can be used.
    """
    table = Table()
    for column in (family.kind, says, *more, "package"):
        table.add_column(column, no_wrap=column in (family.kind, "hooks"))
    read: dict[str, Callable[[Any], list[str]]] = {
        "paper": lambda thing: described(thing)[1],
        "hooks": hooks,
    }
    own, plugins = family.own, family.plugins
    for name in family.names():
        owners = ["sparke"] if name in own else [p.owner for p in plugins if p.name == name]
        try:
            thing = type(family.build(name, {})) if built else family.factory(name)
            line = described(thing)[0]
            cells = ["\n".join(read[column](thing)) for column in more]
        except SparkeError as error:
            line, cells = f"cannot be used: {error}", [""] * len(more)
        table.add_row(*map(Text, (name, line, *cells, ", ".join(dict.fromkeys(owners)))))
    console.print(table)
    for line in ignored([plugin for plugin in plugins if plugin.name in own]):
        console.print(Text(line))


def ignored(plugins: Sequence[Plugin]) -> list[str]:
    """What is said of plugins behind names of ours."""
    return [f"Ignored: {plugin}. The name is sparke's own." for plugin in plugins]


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
