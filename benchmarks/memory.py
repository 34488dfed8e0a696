"""Memories: gated selection, throughput, int8, killed writers: python -m benchmarks.memory.

    python -m benchmarks.memory                            under a minute
    python -m benchmarks.memory --rows 1000000 --width 16384   33 GB in --folder while it runs
    python -m benchmarks.memory --kills 200                kill -9 of a writer at random moments

Figures are compared within one run: with the time of reading the same bytes once, and with what is
read without the gate.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _report
from benchmarks._progress import shown
from sparke import Features
from sparke.memory import DiskMemory, RingMemory
from sparke.protocols import Memory
from sparke.scores import CondRKE

RELEVANT, COND_WIDTH, STEPS = 0.01, 768, 10
RESIDENT = Path("/proc/self/status")
Row = dict[str, Any]


def timed(run: Callable[[], Any], repeats: int = 3) -> float:
    """Least seconds of one call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory now, where the system tells."""
    if not RESIDENT.exists():
        return 0
    (line,) = (s for s in RESIDENT.read_text().splitlines() if s.startswith(name + ":"))
    return int(line.split()[1]) << 10


class Peak:
    """The largest resident memory while it is held, over what there was before, in bytes."""

    def __enter__(self) -> Peak:
        gc.collect()
        self._before, self.bytes, self._done = resident(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, resident() - self._before)


def prompts(n: int, generator: torch.Generator, query: Tensor) -> Tensor:
    """(n, c) prompts, a hundredth of them near the query, the others unrelated."""
    cond = torch.randn(n, query.shape[1], generator=generator)
    ours = torch.rand(n, generator=generator) < RELEVANT
    noise = torch.randn(int(ours.sum()), query.shape[1], generator=generator)
    cond[ours] = query + 0.1 * noise
    return cond


def fill(memory: Memory, n: int, width: int, batch: int) -> tuple[Tensor, float]:
    """Commit n rows, those of a batch all different; the (1, c) query prompt and the seconds."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, COND_WIDTH, generator=generator)
    block = torch.randn(min(n, batch), width, generator=generator).half()
    seconds = 0.0
    for low in shown(range(0, n, batch), "filling"):
        rows = min(batch, n - low)
        cond = prompts(rows, generator, query)
        start = time.perf_counter()
        memory.commit(Features(block[:rows], cond))
        seconds += time.perf_counter() - start
    return query, seconds


def gate_once(
    n: int, width: int, score: CondRKE, tolerance: float
) -> tuple[int, float, float, Tensor]:
    """Rows read, seconds to select and of a step, and the direction."""
    memory = RingMemory(n, torch.float16, tolerance=tolerance)
    prompt, _ = fill(memory, n, width, 4096)
    query = Features(memory.features.x[:1] + 0.5, prompt)
    selection = memory.select(prompt, score.log_weight)
    select = timed(lambda: memory.select(prompt, score.log_weight))
    step = timed(lambda: score.direction(query, selection))
    return len(selection), select, step, score.direction(query, selection)


def gate(n: int, width: int) -> Row:
    """The same ring read densely and gated."""
    score = CondRKE(bandwidth=2.0 * width**0.5)
    found = {t: gate_once(n, width, score, t) for t in (0.0, 1e-3)}
    dense, gated = found[0.0], found[1e-3]
    return {
        "rows": n,
        "width": width,
        "rows read": gated[0] / dense[0],
        "step": gated[2] / dense[2],
        "selection": gated[1] / dense[1],
        "direction off by": float((gated[3] - dense[3]).norm() / dense[3].norm()),
    }


def throughput(folder: Path, n: int, width: int) -> list[Row]:
    """Bytes a second, and against a plain file of the same bytes, flushed to disk too."""
    size = n * width * 2
    data = os.urandom(1 << 20) * max(1, size >> 20)
    plain = folder / "plain"

    def write() -> None:
        with plain.open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())

    write_seconds, read_seconds = timed(write), timed(plain.read_bytes)
    plain.unlink()
    rows = []

    def add(what: str, seconds: float, limit: float) -> None:
        rows.append({"what": what, "MB/s": size / seconds / 1e6, "against a file": seconds / limit})

    ring = RingMemory(n, torch.float16)
    fill(ring, n, width, 4096)
    add("ring, save", timed(lambda: ring.save(folder / "ring")), write_seconds)
    add("ring, load", timed(lambda: RingMemory.load(folder / "ring")), read_seconds)
    (folder / "ring").unlink()
    for batch in (1, 16, 4096):
        memory = DiskMemory(folder / f"disk-{batch}")
        _, seconds = fill(memory, n, width, batch)
        add(f"disk, append by {batch}", seconds, write_seconds)
        shutil.rmtree(memory.path)
    memory = DiskMemory(folder / "disk")
    fill(memory, n, width, 256)
    add("disk, read all", timed(memory.rows), read_seconds)
    shutil.rmtree(memory.path)
    return rows


