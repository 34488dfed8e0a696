"""A fixed set of rows to keep away from, or to stay near."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, MemoryFileError, ShapeError
from sparke.memory import _file, _gate, _rules
from sparke.protocols import Features, Memory, Selection, Spread, Weigh

__all__ = ["ReferenceMemory"]

CHUNK = 16
"""Latents are given to `features` so many at a time."""


class ReferenceMemory:
    r"""Rows given once, which generated samples never join.

    For novelty guidance (arXiv 2506.10173), where samples are pushed away from pictures that exist
    already, and for exemplars (arXiv 2406.04551). With `history` it is two memories read as one:
    finished samples go to the history, and a selection holds the reference's rows first, then the
    history's. Without one, finished samples are not kept, and ``commit`` does nothing.

    Rows with prompts are weighed, and left out where they cannot matter, as those of
    [RingMemory][sparke.memory.RingMemory] are. Rows without prompts count in full whatever the
    prompt is, $\log w = 0$. A selection by prompt shows them under the mean of the prompts asked
    for, so that scores which compare prompts themselves (cond-vendi) find them near every one of
    these; asked for without prompts, they have none, or zeros where the history has some.

    It is not a [Memory][sparke.protocols.Memory] to the letter unless it has a history: a memory
    keeps what it is given.

    Args:
        reference: the rows, with prompts or without: Features; or a tensor (n, ...) of clean
            latents in the host's units, flattened to rows.
        prompt_embeds: (n, c) prompts of the rows, where `reference` is a tensor; from the encoder
            that the run's prompts come from, pooled as they are.
        history: where finished samples are kept beside the reference; nowhere if None.
        features: latents (b, ...) -> rows (b, d), applied to `reference` where that is a tensor of
            latents; give the guider the same.
        dtype: of the stored rows: float32, float16 or bfloat16. Prompts are kept in float32.
        device: where rows are kept; where they are if None.
        tolerance: share of the prompt weights that may be left out, as for RingMemory.

    Raises:
        ShapeError: rows or prompts are of a wrong shape.
        ArgumentError: there are no rows, one is not finite or too large for `dtype`, an option has
            a forbidden value, or an argument would go nowhere.
    """

    def __init__(
        self,
        reference: Features | Tensor,
        prompt_embeds: Tensor | None = None,
        *,
        history: Memory | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        tolerance: float = _gate.TOLERANCE,
    ) -> None:
        given = rows_given("reference", reference, prompt_embeds, features)
        self.dtype = _rules.check_dtype("dtype", dtype, _rules.DTYPES)
        self.tolerance = _gate.check_tolerance(tolerance)
        self.history = None if history is None else checks.memory("history", history)
        x, cond = _rules.admit(given, None, dtype)
        with torch.inference_mode(False):
            self._x = x.to(device, dtype, copy=True)
            self._cond = None if cond is None else cond.to(device, torch.float32, copy=True)

    def __len__(self) -> int:
        return len(self._x) + (0 if self.history is None else len(self.history))

    def __repr__(self) -> str:
        prompts = "without" if self._cond is None else "with"
        beside = "" if self.history is None else f", history={self.history!r}"
        return (
            f"ReferenceMemory({len(self._x)} rows of width {self._x.shape[1]} {prompts} prompts, "
            f"{self.dtype}{beside})"
        )

    @property
    def reference(self) -> Features:
        """A float32 copy of the rows given."""
        cond = None if self._cond is None else self._cond.clone()
        return Features(self._x.to(torch.float32, copy=True), cond)

    @property
    def has_prompts(self) -> bool:
        """Whether the rows given have prompts."""
        return self._cond is not None

    def beside(self, history: Memory | None) -> ReferenceMemory:
        """The same rows, not copied, with this history in place of the present one.

        Raises:
            ArgumentError: `history` is no Memory.
        """
        made = copy.copy(self)
        made.history = None if history is None else checks.memory("history", history)
        return made

    def commit(self, items: Features) -> None:
        """Hand finished samples to the history; without one they are not kept.

        Raises:
            ShapeError: rows or prompts of another width than those of the reference.
            ArgumentError, MissingPrompts: as the history raises them.
        """
        if self.history is None:
            return
        checks.features("items", items)
        if items.x.shape[1] != self._x.shape[1]:
            raise ShapeError(
                f"items.x has width {items.x.shape[1]}, the reference has rows of width "
                f"{self._x.shape[1]}. Latents of another size or model need their own memory."
            )
        if items.cond is not None and self._cond is not None:
            _rules.asked(items.cond, self._cond.shape[1])
        self.history.commit(items)

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        """The reference's rows that matter for these prompts in float32, then the history's.

        Args:
            cond: (b, c) prompts of the samples to come; None hands out every row, unweighted.
            weigh: prompt kernel, as for RingMemory.

        Raises:
            ShapeError: `cond` has another width than the prompts here.
            MissingPrompts: `cond` is given and the history was filled without prompts.
            ArgumentError: the history's rows are spread over ranks.
        """
        found = self._selected(cond, weigh)
        if self.history is None:
            return found
        kept = self.history.select(cond, weigh)
        if isinstance(kept, Spread):
            raise ArgumentError(
                "history's rows are spread over ranks and the reference's are not. Use "
                "ShardedMemory(keep='all') beside a reference."
            )
        return _joined(found, kept) if len(kept) else found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the reference to a safetensors file, atomically; a history has its own.

        Raises:
            MemoryFileError: the file cannot be written; an older one is left as it was.
        """
        tensors = {"x": self._x}
        if self._cond is not None:
            tensors["cond"] = self._cond
        # The capacity lets a RingMemory go on from the same file.
        _file.write(path, tensors, {"capacity": str(len(self._x)), "kind": "reference"})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **options: Any
    ) -> ReferenceMemory:
        """The rows of a file that this class or RingMemory saved.

        Args:
            path: of the file.
            dtype: of the stored rows; as in the file if None.
            **options: `history`, `device` and `tolerance`.

        Raises:
            MemoryFileError: not there, damaged, no sparke memory, or without rows.
        """
        tensors, _ = _file.read(path)
        x = tensors.get("x")
        if x is None or not len(x):
            raise MemoryFileError(f"{path} holds no rows, and a reference needs at least one.")
        return cls(Features(x, tensors.get("cond")), dtype=dtype or x.dtype, **options)

    def _selected(self, cond: Tensor | None, weigh: Weigh | None) -> Selection:
        if cond is None:
            return Selection(self._x.float(), self._cond)
        kept, device = self._cond, cond.device
        if kept is None:
            if cond.ndim != 2 or not len(cond):
                raise ShapeError(f"prompt_embeds must be (batch, width), got {tuple(cond.shape)}.")
            # As near to every prompt asked for as one row can be.
            shown = cond.detach().float().mean(0).expand(len(self._x), -1)
            weight = torch.zeros(len(cond), len(self._x), device=device)
            return Selection(self._x.to(device).float(), shown, weight)
        query = _rules.asked(cond, kept.shape[1])
        weight = _gate.log_weights(query, _chunks(kept), weigh, len(kept))
        index = _gate.keep(weight, self.tolerance)
        x = self._x
        if index is not None:
            weight, index = weight[:, index], index.to(x.device)
            x, kept = x[index], kept[index]
        return Selection(x.to(device).float(), kept.to(device), weight)


