"""RKE at equal prompts."""

from __future__ import annotations

import torch

from sparke.metrics._pairs import Kernel, PromptKernel, count, square_sums
from sparke.metrics._progress import Progress, Steps
from sparke.metrics._rows import Array, table


@torch.no_grad()
def cond_rke(
    features: Array,
    prompt_embeds: Array | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    cond_bandwidth: float = 0.35,
    progress: Progress | None = None,
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
        progress: called with the tiles done and their total.

    Returns:
        Effective number of distinct samples per prompt, 1 to n.

    Raises:
        MissingPrompts: `prompt_embeds` is None.
        ShapeError: an argument is not a matrix, or the rows do not match.
        ArgumentError: one is empty or not finite, a row of zeros meets the cosine kernel, or an
            option has a forbidden value.
    """
    x = table("features", features, "cond_rke")
    compare = Kernel(kernel, bandwidth, x)
    prompts = PromptKernel("cond_rke", prompt_embeds, x, cond_bandwidth)
    steps = Steps(progress, count(x))
    k_t, joint = square_sums(x, lambda tile: prompts.with_joint(tile, compare), steps)
    return k_t / joint
