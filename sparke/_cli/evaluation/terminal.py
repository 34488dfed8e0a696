"""What is shown on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from sparke._cli.evaluation import explain
from sparke._cli.evaluation.measures import Tell
from sparke._cli.evaluation.sets import printable
from sparke._cli.evaluation.told import Told


class Bars:
    """Progress bars, of which the newest is shown."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._task: Any = None

    def __call__(self, name: str) -> Tell:
        """Start one; it moves when what it returns is called with what is done and all there is."""
        if self._task is not None:
            self._shown.remove_task(self._task)
        task = self._task = self._shown.add_task(printable(name), total=None)

        def tell(done: int, total: int) -> None:
            if self._task == task:
                self._shown.update(task, completed=done, total=total)

        return tell


def table(told: Told) -> Table:
    made = Table()
    made.add_column("measure")
    for one in told.sets:
        made.add_column(Text(one.of.label), justify="right")
    made.add_column("better")
    made.add_row("pictures", *(str(len(one.of)) for one in told.sets), "")
    if told.prompts:
        made.add_row("prompts", *(str(len(one.by_prompt)) for one in told.sets), "")
    for row in told.measures:
        cells = [explain.number(one.values[row.name], row.digits) for one in told.sets]
        made.add_row(told.title(row), *cells, row.better)
    return made


def say(console: Console, text: str) -> None:
    console.print(printable(text), soft_wrap=True, markup=False, highlight=False)
