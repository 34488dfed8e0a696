"""The quick benchmarks in a row: python -m benchmarks."""

from __future__ import annotations

import subprocess
import sys

QUICK = (
    ["guidance_step", "--repeats", "3"],
    ["scaling", "--quick"],
    ["peers", "--quick"],
    ["memory"],
    ["overhead", "--quick"],
    ["sequential", "--generations", "300"],
)

for name, *options in QUICK:
    print(f"== python -m benchmarks.{name} {' '.join(options)}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=True)
