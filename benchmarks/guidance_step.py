"""One guidance evaluation against the straightforward way: python -m benchmarks.guidance_step.

The straightforward way is what public implementations do: append the new sample to the bank, build
the (n+1) x (n+1) kernel matrices, take the score, differentiate. Both sides compute the direction
of conditional RKE for one new sample, in the same run, on the same rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks import _report
from sparke import Features
from sparke.protocols import Selection
from sparke.scores import CondRKE

S_IMAGE, S_TEXT = 60.0, 0.35


def straightforward(z: Tensor, p: Tensor, bank: Tensor, prompts: Tensor) -> Tensor:
    """Gradient of log conditional RKE by autograd through the whole kernel matrices."""
    z = z.detach().requires_grad_()
    x, t = torch.cat([bank, z]), torch.cat([prompts, p])
    k_x = torch.exp(-torch.cdist(x, x).square() / (2 * S_IMAGE**2))
    k_t = torch.exp(-torch.cdist(t, t).square() / (2 * S_TEXT**2))
    score = torch.log(k_t.square().sum() / (k_x * k_t).square().sum())
    (gradient,) = torch.autograd.grad(score, z)
    return gradient


def timed(run: Callable[[], Tensor], repeats: int) -> float:
    """Median seconds of one call."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(args.rows, args.width, generator=generator)
    z = bank[:1] + 0.3 * torch.randn(1, args.width, generator=generator)
    prompts = torch.nn.functional.normalize(torch.randn(args.rows, 64, generator=generator))
    p = prompts[:1]
    score = CondRKE(bandwidth=S_IMAGE, cond_bandwidth=S_TEXT)
    query = Features(z, p)
    # The prompt weights are computed once per generation, as in a run.
    selection = Selection(bank, prompts, score.log_weight(p, prompts))

    ours = score.direction(query, selection)
    theirs = straightforward(z, p, bank, prompts)
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs))
    fast = timed(lambda: score.direction_and_crowding(query, selection)[0], args.repeats)
    slow = timed(lambda: straightforward(z, p, bank, prompts), 1)
    read = timed(lambda: bank.sum(), args.repeats)

    rows = [
        {"way": "sparke", "seconds": fast, "against reading once": fast / read},
        {"way": "straightforward", "seconds": slow, "against reading once": slow / read},
    ]
    _report.show(f"one guidance evaluation, n={args.rows}, d={args.width}, float32", rows)
    print(f"ratio {slow / fast:.0f}, cosine of the two directions {cosine:.6f}")
    _report.write(
        "guidance_step",
        {
            "rows": args.rows,
            "width": args.width,
            "table": rows,
            "ratio": slow / fast,
            "cosine": cosine,
            "read_bytes_per_second": bank.nbytes / read,
        },
    )


if __name__ == "__main__":
    main()
