"""What the pages and docstrings show: fenced blocks, and commands in line."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

__all__ = ["ROOT", "Block", "inline", "of_docstrings", "of_page", "pages", "run"]

ROOT = Path(__file__).parents[2]
REASON = re.compile(r"<!-- not run: \S.*-->")
SECTION = re.compile(r"^[A-Z][A-Za-z ]*:$")


@dataclass(frozen=True)
class Block:
    """A block of code somewhere.

    Attributes:
        source: the file, relative to the repository.
        owner: what the docstring belongs to; empty on a page.
        line: of the first line of code in that file.
        language: after the fence; empty if there is none, or no fence.
        code: what is in it.
        fenced: false for code that is merely indented.
        reason: whether a comment right before says why it is not run.
    """

    source: str
    owner: str
    line: int
    language: str
    code: str
    fenced: bool = True
    reason: bool = False

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" + (f" ({self.owner})" if self.owner else "")


def pages() -> list[Path]:
    """README and everything under docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def of_page(path: Path) -> list[Block]:
    """Its blocks, in order."""
    return list(_blocks(path.read_text(encoding="utf-8"), _name(path), "", 1))


@functools.cache
def of_docstrings(path: Path) -> tuple[Block, ...]:
    """The blocks in the docstrings of one source file."""
    found: list[Block] = []
    for owner, node in _owners(ast.parse(path.read_text(encoding="utf-8"))):
        if not node.body or ast.get_docstring(node) is None:
            continue
        first = node.body[0]
        assert isinstance(first, ast.Expr)
        assert isinstance(first.value, ast.Constant)
        text = str(first.value.value)
        above = len(text) - len(text.lstrip("\n"))
        lines = _without_sections(inspect.cleandoc(text).splitlines())
        found += _blocks("\n".join(lines), _name(path), owner, first.lineno + above)
    return tuple(found)


def inline(path: Path) -> list[str]:
    """Code between single backticks on a page."""
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    parts = (part for token in tokens for part in token.children or ())
    return [part.content for part in parts if part.type == "code_inline"]


def run(blocks: Iterable[Block], namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Executes them one after another in one namespace, as pasted into one session."""
    # A dataclass looks its module up.
    here: dict[str, Any] = {"__name__": "__main__", **(namespace or {})}
    for block in blocks:
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, str(ROOT / block.source), "exec", dont_inherit=True), here)
    return here


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def _blocks(text: str, source: str, owner: str, first: int) -> Iterator[Block]:
    before: Token | None = None
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            fenced = token.type == "fence"
            reason = before is not None and before.type == "html_block"
            yield Block(
                source=source,
                owner=owner,
                line=first + token.map[0] + fenced,
                language=token.info.split()[0] if token.info.strip() else "",
                code=token.content,
                fenced=fenced,
                reason=reason and bool(REASON.search(before.content if before else "")),
            )
        before = token


def _without_sections(lines: list[str]) -> list[str]:
    """The lines with the bodies of ``Example:`` and its like moved to the margin."""
    inside, out = False, []
    for line in lines:
        if SECTION.match(line):
            inside, line = True, ""
        elif line and not line.startswith(" "):
            inside = False
        out.append(line.removeprefix("    ") if inside else line)
    return out


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _owners(tree: ast.Module) -> Iterator[tuple[str, Documented]]:
    yield "module", tree
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node
