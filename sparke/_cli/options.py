"""Rules on options that several commands share."""

from __future__ import annotations

from pathlib import Path

import typer


def place(text: str | Path) -> Path:
    """A file or folder; what a forgotten shell variable leaves would be the current folder."""
    if not str(text).strip() or (isinstance(text, Path) and not text.parts):
        raise typer.BadParameter("it is empty; give a name, or ./ for the current folder.")
    if "\0" in str(text):
        raise typer.BadParameter("it has a null byte in it, which no path has.")
    return Path(text)
