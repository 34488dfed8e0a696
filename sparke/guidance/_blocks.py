"""Blocks of multimodal transformers: which they are, where their text is, and edits to it.

A block's output is edited through diffusers' own hooks, which `torch.compile` notices whenever they
come and go, and through one operator of ours, which it calls without looking inside: an edit that
changes from step to step compiles nothing anew.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from sparke import checks
from sparke.errors import ArgumentError

__all__ = ["FAMILIES", "Blocks", "Editor", "Where", "edited", "found"]

Where: TypeAlias = int | str
"""Place of the text in what a block returns: 0 or 1 in a pair, or "all": every token there is."""
Blocks: TypeAlias = "Mapping[str, Where] | Callable[[str, nn.Module], Where | None]"
"""Class names of blocks, or a function of a module's name and the module, to the place of text."""

FAMILIES: dict[str, dict[str, Where]] = {
    "SD3 and SD3.5": {"JointTransformerBlock": 0},
    "Flux": {"FluxTransformerBlock": 0, "FluxSingleTransformerBlock": "all"},
    "Flux 2": {"Flux2TransformerBlock": 0, "Flux2SingleTransformerBlock": "all"},
    "Qwen-Image": {"QwenImageTransformerBlock": 0},
    "Chroma": {"ChromaTransformerBlock": 0, "ChromaSingleTransformerBlock": "all"},
    "AuraFlow": {"AuraFlowJointTransformerBlock": 0, "AuraFlowSingleTransformerBlock": "all"},
    "Bria": {"BriaTransformerBlock": 0, "BriaSingleTransformerBlock": "all"},
    "LongCat-Image": {
        "LongCatImageTransformerBlock": 0,
        "LongCatImageSingleTransformerBlock": "all",
    },
    "Ovis-Image": {"OvisImageTransformerBlock": 0, "OvisImageSingleTransformerBlock": "all"},
    "HunyuanImage": {
        "HunyuanImageTransformerBlock": 1,
        "HunyuanImageSingleTransformerBlock": "all",
    },
    "CogView4": {"CogView4TransformerBlock": 1},
}
"""Names of the classes of blocks in diffusers, and where each has its text tokens."""

_KNOWN = {name: where for family in FAMILIES.values() for name, where in family.items()}
_PLACES: tuple[Where, ...] = (0, 1, "all")