def precision(folder: Path, n: int, width: int) -> list[Row]:
    """Directions from rows stored with fewer bits, against float32."""
    directions: dict[torch.dtype, Tensor] = {}
    rows = []
    generator = torch.Generator().manual_seed(0)
    x, cond = torch.randn(n, width, generator=generator), torch.ones(n, 4)
    # Near one row of memory: the difference to it is small, so errors of storage weigh most.
    z = x[:8] + 0.3 * torch.randn(8, width, generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        memory = DiskMemory(folder / str(dtype), dtype=dtype)
        memory.commit(Features(x, cond))
        size = sum(path.stat().st_size for path in memory.path.iterdir())
        selection = memory.select(cond[:8])
        score = CondRKE(bandwidth=0.35 * width**0.5)
        directions[dtype] = score.direction(Features(z, cond[:8]), selection)
        cosine = torch.cosine_similarity(directions[dtype], directions[torch.float32])
        told = {"dtype": str(dtype).removeprefix("torch."), "bytes a number": size / x.numel()}
        rows.append({**told, "loss of direction, 1 - cosine": float((1 - cosine).max())})
        shutil.rmtree(memory.path)
    return rows


def generation(memory: Memory, score: CondRKE, prompt: Tensor) -> tuple[int, float, float]:
    """Rows read, seconds of the selection, and of one of the steps that read it."""
    start = time.perf_counter()
    selection = memory.select(prompt, score.log_weight)
    seconds = time.perf_counter() - start
    query = Features(selection.x[:1] + 0.5, prompt)
    return len(selection), seconds, timed(lambda: score.direction(query, selection), STEPS)


def large(folder: Path, n: int, width: int, select_bytes: int) -> Row:
    """A generation's selection from a folder, and its steps: time and resident memory."""
    place = folder / "large"
    free = shutil.disk_usage(folder).free
    need = n * (2 * width + 2 * COND_WIDTH)
    if need > 0.8 * free:
        n = int(n * 0.8 * free / need)
        print(f"{free / 1e9:.0f} GB free: {n} rows instead", file=sys.stderr)
    try:
        _, fill_seconds = fill(DiskMemory(place), n, width, 4096)
        # Who reads has not just written: what the heap of this process keeps would count, or hide.
        command = [sys.executable, "-m", "benchmarks.memory", "--read", str(place)]
        options = ["--width", str(width), "--select-mb", str(select_bytes >> 20)]
        done = subprocess.run([*command, *options], check=True, capture_output=True)
        size = sum(p.stat().st_size for p in place.iterdir()) / 1e9
        return {"rows": n, "GB on disk": size, "fill s": fill_seconds, **json.loads(done.stdout)}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def read(place: Path, width: int, select_bytes: int) -> Row:
    """The reading part of `large`, in a process of its own."""
    query = torch.randn(1, COND_WIDTH, generator=torch.Generator().manual_seed(0))  # as in `fill`
    memory = DiskMemory(place, select_bytes=select_bytes)
    n, score = len(memory), CondRKE(bandwidth=2.0 * width**0.5)
    with Peak() as peak:
        chosen, first, step = generation(memory, score, query)
    again = timed(lambda: memory.select(query, score.log_weight), 1)
    assert memory.left_out is not None
    return {
        "rows read": chosen,
        "share": chosen / n,
        "weight left out": float(memory.left_out),
        "first selection s": first,
        "again s": again,
        "step s": step,
        "peak resident MB": peak.bytes / 1e6,
        "of it rows MB": chosen * width * 4 / 1e6,
        "budget MB": (select_bytes + (256 << 20) + 24 * n) / 1e6,
    }


def lookup(folder: Path, n: int) -> Row:
    """Selecting by an index of prompts, against weighing every prompt; narrow rows."""
    place = folder / "lookup"
    query, _ = fill(DiskMemory(place), n, 16, 4096)
    score = CondRKE(bandwidth=8.0)
    exact, indexed = DiskMemory(place), DiskMemory(place, lookup_from=1)
    made = timed(lambda: indexed.select(query, score.log_weight), 1)
    opened = DiskMemory(place, lookup_from=1)
    first = timed(lambda: opened.select(query, score.log_weight), 1)
    took = {m: timed(lambda m=m: m.select(query, score.log_weight)) for m in (exact, indexed)}  # type: ignore[misc]
    whole, found = (set(m.select(query, score.log_weight).x[:, 0].tolist()) for m in took)
    size = (place / "prompts.lookup").stat().st_size
    shutil.rmtree(place)
    return {
        "rows": n,
        "made once s": made,
        "its file MB": size / 1e6,
        "first selection s": first,
        "against weighing all": took[indexed] / took[exact],
        "rows missed": len(whole - found),
        "of": len(whole),
    }


def killed(folder: Path, kills: int) -> Row:
    """kill -9 of a writer at random moments; raises unless everything committed is there."""
    command = [sys.executable, "-m", "tests.memory.kills", str(folder / "kills")]
    done = subprocess.run([*command, "--kills", str(kills)], check=True, capture_output=True)
    found: Row = json.loads(done.stdout)
    return {**found, "rows lost": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="of the large folder")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--select-mb", type=int, default=1024, help="budget of one selection")
    parser.add_argument("--prompts", type=int, default=20_000, help="of the index of prompts")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read is not None:
        print(json.dumps(read(args.read, args.width, args.select_mb << 20)))
        return

    content: Row = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        content["gate"] = [gate(20_000, 2048)]
        _report.show("gated against dense, 1 % of the rows relevant", content["gate"])
        content["throughput"] = throughput(folder, 4096, 8192)
        _report.show("throughput, float16 rows of width 8192", content["throughput"])
        content["precision"] = precision(folder, 512, 16384)
        _report.show("stored precision", content["precision"])
        content["large"] = [large(folder, args.rows, args.width, args.select_mb << 20)]
        _report.show(
            "selection from disk", [{"figure": k, "": v} for k, v in content["large"][0].items()]
        )
        content["lookup"] = [lookup(folder, args.prompts)]
        _report.show("prompts looked up", content["lookup"])
        if os.name == "posix":
            content["kills"] = [killed(folder, args.kills)]
            _report.show("writers killed with SIGKILL", content["kills"])
    content["width"] = args.width
    _report.write("memory", content)


if __name__ == "__main__":
    main()
