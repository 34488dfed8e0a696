"""One memory on two ranks against one memory in one process; and ranks that lose each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparke import testing
from sparke.errors import ArgumentError, SparkeError
from sparke.kernels import SAMPLED_ROWS, QuantileRule
from sparke.memory import RingMemory
from sparke.memory._spread import SpreadSelection, merge
from sparke.memory.sharded import RankError, ShardedMemory
from sparke.protocols import Features, Memory, Selection, Weigh
from sparke.scores import CondRKE
from tests.memory import two_ranks
from tests.memory.two_ranks import queries, rows

ROOT = Path(__file__).parents[2]
SCENES = ["all", "shard", "commits", "spread", "refusals", "mismatches"]
KEEP = ["all", "shard"]
both = pytest.mark.parametrize("rank", [0, 1])


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks, started as torchrun does, have left what they saw."""
    return launched(tmp_path_factory.mktemp("ranks"), 2, SCENES)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node={}"]
ACCELERATE = [
    "accelerate.commands.launch",
    "--multi_gpu",  # its word for one process to a rank; without GPUs, too
    "--num_processes={}",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
]


def launched(
    folder: Path, ranks: int, scenes: list[str], launcher: list[str] | None = None
) -> Path:
    run = ["-m", *(word.format(ranks) for word in launcher or TORCHRUN)]
    done = subprocess.run(
        [sys.executable, *run, two_ranks.__file__, str(folder), *scenes],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks on their own, so that one outlives the other; the second one kills itself."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, two_ranks.__file__, str(folder), "late", "killed"]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(command, env=environment(RANK=str(rank), **place)) for rank in range(2)
    ]
    try:
        codes = [process.wait(60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, -9]
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def seen(folder: Path, scene: str, rank: int) -> Any:
    return torch.load(folder / f"{scene}-{rank}.pt", weights_only=False)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6)


# Against one process.


class Union:
    """The memory of all ranks in one process: commits wait until every rank has run."""

    def __init__(self) -> None:
        self.store, self.waiting = RingMemory(), list[Features]()

    def __len__(self) -> int:
        return len(self.store)

    def commit(self, items: Features) -> None:
        self.waiting.append(items)

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        return self.store.select(cond, weigh)

    def settle(self) -> None:
        for items in self.waiting:
            self.store.commit(items)
        self.waiting.clear()


@pytest.fixture(scope="module")
def in_one() -> tuple[list[list[Tensor]], Selection]:
    memory, samples = Union(), []
    for run in range(two_ranks.RUNS):
        samples.append([two_ranks.generate(memory, rank, run) for rank in range(2)])
        memory.settle()
    return samples, memory.store.select()


@both
@pytest.mark.parametrize("keep", KEEP)
def test_guided_samples_are_those_of_one_process(
    keep: str, rank: int, torchrun: Path, in_one: tuple[list[list[Tensor]], Selection]
) -> None:
    found = seen(torchrun, keep, rank)
    samples, kept = in_one
    assert found["len"] == len(kept) == 15
    for run in range(two_ranks.RUNS):
        close(found["samples"][run], samples[run][rank])
    if keep == "all":
        close(found["kept"].x, kept.x)
        assert kept.cond is not None
        assert torch.equal(found["kept"].cond, kept.cond)


def test_accelerate_launch_makes_what_torchrun_makes(tmp_path: Path, torchrun: Path) -> None:
    pytest.importorskip("accelerate")
    found = seen(launched(tmp_path, 2, ["all"], ACCELERATE), "all", 1)
    expected = seen(torchrun, "all", 1)
    for ours, theirs in zip(found["samples"], expected["samples"], strict=True):
        assert torch.equal(ours, theirs)


def test_guidance_had_something_to_say(in_one: tuple[list[list[Tensor]], Selection]) -> None:
    alone = two_ranks.generate(RingMemory(), 0, 2)
    assert float((in_one[0][2][0] - alone).norm(dim=1).min()) > 0.1


