"""The operation as callers see it: arguments checked, an implementation picked."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, MissingHost, ShapeError
from sparke.ops import _reference, _tiles, _triton
from sparke.ops._problem import Problem
from sparke.ops._rows import center_of, working_dtype

IMPLEMENTATIONS = ("reference", "cpu", "triton")
"""Names `implementation=` takes."""
SMALL = 2**16
"""Below this many numbers the bank fits the cache anyway."""


def pull(
    query: Tensor,
    rows: Tensor,
    log_weight: Tensor | None,
    width: float | Tensor,
    *,
    norms: Tensor | None = None,
    center: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log sum of squared Gaussian kernels, and the mean of the rows under their softmax.

    $$\ell_{ij} = -\frac{\|q_i - x_j\|^2}{s_i^2} + \log w_{ij}, \qquad
      \text{lse}_i = \log \sum_j e^{\ell_{ij}}, \qquad
      \text{mean}_i = \sum_j \text{softmax}(\ell_i)_j\, x_j$$

    The gradient of $-\text{lse}_i$ in $q_i$ is $\frac{2}{s_i^2}(q_i - \text{mean}_i)$, the update
    of SPARKE (arXiv 2506.10173) in log form. Sums are taken in float32, or float64 where the query
    is; rows in half precision are converted a tile at a time, never as a whole. The same arguments
    give the same bits. Nothing here is differentiable.

    Implementations agree: on rows whose center is not far from them compared with their spread, log
    sums to 1e-5 of the largest $\|q-x\|^2/s^2$ in float32 and means to 1e-5 of the largest row;
    ``tests/ops`` holds each to this against float64. Tiles whose weight cannot matter are left out
    of the mean, together at most $2^{-24}$ of it.

    Args:
        query: (b, d).
        rows: (n, d), any float dtype and strides, finite. Not modified.
        log_weight: (b, n), ``-inf`` hides a row; None: every row counts in full.
        width: s, a number or (b, 1), that of the unsquared kernel.
        norms: (n,) squared norms about `center`, from
            [squared_norms][sparke.ops.squared_norms]. Without them they are computed on the way.
        center: (d,) the point they are about.
        implementation: ``"reference"``, plain torch with a centred copy of the bank; ``"cpu"``,
            tiles; ``"triton"``, for CUDA; None picks by device and size.

    Returns:
        (b,) and (b, d) in the working dtype. A query with no weighted row, or no rows at all, gets
        ``-inf`` and itself: nothing pulls it.

    Raises:
        ShapeError: shapes that do not fit each other.
        ArgumentError: a width not above 0, norms without their center, or an implementation that
            cannot work on this device or dtype.
        MissingHost: ``"triton"`` is asked for and not installed.
    """
    problem = _checked(query, rows, log_weight, width, norms, center)
    return _solve(problem, implementation)


def log_sum(
    query: Tensor,
    rows: Tensor,
    log_weight: Tensor | None,
    width: float | Tensor,
    *,
    norms: Tensor | None = None,
    center: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """(b,) the log sums of [pull][sparke.ops.pull] alone; the same arguments, less work."""
    problem = _checked(query, rows, log_weight, width, norms, center)
    return _solve(replace(problem, wants_mean=False), implementation)[0]


def pick(query: Tensor, rows: Tensor) -> str:
    """The implementation for these tensors."""
    if rows.device.type == "cpu":
        return "cpu" if rows.numel() > SMALL else "reference"
    if rows.device.type == "cuda" and query.dtype == torch.float32 and _has_triton():
        return "triton"
    return "reference"


def _checked(
    query: Tensor,
    rows: Tensor,
    log_weight: Tensor | None,
    width: float | Tensor,
    norms: Tensor | None,
    center: Tensor | None,
) -> Problem:
    if query.ndim != 2 or rows.ndim != 2 or (len(rows) and query.shape[1] != rows.shape[1]):
        raise ShapeError(
            "query and rows must be (b, d) and (n, d) of the same width, got "
            f"{tuple(query.shape)} and {tuple(rows.shape)}."
        )
    (b, d), n = query.shape, len(rows)
    query, rows = query.detach().to(working_dtype(query)), rows.detach()
    if not n:
        rows = rows.new_zeros(0, d)
    if log_weight is not None:
        log_weight = checks.shape("log_weight", log_weight.detach().to(query), (b, n))
    if norms is not None:
        if center is None:
            raise ArgumentError("norms= came without center=; sparke.ops.squared_norms gives both.")
        norms = checks.shape("norms", norms.detach().to(query), (n,))
    center = center_of(rows) if center is None else center.detach()
    center = checks.shape("center", center.to(query), (d,))
    if isinstance(width, Tensor):
        scale = width.detach().to(query).expand(b, 1).square().reciprocal()
    else:
        scale = query.new_full((b, 1), checks.positive("width", width) ** -2)
    return Problem(query, rows, log_weight, scale, center, norms)


def _solve(problem: Problem, implementation: str | None) -> tuple[Tensor, Tensor]:
    name = pick(problem.query, problem.rows) if implementation is None else implementation
    checks.choice("implementation", name, IMPLEMENTATIONS)
    if not torch.compiler.is_compiling():
        return _run(problem, name)
    found: tuple[Tensor, Tensor] = torch.ops.sparke.pull(
        problem.query,
        problem.rows,
        problem.log_weight,
        problem.scale,
        problem.center,
        problem.norms,
        problem.wants_mean,
        name,
    )
    return found


def _run(problem: Problem, name: str) -> tuple[Tensor, Tensor]:
    query, rows = problem.query, problem.rows
    if not len(rows) or not len(query):
        return query.new_full((len(query),), -torch.inf), query.clone()
    with torch.no_grad():
        if name == "reference":
            return _reference.run(problem)
        if name == "cpu":
            if rows.device.type != "cpu":
                raise ArgumentError(
                    f"implementation='cpu' needs tensors on the CPU, rows are on {rows.device}. "
                    "Leave implementation out."
                )
            return _tiles.run(problem)
        if not _has_triton():
            raise MissingHost("implementation='triton' needs the package triton: install it.")
        if rows.device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
            raise ArgumentError(
                f"implementation='triton' needs tensors on CUDA, rows are on {rows.device}. Leave "
                "implementation out."
            )
        return _triton.run(problem)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# A compiler would unroll the loop over tiles and stop at every look at a tile's scores: to it the
# operation is one call.
@torch.library.custom_op("sparke::pull", mutates_args=())
def _opaque(
    query: Tensor,
    rows: Tensor,
    log_weight: Tensor | None,
    scale: Tensor,
    center: Tensor,
    norms: Tensor | None,
    wants_mean: bool,
    name: str,
) -> tuple[Tensor, Tensor]:
    problem = Problem(query, rows, log_weight, scale, center, norms, wants_mean)
    lse, mean = _run(problem, name)
    return lse.contiguous(), mean.contiguous() if wants_mean else mean.new_empty(len(query), 0)


@_opaque.register_fake
def _shapes(
    query: Tensor,
    rows: Tensor,
    log_weight: Tensor | None,
    scale: Tensor,
    center: Tensor,
    norms: Tensor | None,
    wants_mean: bool,
    name: str,
) -> tuple[Tensor, Tensor]:
    b, d = query.shape
    return query.new_empty(b), query.new_empty(b, d if wants_mean else 0)
