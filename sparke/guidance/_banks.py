"""What a run repels from, frozen when it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparke import ops
from sparke.errors import ArgumentError, MissingPrompts, ShapeError
from sparke.guidance._samples import from_origin
from sparke.protocols import (
    Calibrated,
    Memory,
    PromptWeighted,
    Run,
    Score,
    Selection,
    Spread,
    Weigh,
)


@dataclass(frozen=True)
class Banks:
    """Rows of memory and weights among batch mates, for one run.

    Attributes:
        score: as given, for batch mates, whose spread changes from step to step.
        bank_score: with constants read off memory.
        bank: memory's rows, None while it is empty.
        mates: (b, b) log weights, None when the batch does not repel itself.
        cond: (b, c) prompts of the run.
    """

    score: Score
    bank_score: Score
    bank: Selection | None = None
    mates: Tensor | None = None
    cond: Tensor | None = None

    def __bool__(self) -> bool:
        return self.bank is not None or self.mates is not None

    @property
    def kept_cond(self) -> Tensor | None:
        """The prompts to keep with this run's samples: none where memory keeps none."""
        return None if self.bank is not None and self.bank.cond is None else self.cond

    def sources(self, rows: Tensor) -> list[tuple[Score, Selection]]:
        """Each bank with the score that reads it, for (b, d) query rows."""
        found: list[tuple[Score, Selection]] = []
        if self.bank is not None:
            found.append((self.bank_score, self.bank))
        if self.mates is not None:
            found.append((self.score, self._among_mates(rows, self.mates.to(rows))))
        return found

    def _among_mates(self, rows: Tensor, weight: Tensor) -> Selection:
        good = torch.isfinite(rows).all(1)
        if not bool(good.all()):
            # One broken sample must not break its mates: they no longer see it.
            rows = torch.where(good[:, None], rows, 0.0)
            weight = torch.where(good, weight, -torch.inf)
        return Selection(rows, self.cond, weight, mates=True)


def check(score: Score, run: Run) -> None:
    """Raise unless the run has what the score requires."""
    name, needs = type(score).__name__, score.requires
    if needs.cond and run.cond is None:
        raise MissingPrompts(
            f"score {name} compares prompts and this run has none. Give prompt_embeds=, one row "
            "per sample, or use an unconditional score such as 'rke'."
        )
    if run.shape[0] < needs.batch:
        raise ArgumentError(
            f"score {name} needs a batch of at least {needs.batch}, got {run.shape[0]}."
        )


def freeze(score: Score, memory: Memory, run: Run, *, in_batch: bool, flat: bool) -> Banks:
    """Select memory's rows for these prompts and weigh the batch mates, once.

    Args:
        score: reads the rows.
        memory: gives them.
        run: of which the prompts and the shape matter.
        in_batch: whether batch mates repel each other.
        flat: rows are flattened latents, so their width is known before the first step.
    """
    bank, bank_score = None, score
    if len(memory):
        bank = _select(score, memory, run, flat=flat)
        bank_score = score.calibrate(bank) if isinstance(score, Calibrated) else score
    mates = _mates(score, run) if in_batch and run.shape[0] > 1 else None
    return Banks(score, bank_score, bank, mates, run.cond)


def _select(score: Score, memory: Memory, run: Run, *, flat: bool) -> Selection:
    if isinstance(score, PromptWeighted):
        bank = memory.select(run.cond, _weigh(score, run))
    else:
        bank = memory.select()
    if bank.cond is not None and run.cond is None:
        raise MissingPrompts(
            "memory holds samples with prompts and this run has none. Give prompt_embeds=, or use "
            "a memory of its own for runs without prompts."
        )
    width = run.shape[1:].numel()
    if flat and bank.x.shape[1] != width:
        raise ShapeError(
            f"latents of shape {tuple(run.shape[1:])} have {width} numbers and memory holds rows "
            f"of width {bank.x.shape[1]}. Latents of another size or model need their own memory."
        )
    if isinstance(bank, Spread) and not getattr(score, "across", False):
        raise ArgumentError(
            f"score {type(score).__name__} needs every row on each rank, and this memory is spread "
            "over ranks. Use ShardedMemory(keep='all'), or the scores 'rke' and 'cond-rke'."
        )
    x = bank.x.to(run.device)
    norms, center = bank.norms, bank.center
    if norms is None or center is None:
        norms, center = ops.squared_norms(x)
    norms, center = norms.to(run.device), center.to(run.device)
    return replace(bank, x=x, norms=norms, center=center)


def _mates(score: Score, run: Run) -> Tensor:
    b = run.shape[0]
    weight = torch.zeros(b, b, device=run.device)
    if isinstance(score, PromptWeighted) and run.cond is not None:
        weight = _weigh(score, run)(run.cond, run.cond).to(weight)
    return weight.fill_diagonal_(-torch.inf)


def _weigh(score: PromptWeighted, run: Run) -> Weigh:
    """The score's prompt kernel, seen from the origin of this run's prompts."""
    if run.cond_origin is None:
        return score.log_weight

    def centred(queries: Tensor, rows: Tensor) -> Tensor:
        return score.log_weight(from_origin(run, queries), from_origin(run, rows))

    return centred
