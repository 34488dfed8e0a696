"""Damaged and hostile files against everything of sparke that reads one.

    python -m benchmarks.fuzz

Whole files are damaged in their bytes and in what their headers say (``benchmarks/_mutations.py``),
and read and used (``benchmarks/_loaders.py``). Each input must be taken, and then behave, or be
refused by an error of sparke; the file stays as it is; the process lives, and asks for no more
memory than a limit far below what the headers claim. Anything else is a failure and is printed
with the number that makes its input again.

Processes work on parts of the inputs; one that dies counts as a failure of the input it was at, and
another goes on behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import multiprocessing.connection
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from benchmarks import _clock
from benchmarks._loaders import LOADERS, Bench
from benchmarks._report import show, write
from sparke.errors import SparkeError

INPUTS = 100_000
PART = 500
ROOM = 512 << 20
"""Bytes a process may ask for beyond what it has at its start; the largest file has 0.7 MB."""
PATIENCE = 60
"""Seconds for one input."""


@dataclass
class Part:
    """What became of some inputs of one loader."""

    loader: int
    first: int
    done: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    peak: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Damaged files against all loaders.")
    parser.add_argument("--inputs", type=int, default=INPUTS, help="of all loaders together")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="loaders whose name holds this")
    parser.add_argument("--no-result", action="store_true", help="write no file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [i for i, loader in enumerate(LOADERS) if options.only in loader.name]
    total = sum(LOADERS[i].weight for i in chosen)
    counts = {i: -(-options.inputs * LOADERS[i].weight // total) for i in chosen}
    started = time.perf_counter()
    parts = run(counts, options.seed, max(1, options.processes))
    rows = [row(LOADERS[i].name, [p for p in parts if p.loader == i]) for i in chosen]
    show("Damaged files, and what became of them", rows)
    failures = [
        {"loader": LOADERS[p.loader].name, **failure} for p in parts for failure in p.failures
    ]
    for failure in failures:
        print("FAILURE", failure)
    inputs, seconds = sum(r["inputs"] for r in rows), time.perf_counter() - started
    print(f"\n{inputs} inputs, {len(failures)} failures, {seconds:.0f} s")
    if not options.no_result:
        told = {"inputs": inputs, "seed": options.seed, "seconds": round(seconds)}
        write("fuzz", {**told, "rows": rows, "failures": failures})
    sys.exit(bool(failures))


def row(name: str, parts: list[Part]) -> dict[str, Any]:
    """One line of the table."""
    outcomes = sum((part.outcomes for part in parts), Counter())
    refused = {error: n for error, n in sorted(outcomes.items()) if error != "accepted"}
    return {
        "loader": name,
        "inputs": sum(part.done for part in parts),
        "accepted": outcomes["accepted"],
        "refused": ", ".join(f"{error} {n}" for error, n in refused.items()),
        "anything else": sum(len(part.failures) for part in parts),
        "peak, MB": round(max((part.peak for part in parts), default=0) / 1e6),
    }


def run(counts: dict[int, int], seed: int, processes: int) -> list[Part]:
    """Every loader's inputs, in parts, several processes at a time."""
    waiting = [
        (i, first, min(PART, count - first))
        for i, count in counts.items()
        for first in range(0, count, PART)
    ]
    waiting.reverse()
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    running: dict[Any, tuple[Any, Any, tuple[int, int, int]]] = {}
    parts: list[Part] = []
    with Progress() as shown:
        task = shown.add_task("damaged files", total=sum(counts.values()))
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop()
                pipe, theirs = context.Pipe(duplex=False)
                at = context.Value("q", -1)
                process = context.Process(target=work, args=(theirs, at, seed, *job))
                process.start()
                theirs.close()
                running[pipe] = (process, at, job)
            ready: list[Any] = list(multiprocessing.connection.wait(list(running)))
            for mine in ready:
                process, at, (loader, first, count) = running.pop(mine)
                part = received(mine)
                process.join()
                if part is None:  # it died; what it did before is done again, without the last
                    died = int(at.value)
                    part = Part(loader, died, 1, Counter(), [])
                    part.failures.append({"input": died, "error": f"died: {process.exitcode}"})
                    left = [(first, died - first), (died + 1, first + count - died - 1)]
                    waiting += [(loader, low, n) for low, n in left if n > 0]
                parts.append(part)
                shown.advance(task, part.done)
    return parts


def received(pipe: Any) -> Part | None:
    try:
        part: Part = pipe.recv()
    except EOFError:
        return None
    return part


def work(pipe: Any, at: Any, seed: int, loader: int, first: int, count: int) -> None:
    """Some inputs of one loader, in a process of its own."""
    torch.set_num_threads(1)
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as folder:
        bench = Bench(LOADERS[loader], Path(folder))
        assert bench.tried(bench.data) is None, "the whole file must be read"
        limit_memory()
        _clock.reset_peak("cpu")
        before = _clock.peak("cpu") or 0
        part = Part(loader, first)
        for number in range(first, first + count):
            at.value = number
            part.done += 1
            data = bench.damaged(random.Random(f"{seed} {loader} {number}"))
            outcome, failure = judged(bench, data)
            if failure is None:
                part.outcomes[outcome] += 1
            else:
                part.failures.append({"input": f"{seed} {loader} {number}", "error": failure})
        part.peak = (_clock.peak("cpu") or 0) - before
    pipe.send(part)


def judged(bench: Bench, data: bytes) -> tuple[str, str | None]:
    """What became of one input, and what is wrong with that."""
    with patience():
        try:
            refused = bench.tried(data)
        except (AssertionError, TimeoutError) as error:
            return "", f"{type(error).__name__}: {error}"
    if refused is None:
        return "accepted", None
    name = type(refused).__name__
    if not isinstance(refused, SparkeError):
        return "", f"{name}: {refused}"
    return name, None if str(refused).strip() else f"{name} without a word"


@contextlib.contextmanager
def patience() -> Any:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {PATIENCE} s")

    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(PATIENCE)
    try:
        yield
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)


def limit_memory() -> None:
    """No more address space than there is, and `ROOM`: a header that is believed is noticed."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
