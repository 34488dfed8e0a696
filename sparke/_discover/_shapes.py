"""Whether an object can be called as sparke calls objects of its kind, told without calling it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from sparke.protocols import Requires

__all__ = ["complaint", "complaint_of_factory", "needs"]


@dataclass(frozen=True)
class _Call:
    """One way in which a method is called.

    Attributes:
        method: its name.
        shown: the call, for messages.
        args: number of positional arguments.
        keywords: names of those given by keyword.
        optional: whether an object may do without the method.
    """

    method: str
    shown: str
    args: int
    keywords: tuple[str, ...] = ()
    optional: bool = False


def _calls(*shown: str, optional: bool = False) -> tuple[_Call, ...]:
    """From the way they are written: ``attach(target, guider, prompt_embeds=)``."""
    found = []
    for call in shown:
        method, _, inner = call.rstrip(")").partition("(")
        names = [name.strip() for name in inner.split(",") if name.strip()]
        keywords = tuple(name.rstrip("=") for name in names if name.endswith("="))
        found.append(_Call(method, call, len(names) - len(keywords), keywords, optional))
    return tuple(found)


CALLS: dict[str, tuple[_Call, ...]] = {
    "score": _calls("__call__(query, bank)")
    + _calls(
        "direction(query, bank)",
        "crowding(query, bank)",
        "direction_and_crowding(query, bank)",
        "calibrate(bank)",
        "log_weight(query_cond, bank_cond)",
        optional=True,
    ),
    "memory": _calls("__len__()", "commit(items)", "select()", "select(cond, weigh)"),
    "guider": _calls("begin(run)", "__call__(state)", "finish(x)")
    + _calls(
        "on_guidance_scale(step, guidance_scale)",
        "on_noise(x)",
        "on_condition(prompt_embeds, step, mask)",
        "on_model(model)",
        "on_evaluation(evaluation)",
        "on_encoder(encoder)",
        optional=True,
    ),
    "backend": _calls("accepts(target)", "attach(target, guider, prompt_embeds=)"),
}


def needs(kind: str) -> str:
    """What an object of this kind must have, for messages."""
    found = [call.shown for call in CALLS[kind] if not call.optional]
    if kind == "score":
        found.append("a `requires` of type sparke.Requires")
    return f"{', '.join(found[:-1])} and {found[-1]}"


def complaint(kind: str, thing: Any) -> str | None:
    """What keeps an object from being one of this kind, None if nothing does."""
    for call in CALLS[kind]:
        if call.method == "__call__":
            method, bound = thing if callable(thing) else None, 0
        elif call.method == "__len__":  # looked up on the type, as len() does
            method, bound = getattr(type(thing), "__len__", None), 1
        else:
            method, bound = getattr(thing, call.method, None), 0
        if wrong := _wrong(call, method, bound):
            return wrong
    if kind == "score":
        return _wrong_requires(getattr(thing, "requires", None))
    return None


def complaint_of_factory(kind: str, loaded: Any) -> str | None:
    """What keeps an entry point's object from making objects of this kind, as far as it shows.

    A class is looked at here; what a function makes shows when it is called.
    """
    if not isinstance(loaded, type):
        if complaint(kind, loaded) is None:
            return f"it is a {kind} already; name its class, or a function that makes one"
        if not callable(loaded):
            return f"it is {_described(loaded)}, neither a class nor a function that makes a {kind}"
        return None
    for call in CALLS[kind]:
        if wrong := _wrong_on_class(call, loaded):
            return f"{wrong}; a class that makes its methods otherwise is registered by a function"
    declared = inspect.getattr_static(loaded, "requires", None)
    if kind == "score" and declared is not None and not hasattr(declared, "__get__"):
        return _wrong_requires(declared)
    return None


def _wrong(call: _Call, method: Any, bound: int) -> str | None:
    """Why a method cannot be called so; `bound` is 1 where it still wants its object."""
    if not callable(method):
        return None if call.optional and method is None else f"it lacks {call.shown}"
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # some written in C tell none
        return None
    try:
        signature.bind(*[None] * (call.args + bound), **dict.fromkeys(call.keywords))
    except TypeError as error:
        return f"it cannot be called as {call.shown}, its own is {call.method}{signature}: {error}"
    return None


def _wrong_on_class(call: _Call, kind: type) -> str | None:
    # getattr would find `__call__` on every class: that of its metaclass.
    held = inspect.getattr_static(kind, call.method, None)
    if call.method == "__call__" and not any("__call__" in vars(c) for c in kind.__mro__):
        held = None
    if held is None:
        dynamic = hasattr(kind, "__getattr__") and not call.method.startswith("__")
        return None if call.optional or dynamic else f"it lacks {call.shown}"
    if isinstance(held, (staticmethod, classmethod)):
        return _wrong(call, held.__get__(None, kind), 0)
    return _wrong(call, held, 1) if isinstance(held, FunctionType) else None


def _wrong_requires(found: Any) -> str | None:
    if isinstance(found, Requires):
        return None
    return f"its `requires` must be of type sparke.Requires, got {_described(found)}"


def _described(thing: Any) -> str:
    return "None" if thing is None else f"{thing!r} of type {type(thing).__name__}"