@both
@pytest.mark.parametrize(
    ("name", "dtype", "prompts"),
    [("single", torch.float32, 4), ("half", torch.float16, 4), ("bare", torch.bfloat16, None)],
)
def test_every_rank_keeps_all_rows_in_rank_order(
    name: str, dtype: torch.dtype, prompts: int | None, rank: int, torchrun: Path
) -> None:
    expected = RingMemory(50, dtype)
    for part, sizes in enumerate(((2, 5), (0, 3), (4, 0), (0, 0), (1, 1))):
        for who, n in enumerate(sizes):
            expected.commit(rows(who, n, part, prompts))
    x, cond, length = seen(torchrun, "commits", rank)[name]
    kept = expected.select()
    assert length == len(kept) == 16
    assert torch.equal(x, kept.x)
    assert (cond is None) == (kept.cond is None)
    assert cond is None or kept.cond is None or torch.equal(cond, kept.cond)


SIZES = {"even": (30, 30), "uneven": (5, 41), "one": (0, 20), "many": (700, 300)}


@both
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["log_weight", "hiding", "bare"])
def test_statistics_over_shards_are_those_of_the_union(
    kind: str, size: str, rank: int, torchrun: Path
) -> None:
    width, lse, mean, fixed_lse, fixed_mean, length, witnesses = seen(torchrun, "spread", rank)[
        f"{size} {kind}"
    ]
    prompts = None if kind == "bare" else 4
    memory = RingMemory(tolerance=0)
    for who, n in enumerate(SIZES[size]):
        memory.commit(rows(who, n, 1, prompts))
    query = queries(rank, prompts is not None)
    weigh = two_ranks.hiding if kind == "hiding" else CondRKE().log_weight
    bank = memory.select(query.cond, weigh) if prompts else memory.select()
    assert length == len(memory) == sum(SIZES[size])
    weight = bank.log_weight
    hidden = torch.zeros(len(query), dtype=torch.bool)
    if weight is not None:
        weight, hidden = weight.double(), ~weight.isfinite().any(1)
    assert bool(hidden.any()) == (kind == "hiding")

    expected = QuantileRule()(query, bank).expand(len(query), 1)
    if size == "many" and kind != "log_weight":
        # More than can be sampled: any fair sample will do, and the two are different ones.
        assert witnesses <= SAMPLED_ROWS * len(query)
        torch.testing.assert_close(width.expand_as(expected), expected, rtol=0.1, atol=0)
    else:
        close(width.expand_as(expected), expected)
    for s, found_lse, found_mean in ((width, lse, mean), (1.5, fixed_lse, fixed_mean)):
        at = torch.as_tensor(s, dtype=torch.float64).expand(len(query), 1)
        of_all = two_ranks.statistics(bank, query.x, weight, at)
        close(found_lse[~hidden], of_all[0][~hidden])
        close(found_mean[~hidden], of_all[1][~hidden])
        assert bool((found_lse[hidden] == -torch.inf).all())
        assert torch.equal(found_mean[hidden], query.x[hidden])


@pytest.mark.slow
def test_shards_within_nodes_that_each_hold_all(tmp_path: Path) -> None:
    folder = launched(tmp_path, 4, ["nested"])
    memory = RingMemory(dtype=torch.float16)
    for part in range(2):
        for who in range(4):
            memory.commit(rows(who, 3 + who, part))
    for rank in range(4):
        length, local, (lse, mean) = seen(folder, "nested", rank)
        assert length == len(memory) == 36
        assert local == (2 * (3 + 5), 2 * (4 + 6))[rank % 2]
        query = rows(rank, 2, 7)
        bank = memory.select(query.cond, CondRKE().log_weight)
        assert bank.log_weight is not None
        width = torch.full((2, 1), 1.5, dtype=torch.float64)
        expected = two_ranks.statistics(bank, query.x.double(), bank.log_weight.double(), width)
        close(lse, expected[0])
        close(mean, expected[1])


def test_parts_merge_to_the_whole() -> None:
    terms = 30 * torch.randn(4, 5, 9, dtype=torch.float64)
    terms[1], terms[:, 2], terms[0, 3, 4:] = -torch.inf, -torch.inf, -torch.inf
    x = torch.randn(4, 9, 7, dtype=torch.float64)
    mean = torch.einsum("rbn,rnd->rbd", torch.softmax(terms, -1), x)  # NaN where nothing counts
    lse, merged = merge(torch.logsumexp(terms, -1), mean)
    every = terms.permute(1, 0, 2).reshape(5, -1)
    expected = torch.softmax(every, -1) @ x.reshape(-1, 7)
    seen_at = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(lse[seen_at], torch.logsumexp(every, -1)[seen_at])
    torch.testing.assert_close(merged[seen_at], expected[seen_at])
    assert lse[2] == -torch.inf
    assert bool((merged[2] == 0).all())


