"""Commands as the pages show them, and whether whoever they are for would take them."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docs.blocks import ROOT, inline, of_page

__all__ = ["Refused", "check", "sparke_command", "split", "told"]

FOREIGN = {"cd", "jupyter", "pytest", "torchrun"}
"""Programs that are not ours and whose arguments are not looked at."""
STARTS = ("sparke ", "python -m ", "python examples/", "make ")
"""What code in a line has to start with to be taken for a command."""


class Refused(Exception):
    """A command that would not run: no such program, target, module or option."""


def told(path: Path, *, blocks_only: bool = False) -> list[list[str]]:
    """The commands on a page, in blocks and in line, as words."""
    shown = [block.code for block in of_page(path) if block.language == "sh"]
    if not blocks_only:
        shown += [code for code in inline(path) if code.startswith(STARTS)]
    return [words for text in shown for words in split(text)]


def split(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without what is set before them."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s(?:&&|\|)\s", line):
            words = shlex.split(part, comments=True)
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words:
                yield words


def check(words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Nothing, where the command would be taken.

    Raises:
        Refused: otherwise.
    """
    program, *rest = words
    if program == "sparke":
        sparke_command(rest)
    elif program == "make":
        _targets(rest)
    elif program == "pip" or rest[:2] == ["-m", "pip"]:
        _extras(rest)
    elif program == "python" and rest[:1] == ["-m"]:
        _module(rest[1], rest[2:], patch)
    elif program == "python":
        _script(rest, patch)
    elif program not in FOREIGN and not (ROOT / program).is_file():
        raise Refused(f"no program {program!r}")


def sparke_command(arguments: Sequence[str]) -> Any:
    """The subcommand, with its arguments read."""
    import typer.main

    from sparke._cli.commands import app

    for word in arguments:  # what a command reads has to be there
        if word.endswith("/"):
            Path(word).mkdir(exist_ok=True)
        elif Path(word).suffix in (".csv", ".safetensors"):
            Path(word).touch()
    group: Any = typer.main.get_command(app)
    try:
        with group.make_context("sparke", list(arguments)) as context:
            name, command, rest = group.resolve_command(
                context, [*context._protected_args, *context.args]
            )
            # A command is named without what it would need to run.
            return command.make_context(name, list(rest), parent=context) if rest else command
    except typer.BadParameter as error:
        raise Refused(f"sparke {' '.join(arguments)}: {error}") from error
    except Exception as error:
        if any(kind.__name__ == "UsageError" for kind in type(error).__mro__):
            raise Refused(f"sparke {' '.join(arguments)}: {error}") from error
        raise


def _targets(names: Sequence[str]) -> None:
    made = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if missing := {name for name in names if "=" not in name} - made:
        raise Refused(f"no target {missing} in the Makefile")


def _extras(words: Sequence[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^([a-z-]+) = \[", section, re.MULTILINE))
    for word in words:
        if match := re.fullmatch(r"(?:\.|sparke)\[(.+)\]", word):
            if missing := set(match[1].split(",")) - known:
                raise Refused(f"no extras {missing}")
        elif word.startswith(("./", "examples/")) and not (ROOT / word).is_dir():
            raise Refused(f"no folder {word}")


def _module(name: str, arguments: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(name) is None:
        raise Refused(f"no module {name}")
    if (ROOT / Path(*name.split("."))).is_dir():  # its __main__ would start at once
        if importlib.util.find_spec(f"{name}.__main__") is None or arguments:
            raise Refused(f"{name} has no __main__, or one without options")
    elif name.split(".")[0] in ("benchmarks", "tests", "examples"):
        _parsed(importlib.import_module(name), arguments, patch)


def _script(words: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    path = ROOT / words[0]
    if not path.is_file():
        raise Refused(f"no file {words[0]}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, path.stem, module)
    patch.syspath_prepend(str(path.parent))  # as when it is run
    spec.loader.exec_module(module)
    _parsed(module, words[1:], patch)


def _parsed(module: ModuleType, arguments: Sequence[str], patch: pytest.MonkeyPatch) -> None:
    """Calls the module's main as far as its arguments are read."""

    class Read(BaseException):
        pass

    parse = argparse.ArgumentParser.parse_args

    def read(self: Any, args: Any = None, namespace: Any = None) -> Any:
        parse(self, args, namespace)
        raise Read

    patch.setattr(sys, "argv", [module.__name__, *arguments])
    patch.setattr(argparse.ArgumentParser, "parse_args", read)
    try:
        module.main()
    except Read:
        return
    except SystemExit as error:
        raise Refused(f"{module.__name__} {' '.join(arguments)}") from error
    raise Refused(f"{module.__name__} reads no arguments")
