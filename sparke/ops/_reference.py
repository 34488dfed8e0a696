"""The operation in plain torch: what the other implementations are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from sparke.ops._problem import Problem


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """(b,) log sums and (b, d) means. Holds a centred copy of the bank while it runs."""
    center, log_weight = problem.center, problem.log_weight
    query, rows = problem.query - center, problem.rows.to(center) - center
    distance = torch.addmm(query.square().sum(1, keepdim=True), query, rows.mT, alpha=-2)
    distance += rows.square().sum(1)
    terms = distance.clamp_min_(0).mul_(-problem.scale)
    if log_weight is not None:
        terms += log_weight
    lse = torch.logsumexp(terms, 1)
    if not problem.wants_mean:
        return lse, query[:, :0]
    unseen = (lse == -torch.inf)[:, None]
    p = torch.exp(terms - lse[:, None].masked_fill(unseen, 0))  # -inf - -inf would be NaN
    # Added last: a product that starts from the center would round at the size of the center.
    return lse, torch.where(unseen, problem.query, center + p @ rows)
