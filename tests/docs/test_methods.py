"""Every method has a page, and every page says what such a page has to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, of_page

FOLDER = ROOT / "docs" / "methods"
PAGES = sorted(FOLDER.glob("*.md"))
BY_PAIRS = {"rke": ("rke", "cond-rke"), "vendi": ("vendi", "cond-vendi")}
"""Scores that share a page."""


def test_every_name_has_a_page() -> None:
    own = {
        path.stem.replace("_", "-")
        for family in ("guidance", "scores")
        for path in (ROOT / "sparke" / family).glob("[a-z]*.py")
    }
    shared = {name for names in BY_PAIRS.values() for name in names}
    assert {path.stem for path in PAGES} == (own - shared) | set(BY_PAIRS)
    overview = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [path.name for path in PAGES if f"methods/{path.name})" not in overview] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_is_complete(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    titles = " | ".join(re.findall(r"^## (.+)$", text, re.MULTILINE)).lower()
    assert re.search(r"\$\$.+?\$\$|\| \$", text, re.DOTALL), "an equation"
    assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}", text), "a source"
    assert "when to use it" in titles
    assert "what it is not" in titles
    assert "cost" in titles
    assert any(block.language == "python" for block in of_page(path))
