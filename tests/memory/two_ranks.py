"""What test_sharded.py runs on two ranks: ``python two_ranks.py FOLDER SCENE...``.

Each rank writes what it saw to ``FOLDER/SCENE-RANK.pt``; the test compares that with one process.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

import sparke
from sparke.kernels import QuantileRule
from sparke.memory import RingMemory
from sparke.memory._spread import SpreadSelection
from sparke.memory.sharded import ShardedMemory
from sparke.models.mixture import GaussianMixture
from sparke.protocols import Features, Memory, Selection
from sparke.scores import CondRKE

MIXTURE = GaussianMixture.planar(dtype=torch.float64)
BATCHES = ((0, 0, 3), (1, 4))
"""Prompts of each rank's runs."""
RUNS, WIDTH, PROMPTS = 3, 8, 4


def rank() -> int:
    return int(distributed.get_rank())


# What is compared. The same functions make one rank's part and, in the test, all of it.


def euler(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None) -> Tensor:
    for here, there in itertools.pairwise(sigmas):
        denoised = model(x, here.expand(len(x)), **(extra_args or {}))
        x = x + (x - denoised) / here * (there - here)
    return x


def generate(memory: Memory, who: int, run: int) -> Tensor:
    """One run of one rank, three steps of it long enough ago for the guidance to act."""
    names = MIXTURE.prompts
    prompts = [names[(p + run) % len(names)] for p in BATCHES[who]]
    sampler = sparke.wrap(euler, "cond-rke", memory=memory, scale=2.0)
    noise = torch.randn(len(prompts), 2, generator=torch.Generator().manual_seed(10 * run + who))
    extra = {"cond": MIXTURE.encode(prompts)}
    x = MIXTURE.sigma_max * noise.double()
    return sampler(MIXTURE, x, MIXTURE.sigmas(8), extra_args=extra)


def rows(who: int, n: int, part: int = 0, prompts: int | None = PROMPTS) -> Features:
    g = torch.Generator().manual_seed(100 * part + who)
    x, cond = torch.randn(n, WIDTH, generator=g), torch.randn(n, PROMPTS, generator=g)
    return Features(x, None if prompts is None else cond)


def queries(who: int, prompts: bool = True) -> Features:
    found = rows(who, 3 - who, 7)
    return Features(found.x.double(), found.cond if prompts else None)


def hiding(query: Tensor, bank: Tensor) -> Tensor:
    """Hides half the rows from each query, and all of them from some."""
    weight = -(query[:, None] - bank[None]).abs().sum(-1)
    hidden = (query[:, :1] > bank[:, 0]) | (query[:, 1:2] > 0.5)
    return torch.where(hidden, -torch.inf, weight)


def statistics(bank: Selection, query: Tensor, weight: Tensor | None, width: Tensor) -> Any:
    """Log-sum-exp and mean, the plain way, of rows here."""
    x = bank.x.to(query)
    terms = -torch.cdist(query, x).square() / width**2
    terms = terms if weight is None else terms + weight
    return torch.logsumexp(terms, -1), torch.softmax(terms, -1) @ x


def read(bank: SpreadSelection, query: Tensor, width: Any) -> tuple[Tensor, Tensor]:
    return bank.across(lambda q, w, s: statistics(bank, q, w, s), query, width)


# Scenes.


