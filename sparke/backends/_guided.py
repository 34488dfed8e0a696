"""A pipeline whose calls are guided: which scheduler that takes, and the class it is of."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from sparke.backends import _schedulers
from sparke.errors import GuidanceWarning, UnsupportedTarget

__all__ = ["guided", "scheduler_of"]


def scheduler_of(pipeline: Any) -> Any:
    """The scheduler that takes the pipeline's last denoising loop.

    Raises:
        UnsupportedTarget: it has none, or one that cannot be guided.
    """
    held = vars(pipeline)
    named = ["scheduler", "decoder_scheduler", *(k for k in held if k.endswith("scheduler"))]
    found = (held.get(name) for name in named)
    scheduler = next((s for s in found if s is not None and _schedulers.is_scheduler(s)), None)
    if scheduler is None:
        raise UnsupportedTarget(
            f"{type(pipeline).__name__} has no scheduler whose steps could be guided."
        )
    if not _schedulers.supported(scheduler):
        _schedulers.Reading(scheduler)  # raises, and says why
    return scheduler


def guided(
    target: Any,
    run: Callable[[Any, Mapping[str, Any]], AbstractContextManager[None]],
    **names: Any,
) -> Any:
    """The pipeline with each of its calls inside a run: same class, same call, same components.

    Args:
        target: the pipeline.
        run: pipeline, arguments of the call, defaults included -> a context to call it in.
        **names: further attributes of the class.

    A pipeline that is wrapped already gives a GuidanceWarning: a cell of a notebook run again.

    Returns:
        A pipeline that shares every attribute with `target`. Used in a ``with`` statement it guides
        the calls of `target` itself until the end of the block.
    """
    kind = type(target)
    if hasattr(kind, "__wrapped__"):
        warnings.warn(
            f"this {kind.__name__} is wrapped already: both its guiders push, the new one first. "
            "To replace its guidance, wrap pipe.__wrapped__; to have both on purpose, give them "
            "as guider=[...].",
            GuidanceWarning,
            stacklevel=4,
        )
    signature = inspect.signature(kind.__call__)
    entered: list[type] = []

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
            elif parameter.default is not inspect.Parameter.empty:
                arguments.setdefault(name, parameter.default)
        with run(self, arguments):
            return kind.__call__(self, *args, **kwargs)

    def enter(self: Any) -> Any:
        entered.append(type(target))
        target.__class__ = type(self)
        return self

    def leave(self: Any, *_: object) -> None:
        target.__class__ = entered.pop()

    held = {
        "__call__": call,
        "__enter__": enter,
        "__exit__": leave,
        "__wrapped__": target,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        **names,
    }
    wrapped: Any = object.__new__(type(kind.__name__, (kind,), held))
    object.__setattr__(wrapped, "__dict__", vars(target))
    return wrapped
