"""One memory for all ranks of a process group."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sparke import checks
from sparke.errors import ShapeError
from sparke.memory import _rules
from sparke.memory._ranks import CALLS, DTYPES, RankError, Ranks, Told
from sparke.memory._spread import Link, SpreadSelection
from sparke.protocols import Features, Memory, Selection, Weigh

__all__ = ["RankError", "ShardedMemory"]

KEEP = ("all", "shard")


class ShardedMemory:
    r"""One memory for all ranks of a process group, each generating its own prompts.

    With ``keep="all"`` every rank holds everybody's rows: a commit gathers what all ranks finished
    and appends it to each rank's store in rank order. Selections are local, and nothing travels
    while samples are generated. Any score works.

    With ``keep="shard"`` each rank holds what it made. A selection is then a shard of the bank, and
    a score that knows how reads the rest through the other ranks at each step: with
    $l_r = \log \sum_j w_j k(x_j, z)^2$ over the rows of rank r and $\bar x_r$ their
    softmax-weighted mean,

    $$l = \log \sum_r e^{l_r}, \qquad \bar x = \sum_r e^{l_r - l}\, \bar x_r,$$

    exact up to rounding. The kernel scores know how; others need ``keep="all"``.

    Making it and ``commit`` are collective, and with ``keep="shard"`` so are ``select`` and each
    guided step: all ranks take part, or those that do wait. So every rank makes it and runs the
    same number of generations, and with ``keep="shard"`` each with the same schedule, solver and
    score. A rank that has nothing to add commits no rows, ``Features(torch.zeros(0, d))``. Ranks
    tell each other where they are before rows travel: one that is elsewhere, has failed or is gone
    is an error on all, after `timeout` seconds at the latest. While rows are on their way over
    nccl, nccl's own limit holds.

    In a process without a process group it is `store` and nothing more. The store must be this
    rank's own: ranks that append to one shared folder see each other's rows there already. With
    ``keep="shard"`` its capacity is each rank's, and a store that leaves out rows of little weight
    (`tolerance`) does so on each rank.

    Args:
        store: where this rank keeps rows; a new [RingMemory][sparke.memory.RingMemory] if
            None. With ``keep="all"`` all ranks' stores must hold the same rows, none for instance.
        group: the ranks that share; all if None.
        keep: ``"all"`` or ``"shard"``.
        timeout: seconds to wait for the slowest rank, at a commit or a step.

    Raises:
        ArgumentError: an option has a forbidden value, the process is no member of `group`, or
            started with others (``WORLD_SIZE``) and torch.distributed is not set up.
        RankError: ranks differ in `keep`, in what their stores hold, or one did not come.
    """

    def __init__(
        self,
        store: Memory | None = None,
        *,
        group: ProcessGroup | None = None,
        keep: str = "all",
        timeout: float = 600.0,
    ) -> None:
        self.keep = checks.choice("keep", keep, KEEP)
        timeout = checks.positive("timeout", timeout)
        if store is None:
            # Siblings do not import each other; the family they are members of knows both.
            store = sys.modules[__package__].RingMemory()
        self.store = checks.memory("store", store)
        self._ranks = Ranks(group, timeout)
        self._runs = 0
        self._like: _rules.Widths | None = None
        self._held = self._stored(self._meet("construction", held=len(self.store)))

    def __len__(self) -> int:
        """Rows all ranks hold together, as of the last time they met."""
        if self.keep == "all" or len(self._ranks) == 1:
            return len(self.store)
        return sum(self._held)

    def __repr__(self) -> str:
        ranks = self._ranks
        return (
            f"ShardedMemory({self.store!r}, keep={self.keep!r}, rank {ranks.rank} of {len(ranks)}, "
            f"{len(self)} rows)"
        )

    def commit(self, items: Features) -> None:
        """Append what all ranks finished, (n, d) rows with (n, c) prompts or none; n may differ.

        Raises:
            ShapeError: rows or prompts of another width than those here or on other ranks.
            ArgumentError: a row is not finite, or too large for the storage dtype.
            MissingPrompts: some rows have prompts and some have none.
            RankError: a rank refused its rows, is elsewhere or is gone.

        Nothing is written on any rank when rows are refused.
        """
        error = None
        x, cond = items.x, items.cond
        try:
            x, cond = _rules.admit(items, self._like if len(x) else None, self.dtype)
        except Exception as caught:  # noqa: BLE001  raised once the others were told
            error = caught
        told = self._meet("commit", error, **_shape(x, cond), dtype=DTYPES.index(self.dtype))
        like = self._agreed(told) or self._like
        if self.keep == "all" and like is not None:
            x, cond = self._everyones(x, cond, told, like)
        try:
            if len(x):
                self.store.commit(Features(x, cond))
        except Exception as caught:  # noqa: BLE001  raised once the others were told
            error = caught
        self._held = self._stored(self._meet("storage", error, held=len(self.store)))
        self._runs, self._like = self._runs + 1, like

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        """The store's rows; with ``keep="shard"`` this rank's, and the way to all others.

        Raises:
            MissingPrompts, ShapeError: as the store raises them.
            RankError: ``keep="shard"``, and a rank refused, is elsewhere or is gone.
        """
        ranks = self._ranks
        if self.keep == "all" or len(ranks) == 1:
            return self.store.select(cond, weigh)
        asked = torch.zeros(0, 0) if cond is None else cond
        mine = self._told("select", **_shape(asked, cond))
        told = ranks.meet(mine)
        _same("prompts of width", ranks, [t.prompts for t in told])
        queries = None if cond is None else [t.rows for t in told]
        everyone, found, error = None, None, None
        if cond is not None and queries is not None:
            everyone = torch.cat(ranks.gather(cond.detach().float(), queries, mine))
        try:
            found = self.store.select(everyone, weigh)
        except Exception as caught:  # noqa: BLE001  raised once the others were told
            error = caught
        size = {} if found is None else _shape(found.x, found.cond)
        told = self._meet("the rows of select", error, **size)
        like = self._agreed(told)
        if found is None or like is None:
            return self.store.select(cond, weigh)
        return self._spread(found, everyone, queries, like)

    def _spread(
        self,
        found: Selection,
        everyone: Tensor | None,
        queries: list[int] | None,
        like: _rules.Widths,
    ) -> SpreadSelection:
        parts: dict[str, Any] = {f.name: getattr(found, f.name) for f in fields(found)}
        if not len(found):
            device = found.x.device
            parts["x"], parts["cond"] = _no_rows(like, device)
            parts.update({name: None for name in ("norms", "center") if name in parts})
            if everyone is not None:
                parts["log_weight"] = torch.zeros(len(everyone), 0, device=device)
        weight: Tensor | None = parts["log_weight"]
        link = Link(self._ranks, self._runs, None if weight is None else queries)
        if weight is not None and queries is not None:
            parts["log_weight"] = weight.split(queries)[self._ranks.rank]
        return SpreadSelection(**parts, everyones=weight, link=link)

    def _everyones(
        self, x: Tensor, cond: Tensor | None, told: Sequence[Told], like: _rules.Widths
    ) -> tuple[Tensor, Tensor | None]:
        """All ranks' rows and prompts in rank order; rows travel in the store's dtype."""
        if len(self._ranks) == 1 or not sum(t.rows for t in told):
            return x, cond
        if not len(x):
            x, cond = _no_rows(like, x.device)
        sent = _bytes(x, self.dtype)
        if cond is not None:
            sent = torch.cat([sent, _bytes(cond, torch.float32)], 1)
        mine = told[self._ranks.rank]
        found = torch.cat(self._ranks.gather(sent, [t.rows for t in told], mine))
        cut = like.x * self.dtype.itemsize
        everyones = found[:, :cut].contiguous().view(self.dtype)
        if cond is None:
            return everyones, None
        return everyones, found[:, cut:].contiguous().view(torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        """Of committed rows on the wire: float16 or bfloat16 where the store keeps that."""
        dtype = getattr(self.store, "dtype", None)
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32

    def _told(self, call: str, **numbers: int) -> Told:
        return Told(CALLS.index(call), self._runs, 0, keep=KEEP.index(self.keep), **numbers)

    def _meet(self, call: str, error: Exception | None = None, **numbers: int) -> list[Told]:
        return self._ranks.meet(self._told(call, **numbers), error)

    def _stored(self, told: Sequence[Told]) -> list[int]:
        """How many rows each rank holds."""
        _same("keep= (0: all, 1: shard)", self._ranks, [t.keep for t in told])
        held = [t.held for t in told]
        if self.keep == "all":
            _same("a store with this many rows:", self._ranks, held)
        return held

    def _agreed(self, told: Sequence[Told]) -> _rules.Widths | None:
        """Widths of all ranks' rows and prompts; None if no rank brings any."""
        _same("a store of dtype number", self._ranks, [t.dtype for t in told])
        shapes = {
            rank: (t.width, None if t.prompts < 0 else t.prompts)
            for rank, t in zip(self._ranks.members, told, strict=True)
            if t.rows
        }
        if len(set(shapes.values())) > 1:
            raise ShapeError(
                f"ranks bring rows and prompts of different widths, {shapes} (rank: widths). All "
                "ranks that share a memory use one model, and all give prompts or none does."
            )
        return _rules.Widths(*next(iter(shapes.values()))) if shapes else None


def _shape(x: Tensor, cond: Tensor | None) -> dict[str, int]:
    if x.ndim != 2:
        return {}  # refused, and told so
    prompts = -1 if cond is None or cond.ndim != 2 else cond.shape[1]
    return {"rows": len(x), "width": x.shape[1], "prompts": prompts}


def _no_rows(like: _rules.Widths, device: torch.device) -> tuple[Tensor, Tensor | None]:
    cond = None if like.cond is None else torch.zeros(0, like.cond, device=device)
    return torch.zeros(0, like.x, device=device), cond


def _same(what: str, ranks: Ranks, values: Sequence[int]) -> None:
    mine = values[ranks.rank]
    for rank, theirs in zip(ranks.members, values, strict=True):
        if theirs != mine:
            raise RankError(
                f"rank {rank} has {what} {theirs}, this rank ({ranks.name}) {mine}. All ranks that "
                "share a memory must agree in this."
            )


def _bytes(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous().view(torch.uint8)
