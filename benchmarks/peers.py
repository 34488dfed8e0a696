"""The same step done in other ways: python -m benchmarks.peers [--quick].

Every way moves one new sample away from the rows of a bank. The figure is its time as a multiple of
reading the rows once, a plain sum over them, taken in turns in the same run. Cosines are to
sparke's direction; other scores point elsewhere, as they should.

- sparke: ``CondRKE.direction_and_crowding`` on a bank whose norms are known, as in a run.
- attention: torch's ``scaled_dot_product_attention`` with the rows as keys and as values, norms and
  prompt weights in its mask. The same answer, without the crowding.
- pairwise: the form of Particle Guidance (arXiv 2310.13102), differences to every row held as one
  (n, d) tensor and weighted by an RBF kernel.
- published: concatenate, take conditional RKE of the n + 1 samples by their whole kernel matrices,
  differentiate.
- vendi: the Vendi score of the n + 1 samples through eigendecomposition, differentiated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, scaled_dot_product_attention

from benchmarks import _limits, _report
from benchmarks.guidance_step import straightforward
from sparke import Features, ops
from sparke.protocols import Selection
from sparke.scores import CondRKE, Vendi

S_TEXT = 0.35


def ways(
    z: Tensor, p: Tensor, bank: Tensor, prompts: Tensor, width: float
) -> dict[str, Callable[[], Tensor]]:
    """Each way, to be called once a step; what does not change in a run is computed here."""
    score = CondRKE(bandwidth=width, cond_bandwidth=S_TEXT)
    norms, center = ops.squared_norms(bank)
    weight = score.log_weight(p, prompts)
    query = Features(z, p)
    selection = Selection(bank, prompts, weight, norms=norms, center=center)
    plain_norms = bank.square().sum(1)
    vendi = Vendi(bandwidth=width, max_rows=len(bank))

    def attention() -> Tensor:
        mask = weight - plain_norms / width**2
        mean = scaled_dot_product_attention(
            z[None, None], bank[None, None], bank[None, None], mask, scale=2 / width**2
        )
        return (z - mean[0, 0]) * (2 / width**2)

    def pairwise() -> Tensor:
        difference = z - bank
        k = torch.exp(weight[0] - difference.square().sum(1) / width**2)
        return (k[:, None] * difference).sum(0, keepdim=True) * (2 / width**2)

    def eigenvalues() -> Tensor:
        leaf = z.detach().requires_grad_()
        value = vendi(Features(leaf), Features(bank)).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        return gradient

    return {
        "sparke": lambda: score.direction_and_crowding(query, selection)[0],
        "attention": attention,
        "pairwise": pairwise,
        "published": lambda: straightforward(z, p, bank, prompts, width),
        "vendi": eigenvalues,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="500 rows")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.repeats = 500, 3

    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(args.rows, args.width, generator=generator)
    z = bank[:1] + 0.3 * torch.randn(1, args.width, generator=generator)
    prompts = normalize(torch.randn(args.rows, 64, generator=generator))
    found = ways(z, prompts[:1], bank, prompts, 0.47 * args.width**0.5)
    slow = ("published", "vendi")
    runs = {name: way for name, way in found.items() if name not in slow}
    seconds = _limits.side_by_side({"read": _limits.reading(bank), **runs}, args.repeats)
    seconds |= _limits.side_by_side({name: found[name] for name in slow}, 0)

    direction = found["sparke"]()
    rows = [
        {
            "way": name,
            "ms": seconds[name] * 1e3,
            "against reading once": seconds[name] / seconds["read"],
            "against sparke": seconds[name] / seconds["sparke"],
            "cosine": float(cosine_similarity(way(), direction)) if name not in slow else "",
        }
        for name, way in found.items()
    ]
    bandwidth = bank.nbytes / seconds["read"]
    _report.show(f"one step, n={args.rows}, d={args.width}, b=1, float32", rows)
    print(f"reading once: {seconds['read'] * 1e3:.4g} ms, {bandwidth / 1e9:.4g} GB/s")
    _report.write(
        "peers",
        {
            "rows": args.rows,
            "width": args.width,
            "table": rows,
            "read_bytes_per_second": bandwidth,
        },
    )


if __name__ == "__main__":
    main()
