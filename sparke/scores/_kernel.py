"""What the kernel scores share: weights of rows, and sums of squared kernels in log form."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from sparke import checks, ops
from sparke.errors import MissingPrompts, ShapeError
from sparke.kernels import QuantileRule, cosine, normalize, squared_distances
from sparke.protocols import Features, Selection, Spread

Bandwidth: TypeAlias = float | Tensor | QuantileRule
S = TypeVar("S")

LOG2 = math.log(2)
TINY = 1e-12
"""Added to squared cosines so that rows at right angles keep a finite logarithm."""


def check_bandwidth(name: str, value: Bandwidth) -> None:
    """Raise unless `value` is a rule, a positive number, or a tensor of one or (b, 1) of them."""
    if isinstance(value, Tensor):
        checks.positives(name, value)
    elif not isinstance(value, QuantileRule):
        checks.positive(name, value)


def width_of(value: Bandwidth, query: Features, bank: Features) -> float | Tensor:
    """A number, or (b, 1) numbers where the bandwidth is a rule or was read off per query."""
    if isinstance(value, QuantileRule):
        return value(query, bank)
    if not isinstance(value, Tensor):
        return value
    if value.ndim and len(value) not in (1, len(query)):
        raise ShapeError(
            f"a bandwidth for each of {len(value)} queries was given, and there are {len(query)}. "
            "Give a single number, or one for each query."
        )
    return value.to(query.x)


def fixed(value: Bandwidth, bank: Features) -> Bandwidth:
    """The bandwidth for these rows: a rule becomes (b, 1) numbers, b from the bank's weights."""
    if not isinstance(value, QuantileRule):
        return value
    bank = bank.witnesses() if isinstance(bank, Spread) else bank
    weight = bank.log_weight if isinstance(bank, Selection) else None
    queries = 1 if weight is None else weight.shape[0]
    return value(Features(bank.x.new_zeros(queries, bank.x.shape[1])), bank)


def calibrated(score: S, option: str, bank: Features) -> S:
    """The same score with a rule's bandwidth, the attribute `option`, read off this bank."""
    made = copy.copy(score)
    # Past the checks of a new one: looking at the numbers would make a device wait, and where a
    # rule finds none that will do, it is for the guider to say at which step, and to go on.
    object.__setattr__(made, option, fixed(getattr(score, option), bank))
    return made


def need_prompts(score: str, query: Features, bank: Features) -> None:
    """Raise unless both sides carry prompts."""
    for side, rows in (("query", query), ("bank", bank)):
        if rows.cond is None and len(rows):
            raise MissingPrompts(
                f"score={score!r} compares prompts, but {side}.cond is None. Give prompt_embeds "
                "(one row per sample), or use the unconditional score."
            )


def given_weight(query: Features, bank: Features) -> Tensor:
    """(b, n) log weights the bank came with, or zeros."""
    weight = bank.log_weight if isinstance(bank, Selection) else None
    if weight is None:
        return query.x.new_zeros(len(query), len(bank))
    return weight.to(query.x)


def check_selection(query: Features, bank: Features) -> None:
    """Raise unless query and bank compare and the bank's weights are (b, n)."""
    checks.pair(query, bank)
    if isinstance(bank, Selection) and bank.log_weight is not None:
        checks.shape("bank.log_weight", bank.log_weight, (len(query), len(bank)))


