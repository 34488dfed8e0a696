"""A selection whose rows lie on many ranks, and the sums over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from sparke.errors import ShapeError
from sparke.kernels import RELEVANT, SAMPLED_ROWS
from sparke.memory._ranks import CALLS, DTYPES, RankError, Ranks, Told
from sparke.protocols import Selection

Read: TypeAlias = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]
"""(B, d) queries, (B, n) log weights or None, (B, 1) bandwidths -> (B,) log sums, (B, d) means."""


def merge(lse: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    r"""The softmax statistics of all rows from those of their parts, exactly.

    $$L = \log \sum_r e^{l_r}, \qquad \bar x = \sum_r e^{l_r - L}\, \bar x_r$$

    Args:
        lse: (parts, b) $l_r$, the log-sum-exp of each part's exponents; ``-inf``: nothing in it.
        mean: (parts, b, d) each part's softmax-weighted mean.

    Returns:
        (b,) and (b, d); ``-inf`` and 0 where no part has anything.
    """
    total = torch.logsumexp(lse, 0)
    # A part without weight may hold any number for a mean, NaN included: it counts 0 times that.
    nothing = lse == -torch.inf
    share = torch.where(nothing, 0.0, (lse - total).exp())
    mean = torch.where(nothing[..., None], 0.0, mean)
    return total, torch.einsum("rb,rbd->bd", share, mean)


class Link:
    """One selection's way to the other ranks, and how many steps it has made."""

    def __init__(self, ranks: Ranks, run: int, queries: list[int] | None) -> None:
        self.ranks, self.run, self.queries = ranks, run, queries
        self.step = 0

    def told(self, call: str, rows: int, width: int, dtype: torch.dtype) -> Told:
        """What this rank tells at one call."""
        code = DTYPES.index(dtype)
        return Told(CALLS.index(call), self.run, self.step, rows=rows, width=width, dtype=code)


