"""Measures against a reference, and of labels, written out from the papers; nothing of sparke.

Slow and plain on purpose: each function is to be compared with a formula in a paper by eye.
"""

import math
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from tests.oracles import Rows, entropy, similarity, unit


def ken(x: Rows, y: Rows, kernel: str, s: float, eta: float) -> float:
    """By the matrix of the paper, which is not symmetric: real eigenvalues all the same."""
    n, m = len(x), len(y)
    joint = [*x, *y]
    k = np.zeros((n + m, n + m))
    for i, u in enumerate(joint):
        for j, v in enumerate(joint):
            rows, columns = (1.0 if i < n else -math.sqrt(eta)), (1.0 if j < n else math.sqrt(eta))
            size = math.sqrt((n if i < n else m) * (n if j < n else m))
            k[i, j] = rows * columns * similarity(kernel, u, v, s) / size
    positive = [v for v in np.linalg.eigvals(k).real if v > 1e-12]
    total = math.fsum(positive)
    return math.fsum(v * math.log(total / v) for v in positive)


def relative_rke(x: Rows, y: Rows, kernel: str, s: float) -> float:
    k = np.array([[similarity(kernel, u, v, s) for v in y] for u in x])
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(k @ k.T), 0))
    return -math.log(math.fsum(values) ** 2 / (len(x) * len(y)))


def negative_log_fidelity(x: Rows, y: Rows) -> float:
    """Of the covariances of unit rows: F = (tr sqrt(sqrt(A) B sqrt(A)))^2."""

    def covariance(rows: Rows) -> Any:
        return sum(np.outer(unit(u), unit(u)) for u in rows) / len(rows)

    values, vectors = np.linalg.eigh(covariance(x))
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ covariance(y) @ root)
    return -2 * math.log(math.fsum(math.sqrt(max(float(v), 0)) for v in inner))


def prdc(x: Rows, y: Rows, k: int) -> tuple[float, float, float, float]:
    """In fractions: no rounding, so that rows at exactly a radius are outside."""

    def square(u: Sequence[float], v: Sequence[float]) -> Fraction:
        pairs = zip(u, v, strict=True)
        return sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in pairs), Fraction())

    def radii(rows: Rows) -> list[Fraction]:
        return [
            sorted(square(u, v) for j, v in enumerate(rows) if j != i)[k - 1]
            for i, u in enumerate(rows)
        ]

    around_x, around_y = radii(x), radii(y)
    inside = [[square(u, v) < r for v, r in zip(y, around_y, strict=True)] for u in x]
    reached = [[square(u, v) < r for u, r in zip(x, around_x, strict=True)] for v in y]
    precision = sum(any(row) for row in inside) / len(x)
    recall = sum(any(row) for row in reached) / len(y)
    density = sum(sum(row) for row in inside) / (k * len(x))
    coverage = sum(any(row[j] for row in inside) for j in range(len(y))) / len(y)
    return precision, recall, density, coverage


def effective_modes(labels: Sequence[Hashable], prompts: Sequence[Hashable], order: float) -> float:
    numbers = []
    for prompt in dict.fromkeys(prompts):
        of_prompt = [label for label, p in zip(labels, prompts, strict=True) if p == prompt]
        shares = [of_prompt.count(label) / len(of_prompt) for label in set(of_prompt)]
        numbers.append(math.exp(entropy(shares, order)))
    return sum(numbers) / len(numbers)
