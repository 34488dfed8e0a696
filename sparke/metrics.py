r"""How varied a finished set is, each measure as one number.

The same quantities the scores are built on, taken of a whole set. All but
[in_batch_similarity][sparke.metrics.in_batch_similarity] are effective numbers: 1 when all samples
are alike, n when all differ. One signature serves all five, so they can be called in a loop; what a
measure has no use for it ignores, and says so.

Everything is computed in float64. The Gaussian kernel is
$k(u, v) = e^{-\|u - v\|^2 / (2 s^2)}$ with `bandwidth` s in the units of the features, never
squared before it is handed on.

Without a bandwidth the rule is s = 0.5 times the median distance between rows, of at most 2048 of
them at even strides. It has no randomness, but it follows the data: a set twice as wide gets a
bandwidth twice as wide and the same value. **To compare two sets, give both the same bandwidth.**

None of these measures quality: noise is as varied as can be. Read them beside a measure of
fidelity.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sparke import checks
from sparke.entropy import check_order, entropy
from sparke.errors import ArgumentError, MissingPrompts, ShapeError
from sparke.kernels import KERNELS, gaussian, kernel_matrix, normalize

__all__ = ["cond_rke", "cond_vendi", "in_batch_similarity", "rke", "vendi"]

Rows: TypeAlias = "Tensor | np.ndarray[Any, Any]"

BLOCK = 1024
"""Sums over pairs are taken in tiles of this many rows squared."""
MEDIAN_ROWS = 2048
"""At most this many rows are compared pairwise for a bandwidth."""


@torch.no_grad()
def vendi(
    features: Rows,
    prompt_embeds: Rows | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    cond_bandwidth: float = 0.35,
    order: float = 1.0,
) -> float:
    r"""Vendi score of a set.

    $$V_q = \exp H_q(K/n), \qquad H_q = \tfrac{1}{1-q} \log \sum_i \lambda_i^q, \quad
      H_1 = -\sum_i \lambda_i \log \lambda_i$$

    over the eigenvalues of the kernel matrix (arXiv 2210.02410; order q: arXiv 2310.12952). Order 2
    is [rke][sparke.metrics.rke] by way of eigenvalues. O(n^3) time and O(n^2) memory; with the
    cosine kernel and d < n the d x d covariance, which has the same eigenvalues, is used instead.

    It knows nothing of prompts: a set over many prompts is varied because the prompts are.

    Args:
        features: (n, d), one row a sample, tensor or array of any real dtype.
        prompt_embeds: accepted for the shared signature, unused.
        kernel: ``"gaussian"`` or ``"cosine"``.
        bandwidth: of the Gaussian kernel, in the units of `features`; None: the module's rule.
        cond_bandwidth: unused.
        order: q above 0, infinity included.

    Returns:
        Effective number of distinct samples, 1 to n.

    Raises:
        ShapeError: `features` is not a matrix.
        ArgumentError: it is empty or not finite, a row of zeros meets the cosine kernel, or an
            option has a forbidden value.
    """
    check_order(order)
    x, s = _samples(features, kernel, bandwidth)
    if kernel == "cosine" and x.shape[1] < len(x):
        unit = normalize(x)
        return _number(entropy(unit.mT @ unit / len(x), order).exp())
    return _number(entropy(kernel_matrix(x, x, kernel, s) / len(x), order).exp())


@torch.no_grad()
def rke(
    features: Rows,
    prompt_embeds: Rows | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    cond_bandwidth: float = 0.35,
) -> float:
    r"""Rényi kernel entropy of order 2 of a set, as an effective number (RKE mode count).

    $$RKE = \frac{1}{\|K/n\|_F^2} = \frac{n^2}{\sum_{ij} k(x_i, x_j)^2}$$

    (Jalali, Li and Farnia, "An Information-Theoretic Evaluation of Generative Models in Learning
    Multi-modal Distributions", NeurIPS 2023.) O(n^2 d) time, in tiles: no n x n matrix is kept.

    It knows nothing of prompts, and counts what the kernel can tell apart: with a narrow bandwidth
    everything differs.

    Args:
        features: (n, d), one row a sample, tensor or array of any real dtype.
        prompt_embeds: accepted for the shared signature, unused.
        kernel: ``"gaussian"`` or ``"cosine"``.
        bandwidth: of the Gaussian kernel, in the units of `features`; None: the module's rule.
        cond_bandwidth: unused.

    Returns:
        Effective number of distinct samples, 1 to n.

    Raises:
        ShapeError: `features` is not a matrix.
        ArgumentError: it is empty or not finite, a row of zeros meets the cosine kernel, or an
            option has a forbidden value.
    """
    x, s = _samples(features, kernel, bandwidth)
    total = x.new_zeros(())
    for rows, columns, times in _tiles(len(x)):
        total += times * kernel_matrix(x[rows], x[columns], kernel, s).square().sum()
    return _number(len(x) ** 2 / total)


@torch.no_grad()
def cond_vendi(
    features: Rows,
    prompt_embeds: Rows | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    cond_bandwidth: float = 0.35,
    order: float = 1.0,
) -> float:
    r"""Conditional Vendi score: effective number of distinct samples at equal prompts.

    $$V_q(X \mid T) = \exp\left(H_q(\tfrac{1}{n} K_X \circ K_T) - H_q(\tfrac{1}{n} K_T)\right)$$

    (as used in SPARKE, arXiv 2506.10173) with $K_T$ Gaussian on L2-normalised prompt embeddings.
    One prompt for all gives [vendi][sparke.metrics.vendi]; prompts all far apart give 1, for then
    no two samples can be compared. O(n^3) time and O(n^2) memory.

    Args:
        features: (n, d), one row a sample, tensor or array of any real dtype.
        prompt_embeds: (n, c), the prompt of each sample.
        kernel: ``"gaussian"`` or ``"cosine"``, on samples.
        bandwidth: of the Gaussian kernel, in the units of `features`; None: the module's rule.
        cond_bandwidth: s_T on normalised embeddings, between which distances are 0 to 2.
        order: q above 0, infinity included.

    Returns:
        Effective number of distinct samples per prompt.

    Raises:
        MissingPrompts: `prompt_embeds` is None.
        ShapeError: an argument is not a matrix, or the rows do not match.
        ArgumentError: one is empty or not finite, a row of zeros meets the cosine kernel, or an
            option has a forbidden value.
    """
    check_order(order)
    x, s = _samples(features, kernel, bandwidth)
    t = _prompts("cond_vendi", prompt_embeds, x, cond_bandwidth)
    k_t = gaussian(t, t, cond_bandwidth) / len(t)
    joint = entropy(kernel_matrix(x, x, kernel, s) * k_t, order)
    return _number((joint - entropy(k_t, order)).exp())


@torch.no_grad()
def cond_rke(
    features: Rows,
    prompt_embeds: Rows | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    cond_bandwidth: float = 0.35,
) -> float:
    r"""Conditional RKE: effective number of distinct samples at equal prompts, of order 2.

    $$\text{Cond-RKE}(X \mid T) = \frac{\|K_T\|_F^2}{\|K_X \circ K_T\|_F^2}$$

    (SPARKE, arXiv 2506.10173) with $K_T$ Gaussian on L2-normalised prompt embeddings; the norm
    squares both kernels. O(n^2 (d + c)) time, in tiles: no n x n matrix is kept.

    Args:
        features: (n, d), one row a sample, tensor or array of any real dtype.
        prompt_embeds: (n, c), the prompt of each sample.
        kernel: ``"gaussian"`` or ``"cosine"``, on samples.
        bandwidth: of the Gaussian kernel, in the units of `features`; None: the module's rule.
        cond_bandwidth: s_T on normalised embeddings, between which distances are 0 to 2.

    Returns:
        Effective number of distinct samples per prompt, 1 to n.

    Raises:
        MissingPrompts: `prompt_embeds` is None.
        ShapeError: an argument is not a matrix, or the rows do not match.
        ArgumentError: one is empty or not finite, a row of zeros meets the cosine kernel, or an
            option has a forbidden value.
    """
    x, s = _samples(features, kernel, bandwidth)
    t = _prompts("cond_rke", prompt_embeds, x, cond_bandwidth)
    prompts, joint = x.new_zeros(()), x.new_zeros(())
    for rows, columns, times in _tiles(len(x)):
        k_t = gaussian(t[rows], t[columns], cond_bandwidth)
        prompts += times * k_t.square().sum()
        joint += times * (kernel_matrix(x[rows], x[columns], kernel, s) * k_t).square().sum()
    return _number(prompts / joint)


@torch.no_grad()
def in_batch_similarity(
    features: Rows,
    prompt_embeds: Rows | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    cond_bandwidth: float = 0.35,
) -> float:
    r"""Mean cosine between samples of one prompt, averaged over prompts; lower is more varied.

    $$\frac{1}{|G|} \sum_{g \in G} \frac{1}{|g| (|g| - 1)} \sum_{i \ne j \in g}
      \frac{\langle x_i, x_j \rangle}{\|x_i\| \|x_j\|}$$

    over the groups G of at least two samples whose rows of `prompt_embeds` are identical (the
    measure of SPARKE, arXiv 2506.10173, which prints it times 100). O(n d).

    It is no effective number, and its zero depends on the features: embeddings of unrelated
    pictures are seldom at right angles.

    Args:
        features: (n, d), one row a sample, tensor or array of any real dtype.
        prompt_embeds: (n, c), the prompt of each sample; all samples are of one prompt if None.
        kernel: accepted for the shared signature, unused; it is always the cosine.
        bandwidth: unused.
        cond_bandwidth: unused.

    Returns:
        A mean cosine, -1 to 1.

    Raises:
        ShapeError: an argument is not a matrix, or the rows do not match.
        ArgumentError: one is empty or not finite, a sample is a row of zeros, or no prompt has two
            samples.
    """
    x = _matrix("features", features)
    _no_zero_rows(x)
    if prompt_embeds is None:
        group = torch.zeros(len(x), dtype=torch.long, device=x.device)
    else:
        prompts = checks.rows_of("prompt_embeds", _matrix("prompt_embeds", prompt_embeds), len(x))
        group = torch.unique(prompts.to(x.device), dim=0, return_inverse=True)[1]
    unit = normalize(x)
    size = torch.bincount(group).to(x)
    total = x.new_zeros(len(size), x.shape[1]).index_add_(0, group, unit).square().sum(1)
    alone = x.new_zeros(len(size)).index_add_(0, group, unit.square().sum(1))
    pairs = size > 1
    if not bool(pairs.any()):
        raise ArgumentError(
            f"features holds {len(x)} samples and no two of one prompt. Samples belong together "
            "where their rows of prompt_embeds are identical."
        )
    return _number(((total - alone) / (size * (size - 1)))[pairs].mean())


def _matrix(name: str, value: Rows) -> Tensor:
    """(n, width) in float64, finite, at least one row and column."""
    x: Tensor
    if isinstance(value, Tensor):
        x = value.detach()
        x = x.cpu() if x.device.type == "mps" else x  # which has no float64
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise ArgumentError(f"{name} must hold real numbers, got dtype {array.dtype}.")
        x = torch.tensor(array.astype(np.float64))
    if x.is_complex():
        raise ArgumentError(f"{name} must hold real numbers, got dtype {x.dtype}.")
    if x.ndim != 2:
        raise ShapeError(
            f"{name} must be (rows, width), got shape {tuple(x.shape)}. "
            "Flatten each sample into one row first."
        )
    if not x.numel():
        raise ArgumentError(f"{name} is empty, got shape {tuple(x.shape)}.")
    x = checks.finite(name, x.double())
    checks.finite(f"squared length of the rows of {name}", x.square().sum(1, keepdim=True))
    return x


def _samples(features: Rows, kernel: str, bandwidth: float | None) -> tuple[Tensor, float]:
    """Checked rows and their bandwidth."""
    checks.choice("kernel", kernel, KERNELS)
    if bandwidth is not None:
        checks.positive("bandwidth", bandwidth)
    x = _matrix("features", features)
    if kernel == "cosine":
        _no_zero_rows(x)
        return x, 1.0
    # Distances do not change, and lose fewer digits to a common offset.
    x = x - x.mean(0)
    return x, _rule(x) if bandwidth is None else float(bandwidth)


def _rule(x: Tensor) -> float:
    """Half the median distance; of differing rows where most are alike; 1 where all are."""
    if len(x) > MEDIAN_ROWS:
        x = x[torch.arange(MEDIAN_ROWS, device=x.device) * len(x) // MEDIAN_ROWS]
    distance = torch.pdist(x)
    if not bool(distance.any()):
        return 1.0
    return 0.5 * (_median(distance) or _median(distance[distance > 0]))


def _median(values: Tensor) -> float:
    return float(values.quantile(0.5))


def _no_zero_rows(x: Tensor) -> None:
    zero = (x == 0).all(1)
    if bool(zero.any()):
        raise ArgumentError(
            f"features row {int(zero.nonzero()[0])} of {len(x)} is zero and has no cosine to "
            "anything. Drop that sample, or use the Gaussian kernel."
        )


def _prompts(metric: str, value: Rows | None, x: Tensor, bandwidth: float) -> Tensor:
    """(n, c) normalised prompt embeddings, one for each row of x."""
    checks.positive("cond_bandwidth", bandwidth)
    if value is None:
        raise MissingPrompts(
            f"{metric} compares samples at equal prompts, but prompt_embeds is None. Give one row "
            f"per sample, or use {metric.removeprefix('cond_')}."
        )
    prompts = checks.rows_of("prompt_embeds", _matrix("prompt_embeds", value), len(x))
    return normalize(prompts.to(x.device))


def _tiles(n: int) -> Iterator[tuple[slice, slice, int]]:
    """The upper triangle of an n x n matrix in tiles, and how often each counts."""
    for i in range(0, n, BLOCK):
        for j in range(i, n, BLOCK):
            yield slice(i, i + BLOCK), slice(j, j + BLOCK), 1 if i == j else 2


def _number(value: Tensor) -> float:
    return float(value)
