"""Reading the files that ship in this folder, and others of their kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from os import PathLike, fspath
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparke import _tensor_file
from sparke.errors import ArgumentError

DTYPES = ("F32", "F16", "BF16", "I8", "U8")
HIGHEST = 1e9
LARGEST = 1 << 14
"""No size of a network is above this; it bounds what a header can ask for."""

Found: TypeAlias = dict[str, tuple[int, ...]]
"""Shapes of tensors by their names."""
Shapes: TypeAlias = Callable[[dict[str, Any], Found], Found]
"""What a header says, the tensors there are -> those that must be; raises ValueError where the
header makes no sense."""


def read(
    name: str, instead: str | PathLike[str] | None = None, *, shapes: Shapes | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a safetensors file: what its header says, and its tensors.

    Args:
        name: File in this folder.
        instead: File to read in its place.
        shapes: The tensors expected of such a header; they are compared with those the file tells
            of before anything is allocated.

    Raises:
        ArgumentError: The file cannot be read, is damaged, or of another kind.
    """
    if instead is not None:
        return _read(fspath(instead), shapes)
    with resources.as_file(resources.files(__package__).joinpath(name)) as path:
        return _read(str(path), shapes)


def _read(path: str, shapes: Shapes | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        header = _tensor_file.read(path)
        about = json.loads(header.meta.get("emoji", ""))
        if not isinstance(about, dict):
            raise ValueError("its header does not describe a model")
        found = {key: stored.shape for key, stored in header.tensors.items()}
        if shapes is not None:
            _compare(found, shapes(about, found))
        for key, stored in header.tensors.items():
            if stored.dtype not in DTYPES:
                raise ValueError(f"{key!r} is of dtype {stored.dtype}, expected {DTYPES}")
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in found}
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{key!r} holds NaN or infinity")
    except (SafetensorError, OSError, ValueError, RecursionError, RuntimeError) as error:
        raise ArgumentError(
            f"weights={path!r} cannot be used: {error}. Leave weights out to load those that ship "
            "with sparke, or give a file that the scripts in training/emoji/ wrote."
        ) from error
    return about, tensors


def texts(about: dict[str, Any], key: str) -> list[str]:
    """A list of texts of the header.

    Raises:
        ValueError: It is none.
    """
    found = about.get(key)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError(f"its header has no list of texts {key!r}")
    return found


def size(about: dict[str, Any], key: str) -> int:
    """A size of the header, at least 1 and at most 16384.

    Raises:
        ValueError: It is none.
    """
    found = about.get(key)
    if type(found) is not int or not 1 <= found <= LARGEST:
        raise ValueError(f"its header has {key}={str(found)[:40]}, expected 1 to {LARGEST}")
    return found


def level(about: dict[str, Any], key: str) -> float:
    """A noise level of the header, finite and above 0.

    Raises:
        ValueError: It is none.
    """
    found: Any = about.get(key)
    if type(found) not in (int, float) or not 0 < found < HIGHEST:
        raise ValueError(f"its header has {key}={str(found)[:40]}, expected a number above 0")
    return float(found)


def _compare(found: Found, expected: Found) -> None:
    missing, extra = sorted(expected.keys() - found), sorted(found.keys() - expected)
    if missing or extra:
        raise ValueError(f"missing tensors {missing[:3]}, extra tensors {extra[:3]}")
    for key, shape in expected.items():
        if found[key] != shape:
            raise ValueError(f"{key!r} has the shape {found[key]}, its header asks for {shape}")
