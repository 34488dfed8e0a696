"""The definitions, written out as loops in plain Python; nothing of sparke in here.

Slow and plain on purpose: each function is to be compared with a formula in a paper by eye.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = Sequence[float]
Rows = Sequence[Row]


def lists(values: Any) -> list[list[float]]:
    """A matrix (tensor or array) as lists of Python floats, which are float64."""
    return [[float(v) for v in row] for row in values]


def distance(u: Row, v: Row) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(u, v, strict=True)))


def length(u: Row) -> float:
    return math.sqrt(sum(a * a for a in u))


def unit(u: Row) -> list[float]:
    size = length(u)
    return [a / size for a in u] if size > 0 else list(u)


def gaussian(u: Row, v: Row, s: float) -> float:
    return math.exp(-(distance(u, v) ** 2) / (2 * s**2))


def cosine(u: Row, v: Row) -> float:
    if length(u) == 0 or length(v) == 0:
        return 0.0
    return sum(a * b for a, b in zip(u, v, strict=True)) / (length(u) * length(v))


def similarity(kernel: str, u: Row, v: Row, s: float) -> float:
    return cosine(u, v) if kernel == "cosine" else gaussian(u, v, s)


def prompt_similarity(t: Row, p: Row, s: float) -> float:
    """Gaussian, not squared, on embeddings scaled to length 1."""
    return gaussian(unit(t), unit(p), s)


def matrix(rows: Rows, k: Callable[[Row, Row], float]) -> list[list[float]]:
    return [[k(u, v) for v in rows] for u in rows]


def hadamard(a: Rows, b: Rows) -> list[list[float]]:
    return [[x * y for x, y in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]


def frobenius2(k: Rows) -> float:
    return math.fsum(v * v for row in k for v in row)


def eigenvalues(k: Rows) -> list[float]:
    """Of k / n, rounding below zero taken off."""
    n = len(k)
    return [max(float(v), 0.0) for v in np.linalg.eigvalsh(np.array(k) / n)]


def entropy(probabilities: Sequence[float], q: float) -> float:
    """Rényi entropy of order q."""
    p = [v for v in probabilities if v > 1e-13]
    if q == 1:
        return -math.fsum(v * math.log(v) for v in p)
    if math.isinf(q):
        return -math.log(max(p))
    return math.log(math.fsum(v**q for v in p)) / (1 - q)


# Scores: one query z against a bank.


def log_mean_square(z: Row, rows: Rows, weights: Sequence[float], kernel: str, s: float) -> float:
    """-log of the weighted mean of squared similarities."""
    above = math.fsum(
        w * similarity(kernel, x, z, s) ** 2 for x, w in zip(rows, weights, strict=True)
    )
    return -math.log(above / math.fsum(weights))


def crowding(z: Row, rows: Rows, weights: Sequence[float], kernel: str, s: float) -> float:
    total = math.fsum(
        w * similarity(kernel, x, z, s) ** 2 for x, w in zip(rows, weights, strict=True)
    )
    return 2 * total / (1 + 2 * total)


def vendi(rows: Rows, kernel: str, s: float, q: float) -> float:
    k = matrix(rows, lambda u, v: similarity(kernel, u, v, s))
    return math.exp(entropy(eigenvalues(k), q))


def cond_vendi(
    rows: Rows, prompts: Rows, kernel: str, s: float, s_prompt: float, q: float
) -> float:
    k_x = matrix(rows, lambda u, v: similarity(kernel, u, v, s))
    k_t = matrix(prompts, lambda u, v: prompt_similarity(u, v, s_prompt))
    joint = entropy(eigenvalues(hadamard(k_x, k_t)), q)
    return math.exp(joint - entropy(eigenvalues(k_t), q))


def dpp_gain(z: Row, rows: Rows, kernel: str, s: float, jitter: float) -> float:
    """Log-likelihood of the rows with z less that without, plus that of a sample unlike all."""

    def log_likelihood(x: Rows) -> float:
        k = np.array(matrix(x, lambda u, v: similarity(kernel, u, v, s))) + jitter * np.eye(len(x))
        low, high = (float(np.linalg.slogdet(m)[1]) for m in (k, k + np.eye(len(x))))
        return low - high

    alone = math.log((1 + jitter) / (2 + jitter))
    return log_likelihood([*rows, z]) - log_likelihood(rows) - alone


def rke(rows: Rows, kernel: str, s: float) -> float:
    k = matrix(rows, lambda u, v: similarity(kernel, u, v, s))
    return len(rows) ** 2 / frobenius2(k)


def cond_rke(rows: Rows, prompts: Rows, kernel: str, s: float, s_prompt: float) -> float:
    k_x = matrix(rows, lambda u, v: similarity(kernel, u, v, s))
    k_t = matrix(prompts, lambda u, v: prompt_similarity(u, v, s_prompt))
    return frobenius2(k_t) / frobenius2(hadamard(k_x, k_t))


def in_batch_similarity(rows: Rows, prompts: Rows | None) -> float:
    groups: dict[tuple[float, ...], list[Row]] = {}
    for i, row in enumerate(rows):
        key = () if prompts is None else tuple(prompts[i])
        groups.setdefault(key, []).append(row)
    means = []
    for group in groups.values():
        pairs = [cosine(u, v) for i, u in enumerate(group) for j, v in enumerate(group) if i != j]
        if pairs:
            means.append(sum(pairs) / len(pairs))
    return sum(means) / len(means)


# Bandwidths.


def quantile(values: Sequence[float], q: float) -> float:
    """Linear between order statistics."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def median_rule(rows: Rows, most: int) -> float:
    """Half the median distance, of differing rows where most are alike, 1 where all are."""
    n = len(rows)
    if n > most:
        rows = [rows[i * n // most] for i in range(most)]
    pairs = [distance(u, v) for i, u in enumerate(rows) for v in rows[:i]]
    if not any(pairs):
        return 1.0
    return 0.5 * (quantile(pairs, 0.5) or quantile([d for d in pairs if d > 0], 0.5))


def rows_rule(
    rows: Rows, log_weights: Sequence[float], q: float, factor: float, most: int
) -> float:
    """For one query: the quantile among the newest relevant rows, of all where those are few."""
    relevant = [row for row, w in zip(rows, log_weights, strict=True) if w > math.log(0.1)]
    if len(relevant) < 3:
        relevant = list(rows)
    relevant = relevant[-most:]
    if not relevant:
        return factor
    if len(relevant) == 1:
        return factor * math.sqrt(2) * length(relevant[0])
    pairs = [distance(u, v) for i, u in enumerate(relevant) for v in relevant[:i]]
    return factor * quantile(pairs, q)


def mates_rule(z: Row, rows: Rows, log_weights: Sequence[float], q: float, factor: float) -> float:
    """For one query: the quantile of its distances to relevant mates, to all if there are none."""
    near = [row for row, w in zip(rows, log_weights, strict=True) if w > math.log(0.1)]
    near = near or [row for row, w in zip(rows, log_weights, strict=True) if not math.isinf(w)]
    if not near:
        return factor
    return factor * quantile([distance(z, row) for row in near], q)
