"""`sparke scores`: read off the scores' own descriptions, so that plugins appear as ours do."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import entry_points

from rich.console import Console
from rich.table import Table
from rich.text import Text

import sparke
from sparke.errors import SparkeError

PAPER = re.compile(
    r"arXiv[: ]\s*(?:\d{4}\.\d{4,5})|\b(?:NeurIPS|ICML|ICLR|CVPR|ICCV|ECCV|TMLR|AISTATS)\s+\d{4}"
)


def show(console: Console) -> None:
    """Print the table of scores."""
    plugins = {entry.name: entry for entry in entry_points(group="sparke.scores")}
    table = Table()
    for column in ("score", "what it counts as different", "paper", "package"):
        table.add_column(column, no_wrap=column == "score")
    for name in sparke.scores():
        line, papers = described(name)
        dist = plugins[name].dist if name in plugins else None
        package = "sparke" if name not in plugins else dist.name if dist else "?"
        table.add_row(*map(Text, (name, line, "\n".join(papers), package)))
    console.print(table)


def described(name: str) -> tuple[str, list[str]]:
    """First line of a score's description, and the papers it names, in their order."""
    try:
        text = inspect.getdoc(type(sparke.score(name))) or "(no description)"
    except SparkeError as error:
        return f"cannot be used: {error}", []
    line = text.partition("\n")[0]
    papers = (" ".join(found.split()) for found in PAPER.findall(text))
    return line, list(dict.fromkeys(papers))
