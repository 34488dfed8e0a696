"""A pipeline's denoiser, called through a stand-in while the pipeline runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Call", "Rows", "first_input", "head_of", "is_rows", "replaced", "time_of", "watched"]

NAMES = ("unet", "transformer", "transformer_2", "prior", "decoder", "dit")
"""Components that pipelines call as their denoiser."""

Rows: TypeAlias = "Tensor | Sequence[Tensor]"
Call: TypeAlias = Callable[..., Any]
Watcher: TypeAlias = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def watched(pipeline: Any, watcher: Watcher) -> Iterator[list[torch.nn.Module]]:
    """Let `watcher` make the calls of the pipeline's denoisers; tells which there are.

    The pipeline holds stand-ins meanwhile that share the modules' state. The modules themselves are
    called as they are: hooks and compiled code inside them notice nothing.
    """
    held = vars(pipeline)
    found = {name: held[name] for name in NAMES if isinstance(held.get(name), torch.nn.Module)}
    stand_ins = {name: _stand_in(module, watcher) for name, module in found.items()}
    held.update(stand_ins)
    try:
        yield list(found.values())
    finally:
        for name, stand_in in stand_ins.items():
            # Offloading hooks a module anew within a call and keeps what it was given; from here
            # on that is the module by another name, and holds nothing of this run.
            del type(stand_in).__call__
            if held.get(name) is stand_in:  # or else somebody put another module there
                held[name] = found[name]


def _stand_in(module: torch.nn.Module, watcher: Watcher) -> Any:
    kind = type(module)

    def call(self: object, *args: Any, **kwargs: Any) -> Any:
        return watcher(module, args, kwargs)

    # A subclass of the same name passes whatever the pipeline asks of its component.
    copy_of = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    stand_in: Any = object.__new__(copy_of)
    object.__setattr__(stand_in, "__dict__", vars(module))
    return stand_in


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows | None:
    """The noisy latents a denoiser was called with."""
    names = ("hidden_states", "sample", "x", "latents")
    candidates = [*args[:1], *(kwargs[name] for name in names if name in kwargs)]
    return next((c for c in candidates if is_rows(c)), None)


def time_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The time it was called with."""
    value = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    if isinstance(value, Tensor) and value.numel():
        return float(value.reshape(-1)[0])
    return float(value) if isinstance(value, (int, float)) else None


def replaced(out: Any, head: Any) -> Any:
    """A denoiser's answer with another first part."""
    if isinstance(out, tuple):
        return (head, *out[1:])
    if isinstance(out, (Tensor, list)):
        return head
    changed = type(out)(**dict(out)) if isinstance(out, dict) else out
    changed[next(iter(changed))] = head
    return changed


def head_of(out: Any) -> Any:
    if isinstance(out, (Tensor, list)):
        return out
    return out[0]


def is_rows(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor) and value.ndim > 0
