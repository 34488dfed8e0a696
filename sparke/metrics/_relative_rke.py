"""Relative RKE: how far a set is from a reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparke.metrics._covariance import covariance, embedding
from sparke.metrics._pairs import Kernel, count, fill
from sparke.metrics._progress import Progress, Steps
from sparke.metrics._room import reserve
from sparke.metrics._rows import Rows, by_covariance, count_blocks, same_width, table

CURE = (
    'Use random_features=1024, or kernel="cosine" where the features are fewer than the samples: '
    "both need a matrix of features only. Or give fewer samples."
)


@torch.no_grad()
def relative_rke(
    features: Rows,
    reference: Rows,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    random_features: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    r"""Relative Rényi kernel entropy (RRKE) of a set and a reference; smaller is closer.

    $$\text{RRKE}(X, Y) = -2 \log \frac{\|K_{XY}\|_*}{\sqrt{n m}}$$

    with the sum of the singular values of the n x m kernel matrix between the two sets (Jalali, Li
    and Farnia, "An Information-Theoretic Evaluation of Generative Models in Learning Multi-modal
    Distributions", NeurIPS 2023). It is the Rényi divergence of order 1/2 between their kernel
    covariances, $-\log F(C_X, C_Y)$ with their fidelity F: 0 where the two are equal, infinite
    where no sample of one is like any of the other, the same in both directions. For two sets of
    modes far apart it is the Rényi divergence of order 1/2 between how often each shows them.

    Despite its name it is no entropy and no mode count. Other than in [ken][sparke.metrics.ken],
    what the reference has and the set lacks counts as much as what is new. Of two draws of one
    distribution it is above 0, the more so the narrower the kernel; compare like sizes.

    With the Gaussian kernel it takes the n x m matrix and O(n m min(n, m)) time. With the cosine
    kernel and d < n + m, the d x d covariances and one reading of each, to about 7 digits.
    `random_features` does that for the Gaussian kernel, approximately, with 2r features (FKEA,
    arXiv 2407.02961): the spectrum of each is off as in [vendi][sparke.metrics.vendi], and the
    number, which takes square roots of eigenvalues, by more where those are many and small: raise
    r until it no longer moves.

    Args:
        features: (n, d), the samples to judge; tensor or array of any real dtype. With the cosine
            kernel or `random_features` also chunks of it.
        reference: (m, d), what they are compared with, likewise.
        kernel: ``"gaussian"`` or ``"cosine"``.
        bandwidth: of the Gaussian kernel, in the units of the features; None:
            [shared_bandwidth][sparke.metrics.shared_bandwidth] of both.
        random_features: r, for the Gaussian kernel; None: exact.
        seed: of the random features.
        progress: called with the steps done and their total; a decomposition is one step.

    Returns:
        A divergence in nats, 0 to infinity.

    Raises:
        ShapeError: an argument is not a matrix, or the widths differ.
        ArgumentError: one is empty or not finite, a row of zeros meets the cosine kernel, a matrix
            would have no room in memory, or an option has a forbidden value.
    """
    sets = {"features": features, "reference": reference}
    embed = embedding("relative_rke", sets, kernel, bandwidth, random_features, seed)
    if embed is not None and (not embed.cosine or by_covariance(sets)):
        steps = Steps(progress, count_blocks(sets, further=1))
        mine, theirs = (
            _root(covariance("relative_rke", name, value, embed, steps, copies=4))
            for name, value in sets.items()
        )
        between, size = mine @ theirs.mT.to(mine.device), 1.0
    else:
        x = table("features", features, "relative_rke")
        y = table("reference", reference, "relative_rke")
        same_width(x, y)
        compare = Kernel(kernel, bandwidth, x, y)
        reserve("relative_rke", (x.n, y.n), 2, x.device, CURE)
        steps = Steps(progress, count(x, y) + 1)
        between, size = (
            torch.empty(x.n, y.n, dtype=torch.float64, device=x.device),
            (x.n * y.n) ** 0.5,
        )
        fill(between, x, y, compare, steps)
    fidelity = float(torch.linalg.svdvals(between).sum()) / size
    steps.advance()
    # Rounding takes equal sets a little past 1.
    return max(0.0, -2 * math.log(fidelity)) if fidelity else math.inf


def _root(c: Tensor) -> Tensor:
    """A with $A^T A$ = c, of trace 1."""
    values, vectors = torch.linalg.eigh(c)
    real = values > len(values) * torch.finfo(values.dtype).eps
    root: Tensor = (vectors[:, real] * values[real].sqrt()).mT
    return root
