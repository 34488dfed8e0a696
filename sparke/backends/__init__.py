"""Backends: how a guider reaches a host. One file each, a module with `accepts` and `attach`."""

from __future__ import annotations

from sparke._discover import BACKENDS, PluginError
from sparke.errors import UnsupportedTarget
from sparke.protocols import Backend

__all__ = ["backend", "names", "of"]


def names() -> list[str]:
    """Names of all backends, those of installed plugins (``sparke.backends``) included."""
    return BACKENDS.names()


def backend(name: str | Backend) -> Backend:
    """A backend by name; an object or module that is one already is returned as it is.

    Raises:
        UnknownName: nobody registered the name; near matches are in the message.
        ArgumentError: the object is no Backend; the name is that of a plugin that cannot be used.
    """
    built: Backend = BACKENDS.factory(name) if isinstance(name, str) else BACKENDS.object(name, {})
    return built


def of(target: object, given: str | Backend | None = None) -> Backend:
    """The backend that accepts `target`.

    Ours are asked first, and if one accepts, plugins are not loaded: an installed package changes
    nothing of what works without it. Else every plugin is asked. One that is broken is passed over
    where another accepts, and named in the error where none does.

    Args:
        target: what is to be wrapped.
        given: the one to use, by name or as an object; None to find it.

    Raises:
        UnsupportedTarget: none does, or more than one does, or not the one given.
        ArgumentError: the one given cannot be used.
    """
    if given is not None:
        chosen = backend(given)
        if not chosen.accepts(target):
            raise UnsupportedTarget(
                f"target={_described(target)} cannot be wrapped by backend={_named(given)}, which "
                "does not accept it. Leave backend= out to have one found."
            )
        return chosen
    ours = [backend(name) for name in BACKENDS.own]
    found = [one for one in ours if one.accepts(target)]
    broken: list[str] = []
    if not found:
        accepting, broken = _plugins(target)
        if len(accepting) > 1:
            raise UnsupportedTarget(
                f"target={_described(target)} cannot be wrapped: several backends accept it: "
                f"{sorted(accepting)}. Choose one with backend=."
            )
        found = list(accepting.values())
    if found:
        return found[0]
    raise UnsupportedTarget(
        f"target={_described(target)} cannot be wrapped: no backend accepts it. Known backends: "
        f"{', '.join(names())}. A sampler is a function whose first parameters are (model, x, "
        "sigmas) or (model, x, sigma_min, sigma_max); a pipeline of diffusers is loaded before it "
        "is wrapped, DiffusionPipeline.from_pretrained(...)."
        + "".join(f" Passed over: {why}" for why in broken)
    )


def _plugins(target: object) -> tuple[dict[str, Backend], list[str]]:
    """The plugins that accept `target`, and why others could not be asked."""
    accepting, broken = {}, []
    own = BACKENDS.own
    for name in dict.fromkeys(p.name for p in BACKENDS.plugins if p.name not in own):
        try:
            one = backend(name)
        except PluginError as error:
            broken.append(str(error))
            continue
        try:
            if one.accepts(target):
                accepting[name] = one
        except Exception as error:  # noqa: BLE001  others may accept
            plugin = BACKENDS.plugin(name)
            cure = "" if plugin is None else f" {plugin.cure}"
            broken.append(
                f"{plugin} failed in accepts(target): {type(error).__name__}: {error}.{cure}"
            )
    return accepting, broken


def _described(target: object) -> str:
    return repr(getattr(target, "__name__", None) or type(target).__name__)


def _named(given: str | Backend) -> str:
    return repr(given if isinstance(given, str) else getattr(given, "__name__", given))
