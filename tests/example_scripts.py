"""The scripts in examples/ as modules."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

__all__ = ["EXAMPLES", "example"]

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> Any:
    """The script of that name, imported with its folder first on the path, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)
