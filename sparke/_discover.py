"""Names to objects: one file in a family's folder is one name, other packages add theirs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from sparke.errors import ArgumentError, SparkeError, UnknownName

__all__ = ["build", "call", "factory", "key", "modules", "names"]


def key(name: str) -> str:
    """A name as it is registered: small letters, dashes."""
    return name.lower().replace("_", "-")


def modules(package: ModuleType) -> dict[str, str]:
    """Public name -> module path, for each file of the package's folder."""
    found = (info.name for info in pkgutil.iter_modules(package.__path__))
    return {key(name): f"{package.__name__}.{name}" for name in found if not name.startswith("_")}


def names(package: ModuleType, group: str | None = None) -> list[str]:
    """All names of a family, ours and those of installed plugins.

    Args:
        package: the family's folder.
        group: of the entry points by which plugins are known; the package's own name if None.
    """
    plugins = (entry.name for entry in entry_points(group=group or package.__name__))
    return sorted({*modules(package), *plugins})


def factory(
    package: ModuleType, kind: str, name: str, group: str | None = None
) -> Callable[..., Any]:
    """What makes the object called `name`: its file's ``build``, or its entry point."""
    wanted, ours = key(name), modules(package)
    if wanted in ours:
        made: Callable[..., Any] = importlib.import_module(ours[wanted]).build
        return made
    matches = [e for e in entry_points(group=group or package.__name__) if e.name == wanted]
    if not matches:
        raise UnknownName(kind, name, names(package, group))
    try:
        made = matches[0].load()
    except Exception as error:
        owner = matches[0].dist.name if matches[0].dist else "an unknown package"
        raise SparkeError(
            f"{kind} {wanted!r} of {owner} ({matches[0].value}) failed to load: {error}"
        ) from error
    return made


def build(
    package: ModuleType,
    kind: str,
    name: str,
    options: Mapping[str, Any],
    group: str | None = None,
) -> Any:
    """The object called `name`, made with these options."""
    return call(kind, name, factory(package, kind, name, group), options)


def call(kind: str, name: str, made_by: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """What a factory makes with these options; one that it does not have is an ArgumentError."""
    try:
        inspect.signature(made_by).bind(**options)
    except TypeError as error:
        raise ArgumentError(f"{kind}={name!r}: {error}. See help({made_by!r}).") from None
    except ValueError:
        pass  # some written in C tell no signature
    return made_by(**options)