class Editor(Protocol):
    """What is asked for every block's text while the hooks are in place."""

    def edit(self, block: int, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """What to add to (rows, T, C) tokens after this block, a new tensor; None adds nothing.

        `mask`, (rows, T), is true for tokens of the prompt; None where the model tells none.
        """
        ...


def found(model: Any, blocks: Blocks | None = None) -> list[tuple[nn.Module, Where]]:
    """The blocks of a model with text to edit, in its own order.

    Args:
        model: a torch module.
        blocks: where they are, in place of the classes known here.

    Raises:
        ArgumentError: it has none, or `blocks` names a place there is not.
    """
    places = []
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        where = _where(name, module, blocks)
        # The last block of SD3 drops its text.
        if where is not None and not getattr(module, "context_pre_only", False):
            places.append((module, where))
    if not places:
        what = "none that blocks= names" if blocks is not None else "none known here"
        raise ArgumentError(
            f"{type(model).__name__} has no blocks with text tokens to repel: {what}. Known are "
            f"those of {', '.join(FAMILIES)}. For another multimodal transformer give "
            "blocks={'ClassOfItsBlocks': 0}: 0 or 1 is the place of the text in the pair a block "
            "returns, 'all' takes every token; or a function (name, module) -> 0, 1, 'all' or None."
        )
    return places


def _where(name: str, module: nn.Module, blocks: Blocks | None) -> Where | None:
    if callable(blocks):
        where = blocks(name, module)
    else:
        where = (_KNOWN if blocks is None else blocks).get(type(module).__name__)
    if where is not None and (isinstance(where, bool) or where not in _PLACES):
        raise ArgumentError(
            f"blocks= puts the text of {name or type(module).__name__} at {where!r}; it must be 0, "
            "1, 'all', or None for a module to leave alone."
        )
    return where


@contextmanager
def edited(places: list[tuple[nn.Module, Where]], editor: Editor, first: int = 0) -> Iterator[None]:
    """Inside, the editor's changes are added to the blocks' text; afterwards nothing is left.

    Args:
        places: what [found][sparke.guidance._blocks.found] gave.
        editor: asked after every block.
        first: number of the first block.

    Raises:
        MissingHost: diffusers, whose hooks are used, is not installed.
    """
    with checks.host("diffusers", "has the hooks that hold a model's blocks", "diffusers"):
        from diffusers.hooks import HookRegistry
    slot = _take(editor)
    name, held = f"sparke_contextual_{slot}", []
    try:
        for number, (block, where) in enumerate(places, first):
            held.append((block, set(vars(block))))
            registry = HookRegistry.check_if_exists_or_initialize(block)
            registry.register_hook(_hook()(slot, number, where), name)
        yield
    finally:
        for block, before in reversed(held):
            _release(block, name, before)
        _EDITORS.pop(slot, None)


def _release(block: nn.Module, name: str, before: set[str]) -> None:
    registry = vars(block).get("_diffusers_hook")
    if registry is None:
        return
    registry.remove_hook(name, recurse=False)
    if not registry.hooks:
        # What diffusers would leave behind: an empty registry, and `forward` on the instance.
        for left in {"_diffusers_hook", "forward"} - before:
            vars(block).pop(left, None)


_EDITORS: dict[int, Editor] = {}
_LOCK = threading.Lock()


def _take(editor: Editor) -> int:
    """The lowest free number; compiled graphs contain it, so it should be the same every time."""
    with _LOCK:
        slot = next(n for n in range(len(_EDITORS) + 1) if n not in _EDITORS)
        _EDITORS[slot] = editor
    return slot


@torch.library.custom_op(
    "sparke::contextual",
    mutates_args=(),
    schema="(Tensor tokens, Tensor? mask, int editor, int block) -> Tensor",
)
def _change(tokens: Tensor, mask: Tensor | None, editor: int, block: int) -> Tensor:
    change = _EDITORS[editor].edit(block, tokens, mask)
    return torch.zeros_like(tokens) if change is None else change.to(tokens.dtype)


@_change.register_fake
def _(tokens: Tensor, mask: Tensor | None, editor: int, block: int) -> Tensor:
    return torch.empty_like(tokens)


@functools.cache
def _hook() -> Any:
    """The hook's class: made once, because compiled graphs know it by identity."""
    from diffusers.hooks import ModelHook

    class TextHook(ModelHook):  # type: ignore[misc]
        def __init__(self, slot: int, number: int, where: Where) -> None:
            super().__init__()
            self.slot, self.number, self.where = slot, number, where

        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = self.fn_ref.original_forward(*args, **kwargs)
            if isinstance(self.where, str):
                return self.everywhere(output)
            return self.at(self.where, output, kwargs.get("encoder_hidden_states_mask"))

        def everywhere(self, output: Any) -> Any:
            """Text and image tokens, changed as one sequence."""
            if isinstance(output, Tensor):
                return self.changed(output, None)
            parts = self.changed(torch.cat(list(output), 1), None)
            return tuple(parts.split([part.shape[1] for part in output], 1))

        def at(self, where: int, output: Any, mask: Tensor | None) -> Any:
            if not isinstance(output, tuple):
                raise ArgumentError(
                    f"the text of a block is said to be number {where} of what it returns, which "
                    f"is no tuple but {type(output).__name__}. Give blocks= with 'all'."
                )
            if output[where] is None:
                return output
            return (*output[:where], self.changed(output[where], mask), *output[where + 1 :])

        def changed(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
            change = torch.ops.sparke.contextual(tokens.detach(), mask, self.slot, self.number)
            moved: Tensor = tokens + change
            return moved.clip(-65504, 65504) if moved.dtype == torch.float16 else moved

    return TextHook
