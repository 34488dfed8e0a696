"""Exemplars of several contexts, and which of them a sample goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from sparke.errors import ArgumentError, MissingPrompts, ShapeError, UnknownName
from sparke.guidance._samples import from_origin
from sparke.kernels import normalize
from sparke.memory.reference import ReferenceMemory, rows_given
from sparke.protocols import Features, Run

Rows: TypeAlias = Features | Tensor | ReferenceMemory
Exemplars: TypeAlias = Rows | Mapping[str, Rows]
Context: TypeAlias = (
    str | Sequence[str] | Mapping[str, Tensor] | Callable[[Tensor], str | Sequence[str]]
)
Rule: TypeAlias = Callable[[Tensor], Tensor]

ONLY = "exemplars"
"""The name of a single set."""


class Contexts:
    """Sets of exemplars by name, and the rule that gives each sample one of them.

    Args:
        exemplars: one set, or several by name.
        context: the rule; see [CVSG][sparke.guidance.cvsg.CVSG].
        features: applied to sets that are tensors of latents.

    Raises:
        ArgumentError: there are no exemplars, or no rule among several sets.
        UnknownName: the rule names a set that is not there.
    """

    def __init__(
        self, exemplars: Exemplars, context: Context | None, features: Rule | None = None
    ) -> None:
        named = exemplars if isinstance(exemplars, Mapping) else {ONLY: exemplars}
        if not named:
            raise ArgumentError(
                "exemplars has no set; give rows of the wanted context, or several sets by name, "
                "CVSG({'Europe': rows, ...})."
            )
        self.sets = {name: _reference(name, rows, features) for name, rows in named.items()}
        self.context = context
        self._anchors: dict[str, Tensor] = {}
        if context is None and len(self.sets) > 1:
            self._anchors = {name: _own_prompts(name, s) for name, s in self.sets.items()}
        elif isinstance(context, Mapping):
            self._check_names(context)
            self._anchors = {name: _anchor(name, rows) for name, rows in context.items()}
        elif isinstance(context, str):
            self._check_names([context])
        elif isinstance(context, Sequence):
            self._check_names(context)
        elif context is not None and not callable(context):
            raise ArgumentError(
                f"context={context!r} must be a name, names, a function of the prompt embeddings, "
                "or prompt embeddings by name."
            )

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name!r}: {len(s)} rows' for name, s in self.sets.items())}}}"

    def of(self, run: Run) -> Iterator[tuple[Tensor, ReferenceMemory]]:
        """Each context that occurs in the batch: (m,) numbers of its samples, and its exemplars.

        Raises:
            MissingPrompts: the rule reads prompts and the run has none.
            ArgumentError: the rule does not give one name to each sample.
            UnknownName: it gives a name that is not there.
            ShapeError: prompts of another width than the run's.
        """
        names = self._names(run)
        for name in dict.fromkeys(names):
            rows = [i for i, own in enumerate(names) if own == name]
            yield torch.tensor(rows, device=run.device), self.sets[name]

    def _names(self, run: Run) -> list[str]:
        batch, context = run.shape[0], self.context
        if self._anchors:
            return self._nearest(run)
        if context is None:
            return [next(iter(self.sets))] * batch
        if callable(context):
            context = context(_prompts(run))
        names = [context] * batch if isinstance(context, str) else list(context)
        if len(names) != batch:
            raise ArgumentError(
                f"context names {len(names)} contexts for a batch of {batch}. Give one name for "
                "each sample, or a single name for all."
            )
        self._check_names(names)
        return names

    def _nearest(self, run: Run) -> list[str]:
        query = _prompts(run)
        closest = []
        for name, anchor in self._anchors.items():
            if anchor.shape[1] != query.shape[1]:
                raise ShapeError(
                    f"the prompts of context {name!r} have width {anchor.shape[1]} and the run's "
                    f"{query.shape[1]}; both must come from the same text encoder."
                )
            seen = normalize(from_origin(run, anchor.to(query)))
            closest.append((normalize(from_origin(run, query)) @ seen.mT).amax(1))
        names = list(self._anchors)
        return [names[i] for i in torch.stack(closest).argmax(0).tolist()]

    def _check_names(self, names: Sequence[str] | Mapping[str, Tensor]) -> None:
        for name in names:
            if name not in self.sets:
                raise UnknownName("context", str(name), self.sets)


def _prompts(run: Run) -> Tensor:
    if run.cond is None:
        raise MissingPrompts(
            "the context of a sample is read off its prompt and this run has none. Give "
            "prompt_embeds=, or context= as a name or one name for each sample."
        )
    return run.cond.detach().float()


def _reference(name: str, rows: Rows, features: Rule | None) -> ReferenceMemory:
    if isinstance(rows, ReferenceMemory):
        if rows.history is not None:
            raise ArgumentError(
                f"the exemplars {name!r} have a history; finished samples are no exemplars. Give "
                "the history as memory=."
            )
        return rows
    argument = ONLY if name == ONLY else f"{ONLY}[{name!r}]"
    rule = features if isinstance(rows, Tensor) else None
    return ReferenceMemory(rows_given(argument, rows, None, rule))


def _own_prompts(name: str, exemplars: ReferenceMemory) -> Tensor:
    cond = exemplars.reference.cond
    if cond is None:
        raise ArgumentError(
            f"the exemplars {name!r} have no prompts, so no sample's prompt is near them. Give "
            "context=: a name, names, a function of the prompts, or prompt embeddings by name."
        )
    return cond


def _anchor(name: str, rows: Tensor) -> Tensor:
    if not isinstance(rows, Tensor) or rows.ndim not in (1, 2) or not rows.is_floating_point():
        raise ShapeError(
            f"context[{name!r}] must be (width,) or (prompts, width) prompt embeddings."
        )
    return rows.detach().float().reshape(-1, rows.shape[-1])
