"""The operation on CUDA, in Triton.

With d in the tens of thousands no program can hold a query's mean, so a block of rows is visited by
two kernels: one for the scores, which splits d over the grid, and one for the weighted sum. The
second reads the rows from the L2 cache if the block fits there, from memory if not. By default a
block is the whole bank, which is then read twice: blocks that fit a cache of tens of MB are read in
microseconds, and the launches of several kernels for each would cost more than that. `block_bytes`
makes smaller blocks; the softmax is online between them. Up to `MAX_QUERIES` queries share the
readings; more come in groups of that many.

Nothing is added atomically: splits write partial sums, which are then added in a fixed order, so
the same arguments give the same bits.

Products run on tensor cores in TF32 with each factor split in parts (``tf32x3``), which is good to
about float32; where there is no TF32 they run in float32.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sparke.errors import ArgumentError
from sparke.ops._problem import Problem
from sparke.ops._rows import squared_norms
from sparke.ops._triton_kernels import compiled

MAX_QUERIES = 64
MIN_QUERIES = 16
"""The smallest side of a tensor core's product; fewer queries are padded with zeros."""
PROGRAMS = 512
"""Work is split until about so many programs run; fixed, so that sums do not depend on the GPU."""
PRECISION = "tf32x3" if torch.version.hip is None else "ieee"
ROWS, WIDTH = 64, 64
GATHER_ROWS, GATHER_WIDTH = 32, 128


def run(problem: Problem, block_bytes: int | None = None) -> tuple[Tensor, Tensor]:
    """(b,) log sums and (b, d) means; `block_bytes` of rows between two visits, all if None."""
    if problem.query.dtype != torch.float32:
        raise ArgumentError(
            f"implementation='triton' sums in float32, the query is {problem.query.dtype}. Use "
            "'reference' for float64."
        )
    groups = range(0, len(problem.query), MAX_QUERIES)
    with _on(problem.rows.device):
        parts = [_group(problem, at, block_bytes) for at in groups]
    return torch.cat([lse for lse, _ in parts]), torch.cat([mean for _, mean in parts])


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _group(problem: Problem, at: int, block_bytes: int | None) -> tuple[Tensor, Tensor]:
    """The same for the queries from `at` on, `MAX_QUERIES` at most."""
    here = slice(at, at + MAX_QUERIES)
    query, scale = problem.query[here], problem.scale[here]
    rows = problem.rows if problem.rows.stride(1) == 1 else problem.rows.contiguous()
    away = query - problem.center
    towards = (away * (2 * scale)).contiguous()
    constant = away.square().sum(1, keepdim=True) * scale
    norms = problem.norms
    if norms is None:
        norms, _ = squared_norms(rows, problem.center)
    step = len(rows)
    if block_bytes is not None:
        step = max(1, block_bytes // (rows.shape[1] * rows.element_size()))

    total = torch.zeros_like(query)
    mass = query.new_zeros(len(query), 1)
    highest = torch.full_like(mass, -torch.inf)
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        scores = _split_products(towards, rows[block], problem.center)
        scores -= scale * norms[block] + constant
        weight = None if problem.log_weight is None else problem.log_weight[here, block]
        # Rounding must not bring a row nearer than its query's distance 0.
        scores = scores.clamp_max(0) if weight is None else torch.minimum(scores + weight, weight)
        top = torch.maximum(highest, scores.amax(1, keepdim=True))
        safe = top.masked_fill(top == -torch.inf, 0)
        p, fade = torch.exp(scores - safe), torch.exp(highest - safe)
        mass = mass * fade + p.sum(1, keepdim=True)
        if problem.wants_mean:
            total = total * fade + _split_gather(p, rows[block], problem.center)
        highest = top
    lse = (mass.log() + highest).squeeze(1)
    return lse, torch.where(mass == 0, query, problem.center + total / mass)


def _split_products(query: Tensor, rows: Tensor, center: Tensor) -> Tensor:
    """(b, n) products of (b, d) queries and (n, d) rows about the center."""
    (b, d), n = query.shape, len(rows)
    blocks = math.ceil(n / ROWS)
    splits, share = _splits(d, WIDTH, blocks)
    out = query.new_empty(splits, b, n)
    compiled()[0][(blocks, splits)](
        query, rows, center, out, b, n, d, rows.stride(0), share,
        B=_padded(b), N=ROWS, D=WIDTH, PRECISION=PRECISION,
    )  # fmt: skip
    return out.sum(0)


def _split_gather(weight: Tensor, rows: Tensor, center: Tensor) -> Tensor:
    """(b, d) sums of (n, d) rows about the center under (b, n) weights."""
    (b, n), d = weight.shape, rows.shape[1]
    blocks = math.ceil(d / GATHER_WIDTH)
    splits, share = _splits(n, GATHER_ROWS, blocks)
    out = weight.new_empty(splits, b, d)
    compiled()[1][(blocks, splits)](
        weight, rows, center, out, b, n, d, rows.stride(0), share,
        B=_padded(b), N=GATHER_ROWS, D=GATHER_WIDTH, PRECISION=PRECISION,
    )  # fmt: skip
    return out.sum(0)


def _splits(length: int, tile: int, blocks: int) -> tuple[int, int]:
    """Into how many parts to split `length`, and the length of one, a multiple of `tile`."""
    tiles = math.ceil(length / tile)
    wanted = min(tiles, max(1, PROGRAMS // blocks))
    share = math.ceil(tiles / wanted) * tile
    return math.ceil(length / share), share


def _padded(b: int) -> int:
    return max(MIN_QUERIES, 1 << (b - 1).bit_length())
