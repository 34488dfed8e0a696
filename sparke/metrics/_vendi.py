"""The Vendi score."""

from __future__ import annotations

import torch

from sparke.entropy import check_order, renyi
from sparke.metrics._covariance import covariance, embedding
from sparke.metrics._pairs import Kernel, count, fill, square_sums
from sparke.metrics._progress import Progress, Steps
from sparke.metrics._room import reserve
from sparke.metrics._rows import Array, Rows, by_covariance, count_blocks, table
from sparke.metrics._spectrum import spectrum

CURE = (
    'Use random_features=1024, or kernel="cosine" where the features are fewer than the samples: '
    "both need a matrix of features only. Order 2 (rke) needs none."
)


@torch.no_grad()
def vendi(
    features: Rows,
    prompt_embeds: Array | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    cond_bandwidth: float = 0.35,
    order: float = 1.0,
    random_features: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    r"""Vendi score of a set.

    $$V_q = \exp H_q(K/n), \qquad H_q = \tfrac{1}{1-q} \log \sum_i \lambda_i^q, \quad
      H_1 = -\sum_i \lambda_i \log \lambda_i$$

    over the eigenvalues of the kernel matrix (arXiv 2210.02410; order q: arXiv 2310.12952). Order 2
    is [rke][sparke.metrics.rke], and taken without eigenvalues.

    O(n^3) time and O(n^2) memory. With the cosine kernel and d < n the d x d covariance, which has
    the same eigenvalues, is used instead: O(n d^2), in one reading.

    `random_features` does the same for the Gaussian kernel, approximately (FKEA, arXiv 2407.02961):
    r random frequencies, a covariance of 2r x 2r, O(n r (d + r)). The root mean square over the
    draws of the distance between the two spectra, $\sqrt{\sum_i (\lambda_i - \hat\lambda_i)^2}$, is
    at most $1/\sqrt{2r}$: 0.022 for r = 1024. The number is at most 2r and, where it is not far
    below, too low: raise r until it no longer moves. Compare sets with one r and one seed.

    It knows nothing of prompts: a set over many prompts is varied because the prompts are.

    Args:
        features: (n, d), one row a sample, tensor or array of any real dtype. With the cosine
            kernel or `random_features` also chunks of it.
        prompt_embeds: accepted for the shared signature, unused.
        kernel: ``"gaussian"`` or ``"cosine"``.
        bandwidth: of the Gaussian kernel, in the units of `features`; None: the module's rule.
        cond_bandwidth: unused.
        order: q above 0, infinity included.
        random_features: r, for the Gaussian kernel; None: exact.
        seed: of the random features.
        progress: called with the steps done and their total; the eigenvalues are the last.

    Returns:
        Effective number of distinct samples, 1 to n.

    Raises:
        ShapeError: `features` is not a matrix.
        ArgumentError: it is empty or not finite, a row of zeros meets the cosine kernel, a matrix
            would have no room in memory, or an option has a forbidden value.
    """
    check_order(order)
    sets: dict[str, Rows] = {"features": features}
    embed = embedding("vendi", sets, kernel, bandwidth, random_features, seed)
    if embed is not None and (not embed.cosine or by_covariance(sets)):
        steps = Steps(progress, count_blocks(sets, further=1))
        k = covariance("vendi", "features", features, embed, steps, copies=2)
    else:
        x = table("features", features, "vendi")
        compare = Kernel(kernel, bandwidth, x)
        if order == 2:
            (total,) = square_sums(x, lambda tile: (compare(tile),), Steps(progress, count(x)))
            return x.n**2 / total
        reserve("vendi", (x.n, x.n), 2, x.device, CURE)
        steps = Steps(progress, count(x) + 1)
        k = torch.empty(x.n, x.n, dtype=torch.float64, device=x.device)
        fill(k, x, None, compare, steps)
        k.div_(x.n)
    value = renyi(spectrum(k), order).exp()
    steps.advance()
    return float(value)
