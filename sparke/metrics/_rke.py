"""RKE: the effective number of order 2, which needs no eigenvalues."""

from __future__ import annotations

import torch

from sparke.metrics._covariance import Embedding, covariance
from sparke.metrics._pairs import Kernel, check_kernel, count, square_sums
from sparke.metrics._progress import Progress, Steps
from sparke.metrics._rows import Array, Rows, by_covariance, count_blocks, table


@torch.no_grad()
def rke(
    features: Rows,
    prompt_embeds: Array | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    cond_bandwidth: float = 0.35,
    progress: Progress | None = None,
) -> float:
    r"""Rényi kernel entropy of order 2 of a set, as an effective number (RKE mode count).

    $$\mathrm{RKE} = \frac{1}{\|K/n\|_F^2} = \frac{n^2}{\sum_{ij} k(x_i, x_j)^2}$$

    (Jalali, Li and Farnia, "An Information-Theoretic Evaluation of Generative Models in Learning
    Multi-modal Distributions", NeurIPS 2023.) O(n^2 d) time, in tiles: no n x n matrix is kept.
    With the cosine kernel and d < n it is $1/\|C\|_F^2$ of the d x d covariance of the normalised
    rows: O(n d^2), in one reading.

    It knows nothing of prompts, and counts what the kernel can tell apart: with a narrow bandwidth
    everything differs.

    Args:
        features: (n, d), one row a sample, tensor or array of any real dtype. With the cosine
            kernel also chunks of it.
        prompt_embeds: accepted for the shared signature, unused.
        kernel: ``"gaussian"`` or ``"cosine"``.
        bandwidth: of the Gaussian kernel, in the units of `features`; None: the module's rule.
        cond_bandwidth: unused.
        progress: called with the tiles or blocks done and their total.

    Returns:
        Effective number of distinct samples, 1 to n.

    Raises:
        ShapeError: `features` is not a matrix.
        ArgumentError: it is empty or not finite, a row of zeros meets the cosine kernel, or an
            option has a forbidden value.
    """
    check_kernel(kernel, bandwidth)
    sets: dict[str, Rows] = {"features": features}
    if kernel == "cosine" and by_covariance(sets):
        steps = Steps(progress, count_blocks(sets))
        c = covariance("rke", "features", features, Embedding(), steps, copies=2)
        return 1 / float(c.square().sum())
    x = table("features", features, "rke")
    compare = Kernel(kernel, bandwidth, x)
    (total,) = square_sums(x, lambda tile: (compare(tile),), Steps(progress, count(x)))
    return x.n**2 / total
