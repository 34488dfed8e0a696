"""A call of a pipeline's network taken apart: which rows are for the prompt, which embeddings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparke.backends._masks import present

__all__ = ["Call", "Change", "Texts", "padded"]

Change: TypeAlias = Callable[[str, Tensor, "Tensor | None"], Tensor]
"""Name of an argument, its rows for the prompt, their mask or None -> rows in their place."""

EMBEDS = frozenset(
    {
        "encoder_hidden_states",
        "encoder_hidden_states_1",
        "encoder_hidden_states_2",
        "encoder_hidden_states_t5",
        "audio_encoder_hidden_states",
        "cap_feats",
        "text_bth",
        "clip_text",
        "clip_text_pooled",
        "pooled_projections",
        "pooled_embeds",
        "pooled_text_emb",
        "proj_embedding",
        "text_embeds",
    }
)
"""Arguments of diffusers' networks that are embeddings of the prompt, in rows."""
MASKS = {
    "encoder_hidden_states": (
        "encoder_attention_mask",
        "encoder_hidden_states_mask",
        "encoder_mask",
        "text_embedding_mask",
        "attention_mask",
    ),
    "encoder_hidden_states_1": ("encoder_attention_mask_1",),
    "encoder_hidden_states_2": ("encoder_attention_mask_2",),
    "encoder_hidden_states_t5": ("text_embedding_mask_t5",),
    "audio_encoder_hidden_states": ("audio_encoder_attention_mask",),
}
"""And where they say which tokens of them are the prompt's."""
NOISY = frozenset({"hidden_states", "sample", "x", "latents"})
WHOLE = ("img_ids", "txt_ids", "rotary", "rope")
"""Arguments without a row for each sample, whatever their length."""