@dataclass(frozen=True)
class SpreadSelection(Selection):
    """This rank's rows, and the way to everybody's.

    ``x``, ``cond`` and ``log_weight`` are of this rank's rows alone; whoever reads those only, gets
    statistics of a shard. [across][sparke.memory._spread.SpreadSelection.across] gives those of all
    rows.

    Attributes:
        everyones: (B, n) log weights of this rank's rows for all ranks' queries, in rank order;
            None: every row counts in full for everyone.
        link: to the other ranks.
    """

    everyones: Tensor | None = field(default=None, repr=False)
    link: Link | None = field(default=None, repr=False)

    def across(self, read: Read, query: Tensor, width: float | Tensor) -> tuple[Tensor, Tensor]:
        """Softmax statistics of this rank's queries over the rows of all ranks.

        All ranks call it together: queries are gathered, each rank reads its own rows once for all
        of them, and each query's partial statistics go back to where it came from.

        Args:
            read: (B, d) queries, (B, n) log weights (None: zeros) and (B, 1) bandwidths -> (B,)
                log-sum-exp of the exponents and (B, d) softmax-weighted means over this rank's
                rows, as [pull][sparke.ops.pull] gives them. Not called where this rank has none.
            query: (b, d) of this rank.
            width: a number, or (b, 1) numbers.

        Returns:
            (b,) and (b, d), detached; ``-inf`` and itself for a query no row has weight for.

        Raises:
            RankError: ranks are not at the same step, or one is gone.
        """
        ranks, link = self._link.ranks, self._link
        query = query.detach()
        b, d = query.shape
        mine = link.told("step", b, d, query.dtype)
        sizes = _sizes(ranks, ranks.meet(mine), link.queries)
        link.step += 1
        widths = torch.as_tensor(width, dtype=query.dtype, device=query.device)
        sent = torch.cat([query, widths.reshape(-1, 1).expand(b, 1)], 1)
        everyone = torch.cat(ranks.gather(sent, sizes, mine))
        failure = None
        try:
            lse, mean = self._local(read, everyone[:, :d].contiguous(), everyone[:, d:])
        except Exception as error:  # noqa: BLE001  the others wait for an answer first
            failure = error
            lse, mean = everyone[:, 0] * torch.nan, everyone[:, :d] * torch.nan
        answers = torch.cat([lse[:, None], mean], 1).split(sizes)
        back = ranks.exchange([a.reshape(-1) for a in answers], [b * (d + 1)] * len(ranks), mine)
        if failure is not None:
            raise failure
        parts = torch.stack(back).view(len(ranks), b, d + 1)
        lse, mean = merge(parts[..., 0], parts[..., 1:])
        return lse, torch.where((lse == -torch.inf)[:, None], query, mean)

    def witnesses(self) -> Selection:
        """Rows to read constants off, for this rank's queries: a fair sample of all ranks' rows.

        For each query the newest rows of its own prompt, equally many of each rank that has so
        many, at most 256 together: all of them where there are no more. A query whose prompt has
        fewer than 3 rows gets the newest rows of any prompt instead. All ranks call it together.

        Raises:
            RankError: ranks are not at the same place, or one is gone.
        """
        ranks, link = self._link.ranks, self._link
        own = 1 if self.log_weight is None else len(self.log_weight)
        mine = link.told("calibration", own, self.x.shape[1], torch.float32)
        sizes = _sizes(ranks, ranks.meet(mine), link.queries)
        chosen = self._chosen(sum(sizes), mine)
        rows, d = self.x.float(), self.x.shape[1]
        weight = rows.new_zeros(sum(sizes), len(rows)) if self.everyones is None else self.everyones
        age = torch.arange(len(rows), 0, -1, device=rows.device, dtype=rows.dtype)
        parts = []
        for picked, theirs in zip(chosen.split(sizes), weight.to(rows).split(sizes), strict=True):
            some = picked.any(0)
            packed = torch.cat([age[some, None], rows[some], theirs[:, some].mT], 1)
            parts.append(packed.reshape(-1))
        counts = rows.new_tensor([[len(part) for part in parts]], dtype=torch.float64)
        sending = torch.cat(ranks.gather(counts, [1] * len(ranks), mine))
        back = ranks.exchange(parts, [int(n) for n in sending[:, ranks.rank]], mine)
        found = torch.cat([part.view(-1, 1 + d + own) for part in back])
        # Newest last, as in a memory of one process: where a rule takes the newest, it finds them.
        found = found[torch.argsort(found[:, 0], descending=True, stable=True)]
        own_weight = None if self.log_weight is None else found[:, 1 + d :].mT.contiguous()
        return Selection(found[:, 1 : 1 + d].contiguous(), None, own_weight)

    def _chosen(self, queries: int, mine: Told) -> Tensor:
        """(B, n) which rows of this rank are shown to which query."""
        if self.everyones is None:
            relevant = torch.ones(queries, len(self), dtype=torch.bool, device=self.x.device)
        else:
            relevant = self.everyones > RELEVANT
        relevant, counts = self._counted(relevant, mine)
        few = counts.sum(0) < 3
        relevant, counts = self._counted(relevant | few[:, None], mine)
        # From the newest on: the how-maniest relevant row this one is.
        place = relevant.flip(1).cumsum(1).flip(1)
        return relevant & (place <= _quota(counts)[:, None])

    def _counted(self, relevant: Tensor, mine: Told) -> tuple[Tensor, Tensor]:
        own = relevant.sum(1, keepdim=True).mT
        everyones = self._link.ranks.gather(own, [1] * len(self._link.ranks), mine)
        return relevant, torch.cat(everyones)

    def _local(self, read: Read, queries: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
        if not len(self):
            return queries.new_full((len(queries),), -torch.inf), torch.zeros_like(queries)
        weight = None if self.everyones is None else self.everyones.to(queries)
        return read(queries, weight, widths)

    @property
    def _link(self) -> Link:
        if self.link is None:
            raise RankError("this selection belongs to no memory; take one from select().")
        return self.link


def _sizes(ranks: Ranks, told: Sequence[Told], expected: list[int] | None) -> list[int]:
    """How many queries each rank brings; raise unless all compare."""
    sizes = [t.rows for t in told]
    mine = told[ranks.rank]
    for rank, theirs in zip(ranks.members, told, strict=True):
        if (theirs.width, theirs.dtype) != (mine.width, mine.dtype):
            raise ShapeError(
                f"rank {rank} brings queries of width {theirs.width} in {DTYPES[theirs.dtype]}, "
                f"this rank ({ranks.name}) of width {mine.width} in {DTYPES[mine.dtype]}. All "
                "ranks that share a memory sample latents of one size and dtype."
            )
    if expected is not None and sizes != expected:
        raise ShapeError(
            f"ranks bring {sizes} queries and selected for {expected} prompts. A selection serves "
            "the batch whose prompts it was made for."
        )
    return sizes


def _quota(counts: Tensor) -> Tensor:
    """(ranks, B) rows of each rank -> (B,) the most q with sum of min(rows, q) at most 256."""
    quota = torch.zeros_like(counts[0])
    for bit in reversed(range(SAMPLED_ROWS.bit_length())):
        tried = quota + 2**bit
        fits = torch.minimum(counts, tried).sum(0) <= SAMPLED_ROWS
        quota = torch.where(fits, tried, quota)
    return quota.clamp_min(1)
