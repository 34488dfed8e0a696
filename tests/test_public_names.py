"""The public names: few, resolvable, and nothing beside them."""

import re
from pathlib import Path
from types import ModuleType

import sparke

# Left by `from __future__` and `from typing`; not names anybody would look for here.
IMPORTED = {"annotations", "TYPE_CHECKING"}
NAMES = {
    "wrap",
    "callback",
    "score",
    "scores",
    "memory",
    "metrics",
    "DiversityGuider",
    "Features",
    "Step",
    "Requires",
    "Score",
    "Memory",
    "Guider",
    "Backend",
    "SparkeError",
}


def test_the_names_are_the_designed_ones() -> None:
    assert set(sparke.__all__) == NAMES
    assert len(sparke.__all__) == len(set(sparke.__all__)) <= 15


def test_every_name_resolves() -> None:
    assert [name for name in sparke.__all__ if not hasattr(sparke, name)] == []


def test_the_folder_of_scores_lists_their_names() -> None:
    assert {"rke", "cond-rke", "vendi", "cond-vendi"} <= set(sparke.scores())


def test_nothing_else_is_public() -> None:
    others = {
        name
        for name, value in vars(sparke).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert others - set(sparke.__all__) - IMPORTED == set()


def test_no_foreign_module_is_public() -> None:
    foreign = {
        name
        for name, value in vars(sparke).items()
        if not name.startswith("_")
        and isinstance(value, ModuleType)
        and not value.__name__.startswith("sparke.")
    }
    assert foreign == set()


def test_the_version_is_the_packages() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', pyproject, flags=re.MULTILINE)
    assert version is not None
    assert sparke.__version__ == version[1]