@dataclass(frozen=True)
class Call:
    """A call of a network that is about to be made.

    Attributes:
        module: the network.
        args: by position.
        kwargs: by name.
        kind: which prompts its rows are for, as ``Predictions.kind`` tells it.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: str

    @property
    def branches(self) -> tuple[str, ...]:
        """The prompts its rows are for, in order; empty where that is not known."""
        return () if self.kind == "other" else tuple(self.kind.split("+"))

    def made(self, cached_as: str | None = None) -> Any:
        """The network's answer.

        Args:
            cached_as: under what name networks that cache may do so; None if they are told already.
        """
        cached = cached_as is not None and getattr(self.module, "is_cache_enabled", False)
        with self.module.cache_context(cached_as) if cached else nullcontext():
            return self.module(*self.args, **self.kwargs)

    def alone(self, batch: int) -> Call:
        """The same call for the rows of the prompt only."""
        if len(self.branches) < 2:
            return self
        rows, total = self.prompted(batch)[0], len(self.branches) * batch

        def part(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                fits = value.ndim > 0 and len(value) == total
                return value[rows] if fits and not any(w in name for w in WHOLE) else value
            if type(value) is dict:
                return {key: part(key, inner) for key, inner in value.items()}
            if type(value) in (list, tuple):
                if name in EMBEDS | NOISY and len(value) == total:
                    return value[rows]
                return type(value)(part(name, inner) for inner in value)
            return value

        return self._with(part, "cond")

    def prompted(self, batch: int) -> list[slice]:
        """Which rows are for the prompt: one slice, or two where one is of a perturbed look."""
        places = (at for at, name in enumerate(self.branches) if name == "cond")
        return [slice(at * batch, (at + 1) * batch) for at in places]

    def named(self) -> dict[str, Any]:
        """All arguments by name, as far as names are known."""
        return {**dict(zip(_names(self.module), self.args, strict=False)), **self.kwargs}

    def _with(self, part: Callable[[str, Any], Any], kind: str) -> Call:
        """The call with `part` of each argument; itself if that changes none."""
        names = [*_names(self.module), *[""] * len(self.args)]
        args = tuple(part(name, value) for name, value in zip(names, self.args, strict=False))
        kwargs = {name: part(name, value) for name, value in self.kwargs.items()}
        pairs = [*zip(args, self.args, strict=True)]
        pairs += [(kwargs[name], value) for name, value in self.kwargs.items()]
        if kind == self.kind and all(new is old for new, old in pairs):
            return self
        return replace(self, args=args, kwargs=kwargs, kind=kind)


class Texts:
    """Embeddings of the prompt among the arguments of a run's calls.

    Args:
        batch: samples in the run.

    Attributes:
        seen: names of the arguments in which they were found.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._padding: dict[tuple[str, torch.Size], Tensor | None] = {}
        self.seen: set[str] = set()

    def changed(self, call: Call, change: Change) -> Call:
        """The call with other embeddings for the prompt; the same object if none are others.

        A network that takes a list, one (tokens, c) for each sample, is shown to `change` as
        (b, tokens, c), padded to the longest, with their mask where lengths differ. Rows of the
        null prompt stay as they are.
        """
        if "cond" not in call.branches:
            return call
        everywhere, total = call.prompted(self._batch), len(call.branches) * self._batch
        rows = everywhere[0]  # others have the same embeddings
        everything = call.named()

        def part(name: str, value: Any) -> Any:
            if type(value) is dict:
                parts = {k: part(k, v) if k in EMBEDS else v for k, v in value.items()}
                return parts if any(parts[k] is not value[k] for k in value) else value
            if name not in EMBEDS:
                return value
            if _is_list(value) and len(value) == total:
                return self._listed(name, value, everywhere, change)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            if value.ndim not in (2, 3) or len(value) != total:
                return value
            self.seen.add(name)
            own = value[rows] if total > self._batch else value
            other = change(name, own, self._mask(name, own, everything, rows, total))
            return value if other is own else _placed(value, other, everywhere)

        return call._with(part, call.kind)

    def _listed(
        self, name: str, value: list[Tensor], everywhere: list[slice], change: Change
    ) -> list[Tensor]:
        self.seen.add(name)
        own = value[everywhere[0]]
        together, mask = padded(own)
        other = change(name, together, mask)
        if other is together:
            return value
        cut = [row[: len(old)] for row, old in zip(other, own, strict=True)]
        changed = list(value)
        for rows in everywhere:
            changed[rows] = cut
        return changed

    def _mask(
        self, name: str, own: Tensor, everything: Mapping[str, Any], rows: slice, total: int
    ) -> Tensor | None:
        if own.ndim != 3:
            return None
        tokens = own.shape[1]
        for known in MASKS.get(name, ()):
            mask = everything.get(known)
            if not isinstance(mask, Tensor) or mask.ndim < 2:
                continue
            if (mask.shape[0], mask.shape[-1], mask.numel()) == (total, tokens, total * tokens):
                return present(mask[rows])
        key = (name, own.shape)
        if key not in self._padding:  # prompts stay what they are, and looking makes a device wait
            said = own.ne(0).any(-1)
            self._padding[key] = None if bool(said.all()) else said
        return self._padding[key]


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(b, tokens, c) of b (tokens, c), and the mask of those that are no padding, if any is."""
    together = pad_sequence(rows, batch_first=True)
    lengths = [len(row) for row in rows]
    if min(lengths) == max(lengths):
        return together, None
    at = torch.arange(together.shape[1], device=together.device)
    return together, at < torch.tensor(lengths, device=together.device)[:, None]


def _placed(whole: Tensor, other: Tensor, everywhere: list[slice]) -> Tensor:
    """`whole` with other rows in these places, in a tensor of its own."""
    if len(other) == len(whole):
        return other
    parts, at = [], 0
    for rows in everywhere:
        parts += [whole[at : rows.start], other]
        at = rows.stop
    return torch.cat([*parts, whole[at:]])


def _is_list(value: Any) -> bool:
    if type(value) is not list or not value:
        return False
    return all(isinstance(v, Tensor) and v.ndim == 2 and v.is_floating_point() for v in value)


def _names(module: Any) -> tuple[str, ...]:
    kind: Any = type(getattr(module, "_orig_mod", module))
    return _names_of(kind)


@functools.lru_cache(maxsize=64)
def _names_of(kind: Any) -> tuple[str, ...]:
    """What a network calls its arguments, in order."""
    try:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    except (TypeError, ValueError, AttributeError):
        return ()
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in by_place)
