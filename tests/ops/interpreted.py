"""Run by test_triton in a fresh process, with TRITON_INTERPRET=1: triton reads that on import.

Prints, as JSON, how far the interpreted kernels are from the plain implementation in float64.
"""

import json
import math
import sys

import torch

from sparke import ops
from sparke.ops import _triton
from sparke.ops._pull import _checked

# b, n, d, dtype, share of hidden rows, bytes of a block of rows
CASES = [
    (1, 100, 200, torch.float32, 0.0, None),
    (3, 65, 129, torch.bfloat16, 0.3, None),
    (17, 70, 300, torch.float16, 0.3, None),
    (64, 33, 130, torch.float16, 0.0, None),
    (70, 3, 2, torch.float32, 0.0, None),
    (2, 150, 64, torch.float32, 0.9, 64 * 4 * 40),  # several blocks, the last one short
    (2, 40, 64, torch.float16, 0.0, 1),  # a block for each row
    (1, 64, 1600, torch.float32, 0.0, None),  # many splits of d
    (1, 900, 8, torch.float32, 0.0, None),  # many splits of n
]


def main() -> None:
    found = []
    for number, (b, n, d, dtype, hidden, block) in enumerate(CASES):
        generator = torch.Generator().manual_seed(number)
        rows = (torch.randn(n, d, generator=generator) + 3).to(dtype)
        query = rows[:1].float() + torch.randn(b, d, generator=generator)
        weight = -torch.rand(b, n, generator=generator)
        weight[torch.rand(b, n, generator=generator) < hidden] = -math.inf
        if hidden:
            weight[0] = -math.inf
        width = 0.7 * d**0.5
        norms, center = ops.squared_norms(rows)
        known = (norms, center) if number % 2 else (None, None)
        if block is None:
            lse, mean = ops.pull(
                query,
                rows,
                weight,
                width,
                norms=known[0],
                center=known[1],
                implementation="triton",
            )
        else:
            problem = _checked(query, rows, weight, width, *known)
            lse, mean = _triton.run(problem, block)
        expected = ops.pull(
            query.double(), rows.double(), weight.double(), width, implementation="reference"
        )
        seen = expected[0] > -math.inf
        found.append(
            {
                "case": str((b, n, d, dtype, hidden, block)),
                "hidden alike": bool(((lse > -math.inf) == seen).all()),
                "lse": float((lse.double() - expected[0])[seen].abs().max()),
                "mean": float((mean.double() - expected[1]).abs().max()),
            }
        )
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
