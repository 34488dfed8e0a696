"""The ranks of a process group: agreeing on where everybody is, and moving rows between them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from sparke.errors import ArgumentError, SparkeError

CALLS = ("construction", "select", "the rows of select", "calibration", "step", "commit", "storage")
"""What ranks meet for."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class RankError(SparkeError, RuntimeError):
    """Ranks of a process group are not where they should be, or one of them is gone."""


class Told(NamedTuple):
    """What every rank tells all others before rows travel; whole numbers, one message."""

    call: int
    run: int
    step: int
    failed: int = 0
    keep: int = 0
    rows: int = 0
    width: int = 0
    prompts: int = -1
    dtype: int = 0
    held: int = 0

    @property
    def place(self) -> str:
        """In words."""
        step = f" {self.step}" if CALLS[self.call] == "step" else ""
        return f"{CALLS[self.call]}{step} of run {self.run}"


class Ranks:
    """Those of `group`, or this process alone where no process group was made.

    Every exchange begins with [meet][sparke.memory._ranks.Ranks.meet], a message of fixed size, so
    ranks that have lost each other find out instead of mistaking each other's rows. It goes over
    gloo, in a group of its own with a time limit: a limit of nccl ends the process, one of gloo
    is an exception. Rows go over nccl where `group` has it, else over that gloo group too.
    """

    def __init__(self, group: distributed.ProcessGroup | None, timeout: float) -> None:
        self.timeout = timeout
        self.rank, self.members = 0, [0]
        self._gone: str | None = None
        self._fast: distributed.ProcessGroup | None = None
        if not (distributed.is_available() and distributed.is_initialized()):
            self._alone(group)
            return
        world = group or distributed.group.WORLD
        self.rank = distributed.get_rank(world)
        if self.rank < 0:
            raise ArgumentError("this process is not a member of group=.")
        self.members = distributed.get_process_group_ranks(world)
        if len(self.members) > 1:
            if "cuda:nccl" in str(distributed.get_backend_config(world)):
                self._fast = world
            with self._waiting(Told(0, 0, 0)):
                made = distributed.new_group(
                    self.members,
                    timeout=timedelta(seconds=timeout),
                    backend="gloo",
                    use_local_synchronization=True,
                )
                assert isinstance(made, distributed.ProcessGroup)
                self._group = made

    def __len__(self) -> int:
        return len(self.members)

    def meet(self, mine: Told, error: Exception | None = None) -> list[Told]:
        """What all ranks tell, in rank order, once all are here.

        Args:
            mine: what this rank tells.
            error: what went wrong on this rank; it is raised after the others were told.

        Raises:
            RankError: a rank is elsewhere, tells of an error, is gone, or did not come in time.
        """
        if len(self) == 1:
            everyone = [mine]
        else:
            sent = torch.tensor(mine._replace(failed=int(error is not None)))
            found = torch.empty(len(self), len(mine), dtype=sent.dtype)
            with self._waiting(mine):
                distributed.all_gather(list(found.unbind(0)), sent, group=self._group)
            everyone = [Told(*row) for row in found.tolist()]
        if error is not None:
            raise error
        for rank, told in zip(self.members, everyone, strict=True):
            if (told.call, told.run, told.step) != (mine.call, mine.run, mine.step):
                raise RankError(
                    f"rank {rank} is at {told.place}, this rank ({self.name}) at {mine.place}. "
                    "Ranks that share a memory need the same number of runs on each rank, each "
                    "with the same schedule."
                )
            if told.failed:
                raise RankError(
                    f"rank {rank} failed at {told.place}, so this rank ({self.name}) stops there "
                    f"too. The error rank {rank} raised tells why."
                )
        return everyone

    def gather(self, rows: Tensor, sizes: Sequence[int], mine: Told) -> list[Tensor]:
        """All ranks' rows, (sizes[r], k) of rank r; shorter ones travel padded."""
        if len(self) == 1 or max(sizes) == 0:
            return [rows] * len(self)
        sent, group = self._wire(rows)
        if len(sent) < max(sizes):
            sent = torch.cat([sent, sent.new_zeros(max(sizes) - len(sent), *sent.shape[1:])])
        found = sent.new_empty(len(self), *sent.shape)
        with self._waiting(mine):
            distributed.all_gather(list(found.unbind(0)), sent.contiguous(), group=group)
        return [part[:n].to(rows.device) for part, n in zip(found, sizes, strict=True)]

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int], mine: Told) -> list[Tensor]:
        """Flat tensors: ``parts[r]`` goes to rank r, ``sizes[r]`` numbers come from it."""
        if len(self) == 1:
            return list(parts)
        sent, group = self._wire(torch.cat(list(parts)))
        found = sent.new_empty(sum(sizes))
        with self._waiting(mine):
            distributed.all_to_all_single(
                found, sent, list(sizes), [len(part) for part in parts], group=group
            )
        return list(found.to(parts[0].device).split(list(sizes)))

    @property
    def name(self) -> int:
        """This process's rank in the whole job, by which errors call it."""
        return self.members[self.rank]

    def _wire(self, rows: Tensor) -> tuple[Tensor, distributed.ProcessGroup]:
        if self._fast is None:
            return rows.cpu(), self._group
        return (rows if rows.is_cuda else rows.cuda()), self._fast

    @contextmanager
    def _waiting(self, mine: Told) -> Iterator[None]:
        others = [rank for rank in self.members if rank != self.name]
        who = f"rank {others[0]}" if len(others) == 1 else f"one of ranks {_brief(others)}"
        if self._gone is not None:
            raise RankError(f"{self._gone} This memory cannot be shared any more.")
        try:
            yield
        except RuntimeError as error:
            self._gone = (
                f"rank {self.name} waited for {who} at {mine.place} and lost it: it has ended, or "
                f"did not come within timeout={self.timeout:g} seconds."
            )
            raise RankError(
                f"{self._gone} See the other ranks' logs; a rank that is only slow needs a longer "
                f"timeout=. ({_first_line(error)})"
            ) from error

    def _alone(self, group: distributed.ProcessGroup | None) -> None:
        world = os.environ.get("WORLD_SIZE", "1")
        if group is not None or (world.isdecimal() and int(world) > 1):
            raise ArgumentError(
                f"this process is one of WORLD_SIZE={world} and torch.distributed is not set up. "
                "Call torch.distributed.init_process_group() before making a shared memory."
            )


def _brief(ranks: list[int]) -> str:
    names = [str(rank) for rank in ranks]
    return ", ".join(names if len(names) <= 8 else [*names[:3], "...", names[-1]])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
