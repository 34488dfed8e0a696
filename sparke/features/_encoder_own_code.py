"""Encoders in the user's own code, as ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from sparke.errors import ArgumentError

__all__ = ["callable_named"]


def callable_named(name: str, device: str) -> Callable[..., Any]:
    """The callable that ``module:function`` or ``file.py:function`` names; a module in eval mode.

    The current folder is searched for the module too, after everything else.

    Raises:
        ArgumentError: there is no such module or name in it, importing it fails, or what is there
            cannot be called.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ArgumentError(f"encoder {name!r} must be module:function or file.py:function.")
    found: Any = _module(where, name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ArgumentError(f"encoder {name!r}: {where} has no {attribute!r}.")
        found = getattr(found, part)
    if isinstance(found, type):
        raise ArgumentError(
            f"encoder {name!r} is a class; make an object of it in {where} and name that."
        )
    if not callable(found):
        raise ArgumentError(
            f"encoder {name!r} is a {type(found).__name__} and cannot be called. It must take a "
            "batch and return a tensor (b, width)."
        )
    return found.to(device).eval() if isinstance(found, nn.Module) else found


def _module(where: str, name: str) -> Any:
    try:
        if where.endswith(".py"):
            return _from_file(Path(where))
        with _current_folder():
            return importlib.import_module(where)
    except FileNotFoundError as error:
        raise ArgumentError(f"encoder {name!r}: there is no file {where}.") from error
    except ModuleNotFoundError as error:
        raise ArgumentError(
            f"encoder {name!r}: {error}. Give a module that can be imported from here, or its "
            "file: path/to/file.py:function."
        ) from error
    # The user's own code runs here, and may raise what it likes.
    except Exception as error:
        raise ArgumentError(
            f"encoder {name!r}: importing {where} failed: {type(error).__name__}: {error}"
        ) from error


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _current_folder() -> Iterator[None]:
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")
