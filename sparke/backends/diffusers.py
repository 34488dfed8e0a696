"""diffusers' pipelines, of any family, with guidance inside their scheduler's steps.

A wrapped pipeline is used exactly like the bare one and is of its class. While a call runs, the
denoised estimate is read off the model's output as the scheduler is about to read it, displaced,
and converted back; classifier-free guidance, where the pipeline does it, is held at the scale the
guider asks for. Before and after, the pipeline is the user's own. diffusers itself is imported by
nobody here: who has a pipeline has it loaded already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from sparke.backends._guided import guided, scheduler_of
from sparke.backends._pipeline_run import PipelineRun
from sparke.backends._prompt_reader import Prompts, PromptSource
from sparke.backends._run_start import Learned
from sparke.protocols import Guider

__all__ = ["accepts", "attach"]


def accepts(target: object) -> bool:
    """Whether `target` is a pipeline of diffusers, modular ones excepted."""
    host = sys.modules.get("diffusers")
    kind = getattr(host, "DiffusionPipeline", None) if host else None
    return isinstance(kind, type) and isinstance(target, kind)


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
    scheduler_of(target)
    prompts, learned = Prompts(prompt_embeds, prompt_encoder), Learned()

    def run(pipeline: Any, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
        return PipelineRun(pipeline, guider, arguments, prompts, learned).guiding()

    names = {"memory": getattr(guider, "memory", None)}
    if "guider" not in vars(target):
        names["guider"] = guider
    return guided(target, run, **names)
