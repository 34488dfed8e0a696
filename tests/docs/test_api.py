"""Every public name has an entry in the reference, and every entry a name."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

import sparke
from tests.docs.blocks import ROOT

PAGES = [*sorted((ROOT / "docs" / "api").glob("*.md")), ROOT / "docs" / "compat.md"]
FACTORY = "build"
"""What a file of a family makes its objects with; it is another name of the class above it."""


@dataclass(frozen=True)
class Entry:
    """One ``:::`` of a page: what is described, and which members."""

    name: str
    members: tuple[str, ...] | None
    submodules: bool


def entries(text: str) -> Iterator[Entry]:
    """Those of a page."""
    for part in re.split(r"^::: ", text, flags=re.MULTILINE)[1:]:
        name, *options = part.splitlines()
        indented = "\n".join(line for line in options if line.startswith(" "))
        listed = re.findall(r"^ +- (\w+)$", indented, re.MULTILINE)
        has_list = re.search(r"^ +members:", indented, re.MULTILINE) is not None
        yield Entry(
            name.strip(), tuple(listed) if has_list else None, "show_submodules: true" in indented
        )


ENTRIES = [entry for page in PAGES for entry in entries(page.read_text(encoding="utf-8"))]


def _modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.walk_packages(sparke.__path__, "sparke.")]
    public = [name for name in names if "._" not in name]
    found = [sparke, *map(importlib.import_module, public)]
    return [module for module in found if hasattr(module, "__all__")]


def _described(module: ModuleType, name: str) -> bool:
    """Whether an entry shows this name where it is, where it was defined, or from elsewhere."""
    value: Any = getattr(module, name)
    if isinstance(value, ModuleType):
        return any(entry.name == value.__name__ for entry in ENTRIES)
    places = {module.__name__, getattr(value, "__module__", module.__name__)}
    for entry in ENTRIES:
        within = entry.submodules and places & {f"{entry.name}.{m}" for m in entry.members or ()}
        if entry.members is not None and name not in entry.members and not within:
            continue
        if entry.name in {f"{place}.{name}" for place in places} | places:
            return True
        if entry.submodules and any(place.startswith(entry.name + ".") for place in places):
            return True
        shown = importlib.import_module(entry.name) if _is_module(entry.name) else None
        listed = name in getattr(shown, "__all__", ()) and getattr(shown, name) is value
        if listed and not isinstance(value, (str, int, tuple)):
            return True
    return False


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("module", _modules(), ids=lambda module: module.__name__)
def test_every_public_name_has_an_entry(module: ModuleType) -> None:
    names = [name for name in module.__all__ if name != FACTORY]
    assert [name for name in names if not _described(module, name)] == []


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_has_a_name(entry: Entry) -> None:
    parent, _, last = entry.name.rpartition(".")
    shown = (
        importlib.import_module(entry.name)
        if _is_module(entry.name)
        else getattr(importlib.import_module(parent), last)
    )
    assert [name for name in entry.members or () if not hasattr(shown, name)] == []


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_list_of_members_leaves_none_out(entry: Entry) -> None:
    """Unless another entry has it."""
    if entry.members is not None and _is_module(entry.name):
        module = importlib.import_module(entry.name)
        left = {name for name in module.__all__ if name != FACTORY} - set(entry.members)
        assert [name for name in sorted(left) if not _described(module, name)] == []


def test_pages_of_the_reference_are_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[1]
    pages = sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_a_missing_entry_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _described(sparke, "wrap")
    monkeypatch.setattr(sparke, "planted", lambda: None, raising=False)
    assert not _described(sparke, "planted")
    (entry,) = entries("::: sparke.memory\n    options:\n      members:\n        - RingMemory\n")
    assert entry == Entry("sparke.memory", ("RingMemory",), submodules=False)
