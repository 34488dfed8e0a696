"""One call of a modular pipeline, guided; its prompts and latents are in its live state."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sparke.backends import _encodings
from sparke.backends._pipeline_run import PipelineRun
from sparke.backends._prompt_reader import MASK_NAMES

__all__ = ["ModularRun", "text_encoder"]


class ModularRun(PipelineRun):
    """One call of a modular pipeline, or one loop in it; `arguments` are its live values."""

    @contextmanager
    def guiding(self) -> Iterator[None]:
        held = vars(self._pipeline)
        blocks = held["_blocks"]
        held["_blocks"] = self._watching(blocks)
        try:
            with super().guiding():
                yield
        finally:
            held["_blocks"] = blocks

    def _watching(self, blocks: Any) -> Any:
        """The pipeline's blocks, telling of the state they are given."""
        kind = type(blocks)

        def call(_: object, pipeline: Any, state: Any) -> Any:
            self._prompts.arguments = state.values
            return blocks(pipeline, state)

        names = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        stand_in: Any = object.__new__(type(kind.__name__, (kind,), names))
        object.__setattr__(stand_in, "__dict__", vars(blocks))
        return stand_in

    def _begin_at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = self._prompts.arguments.get("latents")
        if isinstance(latents, Tensor) and latents.ndim > 1:
            self._latents = latents
        super()._begin_at(args, kwargs)

    def _begin(self, batch: int, latents: Tensor) -> None:
        if self._sources.own:
            self._prompts.origin = self._origin_like(self._prompts.given())
        super()._begin(batch, latents)

    def _batch(self, rows: Tensor) -> int:
        return len(rows)  # modular pipelines evaluate one prompt at a time

    def _guidance_scale(self) -> float:
        guider = vars(self._pipeline).get("guider")
        scale = getattr(guider, "guidance_scale", None)
        if not isinstance(scale, (int, float)):
            return 2.0
        return float(scale) + bool(getattr(guider, "use_original_formulation", False))

    def _origin_like(self, encoding: _encodings.Encoding | None) -> Tensor | None:
        """The origin of these prompts, by the pipeline's own text encoder where it has one."""
        if encoding is None:
            return None
        origin = self._sources.origin(
            vars(self._pipeline).get("text_encoder"),
            lambda: _origin(self._pipeline, self._prompts.arguments),
        )
        # Embeddings may be projected on their way from the encoder to the loop.
        width = encoding.embeds[0].shape[-1]
        return origin if origin is not None and len(origin) == width else None


def _origin(pipeline: Any, values: Mapping[str, Any]) -> Tensor | None:
    """(c,) mean of the reference prompts, by the pipeline's text encoder block; None without one.

    Args:
        pipeline: whose components the block uses.
        values: inputs of the block, as far as known.
    """
    from diffusers.modular_pipelines import PipelineState

    block = text_encoder(vars(pipeline)["_blocks"])
    if block is None or any(getattr(pipeline, n, None) is None for n in _models(block)):
        return None

    def encode(**inputs: Any) -> tuple[Any, ...]:
        _, state = block(pipeline, PipelineState(values=inputs))
        masks = (state.get(name) for name in MASK_NAMES)
        return (state.get("prompt_embeds"), *(m for m in masks if m is not None))

    names = dict.fromkeys(["prompt", *block.input_names])
    signature = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    )
    known = {name: values.get(name) for name in names}
    heard = inspect.BoundArguments(signature, known)
    reference = getattr(pipeline, "reference_prompts", _encodings.REFERENCE)
    return _encodings.origin(encode, heard, reference)


def text_encoder(block: Any) -> Any:
    """The outermost block that makes embeddings of prompts and nothing of latents, or None."""
    made = block.intermediate_output_names
    if "prompt_embeds" in made and "latents" not in made and "prompt" in block.input_names:
        return block
    found = (text_encoder(inner) for inner in block.sub_blocks.values())
    return next((inner for inner in found if inner is not None), None)


def _models(block: Any) -> list[str]:
    """Names of the text encoders and tokenizers of a block."""
    names: list[str] = block.component_names
    return [name for name in names if "text_encoder" in name or "tokenizer" in name]