def rows_given(
    name: str,
    reference: Features | Tensor,
    prompt_embeds: Tensor | None,
    features: Callable[[Tensor], Tensor] | None,
) -> Features:
    """The rows given as the argument `name`, in whichever form: at least one.

    Raises:
        ShapeError: they are no rows.
        ArgumentError: there are none, one is not finite, or an argument would go nowhere.
    """
    found = _features(name, reference, prompt_embeds, features)
    if not len(found):
        raise ArgumentError(f"{name} has no rows; give at least one.")
    checks.features(name, found)
    checks.finite(name, found.x)
    return found


def _features(
    name: str,
    reference: Features | Tensor,
    prompt_embeds: Tensor | None,
    features: Callable[[Tensor], Tensor] | None,
) -> Features:
    if isinstance(reference, Memory):
        raise ArgumentError(
            f"{name} must be fixed rows and a {type(reference).__name__} goes on taking in samples."
            " Wrap what it holds: ReferenceMemory(memory.select())."
        )
    if isinstance(reference, Features):
        if prompt_embeds is not None or features is not None:
            raise ArgumentError(
                f"{name} is Features already, so prompt_embeds and features would go nowhere. "
                "Give them with a tensor of latents, or make the Features from them."
            )
        return reference
    if not isinstance(reference, Tensor) or reference.ndim < 2:
        got = tuple(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
        raise ShapeError(f"{name} must be Features or a tensor (rows, ...), got {got}.")
    if prompt_embeds is not None:
        checks.rows_of("prompt_embeds", prompt_embeds, len(reference))
    if features is None:
        return Features(reference.detach().flatten(1), prompt_embeds)
    with torch.no_grad():
        rows = [features(part) for part in reference.detach().split(CHUNK)]
    if any(r.ndim != 2 for r in rows) or sum(map(len, rows)) != len(reference):
        raise ShapeError(
            f"features must return one row for each of {len(reference)} latents, got "
            f"{[tuple(r.shape) for r in rows]}."
        )
    return Features(torch.cat(rows) if rows else reference.flatten(1), prompt_embeds)


def _chunks(cond: Tensor) -> Iterator[Tensor]:
    yield from cond.split(_gate.chunk_rows(cond.shape[1]))


def _joined(first: Selection, second: Selection) -> Selection:
    """The rows of both, with zeros for prompts that the first has not."""
    cond = None
    if second.cond is not None:
        after = second.cond.to(first.x.device)
        before = first.cond
        if before is None:
            before = after.new_zeros(len(first), after.shape[1])
        cond = torch.cat([before, after])
    weight = None
    if first.log_weight is not None and second.log_weight is not None:
        weight = torch.cat([first.log_weight, second.log_weight.to(first.log_weight)], 1)
    return Selection(torch.cat([first.x, second.x.to(first.x)]), cond, weight)
