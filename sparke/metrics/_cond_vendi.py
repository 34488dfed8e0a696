"""The Vendi score at equal prompts."""

from __future__ import annotations

import math

import torch

from sparke.entropy import check_order, renyi
from sparke.metrics._pairs import Kernel, PromptKernel, count, fill, square_sums
from sparke.metrics._progress import Progress, Steps
from sparke.metrics._room import reserve
from sparke.metrics._rows import Array, table
from sparke.metrics._spectrum import spectrum

CURE = "Use order 2 (cond_rke), which needs no matrix, or fewer samples."


@torch.no_grad()
def cond_vendi(
    features: Array,
    prompt_embeds: Array | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    cond_bandwidth: float = 0.35,
    order: float = 1.0,
    progress: Progress | None = None,
) -> float:
    r"""Conditional Vendi score: effective number of distinct samples at equal prompts.

    $$V_q(X \mid T) = \exp\left(H_q(\tfrac{1}{n} K_X \circ K_T) - H_q(\tfrac{1}{n} K_T)\right)$$

    (as used in SPARKE, arXiv 2506.10173) with $K_T$ Gaussian on L2-normalised prompt embeddings.
    One prompt for all gives [vendi][sparke.metrics.vendi]; prompts all far apart give 1, for then
    no two samples can be compared. O(n^3) time and O(n^2) memory; order 2 is
    [cond_rke][sparke.metrics.cond_rke] and needs neither.

    Args:
        features: (n, d), one row a sample, tensor or array of any real dtype.
        prompt_embeds: (n, c), the prompt of each sample.
        kernel: ``"gaussian"`` or ``"cosine"``, on samples.
        bandwidth: of the Gaussian kernel, in the units of `features`; None: the module's rule.
        cond_bandwidth: s_T on normalised embeddings, between which distances are 0 to 2.
        order: q above 0, infinity included.
        progress: called with the steps done and their total; eigenvalues are a step each time.

    Returns:
        Effective number of distinct samples per prompt.

    Raises:
        MissingPrompts: `prompt_embeds` is None.
        ShapeError: an argument is not a matrix, or the rows do not match.
        ArgumentError: one is empty or not finite, a row of zeros meets the cosine kernel, a matrix
            would have no room in memory, or an option has a forbidden value.
    """
    check_order(order)
    x = table("features", features, "cond_vendi")
    compare = Kernel(kernel, bandwidth, x)
    prompts = PromptKernel("cond_vendi", prompt_embeds, x, cond_bandwidth)
    if order == 2:
        steps = Steps(progress, count(x))
        k_t, joint = square_sums(x, lambda tile: prompts.with_joint(tile, compare), steps)
        return k_t / joint
    reserve("cond_vendi", (x.n, x.n), 2, x.device, CURE)
    steps = Steps(progress, 2 * (count(x) + 1))
    k = torch.empty(x.n, x.n, dtype=torch.float64, device=x.device)
    entropies = []
    for value in (prompts, lambda tile: prompts.with_joint(tile, compare)[1]):
        fill(k, x, None, value, steps)
        entropies.append(float(renyi(spectrum(k.div_(x.n)), order)))
        steps.advance()
    return math.exp(entropies[1] - entropies[0])
