"""Backends: how a guider reaches a host. One file each, a module with `accepts` and `attach`."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points

from sparke import _discover
from sparke.errors import SparkeError, UnsupportedTarget
from sparke.protocols import Backend

__all__ = ["names", "of"]


def names() -> list[str]:
    """Names of all backends, those of installed plugins (``sparke.backends``) included."""
    return _discover.names(sys.modules[__name__])


def of(target: object) -> Backend:
    """The backend that accepts `target`.

    Raises:
        UnsupportedTarget: none does, or more than one does.
    """
    package = sys.modules[__name__]
    found: dict[str, Backend] = {}
    candidates = {n: importlib.import_module(m) for n, m in _discover.modules(package).items()}
    plugins = {entry.name: entry.load() for entry in entry_points(group=package.__name__)}
    for name, backend in {**plugins, **candidates}.items():
        if not isinstance(backend, Backend):
            raise SparkeError(f"backend {name!r} needs accepts(target) and attach(target, guider).")
        if backend.accepts(target):
            found[name] = backend
    if len(found) == 1:
        return next(iter(found.values()))
    described = getattr(target, "__name__", None) or type(target).__name__
    reason = f"several backends accept it: {sorted(found)}" if found else "no backend accepts it"
    raise UnsupportedTarget(
        f"target={described!r} cannot be wrapped: {reason}. Known backends: {', '.join(names())}. "
        "A sampler is a function whose first parameters are (model, x, sigmas) or "
        "(model, x, sigma_min, sigma_max)."
    )
