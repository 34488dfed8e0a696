"""diffusers' modular pipelines: wrapped like any other, or guided by blocks of their own loop.

`sparke.wrap` guides a modular pipeline through its scheduler's steps, as it does the classic ones,
and reads prompts and latents in the pipeline's live state. `insert` puts two blocks into each
denoising loop instead, the way diffusers means loops to be extended. diffusers is imported by
nobody here before the first pipeline or block of it arrives.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import Tensor

from sparke.backends._guided import guided, scheduler_of
from sparke.backends._hooked import Hooks
from sparke.backends._modular_run import ModularRun, text_encoder
from sparke.backends._prompt_reader import Prompts, PromptSource
from sparke.backends._run_start import Learned
from sparke.errors import ArgumentError, UnsupportedTarget
from sparke.protocols import Guider

__all__ = ["accepts", "attach", "insert", "remove"]

T = TypeVar("T")

NAMES = ("diversity", "diversity_finish")
"""What the inserted blocks are called in their loop."""


def accepts(target: object) -> bool:
    """Whether `target` is a modular pipeline of diffusers."""
    return _is_a("ModularPipeline", target)


def attach(
    target: Any,
    guider: Guider,
    *,
    prompt_embeds: PromptSource | None = None,
    prompt_encoder: Callable[[list[str]], Any] | None = None,
) -> Any:
    """The pipeline with guidance inside: same class, same call, same components.

    The guider component of diffusers keeps its name, ``guider``, and its work: a prediction is
    displaced after it. Where it asks for an unconditional prediction, told by its prompts, and our
    guider wants scale 1, it gets the conditional one.

    Args:
        target: the pipeline, its components loaded.
        guider: displaces the denoised estimate at each step.
        prompt_embeds: (b, c), (b, tokens, c), a pair of those with a mask, or a function of the
            values in the pipeline's state, in place of the state's own ``prompt_embeds``.
        prompt_encoder: list of strings -> (n, c) embeddings to compare prompts by.

    Returns:
        A pipeline that shares every attribute with `target`, with ``memory`` and ``__wrapped__``,
        the pipeline given. Used in a ``with`` statement it guides the calls of `target` itself
        until the end of the block.

    Raises:
        UnsupportedTarget: the pipeline has no scheduler, or one that cannot be guided.
    """
    scheduler_of(target)
    prompts, learned = Prompts(prompt_embeds, prompt_encoder), Learned()

    def run(pipeline: Any, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
        return ModularRun(pipeline, guider, arguments, prompts, learned).guiding()

    return guided(target, run, memory=getattr(guider, "memory", None))


def insert(target: T, guider: Guider, *, prompt_embeds: PromptSource | None = None) -> T:
    """Put guidance into each denoising loop, as two blocks around ``after_denoiser``.

    The first, right before it, displaces ``block_state.noise_pred`` so that the denoised estimate
    moves as the guider says, in the terms of the scheduler; whatever guider of diffusers made that
    prediction has done its work by then. The second ends the loop: after its last step it hands
    the finished latents to `guider`, decoded or not. Copies of the blocks, which diffusers makes
    freely, share `guider` and its memory.

    Unlike `sparke.wrap` this does not hold classifier-free guidance at scale 1 (`cfg_interval` of
    the guider has no effect) and shows no conditional prediction: blocks cannot undo what they did
    to a component when their loop fails, so these change none.

    Args:
        target: a modular pipeline or its blocks; changed in place.
        guider: displaces the denoised estimate. One guider serves one run at a time.
        prompt_embeds: (b, c), (b, tokens, c), a pair of those with a mask, or a function of the
            values in the loop's block state, in place of its ``prompt_embeds``.

    Returns:
        `target`, for chaining; `remove` undoes it.

    Raises:
        UnsupportedTarget: no loop with a block ``after_denoiser`` in it. While running: the loop
            has no ``noise_pred`` for its scheduler.
        ArgumentError: guidance was inserted before; join guiders by `sparke.GuiderChain`. Or the
            guider has hooks on the noise, the embeddings, the network or the encoders, which blocks
            cannot reach.

    Example:
        ```python
        import sparke.backends.modular

        blocks = sparke.backends.modular.insert(StableDiffusionXLAutoBlocks(), guider)
        pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        ```
    """
    loops = _loops(target)
    if not loops:
        raise UnsupportedTarget(
            f"{type(target).__name__} has no denoising loop with a block named 'after_denoiser'. "
            "Give a modular pipeline of diffusers or its blocks, or use sparke.wrap instead."
        )
    if any(NAMES[0] in loop for loop in loops):
        raise ArgumentError(
            "guidance is inserted here already. Call remove(...) first, or insert one "
            "GuiderChain of several guiders."
        )
    if lost := Hooks(guider).offered:
        raise ArgumentError(
            f"guider={guider!r} needs {', '.join(lost)}, where blocks in a loop do not reach. Use "
            "sparke.wrap(pipe, guider=...) instead."
        )
    before, after = _block_classes()
    prompts, encoder = Prompts(prompt_embeds), text_encoder(_blocks_of(target))
    for loop in loops:
        *_, last = loop.values()
        loop.insert(NAMES[0], before(guider, prompts, encoder), list(loop).index("after_denoiser"))
        # A loop's outputs are those of its last block.
        loop.insert(NAMES[1], after(last.intermediate_outputs), len(loop))
    return target


def remove(target: T) -> T:
    """Take out what `insert` put in; a target without it is left alone."""
    for loop in _loops(target):
        for name in NAMES:
            loop.pop(name, None)
    return target


def _is_a(name: str, target: object) -> bool:
    host = sys.modules.get("diffusers")
    kind = getattr(host, name, None) if host else None
    return isinstance(kind, type) and isinstance(target, kind)


def _blocks_of(target: Any) -> Any:
    """A pipeline's own blocks; its attribute ``blocks`` hands out copies."""
    return vars(target)["_blocks"] if accepts(target) else target


