# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,no-untyped-call"
"""The two kernels of the operation. Triton reads their source, so they carry no types.

Offsets that can pass 2^31 are in int64. Tiles past the end of rows, queries or d are masked.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton.language as tl


@cache
def compiled() -> tuple[Any, Any]:
    """Both kernels, to be launched over a grid; the first call imports triton."""
    global tl  # where triton looks names up
    import triton
    import triton.language as tl

    return triton.jit(products), triton.jit(gather)


def products(
    query, rows, center, out, b, n, d, row_stride, share,
    B: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, i, j] = sum of query[i] * (rows[j] - center) over its share of d."""
    split = tl.program_id(1)
    j = tl.program_id(0) * N + tl.arange(0, N)
    i = tl.arange(0, B)
    first = split * share
    last = tl.minimum(first + share, d)
    at_rows = rows + j.to(tl.int64)[:, None] * row_stride
    at_query = query + i.to(tl.int64)[:, None] * d
    total = tl.zeros((B, N), dtype=tl.float32)
    for start in range(first, last, D):
        k = start + tl.arange(0, D)
        inside = (k < last)[None, :]
        x = tl.load(at_rows + k[None, :], mask=(j < n)[:, None] & inside, other=0.0)
        q = tl.load(at_query + k[None, :], mask=(i < b)[:, None] & inside, other=0.0)
        x = x.to(tl.float32) - tl.load(center + k, mask=k < last, other=0.0)[None, :]
        total += tl.dot(q, tl.trans(x), input_precision=PRECISION)
    at = out + (split.to(tl.int64) * b + i[:, None]) * n + j[None, :]
    tl.store(at, total, mask=(i < b)[:, None] & (j < n)[None, :])


def gather(
    weight, rows, center, out, b, n, d, row_stride, share,
    B: tl.constexpr, N: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, i, k] = sum of weight[i, j] * (rows[j, k] - center[k]) over its share of n."""
    split = tl.program_id(1)
    k = tl.program_id(0) * D + tl.arange(0, D)
    i = tl.arange(0, B)
    first = split * share
    last = tl.minimum(first + share, n)
    at_weight = weight + i.to(tl.int64)[:, None] * n
    middle = tl.load(center + k, mask=k < d, other=0.0)[None, :]
    total = tl.zeros((B, D), dtype=tl.float32)
    for start in range(first, last, N):
        j = start + tl.arange(0, N)
        inside = j < last
        p = tl.load(at_weight + j[None, :], mask=(i < b)[:, None] & inside[None, :], other=0.0)
        at_rows = rows + j.to(tl.int64)[:, None] * row_stride + k[None, :]
        x = tl.load(at_rows, mask=inside[:, None] & (k < d)[None, :], other=0.0)
        total += tl.dot(p, x.to(tl.float32) - middle, input_precision=PRECISION)
    at = out + (split.to(tl.int64) * b + i[:, None]) * d + k[None, :]
    tl.store(at, total, mask=(i < b)[:, None] & (k < d)[None, :])
