"""Repulsion of a few rows from each other, in many small moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from sparke.errors import GuidanceWarning
from sparke.guidance import _vectors
from sparke.guidance._contextual_span import Span, Whole
from sparke.protocols import Crowded, Features, PromptWeighted, Score, Selection
from sparke.scores import Vendi

__all__ = ["apart", "entropy_gradient", "finite", "read", "rounding", "sized"]

Reading: TypeAlias = tuple[Tensor, Tensor]
"""(B, d) gradient of a score, and (B,) how much of it counts."""

OURS = "sparke.scores."
"""Scores from here are made of inner products and distances."""


def apart(
    score: Score,
    tokens: Tensor,
    cond: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None = None,
    *,
    eta: float,
    rounds: int,
    normalize: bool,
) -> Tensor:
    r"""(B, T, C) displacements of samples that repel each other.

    ``rounds`` times, $f_i \leftarrow f_i + \frac{\eta}{M} \|f_i\| \frac{g_i}{\|g_i\|}$ with g the
    gradient of the score; without `normalize`, $f_i \leftarrow f_i + \frac{\eta}{M} g_i$.

    Args:
        score: read by each row against the others; of Vendi, its logarithm.
        tokens: (B, T, C), float32 or better; each sample's are one row f.
        cond: (B, c) prompts or None.
        weight: (B, B) log weights of the others, -inf on the diagonal; None where there are none.
        mask: (B, T), true for tokens that may move; the others are at zero.
        eta: length of all moves together, in lengths of the row, or as published.
        rounds: M.
        normalize: as above.
    """
    rows, change = tokens.flatten(1), torch.zeros_like(tokens)
    # One broken sample must not break its mates: they do not see it.
    good = torch.isfinite(rows).all(1).nonzero().squeeze(1)
    if weight is None or len(good) < 2:
        return change
    if len(good) < len(rows):
        rows, weight = rows[good], weight[good][:, good]
        cond = None if cond is None else cond[good]
        mask = None if mask is None else mask[good]
    span = _span(score, rows, mask)
    if span.one_point:
        return change
    start = moved = span.coordinates
    direction = _direction(score, None if cond is None else cond.to(start), weight.to(start))
    noise = rounding(tokens)
    for _ in range(rounds):
        gradient, share = direction(moved)
        length = moved.norm(dim=1) if normalize else None
        move = sized(span.within(gradient), moved, length, noise)
        moved = moved + eta / rounds * share[:, None] * move
    moves = span.back(finite((moved - start).to(tokens.dtype))).view(-1, *tokens.shape[1:])
    if len(good) == len(tokens):
        return moves
    change[good] = moves
    return change


def finite(moves: Tensor) -> Tensor:
    """(B, ...) displacements; those of samples that came out infinite are left out."""
    good = torch.isfinite(moves.flatten(1)).all(1)
    if bool(good.all()):
        return moves
    warnings.warn(
        f"contextual repulsion is not finite for {int((~good).sum())} of {len(good)} samples; "
        "they go on without. A smaller eta would do.",
        GuidanceWarning,
        stacklevel=2,
    )
    return torch.where(_vectors.rowwise(good, moves), moves, 0.0)


def rounding(tokens: Tensor) -> float:
    """A change of the score, per move of a token's length, that is rounding and nothing else."""
    return 1e-9 if tokens.dtype == torch.float64 else 1e-5


def sized(gradient: Tensor, rows: Tensor, length: Tensor | None, noise: float) -> Tensor:
    """(B, d) gradients at these lengths, or at their own if None.

    Where a row is at a maximum, all that is left of its gradient is rounding: it stays there.
    """
    if length is None:
        return gradient
    size = gradient.norm(dim=1)
    felt = size * rows.norm(dim=1) > noise
    return torch.where(felt, length / torch.where(felt, size, 1.0), 0.0)[:, None] * gradient


def read(score: Score, query: Features, bank: Selection) -> Reading:
    """A score's gradient, and its crowding where it weighs prompts.

    Where prompts differ there is nothing to repel, and only the crowding tells: a direction has
    the same length however little the rows it comes from weigh.
    """
    gradient = _vectors.ascent(score, query, bank)
    if isinstance(score, PromptWeighted) and isinstance(score, Crowded):
        return gradient, score.crowding(query, bank)
    return gradient, gradient.new_ones(len(gradient))


def entropy_gradient(rows: Tensor) -> Tensor:
    r"""(B, d) gradient of the Vendi entropy of the rows' cosine kernel.

    With $u_i = f_i / \|f_i\|$ and $K = U U^T / B$, $\partial H / \partial U = -\frac{2}{B} (\log K
    + 1) U$, of which the part along $u_i$ does not turn row i. Directions without rows have
    eigenvalue 0 and no part in U.
    """
    length = rows.norm(dim=1, keepdim=True)
    unit = rows / torch.where(length > 0, length, 1.0)
    values, vectors = torch.linalg.eigh(unit @ unit.mT / len(rows))
    real = values > len(rows) * torch.finfo(rows.dtype).eps
    slope = torch.where(real, -1 - torch.where(real, values, 1.0).log(), 0.0)
    whole = 2 / len(rows) * (vectors * slope) @ (vectors.mT @ unit)
    across = whole - (whole * unit).sum(1, keepdim=True) * unit
    return torch.where(length > 0, across / torch.where(length > 0, length, 1.0), 0.0)


def _span(score: Score, rows: Tensor, mask: Tensor | None) -> Span | Whole:
    free = None
    if mask is not None and bool((mask != mask[0]).any()):
        free = mask.repeat_interleave(rows.shape[1] // mask.shape[1], 1)
    elif type(score).__module__.startswith(OURS):
        return Span(rows)
    return Whole(rows, free)


def _direction(score: Score, cond: Tensor | None, weight: Tensor) -> Callable[[Tensor], Reading]:
    if isinstance(score, Vendi):
        if score.kernel == "cosine" and score.order == 1 and len(weight) <= score.max_rows:
            return lambda rows: (entropy_gradient(rows), rows.new_ones(len(rows)))
        # The entropy, published, is the logarithm of the number.
        return lambda rows: _over_value(score, Features(rows, cond), weight)
    return lambda rows: read(score, Features(rows, cond), _mates(rows, cond, weight))


def _mates(rows: Tensor, cond: Tensor | None, weight: Tensor) -> Selection:
    return Selection(rows, cond, weight, mates=True)


def _over_value(score: Vendi, query: Features, weight: Tensor) -> Reading:
    mates = _mates(query.x, query.cond, weight)
    gradient, share = read(score, query, mates)
    with torch.no_grad():
        return gradient / score(query, mates)[:, None], share
