"""Names to objects, for every family alike: one file in its folder is one name, plugins add theirs.

A name is looked up among ours first, then among the entry points of installed packages. What cannot
be used is an error when it is asked for, and nobody else's: one broken plugin leaves all others and
ours as they are. See docs/extending.md for what a plugin may rely on.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from sparke._discover._plugins import Plugin, PluginError, installed, key
from sparke._discover._shapes import complaint, complaint_of_factory, needs
from sparke.errors import ArgumentError, SparkeError, UnknownName

__all__ = [
    "BACKENDS",
    "FAMILIES",
    "GUIDERS",
    "MEMORIES",
    "SCORES",
    "Family",
    "Plugin",
    "PluginError",
    "call",
    "key",
    "modules",
]


def modules(package: ModuleType) -> dict[str, str]:
    """Public name -> module path, for each file of the package's folder."""
    found = (info.name for info in pkgutil.iter_modules(package.__path__))
    return {key(name): f"{package.__name__}.{name}" for name in found if not name.startswith("_")}


@dataclass(frozen=True)
class Family:
    """Objects of one kind, by name.

    Attributes:
        kind: what one is called, e.g. ``"score"``.
        package: the folder that ours are in.
        group: of the entry points by which other packages add theirs.
        maker: the public function that makes one by name, for messages.
        ours: what makes the object, read off the file that is named like it.
        made: whether an entry point names what makes the object, and not the object itself.
    """

    kind: str
    package: str
    group: str
    maker: str
    ours: Callable[[ModuleType], Any]
    made: bool = True

    @property
    def own(self) -> dict[str, str]:
        """Our names, and the module each is in."""
        return modules(importlib.import_module(self.package))

    @property
    def plugins(self) -> list[Plugin]:
        """Every entry point of the group, those that cannot be used included."""
        return installed(self.kind, self.group)

    def names(self) -> list[str]:
        """All names, ours and those of installed plugins, whether or not these can be used."""
        return sorted({*self.own, *(plugin.name for plugin in self.plugins)})

    def plugin(self, name: str) -> Plugin | None:
        """The one plugin of this name; None where the name is ours.

        Raises:
            UnknownName: nobody registered it.
            PluginError: several packages did.
        """
        wanted = key(name)
        if wanted in self.own:
            return None
        matches = [plugin for plugin in self.plugins if plugin.name == wanted]
        if not matches:
            raise UnknownName(self.kind, name, self.names())
        if len(matches) > 1:
            raise PluginError(
                f"{self.kind} {wanted!r} is ambiguous, several entry points register it: "
                f"{' and '.join(plugin.origin for plugin in matches)}. Uninstall one of these "
                f"packages, or give the object itself in place of its name."
            )
        return matches[0]

    def factory(self, name: str) -> Any:
        """What makes the object called `name`; a backend is its own.

        Raises:
            UnknownName: nobody registered it.
            PluginError: it cannot be loaded, or is nothing that makes such an object.
        """
        plugin = self.plugin(name)
        if plugin is None:
            return self.ours(importlib.import_module(self.own[key(name)]))
        loaded = plugin.load()
        check = complaint_of_factory if self.made else complaint
        if wrong := check(self.kind, loaded):
            raise PluginError(f"{plugin} does not fit {self.group}: {wrong}. {plugin.cure}")
        return loaded

    def build(self, name: str, options: Mapping[str, Any]) -> Any:
        """The object called `name`, made with these options; see `make`."""
        return self.make(name, self.factory(name), options)

    def make(self, name: str, made_by: Callable[..., Any], options: Mapping[str, Any]) -> Any:
        """What a factory of this family makes with these options.

        Raises:
            ArgumentError: an option is unknown, missing, or has a forbidden value.
            PluginError: the plugin's factory failed, or what it made is no object of this kind.
        """
        plugin = self.plugin(name)
        try:
            built = call(self.kind, name, made_by, options, maker=self.maker)
        except SparkeError:
            raise
        except Exception as error:
            if plugin is None:
                raise
            raise PluginError(
                f"{plugin} could not be made with the options {dict(options)}: "
                f"{type(error).__name__}: {error}. If these are right: {plugin.cure}"
            ) from error
        if wrong := complaint(self.kind, built):
            origin = "" if plugin is None else f" It is from {plugin.origin}. {plugin.cure}"
            raise PluginError(
                f"{self.kind}={name!r} is no {self.kind.capitalize()}: {wrong}.{origin}"
            )
        return built

    def object(self, given: Any, options: Mapping[str, Any]) -> Any:
        """By name, or the object itself where it is one of this kind.

        Raises:
            ArgumentError: it is none, or options are given that have nowhere to go.
            UnknownName: nobody registered the name.
            PluginError: the plugin of this name cannot be used.
        """
        if isinstance(given, str):
            return self.build(given, options)
        if options:
            raise ArgumentError(
                f"{self.kind} is an object already, so the options {sorted(options)} have nowhere "
                f"to go. Set them where the object is made, or give the {self.kind} by name."
            )
        if isinstance(given, type):
            raise ArgumentError(
                f"{self.kind}={given.__name__} is a class; make a {self.kind} of it: "
                f"{given.__name__}(...)."
            )
        if wrong := complaint(self.kind, given):
            raise ArgumentError(
                f"{self.kind}={given!r} is no {self.kind.capitalize()}: {wrong}. It needs "
                f"{needs(self.kind)}."
            )
        return given


def call(
    kind: str,
    name: str,
    made_by: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    maker: str | None = None,
) -> Any:
    """What a factory makes with these options; one that it does not have is an ArgumentError."""
    try:
        signature = inspect.signature(made_by)
    except (TypeError, ValueError):  # some written in C tell none
        return made_by(**options)
    try:
        signature.bind(**options)
    except TypeError as error:
        taken = ", ".join(str(p) for p in signature.parameters.values()) or "none"
        where = f" Make it with {maker}({name!r}, ...)." if maker else ""
        raise ArgumentError(f"{kind}={name!r}: {error}.{where} Its options: {taken}.") from None
    return made_by(**options)


def _build(module: ModuleType) -> Any:
    return module.build


def _memory(module: ModuleType) -> Any:
    """The class that the file of a memory holds: RingMemory in ``ring.py``."""
    stem = module.__name__.rpartition(".")[2]
    return getattr(module, f"{stem.title().replace('_', '')}Memory")


def _module(module: ModuleType) -> Any:
    return module


SCORES = Family("score", "sparke.scores", "sparke.scores", "sparke.score", _build)
MEMORIES = Family("memory", "sparke.memory", "sparke.memory", "sparke.memory.memory", _memory)
GUIDERS = Family("guider", "sparke.guidance", "sparke.guiders", "sparke.guidance.guider", _build)
BACKENDS = Family(
    "backend", "sparke.backends", "sparke.backends", "sparke.backends.backend", _module, made=False
)
FAMILIES: Sequence[Family] = (SCORES, MEMORIES, GUIDERS, BACKENDS)
