"""The site as built: it is whole, needs nobody else's server, and can be searched.

How it looks is for a browser; what is here can be read off the files.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

from tests.docs.blocks import ROOT

pytest.importorskip("material", reason="mkdocs is in the docs extra")

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}
LOADING_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "preconnect", "dns-prefetch"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
LEFT_OVER = re.compile(r"\\[()\[\]]|\$\$|\\frac|\\sum|```|:::|\]\[|\*\*|`")
"""LaTeX that was not handed on and Markdown that was not rendered."""


class Page(HTMLParser):
    """What a browser would load for a page, and what a reader would see on it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.meta: dict[str, str] = {}
        self.title = ""
        self.headings: list[str] = []
        self.formulas: list[str] = []
        self.prose = ""
        self.members: set[str] = set()
        self.listed: set[str] = set()
        self._open: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def _inside(self, *names: str) -> bool:
        return any(name in names or set(names) & set(kind.split()) for name, kind in self._open)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        kind = given.get("class") or ""
        address = given.get(LOADED.get(tag, ""))
        if tag == "link" and LOADING_LINKS & set((given.get("rel") or "").split()):
            address = given.get("href")
        if address is not None:
            self.loads.append(address)
        if tag == "img":
            self.images.append(given)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag == "meta" and given.get("name"):
            self.meta[str(given["name"])] = given.get("content") or ""
        if tag in {"h1", "h2"} and self._inside("article"):
            self.headings.append(tag)
        if "doc-heading" in kind.split():
            self.members.add(str(given["id"]))
        if tag == "a" and self._inside("doc-section-item"):
            self.listed.add((given.get("href") or "").partition("#")[2])
        if "arithmatex" in kind.split():
            self.formulas.append("")
        if tag not in VOID:
            self._open.append((tag, kind))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._inside("arithmatex"):
            self.formulas[-1] += data
        elif self._open and self._open[-1][0] == "title" and not self._inside("svg"):
            self.title += data
        elif self._inside("article") and not self._inside("code", "pre", "script", "style"):
            self.prose += data


def broken(formula: str) -> bool:
    """Whether it lacks the delimiters that docs/katex/render.js takes off, or a brace."""
    text = formula.strip()
    bare = re.sub(r"\\[{}\\]", "", text)
    delimited = (text[:2], text[-2:]) in {("\\(", "\\)"), ("\\[", "\\]")}
    return not (delimited and text[2:-2].strip() and bare.count("{") == bare.count("}"))


def elsewhere(address: str) -> bool:
    """Whether loading it asks another host."""
    return bool(urlsplit(address).netloc) or urlsplit(address).scheme not in {"", "data"}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built once, strictly, also where several processes share the tests."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    target = shared / "site"
    with FileLock(shared / "site.lock"):
        if not target.exists():
            subprocess.run(
                [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(target)],
                cwd=ROOT,
                env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
                check=True,
            )
    return target


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, Page]:
    """All of them by path, but for the one that says a page is missing."""
    return {
        path.relative_to(site).as_posix(): Page(path.read_text())
        for path in sorted(site.rglob("*.html"))
        if path.name != "404.html"
    }


def test_every_source_is_a_page(pages: dict[str, Page]) -> None:
    sources = (ROOT / "docs").rglob("*.md")
    assert set(pages) == {
        path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in sources
    }


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert page.loads, f"{name}: the probe sees nothing that is loaded"
        for address in page.loads:
            assert not elsewhere(address), f"{name} loads {address}"
            file = (site / name).parent / unquote(urlsplit(address).path)
            assert file.is_file() or address.startswith("data:"), f"{name} lacks {address}"
    sheets = list(site.rglob("*.css"))
    assert len(sheets) >= 3
    for sheet in sheets:
        text = re.sub(r"/\*.*?\*/", "", sheet.read_text(), flags=re.DOTALL)
        for address in re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')]+)", text):
            assert not elsewhere(address), f"{sheet.name} loads {address}"


def test_every_page_has_a_title_a_description_and_one_first_heading(
    pages: dict[str, Page],
) -> None:
    for name, page in pages.items():
        assert page.title.strip(), name
        assert page.meta.get("description"), name
        assert page.headings.count("h1") == 1, f"{name}: {page.headings}"
        assert len(page.ids) == len(set(page.ids)), name
        assert all(image.get("alt") for image in page.images), f"{name}: an image without alt"


def test_formulas_reach_katex_and_nothing_is_left_as_source(pages: dict[str, Page]) -> None:
    formulas = [formula for page in pages.values() for formula in page.formulas]
    assert len(formulas) > 100
    assert not [formula for formula in formulas if broken(formula)]
    for name, page in pages.items():
        found = LEFT_OVER.search(page.prose)
        at = found.start() if found else 0
        assert found is None, f"{name}: {page.prose[max(0, at - 40) : at + 40]!r}"
        if page.formulas:
            assert any(address.endswith("katex/render.js") for address in page.loads), name


def test_every_reference_page_lists_its_members_at_the_top(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        if name.startswith("api/"):
            assert page.members, f"{name} describes nothing"
            outer = {m for m in page.members if m.rpartition(".")[0] not in page.members}
            missing = {m for m in outer if not m.startswith("sparke._")} - page.listed
            assert not missing, f"{name} does not list {sorted(missing)}"


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ("few-step", "faq.html"),
        ("VRAM", "faq.html"),
        ("ControlNet", "faq.html"),
        ("cond-rke", "methods/rke.html"),
        ("RingMemory", "api/memory.html"),
        ("prompt_embeds", "k-diffusion.html"),
        ("entry point", "extending.html"),
        ("sparke eval", "evaluating.html"),
    ],
)
def test_the_search_index_has(site: Path, words: str, page: str) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    hits = {
        entry["location"].partition("#")[0]
        for entry in index["docs"]
        if words.lower() in re.sub(r"<[^>]+>", "", entry["title"] + " " + entry["text"]).lower()
    }
    assert page in hits


def test_the_search_index_works_without_a_server_and_holds_no_latex(site: Path) -> None:
    text = (site / "search" / "search_index.json").read_text()
    assert (site / "search" / "search_index.js").read_text() == f"var __index = {text}"
    for entry in json.loads(text)["docs"]:
        prose = re.sub(r"<code.*?</code>", "", entry["text"], flags=re.DOTALL)
        assert "\\(" not in prose, entry["location"]
        assert "\\[" not in prose, entry["location"]


def test_the_reader_of_pages_sees_what_is_wrong() -> None:
    page = Page(
        '<head><title>t</title><link rel="stylesheet" href="https://fonts.example/a.css"></head>'
        '<article><h1>a</h1><h1>b</h1><p>\\(x\\) and <code>\\(</code></p><img src="//cdn/x.png">'
        '<span class="arithmatex">\\(\\frac{a}{b\\)</span><h2 id="m" class="doc doc-heading">m</h2>'
        '<li class="doc-section-item"><a href="#n">n</a></li></article>'
    )
    assert [elsewhere(address) for address in page.loads] == [True, True]
    assert page.headings == ["h1", "h1", "h2"]
    assert page.title == "t"
    assert LEFT_OVER.findall(page.prose) == ["\\(", "\\)"]
    assert [broken(formula) for formula in page.formulas] == [True]
    assert page.members == {"m"}
    assert page.listed == {"n"}
