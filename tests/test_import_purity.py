"""Importing sparke brings in torch, numpy, einops and safetensors, and no host."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = frozenset({"torch", "numpy", "einops", "safetensors", "sparke"})
NEVER = (
    "diffusers",
    "transformers",
    "k_diffusion",
    "torchvision",
    "typer",
    "rich",
    "PIL",
    "scipy",
    "triton",
    "usearch",
    "matplotlib",
    "jinja2",
    "timm",
)
PROBE = """
import importlib, json, sys
assert importlib.import_module(sys.argv[1]).__file__, "a folder without __init__.py"
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def brought_in(module: str, path: Path) -> set[str]:
    """Top-level modules loaded in a fresh interpreter that imports `module` from `path`."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, module],
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    [
        "sparke",
        "sparke.backends.diffusers",
        "sparke.backends.k_diffusion",
        "sparke.backends.modular",
        "sparke.compat",
        "sparke.features",
        "sparke.features.encoders",
        "sparke.images",
        "sparke.metrics",
        "sparke.models.emoji",
    ],
)
def test_importing_brings_in_no_host(module: str) -> None:
    loaded = brought_in(module, ROOT)
    assert "sparke" in loaded
    assert loaded.intersection(NEVER) == set()


def test_the_probe_sees_a_host(tmp_path: Path) -> None:
    (tmp_path / "diffusers.py").write_text("", encoding="utf-8")
    (tmp_path / "leaky.py").write_text("import diffusers\n", encoding="utf-8")
    assert brought_in("leaky", tmp_path).intersection(NEVER) == {"diffusers"}


def foreign(source: str) -> list[str]:
    """Imports made when the module is imported, other than of what sparke depends on."""
    return [
        f"line {line}: {name}"
        for name, line in _on_import(ast.parse(source).body)
        if name.partition(".")[0] not in ALLOWED | sys.stdlib_module_names
    ]


def _on_import(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield node.module or "", node.lineno
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _on_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                yield from _on_import(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _on_import(handler.body)


MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "sparke").rglob("*.py")
    if "_cli" not in path.parts
)


@pytest.mark.parametrize("file", MODULES)
def test_hosts_are_imported_inside_functions_only(file: str) -> None:
    assert foreign((ROOT / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import diffusers",
        "from k_diffusion import sampling",
        "try:\n    import triton\nexcept ImportError:\n    triton = None",
        "try:\n    import math\nexcept ImportError:\n    import triton",
        "class Model:\n    import PIL.Image",
        "if True:\n    import scipy.linalg as linalg",
    ],
)
def test_an_import_of_a_host_is_reported(source: str) -> None:
    assert len(foreign(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import math, torch.nn\nfrom numpy import array\nfrom . import rke",
        "def attach():\n    import diffusers",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from diffusers import Pipeline",
    ],
)
def test_other_imports_are_not(source: str) -> None:
    assert foreign(source) == []
