"""Names to objects: one file in a family's folder is one name, other packages add theirs."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from sparke.errors import ArgumentError, SparkeError, UnknownName

__all__ = ["build", "modules", "names"]


def modules(package: ModuleType) -> dict[str, str]:
    """Public name -> module path, for each file of the package's folder."""
    found = (info.name for info in pkgutil.iter_modules(package.__path__))
    return {
        name.replace("_", "-"): f"{package.__name__}.{name}"
        for name in found
        if not name.startswith("_")
    }


def names(package: ModuleType) -> list[str]:
    """All names of a family, ours and those of installed plugins (entry points)."""
    plugins = (entry.name for entry in entry_points(group=package.__name__))
    return sorted({*modules(package), *plugins})


def build(package: ModuleType, kind: str, name: str, options: dict[str, Any]) -> Any:
    """The object called `name`, made by its file's or entry point's ``build(**options)``."""
    key = name.lower().replace("_", "-")
    ours = modules(package)
    if key in ours:
        factory = importlib.import_module(ours[key]).build
    else:
        matches = [e for e in entry_points(group=package.__name__) if e.name == key]
        if not matches:
            raise UnknownName(kind, name, names(package))
        try:
            factory = matches[0].load()
        except Exception as error:
            owner = matches[0].dist.name if matches[0].dist else "an unknown package"
            raise SparkeError(
                f"{kind} {key!r} of {owner} ({matches[0].value}) failed to load: {error}"
            ) from error
    try:
        return factory(**options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ArgumentError(f"{kind}={name!r}: {error}. See help({factory!r}).") from None
