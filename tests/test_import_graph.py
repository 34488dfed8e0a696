"""Imports inside sparke point one way; files of one family never import each other.

The test reads the source, so imports in functions and under ``if TYPE_CHECKING`` count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sparke"

# Low to high; a room may import from the layers below its own, never from its own or above.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "_start"}),
    frozenset({"protocols"}),
    frozenset({"checks", "_discover", "_tensor_file"}),
    frozenset({"kernels", "entropy", "ops", "schedules"}),
    frozenset({"scores", "memory", "models", "metrics"}),
    frozenset({"features"}),
    frozenset({"guidance"}),
    frozenset({"backends", "_guiders"}),
    frozenset({"testing"}),
    frozenset({"_wrap", "_callback", "images"}),
    frozenset({"compat"}),
    frozenset({"__init__"}),
    frozenset({"_cli"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}

# Exchange values only: these know nothing of sparke at all.
ALONE = frozenset({"errors", "protocols"})

# One file per member; what members share is in a file that starts with an underscore.
FAMILIES = frozenset({"scores", "memory", "guidance", "backends", "features"})

Import = tuple[str, str, int]  # importing module, imported module, line


def sources(package: Path) -> dict[str, Path]:
    """Every module by its dotted name; a package goes by its folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> Iterator[Import]:
    """Every import of one module of the package by another."""
    modules = sources(package)
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(module, path, node)
                targets = [
                    inner if (inner := f"{base}.{alias.name}") in modules else base
                    for alias in node.names
                ]
            else:
                continue
            for target in targets:
                if target.split(".")[0] == package.name and target != module:
                    yield module, target, node.lineno


def _absolute(module: str, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    up = node.level - (path.name == "__init__.py")
    base = ".".join(parts[: len(parts) - up])
    return f"{base}.{node.module}" if node.module else base


def room(module: str) -> str:
    """The folder or file right under the package root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def complaint(source: str, target: str) -> str | None:
    """What is wrong with one import, or None."""
    here, there = room(source), room(target)
    if here not in RANK or there not in RANK:
        return f"{here if here not in RANK else there} has no layer: give it one in LAYERS"
    if here == there:
        members = source.split(".")[2:3], target.split(".")[2:3]
        if here in FAMILIES and all(members) and members[0] != members[1]:
            (inside,), (other,) = members
            if inside.startswith("_") and not other.startswith("_"):
                return "what a family shares must not know its members"
            if not other.startswith("_"):
                return f"siblings: share through a file of {here}/ that starts with an underscore"
        return None
    if here in ALONE:
        return f"{here} imports nothing of the package"
    if RANK[there] >= RANK[here]:
        return f"{there} is not below {here}"
    return None


def violations(package: Path) -> list[str]:
    """Every import against the arrows, and every file without a layer."""
    wrong = [
        f"{source}:{line} imports {target}: {why}"
        for source, target, line in imports(package)
        if (why := complaint(source, target))
    ]
    unplaced = sorted({room(module) for module in sources(package)} - set(RANK))
    return wrong + [f"{name} has no layer: give it one in LAYERS" for name in unplaced]


def cycle(package: Path) -> list[str]:
    """The modules of one import cycle, empty if there is none."""
    graph: dict[str, set[str]] = {module: set() for module in sources(package)}
    for source, target, _ in imports(package):
        graph[source].add(target)
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if found := visit(target, [*trail, module]):
                return found
        done.add(module)
        return []

    for module in graph:
        if found := visit(module, []):
            return found
    return []


def test_imports_follow_the_arrows() -> None:
    assert violations(PACKAGE) == []


def test_no_import_cycle() -> None:
    assert cycle(PACKAGE) == []


def test_the_source_was_found() -> None:
    found = {(source, target) for source, target, _ in imports(PACKAGE)}
    assert any(source.startswith("sparke.scores.") for source, _ in found)
    assert any(target == "sparke.protocols" for _, target in found)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small package with the rooms of sparke and no wrong import."""
    files = {
        "__init__.py": "from sparke.guidance import Push\nfrom . import memory\n",
        "cli.py": "import sparke\n",
        "errors.py": "",
        "protocols.py": "import torch\n",
        "kernels.py": "from .protocols import Features\n",
        "scores/__init__.py": "from sparke.scores.rke import RKE\n",
        "scores/_gram.py": "from ..kernels import gaussian\n",
        "scores/rke.py": "from sparke.scores import _gram\nfrom sparke import kernels\n",
        "scores/vendi.py": "from sparke.scores._gram import gram\n",
        "memory/__init__.py": "",
        "memory/ring.py": "from sparke.protocols import Features\n",
        "models/__init__.py": "",
        "models/emoji/__init__.py": "from sparke.models.emoji.net import Net\n",
        "models/emoji/net.py": "from sparke.models.emoji.words import WORDS\n",
        "models/emoji/words.py": "WORDS = ()\n",
        "guidance/__init__.py": "from .push import Push\n",
        "guidance/push.py": "from sparke.memory.ring import Ring\n",
        "backends/__init__.py": "",
        "backends/host.py": "import host\nfrom sparke import errors\n",
    }
    for name, text in files.items():
        path = tmp_path / "sparke" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "sparke"


def test_a_good_tree_passes(tree: Path) -> None:
    assert violations(tree) == []
    assert cycle(tree) == []


@pytest.mark.parametrize(
    ("file", "line", "reported"),
    [
        ("kernels.py", "import sparke.scores.rke", "scores is not below kernels"),
        ("kernels.py", "from sparke import memory", "memory is not below kernels"),
        ("kernels.py", "from sparke import wrap", "__init__ is not below kernels"),
        ("kernels.py", "def f():\n    from . import scores", "scores is not below kernels"),
        (
            "memory/ring.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..guidance import Push",
            "guidance is not below memory",
        ),
        ("memory/ring.py", "from sparke.scores._gram import x", "scores is not below memory"),
        ("models/emoji/net.py", "import sparke.scores", "scores is not below models"),
        ("scores/vendi.py", "from .rke import RKE", "siblings"),
        ("scores/vendi.py", "from sparke.scores import rke", "siblings"),
        ("scores/_gram.py", "from sparke.scores.rke import RKE", "must not know its members"),
        ("protocols.py", "from sparke.errors import SparkeError", "imports nothing"),
        ("__init__.py", "from sparke.cli import main", "cli is not below __init__"),
        ("novel.py", "", "novel has no layer"),
        ("kernels.py", "import sparke.novel", "novel has no layer"),
    ],
)
def test_a_planted_import_is_reported(tree: Path, file: str, line: str, reported: str) -> None:
    path = tree / file
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(before + line + "\n", encoding="utf-8")
    (found,) = violations(tree)
    assert found.startswith(("sparke." + file[:-3].replace("/", "."), "sparke:", "novel"))
    assert reported in found


def test_a_planted_cycle_is_reported(tree: Path) -> None:
    words = tree / "models" / "emoji" / "words.py"
    words.write_text("from sparke.models.emoji import net\n", encoding="utf-8")
    assert cycle(tree) == [
        "sparke.models.emoji.net",
        "sparke.models.emoji.words",
        "sparke.models.emoji.net",
    ]
