"""Which guiders offer which hook, for hosts and chains alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from sparke.protocols import (
    ConditionHook,
    EncoderHook,
    EvaluationHook,
    Exclusive,
    GuidanceScaleHook,
    Guider,
    Idle,
    ModelHook,
    NoiseHook,
    Yielding,
)

__all__ = ["HOOKS", "claims", "having", "members", "told", "yielded"]

H = TypeVar("H")

HOOKS: dict[str, type[Any]] = {
    "guidance_scale": GuidanceScaleHook,
    "noise": NoiseHook,
    "condition": ConditionHook,
    "model": ModelHook,
    "evaluation": EvaluationHook,
    "encoder": EncoderHook,
}
"""Name of what a hook decides -> its protocol, whose one method is ``on_<name>``."""


def members(guider: Guider) -> tuple[Guider, ...]:
    """A chain's guiders in their order, chains within it unrolled; any other guider alone."""
    inner = getattr(guider, "guiders", None)
    if not isinstance(inner, tuple):
        return (guider,)
    return tuple(member for one in inner for member in members(one))


def having(guider: Guider, hook: Callable[..., H]) -> list[H]:
    """Those of `guider`'s members whose `hook` is to be called, in their order.

    That is: who offers it, does not yield it to another, and is not idle in it. Hosts ask once,
    when a run begins, and leave their own code alone where the list is empty::

        for member in having(guider, NoiseHook):
            x = member.on_noise(x)
    """
    # A protocol is no `type[H]` to the type checker, because nobody can make one; a Callable it is.
    protocol = cast("type[Any]", hook)
    name = next((name for name, known in HOOKS.items() if known is protocol), "")
    found: list[Any] = [m for m in members(guider) if isinstance(m, protocol)]
    return [m for m in found if name not in yielded(guider, m) | _idle(m)]


def claims(guider: Guider) -> frozenset[str]:
    """What one guider decides alone; see [Exclusive][sparke.protocols.Exclusive]."""
    return frozenset(guider.exclusive) if isinstance(guider, Exclusive) else frozenset()


def yielded(guider: Guider, member: Guider) -> frozenset[str]:
    """What `member` leaves to the others in `guider`, because one of them claims it."""
    if not isinstance(member, Yielding):
        return frozenset()
    others = (claims(other) for other in members(guider) if other is not member)
    return frozenset(member.yields) & frozenset().union(*others)


def told(guider: Guider, member: Guider) -> str:
    """The hooks of `member` that run in `guider`, for people."""
    gone, idle = yielded(guider, member), _idle(member)
    parts = ["__call__"]
    for name, hook in HOOKS.items():
        if isinstance(member, hook):
            why = " (left to another)" if name in gone else " (idle)" if name in idle else ""
            parts.append(f"on_{name}{why}")
    return ", ".join(parts)


def _idle(member: Guider) -> frozenset[str]:
    return frozenset(member.idle or ()) if isinstance(member, Idle) else frozenset()
