"""What one pull costs by queries and rows: python -m benchmarks.scaling [--quick].

Each figure is a ratio to reading the same rows once (a plain sum over them), taken in turns with it
in the same run. "flat" is a bandwidth at which many rows weigh in, "peaked" one at which few do and
the second product is mostly left out.

b queries need 4 b multiplications and additions for each number read, so beyond a few queries a CPU
is bound by arithmetic, not by reading; "against the limit" takes whichever of the two is longer.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks import _limits, _report
from sparke import ops

WIDTHS = {"flat": 0.47, "peaked": 0.08}
"""Bandwidths in units of the square root of d: exponents of independent rows near 9 and 300."""


def by_queries(rows: int, width: int, batches: list[int], repeats: int) -> list[dict[str, object]]:
    bank = _limits.bank_of(rows, width)
    norms, center = ops.squared_norms(bank)
    runs = {("read", 0): _limits.reading(bank)}
    for name, share in WIDTHS.items():
        for b in batches:
            query = bank[:b] + 0.3 * torch.randn(b, width, generator=torch.Generator())
            runs[name, b] = partial(
                ops.pull, query, bank, None, share * width**0.5, norms=norms, center=center
            )  # type: ignore[assignment]
    seconds = _limits.side_by_side(runs, repeats)
    read, rate = seconds["read", 0], _limits.multiply_rate()
    return [
        {
            "softmax": name,
            "b": b,
            "ms": seconds[name, b] * 1e3,
            "against reading once": seconds[name, b] / read,
            "against b=1": seconds[name, b] / seconds[name, batches[0]],
            "against the limit": seconds[name, b] / max(read, 4 * b * bank.numel() / rate),
        }
        for name in WIDTHS
        for b in batches
    ] + [
        {
            "softmax": "reading once",
            "ms": read * 1e3,
            "GB/s": bank.nbytes / read / 1e9,
            "Gflop/s": rate / 1e9,
        }
    ]


def by_rows(sizes: list[int], width: int, repeats: int) -> list[dict[str, object]]:
    bank = _limits.bank_of(sizes[-1], width)
    norms, center = ops.squared_norms(bank)
    query = bank[:1] + 0.3 * torch.randn(1, width, generator=torch.Generator())
    bandwidth = WIDTHS["flat"] * width**0.5
    runs = {}
    for n in sizes:
        runs["read", n] = _limits.reading(bank[:n])
        runs["pull", n] = partial(
            ops.pull, query, bank[:n], None, bandwidth, norms=norms[:n], center=center
        )  # type: ignore[assignment]
    seconds = _limits.side_by_side(runs, repeats)
    return [
        {
            "n": n,
            "ms": seconds["pull", n] * 1e3,
            "against reading once": seconds["pull", n] / seconds["read", n],
            "against half the rows": seconds["pull", n] / seconds["pull", half] if half else "",
            "GB/s read": n * width * 4 / seconds["read", n] / 1e9,
        }
        for half, n in zip([0, *sizes], sizes, strict=False)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--most", type=int, default=64_000, help="rows of the largest bank")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="smaller banks, fewer repeats")
    args = parser.parse_args()
    if args.quick:
        args.most, args.repeats = 4000, 4

    batches = by_queries(args.rows, args.width, [1, 4, 16, 64], args.repeats)
    _report.show(f"one pull by queries, n={args.rows}, d={args.width}, float32", batches[:-1])
    print(", ".join(f"{key} {value:.4g}" for key, value in batches[-1].items() if key != "softmax"))
    sizes = [1000]
    while sizes[-1] * 2 <= args.most:
        sizes.append(sizes[-1] * 2)
    growth = by_rows(sizes, args.width, max(3, args.repeats // 2))
    _report.show(f"one pull by rows, b=1, d={args.width}, float32, flat", growth)
    _report.write("scaling", {"width": args.width, "by queries": batches, "by rows": growth})


if __name__ == "__main__":
    main()
