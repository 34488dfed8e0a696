"""The operation on a CPU: each row is read from memory once.

Rows go through in tiles that stay in the cache between the product that gives their scores and the
product that adds them up. The softmax is taken as the tiles come by: scores are kept relative to a
reference, which is raised when a tile exceeds it by more than `HEADROOM`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparke.ops import _single
from sparke.ops._problem import Problem
from sparke.ops._rows import tile_rows

HEADROOM = 40.0
"""exp(40) times any sum of rows stays far inside float32."""
NEGLIGIBLE = 2.0**-24
"""All tiles left out of a mean hold together at most this share of the weight."""
FAR = 1e3
"""Rows whose center is this much longer, squared, than they are about it, are centred by tile."""


class Online:
    """The softmax of b queries over tiles: references, and which tiles count.

    `score` is (b, n): it begins as the part of the scores known beforehand, tiles are completed in
    place, and all of it, done or not, is relative to the references.
    """

    def __init__(self, score: Tensor, total: Tensor) -> None:
        self.score, self.total = score, total
        self.reference = [0.0] * len(score)
        self._best = [-math.inf] * len(score)
        self._gap = gap(score.shape[1])

    def admits(self, scores: Tensor) -> bool:
        """Take note of a finished tile, (b, r) or (r,); False if no query needs it in its mean.

        A row counts for nothing where its weight is below ``NEGLIGIBLE / n`` of the largest so far:
        all such rows together then hold at most `NEGLIGIBLE` of the whole.
        """
        top: list[float] = [scores.amax().item()] if scores.ndim == 1 else scores.amax(1).tolist()
        needed = raised = False
        for t, s in zip(top, self._best, strict=True):
            if not (t < s - self._gap or t == -math.inf):  # so that NaN is needed
                needed = True
                raised = raised or _exceeds(t, s)
        if raised:
            self._raise(top)
        if needed:
            self._best = [max(t, s) for t, s in zip(top, self._best, strict=True)]
        return needed

    def _raise(self, top: list[float]) -> None:
        raised = [t if _exceeds(t, s) else 0.0 for t, s in zip(top, self._best, strict=True)]
        for i, up in enumerate(raised):
            self.reference[i] += up
            top[i] -= up
            self._best[i] -= up
        delta = torch.tensor(raised, dtype=self.score.dtype)[:, None]
        self.score.sub_(delta)
        # The first weighted row may lower the reference; nothing has been added up by then.
        self.total.mul_(torch.exp(-delta.clamp_min(0)))


def gap(rows: int) -> float:
    """How far below the largest exponent one of so many rows counts for nothing."""
    return math.log(max(1, rows) / NEGLIGIBLE)


def _exceeds(top: float, best: float) -> bool:
    return top > HEADROOM or (best == -math.inf and top > best)


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """(b,) log sums and (b, d) means."""
    query, rows, center, scale = problem.query, problem.rows, problem.center, problem.scale
    away = query - center
    towards = away * (2 * scale)
    constant = away.square().sum(1, keepdim=True).mul_(scale)
    centring = _needs_centring(problem)
    if not centring:
        constant += (towards * center).sum(1, keepdim=True)
    score = _known(problem, constant)
    if len(query) == 1 and not centring and problem.wants_mean and _single.fits(rows):
        mean = _single.run(towards, rows, score, gap(len(rows)))
        lse = _log_sum(problem, score)
        return lse, torch.where((lse == -torch.inf)[:, None], query, mean)
    total = torch.zeros_like(query)
    online = Online(score, total)
    n, d = rows.shape
    step = tile_rows(d, query.dtype, len(query))
    scratch = query.new_empty(min(step, n), d) if centring else None
    kept = []
    # A tile takes some 0.2 ms, so microseconds count: one query goes by vectors, and views are made
    # in bulk.
    one = query.shape[0] == 1
    scores_of = score[0].split(step) if one else score.split(step, 1)
    vector, sums = towards[0], total[0]
    tiles = zip(range(0, n, step), scores_of, rows.split(step), rows.mT.split(step, 1), strict=True)
    for i, scores, tile, turned in tiles:
        if scratch is not None:
            tile = torch.sub(tile, center, out=scratch[: tile.shape[0]])
            turned = tile.mT
            if problem.norms is None:
                norms = torch.linalg.vector_norm(tile, dim=1).square()
                scores.sub_(norms * scale[0] if one else norms * scale)
        if one:
            scores.addmv_(tile, vector)
        else:
            scores.addmm_(towards, turned)
        if problem.wants_mean and online.admits(scores):
            kept.append(i)
            if one:
                sums.addmv_(turned, scores.exp())
            else:
                total.addmm_(scores.exp(), tile)
    return _finish(problem, online, kept, step, center if centring else None)


def _needs_centring(problem: Problem) -> bool:
    """Whether tiles are copied: to another dtype, for their norms, or for digits."""
    rows, center, norms = problem.rows, problem.center, problem.norms
    if norms is None or rows.dtype != problem.query.dtype:
        return True
    return bool(center.square().sum() > FAR * norms.mean())


def _known(problem: Problem, constant: Tensor) -> Tensor:
    """(b, n) the scores but for the products of queries and rows."""
    if problem.log_weight is None:
        score = (-constant).repeat(1, len(problem.rows))
    else:
        score = problem.log_weight - constant
    if problem.norms is not None:
        score.addcmul_(problem.scale, problem.norms, value=-1)
    return score


def _log_sum(problem: Problem, score: Tensor, reference: Tensor | None = None) -> Tensor:
    """(b,) log sums of finished exponents, which may be relative to (b, 1) references."""
    reference = score.new_zeros(len(score), 1) if reference is None else reference
    # Rounding must not bring a row nearer than its query's distance 0.
    cap = -reference if problem.log_weight is None else problem.log_weight - reference
    return torch.logsumexp(torch.minimum(score, cap), 1) + reference[:, 0]


def _finish(
    problem: Problem, online: Online, kept: list[int], step: int, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    score, total = online.score, online.total
    lse = _log_sum(problem, score, score.new_tensor(online.reference)[:, None])
    if not problem.wants_mean:
        return lse, total[:, :0]
    p = score.exp()
    if len(kept) * step < score.shape[1]:
        out = torch.ones(-(-score.shape[1] // step), dtype=torch.bool)
        out[[i // step for i in kept]] = False
        p.masked_fill_(out.repeat_interleave(step)[: score.shape[1]], 0)
    mean = total / p.sum(1, keepdim=True)
    if shift is not None:
        mean += shift
    return lse, torch.where((lse == -torch.inf)[:, None], problem.query, mean)
