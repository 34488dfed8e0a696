"""What `import sparke` adds to `import torch`: fresh interpreters, in turns.

    python -m benchmarks.import_time

Every interpreter imports torch, looks at the clock, imports what is asked for and looks again, so
that torch, which takes the larger part and varies most, is in none of the figures. `numpy` is
imported before, as torch does where it is there.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from typing import Any

from benchmarks._progress import shown
from benchmarks._report import show, write

CLOCK = """
import time
began = time.perf_counter()
import numpy, torch
torch_there = time.perf_counter()
import {module}
print(torch_there - began, time.perf_counter() - torch_there)
"""
MODULES = ("sparke", "sparke.testing", "sparke.cli", "sparke.models.emoji")
AIM = 0.3


def seconds(module: str) -> tuple[float, float]:
    """Seconds of `import torch`, and what `module` takes after it, in an interpreter of its own."""
    command = [sys.executable, "-c", CLOCK.format(module=module)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    torch, added = map(float, done.stdout.split())
    return torch, added


def main() -> None:
    parser = argparse.ArgumentParser(description="What import sparke adds to import torch.")
    parser.add_argument("--repeats", type=int, default=7, help="interpreters for each module")
    parser.add_argument("--print-only", action="store_true", help="leave the results as they are")
    options = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {module: [] for module in MODULES}
    for module in MODULES:
        seconds(module)  # so that its bytecode and libraries are on hand for all repeats
    for _ in shown(range(options.repeats), "importing"):
        for module in MODULES:
            taken[module].append(seconds(module))
    rows: list[dict[str, Any]] = []
    for module, times in taken.items():
        torch, added = zip(*times, strict=True)
        rows.append(
            {
                "import": module,
                "torch, s": statistics.median(torch),
                "added, s": statistics.median(added),
                "least": min(added),
                "most": max(added),
                "added / torch": statistics.median(added) / statistics.median(torch),
            }
        )
    show(f"Median of {options.repeats} interpreters", rows)
    if not options.print_only:
        write("import_time", {"repeats": options.repeats, "aim_s": AIM, "rows": rows})
    added = rows[0]["added, s"]
    print(f"import sparke adds {added:.3f} s to import torch; the aim is under {AIM} s")


if __name__ == "__main__":
    main()
