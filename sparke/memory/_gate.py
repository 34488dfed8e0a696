r"""Prompt-gated reading: which rows of a bank can matter for these prompts.

Prompt weights are known before the first step and do not change during a generation, so rows that
cannot matter are left out once, and every step reads the rest only.

**The rule.** For query i let $w_{ij} \in [0, 1]$ be the weight of row j and
$W_i = \sum_j w_{ij}$, the number of rows that i's prompt is worth. Rows are left out, smallest
weights first, as long as for every query their weights sum to

$$W^{out}_i \le \tfrac{\epsilon}{2} \max(1, W_i).$$

**What it guarantees** for scores of order 2 (rke, cond-rke). With $k_j \le 1$ the kernel of row
$x_j$ and query q, $S = \sum_j w_j k_j^2$, mean $m = \sum_j w_j k_j^2 x_j / S$ and crowding
$a = 2S/(1+2S)$, the gated pull is

$$P = a\,(q - m) = \frac{2 \sum_j w_j k_j^2 (q - x_j)}{1 + 2S}.$$

Split S into what is kept and what is left out, $S = S' + S^{out}$, likewise m, and let a', m', P'
be those of the rows kept. Then

$$P - P' = \frac{2 S^{out}}{1 + 2S} \left[(1 - a')(q - m^{out}) + a'(m' - m^{out})\right],$$

and the bracket is a mean of differences within the bank and q, so at most their diameter D:

$$|P - P'| \le \frac{2 S^{out}}{1 + 2S} D \le 2 W^{out} D,
  \qquad |a - a'| \le \frac{2 S^{out}}{1 + 2S} \le 2 W^{out}.$$

- If $W_i \le 1$ this is at most $\epsilon D$, wherever the rows lie.
- If $W_i > 1$, write $S^{out} = W^{out} \kappa^{out}$ and $S = W \kappa$ with the weighted means
  $\kappa$ of $k^2$. If the rows left out, which belong to other prompts, are on average no nearer
  to the query than the rows at large ($\kappa^{out} \le \kappa$), then
  $2S^{out}/(1+2S) \le S^{out}/S \le \epsilon/2$, and the error is at most $\epsilon D / 2$; so is
  $|m - m'| = |m' - m^{out}| S^{out}/S$. Whatever $\kappa^{out}$ is, the weighted mean of $k^2$,
  whose negative logarithm is the score, changes by at most $\epsilon/2$, and the pull by at most
  $2 W^{out} D$; [left_out][sparke.memory._gate.left_out] tells $W^{out}$.

Without the factor $\max(1, W_i)$ nothing could be left out of a large bank: a million prompts at
right angles to this one weigh $e^{-16}$ each at the published bandwidth and 0.08 together.

**Always kept:** rows that count as rows of the same prompt (weight above 0.1) and the newest 256
rows, because bandwidths are calibrated on them ([QuantileRule][sparke.kernels.QuantileRule]); rows
come in the order they were committed. Calibration is therefore the same, gated or not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError
from sparke.kernels import RELEVANT, SAMPLED_ROWS, prompt_log_weight
from sparke.protocols import Weigh

TOLERANCE = 1e-3
"""Default of epsilon."""
COND_BANDWIDTH = 0.35
"""Of the published prompt kernel, used when the reader brings no kernel of its own."""
CHUNK_BYTES = 16 << 20
"""Prompts are weighed in chunks of at most this many bytes in float32."""


def check_tolerance(value: float) -> float:
    """`value` if it is in [0, 1)."""
    if checks.positive("tolerance", value, zero=True) >= 1:
        raise ArgumentError(f"tolerance must be at least 0 and below 1, got {value!r}.")
    return float(value)


def chunk_rows(width: int) -> int:
    """Rows of prompts of this width to weigh at once."""
    return max(1, CHUNK_BYTES // (4 * max(width, 1)))


def log_weights(query: Tensor, prompts: Iterable[Tensor], weigh: Weigh | None, rows: int) -> Tensor:
    """(b, rows) log weights of rows whose prompts come in chunks; no (b, n, c) is ever formed.

    Raises:
        ShapeError: `weigh` returned another shape than (b, rows of the chunk).
    """
    whole, at = query.new_empty(len(query), 0), 0
    for chunk in prompts:
        cond = chunk.to(query.device).float()
        if weigh is None:
            weight = prompt_log_weight(query, cond, COND_BANDWIDTH)
        else:
            weight = weigh(query, cond)
        weight = checks.shape("weigh()", weight, (len(query), len(cond))).detach()
        if len(cond) == rows:
            return weight
        if not at:
            # Made once: small blocks kept between large ones that are freed litter the heap.
            whole = weight.new_empty(len(query), rows)
        whole[:, at : at + len(cond)] = weight
        at += len(cond)
    return whole


def keep(log_weight: Tensor, tolerance: float, most: int | None = None) -> Tensor | None:
    """(m,) numbers of the rows to read, ascending; None for all of them.

    Args:
        log_weight: (b, n), rows in the order they were committed.
        tolerance: epsilon of the rule above; 0 keeps every row.
        most: at most this many rows (but never fewer than 256), the heaviest, the newest among
            equals, even where the rule would keep more.
    """
    rows = log_weight.shape[1]
    if rows <= SAMPLED_ROWS:
        return None
    index = None
    if tolerance > 0:
        out = _negligible(log_weight, tolerance)
        if len(out):
            mask = torch.ones(rows, dtype=torch.bool, device=log_weight.device)
            mask[out] = False
            index = mask.nonzero().squeeze(1)
    most = rows if most is None else max(most, SAMPLED_ROWS)
    if (rows if index is None else len(index)) <= most:
        return index
    weight = torch.stack([_largest(w) for w in log_weight.split(1)]).amax(0)
    weight[-SAMPLED_ROWS:] = torch.inf
    # Stable and ascending: among equal weights the newest come last and are kept.
    return torch.sort(weight, stable=True).indices[-most:].sort().values


def left_out(log_weight: Tensor, index: Tensor | None) -> Tensor:
    """(b,) summed weight of the rows that `index` leaves out, in float64."""
    if index is None:
        return log_weight.new_zeros(len(log_weight), dtype=torch.float64)
    out = torch.ones(log_weight.shape[1], dtype=torch.bool, device=log_weight.device)
    out[index] = False
    return torch.stack([w[out].exp().sum(dtype=torch.float64) for w in log_weight])


def _largest(weight: Tensor) -> Tensor:
    """(1, n) -> (n,), NaN first in line: who reads the row finds the damage."""
    return weight[0].nan_to_num(nan=torch.inf)


def _negligible(log_weight: Tensor, tolerance: float) -> Tensor:
    """Numbers of the rows that the rule leaves out."""
    # One query at a time: temporaries are (n,), however large the batch.
    budgets = [tolerance / 2 * w.exp().sum(dtype=torch.float64).clamp_min(1) for w in log_weight]
    share = log_weight.new_zeros(log_weight.shape[1])
    for weight, budget in zip(log_weight, budgets, strict=True):
        relevant = torch.where(weight > RELEVANT, torch.inf, weight.exp() / budget.to(weight))
        share = torch.maximum(share, relevant)
    share[-SAMPLED_ROWS:] = torch.inf
    candidates = (share <= 1).nonzero().squeeze(1)  # not so for NaN, which is kept
    if not len(candidates):
        return candidates
    weights = [w[candidates].exp() for w in log_weight]
    if all(
        bool(w.sum(dtype=torch.float64) <= budget)
        for w, budget in zip(weights, budgets, strict=True)
    ):
        return candidates
    order = share[candidates].argsort()
    count = len(order)
    for weight, budget in zip(weights, budgets, strict=True):
        sums = weight[order].cumsum(0, dtype=torch.float64)
        count = min(count, int(torch.searchsorted(sums, budget, right=True)))
    return candidates[order[:count]]