# Ranks that disagree.


@both
@pytest.mark.parametrize("keep", KEEP)
def test_rows_refused_on_one_rank_are_written_on_none(keep: str, rank: int, torchrun: Path) -> None:
    told, widths, before, after = seen(torchrun, "refusals", rank)[keep]
    if rank == 1:
        assert told.startswith("ArgumentError: items.x must be finite")
    else:
        assert told.startswith("RankError: rank 1 failed at commit of run 1")
    assert widths.startswith("ShapeError")
    assert "8" in widths
    assert "9" in widths
    assert before == (4, 4 if keep == "all" else 2, 0)
    assert after == 6


@both
@pytest.mark.parametrize(
    ("scene", "words"),
    [
        ("select", ("select of run 1", "commit of run 1")),
        ("step", ("step 1 of run 1", "commit of run 1")),
        ("run", ("commit of run 1", "commit of run 2")),
    ],
)
def test_ranks_at_different_places_are_told_where(
    scene: str, words: tuple[str, str], rank: int, torchrun: Path
) -> None:
    found = seen(torchrun, "mismatches", rank)[scene]
    mine, other = words[rank], words[1 - rank]
    assert found.startswith(f"RankError: rank {1 - rank} is at {other}, this rank ({rank}) at")
    assert mine in found


@both
def test_ranks_that_differ_in_what_they_hold_are_told(rank: int, torchrun: Path) -> None:
    found = seen(torchrun, "mismatches", rank)
    assert found["keep"].startswith(f"RankError: rank {1 - rank} has keep=")
    assert found["held"].startswith(f"RankError: rank {1 - rank} has a store with")
    assert found["batch"].startswith("ShapeError: ranks bring [1, 1] queries")


def test_an_error_in_reading_does_not_leave_the_others_waiting(torchrun: Path) -> None:
    assert seen(torchrun, "mismatches", 0)["read"] == "True"
    assert seen(torchrun, "mismatches", 1)["read"] == "ZeroDivisionError: on this rank"


def test_a_rank_that_does_not_come_is_an_error_in_time(separate: Path) -> None:
    found = seen(separate, "late", 0)
    assert found["late"].startswith("RankError: rank 0 waited for rank 1 at commit of run 0")
    assert "timeout=2.5" in found["late"]
    assert 2 < found["late seconds"] < 5.5
    assert "cannot be shared any more" in found["after"]


def test_a_rank_that_is_killed_is_an_error_in_time(separate: Path) -> None:
    found = seen(separate, "killed", 0)
    assert found["step"].startswith("RankError: rank 0 waited for rank 1 at step 1 of run 1")
    assert found["commit"].startswith("RankError: rank 0 waited for rank 1 at commit of run 1")
    assert found["seconds"] < 10


# Alone.


@pytest.mark.parametrize("keep", KEEP)
def test_without_a_process_group_it_is_its_store(keep: str) -> None:
    memory = ShardedMemory(keep=keep)
    assert isinstance(memory, Memory)
    memory.commit(rows(0, 3))
    found = memory.select(queries(0).cond)
    assert len(memory) == len(memory.store) == len(found) == 3
    assert not isinstance(found, SpreadSelection)
    assert "rank 0 of 1, 3 rows" in repr(memory)


@pytest.mark.parametrize("keep", KEEP)
def test_it_conforms(keep: str) -> None:
    testing.check_memory(lambda: ShardedMemory(RingMemory(8), keep=keep))


def test_a_launched_process_without_a_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="init_process_group"):
        ShardedMemory()


@pytest.mark.parametrize(
    ("options", "word"),
    [({"keep": "some"}, "keep"), ({"timeout": 0}, "timeout"), ({"store": 3}, "store")],
)
def test_options_are_checked(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        ShardedMemory(**options)


def test_a_selection_of_no_memory_is_refused() -> None:
    with pytest.raises(RankError, match="select"):
        SpreadSelection(torch.zeros(1, 2)).witnesses()


def test_its_errors_are_ours_and_a_built_in() -> None:
    assert issubclass(RankError, SparkeError)
    assert issubclass(RankError, RuntimeError)
