"""One call of a modular pipeline, guided; its prompts and latents are in its live state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
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
            if self._hooks.hooks.noise:
                state.values = _Watched(state.values, self._on_value)
            self._prompts.arguments = state.values
            try:
                return blocks(pipeline, state)
            finally:
                if isinstance(state.values, _Watched):
                    state.values = dict(state.values)

        names = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
        stand_in: Any = object.__new__(type(kind.__name__, (kind,), names))
        object.__setattr__(stand_in, "__dict__", vars(blocks))
        return stand_in

    def _on_value(self, name: str, value: Any) -> Any:
        """What goes into the state in place of a value; the first latents in it are the noise."""
        if name != "latents" or not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value is self._drawn:
            return self._latents  # a block sets what it has as output and as input
        if self._drawn is not None or self._reading is not None:
            return value
        known = self._prompts.arguments.get
        mixed = known("image_latents") is not None and known("strength") is not None
        return self.started(
            {"timestep": known("latent_timestep"), "strength": mixed or None}, value
        )

    def _begin_at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = self._prompts.arguments.get("latents")
        if isinstance(latents, Tensor) and latents.ndim > 1:
            self._latents = latents
        super()._begin_at(args, kwargs)

    def _begin(self, batch: int, latents: Tensor) -> None:
        if self._sources.own:
            self._prompts.origin = self._origin_like(self._prompts.given())
        if self._hooks.hooks.encoders:
            self._encode_again()
        super()._begin(batch, latents)

    def _encode_again(self) -> None:
        """Have the text encoder block encode the call's prompts once more, differently."""
        values, block = self._prompts.arguments, text_encoder(vars(self._pipeline)["_blocks"])
        why_not = None
        if values.get("prompt") is None:
            why_not = "the call brings its prompts as embeddings; call it with strings"
        elif block is None:
            why_not = "the pipeline has no block that encodes prompts and nothing else"
        made = [] if block is None else block.intermediate_output_names
        known = dict(values)

        def again() -> list[Any]:
            state = _encoded(self._pipeline, block, known)
            return [state.get(name) for name in made]

        self._hooks.encode([values.get(name) for name in made], again, why_not)

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
    block = text_encoder(vars(pipeline)["_blocks"])
    if block is None or any(getattr(pipeline, n, None) is None for n in _models(block)):
        return None

    def encode(**inputs: Any) -> tuple[Any, ...]:
        state = _encoded(pipeline, block, inputs)
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


def _encoded(pipeline: Any, block: Any, values: Mapping[str, Any]) -> Any:
    """The state in which a text encoder block leaves these inputs of it."""
    from diffusers.modular_pipelines import PipelineState

    names = dict.fromkeys(["prompt", *block.input_names])
    _, state = block(pipeline, PipelineState(values={name: values.get(name) for name in names}))
    return state


class _Watched(dict[str, Any]):
    """Values of a state, each as `put` says when it is set."""

    def __init__(self, values: Mapping[str, Any], put: Callable[[str, Any], Any]) -> None:
        super().__init__(values)
        self._put = put

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, self._put(name, value))


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
