"""diffusers' pipelines, of any family, with guidance inside their scheduler's steps.

A wrapped pipeline is used exactly like the bare one and is of its class. While a call runs, the
denoised estimate is read off the model's output as the scheduler is about to read it, displaced,
and converted back; classifier-free guidance, where the pipeline does it, is held at the scale the
guider asks for. Before and after, the pipeline is the user's own. diffusers itself is imported by
nobody here: who has a pipeline has it loaded already.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from sparke.backends._pipeline_run import PipelineRun, Prompts, PromptSource, scheduler_of
from sparke.protocols import Guider

__all__ = ["accepts", "attach"]

PIPELINES = ("DiffusionPipeline", "ModularPipeline")


def accepts(target: object) -> bool:
    """Whether `target` is a pipeline of diffusers, classic or modular."""
    host = sys.modules.get("diffusers")
    kinds = (getattr(host, name, None) for name in PIPELINES) if host else ()
    return any(isinstance(target, kind) for kind in kinds if isinstance(kind, type))


def attach(
    target: Any,
    guider: Guider,
    *,
    prompt_embeds: PromptSource | None = None,
    prompt_encoder: Callable[[list[str]], Any] | None = None,
) -> Any:
    """The pipeline with guidance inside: same class, same call, same components.

    Args:
        target: the pipeline.
        guider: displaces the denoised estimate at each step.
        prompt_embeds: (b, c), (b, tokens, c), a pair of those with a mask, or a function of the
            call's arguments, in place of the pipeline's own encoding.
        prompt_encoder: list of strings -> (n, c) embeddings to compare prompts by.

    Returns:
        A pipeline that shares every attribute with `target`, with ``memory``, ``guider`` (where the
        pipeline has no component of that name) and ``__wrapped__``, the pipeline given. Used in a
        ``with`` statement it guides the calls of `target` itself until the end of the block.

    Raises:
        UnsupportedTarget: the pipeline has no scheduler, or one that cannot be guided.
    """
    kind = type(target)
    scheduler_of(target)
    prompts = Prompts(prompt_embeds, prompt_encoder)
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
        with PipelineRun(self, guider, arguments, prompts).guiding():
            return kind.__call__(self, *args, **kwargs)

    def enter(self: Any) -> Any:
        entered.append(type(target))
        target.__class__ = type(self)
        return self

    def leave(self: Any, *_: object) -> None:
        target.__class__ = entered.pop()

    names = {
        "__call__": call,
        "__enter__": enter,
        "__exit__": leave,
        "__wrapped__": target,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "memory": getattr(guider, "memory", None),
    }
    if "guider" not in vars(target):
        names["guider"] = guider
    wrapped: Any = object.__new__(type(kind.__name__, (kind,), names))
    object.__setattr__(wrapped, "__dict__", vars(target))
    return wrapped
