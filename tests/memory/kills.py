"""Writers that are killed, and what they leave: python -m tests.memory.kills FOLDER --kills 20.

Runs in a process of its own that imports torch once and forks a writer per kill. A writer tells, on
a pipe, the rows it is about to commit and the rows committed; every row can be told from its
number. `random` kills with SIGKILL after a random time; `lines` ends the process, without any
clean-up, before the n-th line of the code that writes, for every n.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import struct
import sys
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sparke.memory import DiskMemory, MemoryFileWarning
from sparke.protocols import Features

WIDTH, PROMPTS = 64, 8
OPTIONS: dict[str, Any] = {"dtype": torch.float32, "cond_dtype": torch.float32, "shard_bytes": 8000}
TRACED = {
    ("_folder.py", "append"),
    ("_folder.py", "start"),
    ("_folder.py", "recover"),
    ("_journal.py", "append"),
    ("_shards.py", "write"),
    ("_shards.py", "replacing"),
    ("_shards.py", "flush_folder"),
}
WORD = struct.Struct("<q")


def rows(start: int, stop: int) -> Features:
    """Rows that tell their number."""
    number = torch.arange(start, stop, dtype=torch.float32)[:, None]
    return Features(number + torch.arange(WIDTH), torch.cos(number + torch.arange(PROMPTS)))


def write(folder: Path, pipe: int, seed: int, commits: int = 10**9, **options: Any) -> None:
    """Commit batches of 1 to 7 rows, telling before (-n) and after (n) what the total is."""
    rng = random.Random(seed)
    memory = DiskMemory(folder, **(OPTIONS | options))
    total = len(memory)
    for _ in range(commits):
        batch = rng.randint(1, 7)
        os.write(pipe, WORD.pack(-(total + batch)))
        memory.commit(rows(total, total + batch))
        total += batch
        os.write(pipe, WORD.pack(total))


def told(pipe: int) -> tuple[int, int]:
    """Rows committed, and rows there would be with the batch under way."""
    data = b""
    while part := os.read(pipe, 1 << 16):
        data += part
    words = [word for (word,) in WORD.iter_unpack(data[: len(data) // WORD.size * WORD.size])]
    done = max([w for w in words if w > 0], default=0)
    return done, max([-w for w in words if w < 0], default=done)


def check(folder: Path, before: int, done: int, tried: int, start: int) -> tuple[int, list[str]]:
    """Rows found and warnings seen; raise unless everything committed is there, whole."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        memory = DiskMemory(folder, **({} if before else OPTIONS))
    assert all(issubclass(w.category, MemoryFileWarning) for w in seen), [str(w) for w in seen]
    found = len(memory)
    assert found in (max(before, done), max(before, tried)), (found, before, done, tried)
    kept, expected = memory.rows(start), rows(start, found)
    assert _same(kept.x, expected.x) or not found, "rows were changed"
    assert kept.cond is None or (expected.cond is not None and _same(kept.cond, expected.cond))
    return found, [str(w.message) for w in seen]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def at_random(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """SIGKILL after a random time, `kills` times, all on one folder."""
    rng, total, reported, batches = random.Random(seed), 0, 0, 0
    for number in range(kills):
        read, write_end = os.pipe()
        child = os.fork()
        if not child:
            try:
                write(folder, write_end, seed + number)
            finally:
                os._exit(1)
        os.close(write_end)
        time.sleep(rng.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "a writer ended before it was killed"
        done, tried = told(read)
        os.close(read)
        batches += done > total
        # The last ones each time, everything at the end.
        total, seen = check(folder, total, done, tried, max(0, total - 20))
        reported += bool(seen)
    check(folder, total, total, total, 0)
    return {"kills": kills, "rows": total, "killed after a commit": batches, "reported": reported}


def at_lines(folder: Path, stride: int) -> dict[str, Any]:
    """The process ends before every `stride`-th line that writes, on a new folder each time."""
    folder.mkdir(exist_ok=True)
    line, kills, reported = 1 - stride, -1, []
    while True:
        line, kills = line + stride, kills + 1
        place = folder / f"line-{line}"
        read, write_end = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                sys.settrace(_dies_at(line))
                write(place, write_end, 0, commits=4, shard_bytes=3000)
                status = 0
            finally:
                os._exit(status)
        os.close(write_end)
        _, status = os.waitpid(child, 0)
        done, tried = told(read)
        os.close(read)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.waitstatus_to_exitcode(status) == 9, "a writer failed of its own"
        found, seen = check(place, 0, done, tried, 0)
        reported += seen
        # Whoever comes next goes on from there.
        memory = DiskMemory(place, **OPTIONS)
        memory.commit(rows(found, found + 2))
        check(place, found + 2, found + 2, found + 2, 0)
    return {"kills": kills, "reported": reported}


def _dies_at(line: int) -> Any:
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if (Path(frame.f_code.co_filename).name, frame.f_code.co_name) not in TRACED:
            return None
        if event == "line":
            left -= 1
            if not left:
                os._exit(9)
        return trace

    return trace


def main() -> None:
    """Run, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, metavar="STRIDE", help="die at lines instead")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has no threads to compute with
    if args.lines:
        found = at_lines(args.folder, args.lines)
    else:
        found = at_random(args.folder, args.kills, args.seed)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