def _loops(target: Any) -> list[Any]:
    """The blocks by name of each loop that has one named ``after_denoiser``."""
    blocks = _blocks_of(target)
    if not _is_a("ModularPipelineBlocks", blocks):
        return []
    inner = blocks.sub_blocks
    found = [inner] if "after_denoiser" in inner else []
    for block in inner.values():
        found.extend(_loops(block))
    return found


@functools.cache
def _block_classes() -> tuple[type[Any], type[Any]]:
    from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks

    class DiversityStep(ModularPipelineBlocks):  # type: ignore[misc]
        """Displaces ``noise_pred`` as a guider of sparke says."""

        def __init__(self, guider: Guider, prompts: Prompts, encoder: Any) -> None:
            super().__init__()
            self.guider, self.prompts = guider, prompts
            known = encoder.inputs if encoder is not None else []
            self._inputs = [(p.name, p.default) for p in known if p.name]

        def __deepcopy__(self, _: dict[int, Any]) -> Any:
            return self  # it holds nothing but the guider, whose memory is one

        @property
        def description(self) -> str:
            return f"Moves the denoised estimate apart by {self.guider!r}."

        @property
        def inputs(self) -> list[Any]:
            # What the prompts were encoded with, to encode the reference prompts likewise.
            return [InputParam(name, default=default) for name, default in self._inputs]

        def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> Any:
            if block_state["diversity_run"] is None:
                _check(components, block_state)
                block_state.diversity_run = ModularRun(
                    components, self.guider, block_state.as_dict(), self.prompts
                )
            moved = block_state.diversity_run.displaced(
                block_state.noise_pred, t, block_state.latents
            )
            block_state.noise_pred = block_state.noise_pred if moved is None else moved
            return components, block_state

    class DiversityFinishStep(ModularPipelineBlocks):  # type: ignore[misc]
        """Hands the latents of the last step to the guider."""

        def __init__(self, outputs: list[Any]) -> None:
            super().__init__()
            self._outputs = outputs

        @property
        def description(self) -> str:
            return "Remembers the finished latents."

        @property
        def intermediate_outputs(self) -> list[Any]:
            return self._outputs

        def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> Any:
            block_state.diversity_run.stepped(block_state.latents)
            block_state.diversity_run.finish()
            return components, block_state

    return DiversityStep, DiversityFinishStep


def _check(components: Any, block_state: Any) -> None:
    output, latents = block_state["noise_pred"], block_state["latents"]
    if not isinstance(output, Tensor) or not isinstance(latents, Tensor):
        raise UnsupportedTarget(
            f"the denoising loop of {type(components).__name__} has no noise_pred and latents to "
            "guide by. Use sparke.wrap on the pipeline, which guides by its scheduler's steps."
        )
