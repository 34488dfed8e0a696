"""What other packages have registered: entry points, read without trusting any of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from typing import Any

from sparke.errors import ArgumentError

__all__ = ["Plugin", "PluginError", "installed", "key"]

UNKNOWN = "an unknown package"


class PluginError(ArgumentError):
    """A name stands for an object of another package that cannot be used.

    The message names the package and its entry point. Plugins are looked at when they are asked
    for, so one that is broken fails nobody who does not ask for it.
    """


def key(name: str) -> str:
    """A name as it is registered: small letters, dashes."""
    return name.strip().lower().replace("_", "-")


@dataclass(frozen=True)
class Plugin:
    """One entry point.

    Attributes:
        kind: of object, e.g. ``"score"``.
        name: by which it is asked for.
        owner: the distribution it is from.
        entry: as its metadata has it.
    """

    kind: str
    name: str
    owner: str
    entry: EntryPoint

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} of {self.origin}"

    @property
    def origin(self) -> str:
        """The package and the line of its metadata, for messages."""
        return f"package {self.owner} ({self.entry.name} = {self.entry.value})"

    @property
    def cure(self) -> str:
        """What to do about it, for messages."""
        return f"Upgrade {self.owner}, tell its authors, or uninstall it."

    def load(self) -> Any:
        """What the entry point names.

        Raises:
            PluginError: the module cannot be imported, or has no such attribute.
        """
        if not EntryPoint.pattern.match(self.entry.value):
            raise PluginError(
                f"{self} failed to load: its value must be 'module' or 'module:attribute'. "
                f"{self.cure}"
            )
        try:
            return self.entry.load()
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self} failed to load: {type(error).__name__}: {error}. {self.cure}"
            ) from error


def installed(kind: str, group: str) -> list[Plugin]:
    """All entry points of a group; the same one found twice counts once."""
    found: dict[tuple[str, str, str], Plugin] = {}
    for entry, owner in _entries(group):
        plugin = Plugin(kind, key(entry.name), owner, entry)
        found.setdefault((plugin.name, owner, entry.value), plugin)
    return list(found.values())


def _entries(group: str) -> Iterator[tuple[EntryPoint, str]]:
    try:
        found: Iterable[EntryPoint] = entry_points(group=group)
    except Exception:  # noqa: BLE001  one unreadable file of metadata fails the listing of all
        for distribution in distributions():
            try:
                own = [e for e in distribution.entry_points if e.group == group]
            except Exception:  # noqa: BLE001  it registers nothing that could be read
                continue
            yield from ((entry, _owner(distribution)) for entry in own)
    else:
        yield from ((entry, _owner(getattr(entry, "dist", None))) for entry in found)


def _owner(distribution: Distribution | None) -> str:
    try:
        return str(distribution.metadata["Name"] or UNKNOWN) if distribution else UNKNOWN
    except Exception:  # noqa: BLE001  metadata that is missing or cannot be parsed
        return UNKNOWN