@dataclass(frozen=True)
class SquaredKernel:
    r"""$-\log \sum_j w_j k(x_j, z)^2 / \sum_j w_j$, its gradient in z, and the crowding at z."""

    kernel: str
    bandwidth: Bandwidth

    def value(self, query: Features, bank: Features, log_weight: Tensor) -> Tensor:
        """(b,) scores; 0 where no row has weight. Over ranks they carry no gradient."""
        if isinstance(bank, Spread):
            total, _ = bank.across(partial(_weights_alone, len(bank)), query.x, 1.0)
            value = total - self._across(query, bank)[0]
            return torch.where(total.isfinite(), value, 0.0)
        if not len(bank):
            return query.x.sum(-1) * 0
        terms, _ = self._terms(query, bank)
        seen, weight = _seen(log_weight)
        value = torch.logsumexp(weight, -1) - torch.logsumexp(terms + weight, -1)
        return torch.where(seen.squeeze(-1), value, 0.0)

    def pull(self, query: Features, bank: Features, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        r"""(b, d) gradient and (b,) crowding.

        Attention whose keys and values are the same rows: for the Gaussian kernel
        $\frac{2}{s^2}(z - \sum_j p_j x_j)$ with $p = \operatorname{softmax}(\log k^2 + \log w)$.
        The crowding is $2S/(1+2S)$ with $S = \sum_j w_j k_j^2$.
        """
        if isinstance(bank, Spread):
            lse, mean = self._across(query, bank)
            if self.kernel == "cosine":
                away = _off_the_ray(query.x, mean)
            else:
                away = (query.x - mean) * (2 / self.width(query, bank) ** 2)
            return away, torch.sigmoid(lse + LOG2)
        if not len(bank):
            return torch.zeros_like(query.x), query.x.new_zeros(len(query))
        if self.kernel == "gaussian":
            width = self.width(query, bank)
            rows, norms, center = _known(query, bank)
            lse, mean = ops.pull(query.x, rows, log_weight, width, norms=norms, center=center)
            away = (query.x - mean.to(query.x)) * (2 / width**2)
            return away, torch.sigmoid(lse.to(query.x) + LOG2)
        terms, _ = self._terms(query, bank)
        seen, weight = _seen(log_weight)
        away = _away_by_angle(query.x, bank.x.to(query.x), torch.softmax(terms + weight, -1))
        return torch.where(seen, away, 0.0), _crowding(terms, log_weight)

    def width(self, query: Features, bank: Features) -> float | Tensor:
        """The bandwidth; the cosine kernel has none and gets 1."""
        return 1.0 if self.kernel == "cosine" else width_of(self.bandwidth, query, bank)

    def crowding(self, query: Features, bank: Features, log_weight: Tensor) -> Tensor:
        """(b,) the crowding alone."""
        if isinstance(bank, Spread):
            return torch.sigmoid(self._across(query, bank)[0] + LOG2)
        if not len(bank):
            return query.x.new_zeros(len(query))
        if self.kernel == "gaussian":
            width = self.width(query, bank)
            rows, norms, center = _known(query, bank)
            lse = ops.log_sum(query.x, rows, log_weight, width, norms=norms, center=center)
            return torch.sigmoid(lse.to(query.x) + LOG2)
        return _crowding(self._terms(query, bank)[0], log_weight)

    def _across(self, query: Features, bank: Features) -> tuple[Tensor, Tensor]:
        """Log sums and means over the rows of all ranks; of scaled unit rows for the cosine."""
        assert isinstance(bank, Spread)

        def read(z: Tensor, weight: Tensor | None, width: Tensor) -> tuple[Tensor, Tensor]:
            if self.kernel == "cosine":
                return _angles(z, bank.x.to(z), weight)
            rows, norms, center = _known(Features(z), bank)
            return ops.pull(z, rows, weight, width, norms=norms, center=center)

        return bank.across(read, query.x, self.width(query, bank))

    def _terms(self, query: Features, bank: Features) -> tuple[Tensor, float | Tensor]:
        """(b, n) logarithms of the squared kernel, and the bandwidth."""
        rows = bank.x.to(query.x)
        width = self.width(query, bank)
        if self.kernel == "cosine":
            return (cosine(query.x, rows).square() + TINY).log(), width
        return -squared_distances(query.x, rows) / width**2, width


def _known(query: Features, bank: Features) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows, and what was computed of them when they were selected."""
    rows = bank.x.to(query.x.device)
    return (rows, bank.norms, bank.center) if isinstance(bank, Selection) else (rows, None, None)


def _crowding(terms: Tensor, log_weight: Tensor) -> Tensor:
    return torch.sigmoid(torch.logsumexp(terms + log_weight, -1) + LOG2)


def _seen(log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """(b, 1) whether any row has weight, and weights without rows of nothing but -inf.

    Replaced before, not after, the sums: -inf - -inf would poison the gradient too.
    """
    seen = log_weight.isfinite().any(-1, keepdim=True)
    return seen, torch.where(seen, log_weight, 0.0)


def _weights_alone(
    rows: int, query: Tensor, weight: Tensor | None, width: Tensor
) -> tuple[Tensor, Tensor]:
    """Log sums of the weights: a kernel of 1 everywhere."""
    weight = query.new_zeros(len(query), rows) if weight is None else weight
    return torch.logsumexp(weight, -1), query


def _angles(query: Tensor, rows: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log sums of squared cosines, and means of unit rows over their cosine with the query."""
    unit_rows = normalize(rows)
    c = normalize(query) @ unit_rows.mT
    terms = (c.square() + TINY).log()
    terms = terms if weight is None else terms + weight
    p = torch.softmax(terms, -1)
    return torch.logsumexp(terms, -1), (p * c / (c.square() + TINY)) @ unit_rows


def _away_by_angle(query: Tensor, rows: Tensor, p: Tensor) -> Tensor:
    unit_rows = normalize(rows)
    c = normalize(query) @ unit_rows.mT
    return _off_the_ray(query, (p * c / (c.square() + TINY)) @ unit_rows)


def _off_the_ray(query: Tensor, mean: Tensor) -> Tensor:
    """-2/|q| times the part of `mean` at right angles to q."""
    unit_query = normalize(query)
    towards = mean - (mean * unit_query).sum(-1, keepdim=True) * unit_query
    length = query.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(query.dtype).tiny ** 0.5)
    away: Tensor = -2 * towards / length
    return away
