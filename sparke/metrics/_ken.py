"""Kernel-based entropic novelty."""

from __future__ import annotations

import torch
from torch import Tensor

from sparke import checks
from sparke.metrics._covariance import Embedding, covariance, embedding
from sparke.metrics._pairs import Kernel, count, fill
from sparke.metrics._progress import Progress, Steps
from sparke.metrics._room import reserve
from sparke.metrics._rows import Rows, Table, by_covariance, count_blocks, same_width, table
from sparke.metrics._spectrum import spectrum

CURE = (
    'Use random_features=1024, or kernel="cosine" where the features are fewer than the samples: '
    "both need a matrix of features only."
)


@torch.no_grad()
def ken(
    features: Rows,
    reference: Rows,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    eta: float = 1.0,
    random_features: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    r"""Kernel-based entropic novelty (KEN) of a set against a reference; larger is more novel.

    $$\text{KEN}_\eta(X \mid Y) = \sum_{\lambda_i > 0} \lambda_i \log \frac{S}{\lambda_i},
      \qquad S = \sum_{\lambda_i > 0} \lambda_i$$

    over the positive eigenvalues of $C_X - \eta C_Y$, the difference of the two kernel covariance
    operators (Zhang, Li and Farnia, arXiv 2402.17287). Of modes far apart these are how often X
    shows each beyond eta times as often as Y; S, 0 to 1, adds that up, and KEN is S times the
    entropy of the novel kinds, in nats: 0 for equal sets, and also for a set of a single kind,
    however novel; log n for n samples that are unlike each other and unlike the reference.

    It is no distance: what the reference has and the set lacks does not count. It is no measure of
    quality: noise is novel. A bandwidth that makes all samples differ makes any two draws of one
    distribution novel; at equal sizes, split the reference in two and judge one half by the other
    to see how much of the number that is.

    With the Gaussian kernel it takes the (n + m)^2 matrix of all pairs and O((n + m)^3) time. With
    the cosine kernel and d < n + m, the d x d covariances in O((n + m) d^2) and one reading of
    each. `random_features` does that for the Gaussian kernel, approximately, with 2r features
    (FINC, arXiv 2405.02700): the spectrum is off by the order of $(1 + \eta)/\sqrt r$, and the
    number by more where its eigenvalues are many and small: raise r until it no longer moves.

    Args:
        features: (n, d), the samples to judge; tensor or array of any real dtype. With the cosine
            kernel or `random_features` also chunks of it.
        reference: (m, d), what they are compared with, likewise.
        kernel: ``"gaussian"`` or ``"cosine"``.
        bandwidth: of the Gaussian kernel, in the units of the features; None:
            [shared_bandwidth][sparke.metrics.shared_bandwidth] of both.
        eta: above 0; how many times as often something must appear to be novel.
        random_features: r, for the Gaussian kernel; None: exact.
        seed: of the random features.
        progress: called with the steps done and their total; a decomposition is one step.

    Returns:
        A novelty in nats, 0 to log n.

    Raises:
        ShapeError: an argument is not a matrix, or the widths differ.
        ArgumentError: one is empty or not finite, a row of zeros meets the cosine kernel, a matrix
            would have no room in memory, or an option has a forbidden value.
    """
    checks.positive("eta", eta)
    sets = {"features": features, "reference": reference}
    embed = embedding("ken", sets, kernel, bandwidth, random_features, seed)
    if embed is not None and (not embed.cosine or by_covariance(sets)):
        steps = Steps(progress, count_blocks(sets, further=1))
        difference = _by_covariance(features, reference, embed, eta, steps)
    else:
        x, y = table("features", features, "ken"), table("reference", reference, "ken")
        same_width(x, y)
        compare = Kernel(kernel, bandwidth, x, y)
        steps = Steps(progress, count(x) + count(y) + count(x, y) + 2)
        difference = _by_pairs(x, y, compare, eta, steps)
    values = spectrum(difference, scale=max(1.0, eta))
    steps.advance()
    total = float(values.sum())
    return float(-torch.special.xlogy(values, values / total).sum()) if total else 0.0


def _by_covariance(
    features: Rows, reference: Rows, embed: Embedding, eta: float, steps: Steps
) -> Tensor:
    mine = covariance("ken", "features", features, embed, steps, copies=2)
    theirs = covariance("ken", "reference", reference, embed, steps, copies=2)
    return mine.sub_(theirs.to(mine.device), alpha=eta)


def _by_pairs(x: Table, y: Table, compare: Kernel, eta: float, steps: Steps) -> Tensor:
    r"""A symmetric matrix with the eigenvalues of $C_X - \eta C_Y$.

    With $K = A A^T$ the matrix of all pairs and D the diagonal of 1/n and -eta/m, that is
    $A^T D A$. A is taken from the eigenvectors of K: where both sets share samples K is singular,
    and a Cholesky factor of K plus something would give novelty to a set compared with itself.
    """
    n, rows = x.n, x.n + y.n
    reserve("ken", (rows, rows), 4, x.device, CURE)
    k = torch.empty(rows, rows, dtype=torch.float64, device=x.device)
    fill(k[:n, :n], x, None, compare, steps)
    fill(k[n:, n:], y, None, compare, steps)
    fill(k[:n, n:], x, y, compare, steps)
    k[n:, :n] = k[:n, n:].mT
    values, vectors = torch.linalg.eigh(k)
    del k
    real = values > rows**2 * torch.finfo(values.dtype).eps  # beside a trace of `rows`
    factor = vectors[:, real] * values[real].sqrt()
    del vectors
    weight = factor.new_full((rows, 1), 1 / n)
    weight[n:] = -eta / y.n
    steps.advance()
    difference: Tensor = factor.mT @ (factor * weight)
    return difference
