"""One guidance evaluation against the straightforward way: python -m benchmarks.guidance_step.

The straightforward way is what public implementations do: append the new sample to the bank, build
the (n+1) x (n+1) kernel matrices, take the score, differentiate. Both sides compute the direction
of conditional RKE for one new sample, in the same run, on the same rows.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks import _limits, _report
from sparke import Features, ops
from sparke.protocols import Selection
from sparke.scores import CondRKE

S_IMAGE, S_TEXT = 60.0, 0.35


def straightforward(
    z: Tensor, p: Tensor, bank: Tensor, prompts: Tensor, width: float = S_IMAGE
) -> Tensor:
    """Gradient of log conditional RKE by autograd through the whole kernel matrices."""
    z = z.detach().requires_grad_()
    x, t = torch.cat([bank, z]), torch.cat([prompts, p])
    k_x = torch.exp(-torch.cdist(x, x).square() / (2 * width**2))
    k_t = torch.exp(-torch.cdist(t, t).square() / (2 * S_TEXT**2))
    score = torch.log(k_t.square().sum() / (k_x * k_t).square().sum())
    (gradient,) = torch.autograd.grad(score, z)
    return gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(args.rows, args.width, generator=generator)
    z = bank[:1] + 0.3 * torch.randn(1, args.width, generator=generator)
    prompts = torch.nn.functional.normalize(torch.randn(args.rows, 64, generator=generator))
    p = prompts[:1]
    score = CondRKE(bandwidth=S_IMAGE, cond_bandwidth=S_TEXT)
    query = Features(z, p)
    # Prompt weights and norms are computed once per generation, as in a run.
    norms, center = ops.squared_norms(bank)
    weight = score.log_weight(p, prompts)
    selection = Selection(bank, prompts, weight, norms=norms, center=center)

    ours = score.direction(query, selection)
    theirs = straightforward(z, p, bank, prompts)
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs))
    seconds = _limits.side_by_side(
        {
            "read": _limits.reading(bank),
            "sparke": lambda: score.direction_and_crowding(query, selection),
        },
        args.repeats,
    )
    read, fast = seconds["read"], seconds["sparke"]
    slow = _limits.side_by_side({"": lambda: straightforward(z, p, bank, prompts)}, 0)[""]

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
