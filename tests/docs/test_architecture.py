"""The page on the architecture shows the tree and the layers as they are."""

from __future__ import annotations

import re

from tests.docs.blocks import ROOT, of_page
from tests.test_import_graph import FAMILIES, LAYERS

PAGE = ROOT / "docs" / "architecture.md"
TREE, ARROWS, *_ = (block.code for block in of_page(PAGE) if block.language == "text")


def test_every_room_is_shown() -> None:
    shown = re.findall(r"^  (\w+/|\w+\.py)\s+\S", TREE, re.MULTILINE)
    there = {
        path.name + ("/" if path.is_dir() else "")
        for path in (ROOT / "sparke").iterdir()
        if not path.name.startswith(("_", "."))
        and (path.suffix == ".py" or (path / "__init__.py").is_file())
    }
    assert len(shown) == len(set(shown))
    assert set(shown) == there


def test_arrows_are_those_the_imports_keep_to() -> None:
    shown = [frozenset(part.strip().split(", ")) for part in ARROWS.split("←")]
    named = {"__init__": "the package root"}
    public = (
        frozenset(named.get(r, r) for r in layer if r in named or not r.startswith("_"))
        for layer in LAYERS
    )
    assert shown == [layer for layer in public if layer]


def test_families_are_named() -> None:
    text = PAGE.read_text(encoding="utf-8")
    (line,) = re.findall(r"^Files of one family \((.+?)\) never", text, re.MULTILINE)
    assert set(re.findall(r"`(\w+)/`", line)) == FAMILIES
