"""Time and memory of every measure at full size: python -m benchmarks.metrics.

    OMP_NUM_THREADS=1 python -m benchmarks.metrics            50,000 rows of 512 numbers
    python -m benchmarks.metrics --rows 5000 --only rke,prdc  some of it, smaller

Seconds are those this process computed, which other work on the machine stretches little. "times
its products" divides them by what the matrix products of the measure alone would take, at the rate
of a large square product in float64 in the same run. Memory is the most that was resident over
what the features themselves take; the matrix of all pairs would take 8 n^2 bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from benchmarks import _clock, _report
from sparke import metrics

PROMPTS, PROMPT_WIDTH, MODES = 100, 64, 10
Measure = Callable[..., Any]
Case = tuple[str, int, float, Measure]
"""Name, rows, operations of its matrix products, and the measure of a progress function."""


def labelled(n: int, width: int, kinds: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features, prompt of each sample and mode of each sample within its prompt.

    Of its ten modes a prompt shows the first `kinds`.
    """
    fixed, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    centers = torch.randn(PROMPTS, MODES, width, generator=fixed)
    prompt = torch.arange(n) % PROMPTS
    mode = torch.randint(kinds, (n,), generator=drawn)
    x = torch.randn(n, width, generator=drawn).mul_(0.3)
    for start in range(0, n, 4096):  # the centers of all rows would be as large as the features
        rows = slice(start, start + 4096)
        x[rows] += centers[prompt[rows], mode[rows]]
    return x, prompt, mode


def multiply_rate() -> float:
    """Operations a second of a large square product in float64."""
    a = torch.randn(2048, 2048, dtype=torch.float64)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        a @ a
        seconds.append(time.process_time() - start)
    return 2 * 2048**3 / min(seconds)


def cases(n: int, width: int, exact: int, r: int) -> list[Case]:
    x, prompt, mode = labelled(n, width, MODES, 1)
    y, _, _ = labelled(n, width, MODES // 2, 2)
    t = torch.randn(PROMPTS, PROMPT_WIDTH)[prompt]
    s = metrics.shared_bandwidth(x, y)
    few = min(exact, n)
    pairs, both, covariance = n * (n + 512) * width, 2 * n * n * width, 2 * n * width**2
    random = 2 * n * r * (width + 4 * r)
    cosine: dict[str, Any] = {"kernel": "cosine"}
    gaussian: dict[str, Any] = {"bandwidth": s}
    fourier: dict[str, Any] = {"bandwidth": s, "random_features": r}
    m = metrics
    return [
        ("shared_bandwidth", n, 0, lambda progress: m.shared_bandwidth(x, y)),
        ("vendi, cosine", n, covariance, partial(m.vendi, x, **cosine)),
        (f"vendi, gaussian, {r} random features", n, random, partial(m.vendi, x, **fourier)),
        ("vendi, gaussian", few, 0, partial(m.vendi, x[:few], **gaussian)),
        ("rke, cosine", n, covariance, partial(m.rke, x, **cosine)),
        ("rke, gaussian", n, pairs, partial(m.rke, x, **gaussian)),
        ("cond_vendi, gaussian", few, 0, partial(m.cond_vendi, x[:few], t[:few], **gaussian)),
        (
            "cond_rke, gaussian",
            n,
            pairs * (1 + PROMPT_WIDTH / width),
            partial(m.cond_rke, x, t, **gaussian),
        ),
        ("in_batch_similarity", n, 0, partial(m.in_batch_similarity, x, t)),
        ("ken, cosine", n, 2 * covariance, partial(m.ken, x, y, **cosine)),
        (f"ken, gaussian, {r} random features", n, 2 * random, partial(m.ken, x, y, **fourier)),
        ("ken, gaussian", few // 2, 0, partial(m.ken, x[: few // 2], y[: few // 2], **gaussian)),
        ("relative_rke, cosine", n, 2 * covariance, partial(m.relative_rke, x, y, **cosine)),
        ("relative_rke, gaussian", few, 0, partial(m.relative_rke, x[:few], y[:few], **gaussian)),
        ("prdc", n, 2 * pairs + both, partial(m.prdc, x, y)),
        ("effective_modes", n, 0, lambda progress: m.effective_modes(mode, prompt)),
    ]


def measured(case: Case, rate: float, bars: Progress) -> dict[str, Any]:
    name, n, operations, measure = case
    task = bars.add_task(name, total=None)

    def progress(done: int, total: int) -> None:
        bars.update(task, completed=done, total=total or None)

    _clock.reset_peak("cpu")
    before = _resident()
    start = time.process_time()
    value = measure(progress=progress)
    seconds = time.process_time() - start
    most = _clock.peak("cpu")
    bars.update(task, completed=1, total=1)
    return {
        "measure": name,
        "rows": n,
        "CPU s": seconds,
        "times its products": seconds * rate / operations if operations else "",
        "MB more": (most - before) / 1e6 if most is not None and before is not None else "",
        "value": _rounded(value),
    }


def _resident() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(status.read_text().split("VmRSS:")[1].split()[0])


def _rounded(value: Any) -> str:
    numbers = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{number:.4g}" for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--exact", type=int, default=2000, help="rows where all pairs are kept")
    parser.add_argument("--random-features", type=int, default=512)
    parser.add_argument("--only", default="", help="names of measures, separated by commas")
    args = parser.parse_args()
    rate = multiply_rate()
    wanted = set(filter(None, args.only.split(",")))
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        every = cases(args.rows, args.width, args.exact, args.random_features)
        chosen = [case for case in every if not wanted or case[0].split(",")[0] in wanted]
        rows = [measured(case, rate, bars) for case in chosen]
    _report.show(f"n={args.rows}, d={args.width}, float32; {rate / 1e9:.1f} Gflop/s", rows)
    print(f"\nthe matrix of all pairs would take {8 * args.rows**2 / 1e6:,.0f} MB")
    if not wanted:
        content = {"rows": args.rows, "width": args.width, "flop/s": rate, "measures": rows}
        _report.write("metrics", content)


if __name__ == "__main__":
    main()
