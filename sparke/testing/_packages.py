"""Conformance of an installed package: what it registers can be found, loaded and used."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from sparke._discover import FAMILIES, Plugin
from sparke.errors import SparkeError
from sparke.testing._common import expect


def check_package(name: str) -> dict[str, list[str]]:
    """Raise unless everything that an installed package registers with sparke can be used.

    Each of its entry points in the groups of sparke loads, is what its group asks for, and goes by
    a name that is neither one of ours nor another package's. Objects are not made: that may need
    options, and is for `check_score` and its siblings.

    Args:
        name: of the distribution, as in ``pip install``.

    Returns:
        The names registered under each entry-point group, groups that are used alone.

    Raises:
        AssertionError: one cannot be used, or there are none; the message says which and why.
    """
    try:
        wanted = str(distribution(name).metadata["Name"])
    except PackageNotFoundError:
        raise AssertionError(f"no package {name!r} is installed.") from None
    found: dict[str, list[str]] = {}
    for family in FAMILIES:
        own, plugins = family.own, family.plugins
        for plugin in (p for p in plugins if p.owner == wanted):
            _check_name(plugin, own, plugins)
            try:
                family.factory(plugin.name)
            except SparkeError as error:
                raise AssertionError(str(error)) from error
            found.setdefault(family.group, []).append(plugin.name)
    groups = ", ".join(family.group for family in FAMILIES)
    expect(bool(found), f"package {wanted} registers nothing in the groups {groups}")
    return {group: sorted(names) for group, names in found.items()}


def _check_name(plugin: Plugin, own: dict[str, str], plugins: list[Plugin]) -> None:
    expect(plugin.name not in own, f"{plugin} is never used: {plugin.name!r} is sparke's own name")
    expect(
        plugin.name == plugin.entry.name,
        f"{plugin} goes by the name {plugin.name!r}; register it as that",
    )
    others = [p for p in plugins if p.name == plugin.name and p is not plugin]
    expect(not others, f"{plugin} has the name of {' and '.join(map(str, others))}")
