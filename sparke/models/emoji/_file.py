"""Reading the files that ship in this folder."""

from __future__ import annotations

import json
from importlib import resources
from os import PathLike, fspath
from typing import Any

from safetensors import safe_open
from torch import Tensor


def read(
    name: str, instead: str | PathLike[str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a safetensors file: what its header says, and its tensors.

    Args:
        name: File in this folder.
        instead: File to read in its place.
    """
    if instead is not None:
        return _read(fspath(instead))
    with resources.as_file(resources.files(__package__).joinpath(name)) as path:
        return _read(str(path))


def _read(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["emoji"])
        return about, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