def say(error: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> str:
    """The name and words of the error that `call` raises."""
    try:
        call()
    except error as found:
        return f"{type(found).__name__}: {found}"
    raise AssertionError("no error")


def generations(keep: str) -> Any:
    memory = ShardedMemory(keep=keep, timeout=60)
    samples = [generate(memory, rank(), run) for run in range(RUNS)]
    return {"samples": samples, "len": len(memory), "kept": memory.store.select()}


def commits() -> Any:
    found = {}
    for name, dtype, prompts in (
        ("single", torch.float32, PROMPTS),
        ("half", torch.float16, PROMPTS),
        ("bare", torch.bfloat16, None),
    ):
        memory = ShardedMemory(RingMemory(50, dtype), timeout=60)
        for part, sizes in enumerate(((2, 5), (0, 3), (4, 0), (0, 0), (1, 1))):
            items = rows(rank(), sizes[rank()], part, prompts)
            # A rank without rows need not know whether the others have prompts.
            memory.commit(items if len(items) else Features(items.x))
        kept = memory.select()
        found[name] = (kept.x, kept.cond, len(memory))
    return found


def spread() -> Any:
    found = {}
    sizes = {"even": (30, 30), "uneven": (5, 41), "one": (0, 20), "many": (700, 300)}
    for name, (first, second) in sizes.items():
        for weigh in (CondRKE().log_weight, hiding, None):
            prompts = weigh is not None
            memory = ShardedMemory(RingMemory(tolerance=0), keep="shard", timeout=60)
            memory.commit(rows(rank(), (first, second)[rank()], 1, PROMPTS if prompts else None))
            query = queries(rank(), prompts)
            bank = memory.select(query.cond, weigh) if weigh else memory.select()
            assert isinstance(bank, SpreadSelection)
            witnesses = bank.witnesses()
            width = QuantileRule()(Features(query.x), witnesses)
            lse, mean = read(bank, query.x, width)
            fixed = read(bank, query.x, 1.5)
            kind = "bare" if weigh is None else getattr(weigh, "__name__", "")
            seen = (width, lse, mean, *fixed, len(memory), len(witnesses))
            found[f"{name} {kind}"] = seen
    return found


def refusals() -> Any:
    found = {}
    for keep in ("all", "shard"):
        memory = ShardedMemory(keep=keep, timeout=60)
        memory.commit(rows(rank(), 2))
        bad = rows(rank(), 2, 1)
        if rank() == 1:
            bad.x[0, 0] = math.nan
        told = say(sparke.SparkeError, lambda m=memory, b=bad: m.commit(b))  # type: ignore[misc]
        wide = Features(torch.zeros(2, WIDTH + rank()), torch.zeros(2, PROMPTS))
        fresh = ShardedMemory(keep=keep, timeout=60)
        other = say(sparke.SparkeError, lambda m=fresh, w=wide: m.commit(w))  # type: ignore[misc]
        before = len(memory), len(memory.store), len(fresh)
        memory.commit(rows(rank(), 1, 2))
        found[keep] = (told, other, before, len(memory))
    return found


def mismatches() -> Any:
    def ranks(zero: Callable[[], object], one: Callable[[], object]) -> str:
        return say(sparke.SparkeError, one if rank() else zero)

    memory = ShardedMemory(keep="shard", timeout=60)
    memory.commit(rows(rank(), 3))
    cond = queries(rank()).cond
    assert cond is not None
    found = {"select": ranks(lambda: memory.select(cond), lambda: memory.commit(rows(1, 1)))}
    bank = memory.select(cond)
    assert isinstance(bank, SpreadSelection)
    query = queries(rank()).x
    read(bank, query, 1.0)
    found["step"] = ranks(lambda: read(bank, query, 1.0), lambda: memory.commit(rows(1, 1)))
    found["batch"] = say(sparke.SparkeError, lambda: read(bank, query[:1], 1.0))
    found["keep"] = say(
        sparke.SparkeError, lambda: ShardedMemory(keep=("all", "shard")[rank()], timeout=60)
    )
    full = RingMemory()
    full.commit(rows(0, 1 + rank()))
    found["held"] = say(sparke.SparkeError, lambda: ShardedMemory(full, timeout=60))

    def broken(*_: object) -> Any:
        raise ZeroDivisionError("on this rank")

    if rank() == 1:
        found["read"] = say(ZeroDivisionError, lambda: bank.across(broken, query, 1.0))
    else:
        found["read"] = str(read(bank, query, 1.0)[0].isnan().all().item())
    memory._runs += rank()  # as if this rank had run once more
    found["run"] = say(sparke.SparkeError, lambda: memory.commit(rows(rank(), 1)))
    return found


def late() -> Any:
    slow = ShardedMemory(timeout=2.5)
    seen: dict[str, Any] = {}
    start = time.monotonic()
    if rank() == 0:
        seen["late"] = say(sparke.SparkeError, lambda: slow.commit(rows(0, 1)))
        seen["late seconds"] = time.monotonic() - start
        seen["after"] = say(sparke.SparkeError, lambda: slow.commit(rows(0, 1)))
    else:
        time.sleep(6)
    return seen


def killed() -> Any:
    seen: dict[str, Any] = {}
    memories = [ShardedMemory(keep="shard", timeout=20) for _ in range(2)]
    for memory in memories:
        memory.commit(rows(rank(), 3))
    cond = queries(rank()).cond
    bank = memories[0].select(cond)
    assert isinstance(bank, SpreadSelection)
    query = queries(rank()).x
    read(bank, query, 1.0)
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    seen["step"] = say(sparke.SparkeError, lambda: read(bank, query, 1.0))
    seen["commit"] = say(sparke.SparkeError, lambda: memories[1].commit(rows(0, 1)))
    seen["seconds"] = time.monotonic() - start
    return seen


def nested() -> Any:
    """Four ranks on two nodes: every node holds all rows, each of its ranks a half."""
    nodes: list[Any] = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    peers: list[Any] = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
    within = ShardedMemory(
        RingMemory(dtype=torch.float16), group=nodes[rank() // 2], keep="shard", timeout=60
    )
    memory = ShardedMemory(within, group=peers[rank() % 2], timeout=60)
    for part in range(2):
        memory.commit(rows(rank(), 3 + rank(), part))
    query = rows(rank(), 2, 7)
    bank = memory.select(query.cond, CondRKE().log_weight)
    assert isinstance(bank, SpreadSelection)
    return len(memory), len(bank), read(bank, query.x.double(), 1.5)


SCENES: dict[str, Callable[[], Any]] = {
    "all": lambda: generations("all"),
    "shard": lambda: generations("shard"),
    "commits": commits,
    "spread": spread,
    "refusals": refusals,
    "mismatches": mismatches,
    "nested": nested,
    "late": late,
    "killed": killed,
}


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for name in names:
        torch.save(SCENES[name](), folder / f"{name}-{rank()}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
