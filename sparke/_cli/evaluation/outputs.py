"""The files that are written: whole or not at all, and never in the place of another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from sparke import checks
from sparke._cli import files
from sparke._cli.evaluation import report
from sparke._cli.evaluation.asked import Asked
from sparke._cli.evaluation.told import Told
from sparke.errors import ArgumentError

REPORT = "sparke-eval{}.html"


def check(asked: Asked) -> None:
    """Refuse what could not be written in the end, before the work."""
    asked_for = [path for path in (asked.report, asked.json) if path is not None]
    if not asked.write_report and asked.report is not None:
        raise ArgumentError("--report and --no-report are both given; one will do.")
    if asked.write_report:
        for package in ("matplotlib", "jinja2"):
            with checks.host(package, "writes the report", "eval"):
                __import__(package)
    if len({path.absolute() for path in asked_for}) < len(asked_for):
        raise ArgumentError(f"--report and --json both name {asked.json}; give two files.")
    for path in asked_for:
        _check(path, asked.force)


def _check(path: Path, force: bool) -> None:
    try:
        if path.is_dir():
            raise files.OutputError(f"{path} is a folder, a file is needed there.")
        if not force and (path.exists() or path.is_symlink()):
            raise _taken(path)
        if path.parent.exists():
            files.folder(path.parent, make=False)
    except files.OutputError:
        raise
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise files.OutputError(f"cannot write {path}: {said}.") from error


def _taken(path: Path) -> files.OutputError:
    return files.OutputError(f"{path} is there already; --force replaces it.")


def write(told: Told, asked: Asked) -> list[Path]:
    """The files, all or none; their paths."""
    contents = {}
    if asked.json is not None:
        text = json.dumps(told.json(), indent=2, allow_nan=False)
        contents[asked.json] = f"{text}\n".encode()
    data = report.html(told, asked.kernel) if asked.write_report else None
    for name in [asked.report] if asked.report is not None else _free():
        found = contents if data is None else {name: data, **contents}
        for path in found:
            files.folder(path.parent)
        try:
            with files.uninterrupted():
                files.create_all(found, replace=asked.force)
        except FileExistsError as error:
            taken = [path for path in (asked.report, asked.json) if path and os.path.lexists(path)]
            if taken:
                raise _taken(taken[0]) from error
            continue
        return list(found)
    raise AssertionError


def _free() -> Iterator[Path]:
    """Names for the report where none is asked for."""
    return (Path(REPORT.format("" if number == 1 else f"-{number}")) for number in count(1))
