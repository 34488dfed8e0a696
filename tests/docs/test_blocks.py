"""Every Python block of the pages and docstrings runs as it stands."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import ROOT, Block, of_docstrings, of_page, pages, run
from tests.docs.settings import SETTINGS

# python is run, sh is looked up (test_commands), toml and json are read, text is for people.
LANGUAGES = {"python", "sh", "toml", "json", "text"}
PAGES = pages()
SOURCES = sorted((ROOT / "sparke").rglob("*.py"))
ALONE = (
    "README.md",
    "docs/index.md",
    "docs/diffusers.md",
    "docs/evaluating.md",
    "docs/faq.md",
    "docs/methods/",
)
"""Pages whose blocks stand alone; on others a block may go on from the one before."""


def _python(path: Path) -> list[Block]:
    return [block for block in of_page(path) if block.language == "python"]


def _units() -> list[Any]:
    """What is run in one namespace: a page, or one block of it."""
    units = []
    for path in PAGES:
        name, blocks = path.relative_to(ROOT).as_posix(), _python(path)
        if name.startswith(ALONE):
            units += [pytest.param([block], id=f"{name}:{block.line}") for block in blocks]
        elif blocks:
            units.append(pytest.param(blocks, id=name))
    return units


def _interactive() -> list[str]:
    """Modules of sparke with ``>>>`` in them."""
    shown = [path for path in SOURCES if ">>> " in path.read_text(encoding="utf-8")]
    named = [path.relative_to(ROOT).with_suffix("").parts for path in shown]
    return [".".join(parts).removesuffix(".__init__") for parts in named]


def test_there_are_blocks_to_run() -> None:
    shown = [path for path in PAGES if _python(path)]
    assert len(shown) >= 25
    assert sum(len(_python(path)) for path in shown) >= 50
    assert {path.name for path in shown} >= {"README.md", "index.md", "quickstart.md", "faq.md"}


def test_every_block_says_what_it_is() -> None:
    on_pages = [block for path in PAGES for block in of_page(path)]
    in_sources = [b for path in SOURCES for b in of_docstrings(path) if b.fenced]
    assert [str(b) for b in on_pages if not b.fenced] == [], "indented code is not run: fence it"
    unknown = [(str(b), b.language) for b in on_pages + in_sources if b.language not in LANGUAGES]
    assert unknown == []


def test_python_shown_as_text_has_a_reason() -> None:
    """``<!-- not run: why -->`` right before it."""
    shown = [b for p in PAGES for b in of_page(p) if b.language == "text" and _does(b.code)]
    assert [str(block) for block in shown if not block.reason] == []


@pytest.mark.parametrize("blocks", _units())
def test_blocks_run(blocks: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(blocks)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=str(block))
        for path in PAGES
        for block in of_page(path)
        if block.language in ("json", "toml")
    ],
)
def test_data_is_well_formed(block: Block) -> None:
    if block.language == "json":
        json.loads(block.code)
    else:
        pytest.importorskip("tomllib", reason="new in Python 3.11").loads(block.code)


@pytest.mark.slow
def test_the_script_for_many_devices_runs_on_two_ranks(tmp_path: Path) -> None:
    blocks = _python(ROOT / "docs" / "many-devices.md")
    (tmp_path / "generate.py").write_text("\n".join(block.code for block in blocks))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--standalone", "generate.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank}: 8 pictures to stay away from" in done.stdout
        assert f"rank {rank}: 4 pictures on this node" in done.stdout


def _docstrings() -> list[Any]:
    """The examples of one docstring run in one namespace."""
    units = []
    for path in SOURCES:
        by_owner: dict[str, list[Block]] = {}
        for block in of_docstrings(path):
            if block.language == "python":
                by_owner.setdefault(block.owner, []).append(block)
        units += [pytest.param(blocks, id=str(blocks[0])) for blocks in by_owner.values()]
    return units


@pytest.mark.parametrize("blocks", _docstrings())
def test_examples_of_docstrings_run(
    blocks: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    setting = SETTINGS.get((blocks[0].source, blocks[0].owner))
    run(blocks, {} if setting is None else setting(monkeypatch))


def test_no_setting_is_left_over() -> None:
    shown = {(b.source, b.owner) for p in SOURCES for b in of_docstrings(p) if b.language}
    assert set(SETTINGS) - shown == set()


@pytest.mark.parametrize("name", _interactive())
def test_interactive_examples_give_what_they_show(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_a_broken_block_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n- item\n\n  ```python\n  x / 0\n  ```\n")
    blocks = of_page(page)
    assert [(b.line, b.language) for b in blocks] == [(4, "python"), (10, "python")]
    with pytest.raises(ZeroDivisionError) as caught:
        run(blocks)
    assert caught.traceback[-1].lineno == 9  # counted from 0: the line of the page
    with pytest.raises(NameError):
        run(blocks[1:])


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Text.\n\n    x = 1\n", ("", False)),
        ("```\nx = 1\n```\n", ("", True)),
        ("~~~py\nx = 1\n~~~\n", ("py", True)),
        ("```{.python}\nx = 1\n```\n", ("{.python}", True)),
    ],
)
def test_what_would_be_skipped_is_seen(text: str, seen: tuple[str, bool], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    (block,) = of_page(page)
    assert (block.language, block.fenced) == seen
    assert not block.fenced or block.language not in LANGUAGES


def test_examples_in_docstrings_are_found(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "class Thing:\n"
        '    """A thing.\n\n    Example:\n        ```python\n        1 / 0\n        ```\n    """\n'
    )
    (block,) = of_docstrings(source)
    assert (block.owner, block.line, block.code) == ("Thing", 6, "1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        run([block])


@pytest.mark.parametrize(
    ("code", "does"),
    [
        ("import sparke\n", True),
        ("x = f(1)\n", True),
        ("f(1)\n", True),
        ("errors, protocols <- kernels\n", False),
        ("sparke/\n  errors.py   every error\n", False),
        ("kernels\n", False),
    ],
)
def test_python_shown_as_text_is_told_from_text(code: str, does: bool) -> None:
    assert _does(code) is does


def _does(code: str) -> bool:
    """Whether a text is Python that does something."""
    try:
        statements = ast.parse(code).body
    except SyntaxError:
        return False
    does = (ast.Import, ast.ImportFrom, ast.Assign, ast.Call)
    return any(isinstance(node, does) for s in statements for node in ast.walk(s))
