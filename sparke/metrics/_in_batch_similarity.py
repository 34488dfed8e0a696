"""Mean cosine between samples of one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from sparke.errors import ArgumentError, ShapeError
from sparke.kernels import normalize
from sparke.metrics._progress import Progress, Steps
from sparke.metrics._rows import Array, Rows, Table, count_blocks, stream


@torch.no_grad()
def in_batch_similarity(
    features: Rows,
    prompt_embeds: Array | None = None,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    cond_bandwidth: float = 0.35,
    progress: Progress | None = None,
) -> float:
    r"""Mean cosine between samples of one prompt, averaged over prompts; lower is more varied.

    $$\frac{1}{|G|} \sum_{g \in G} \frac{1}{|g| (|g| - 1)} \sum_{i \ne j \in g}
      \frac{\langle x_i, x_j \rangle}{\|x_i\| \|x_j\|}$$

    over the groups G of at least two samples whose rows of `prompt_embeds` are identical (the
    measure of SPARKE, arXiv 2506.10173, which prints it times 100). O(n d), in one reading; a sum
    of d numbers is kept for each group.

    It is no effective number, and its zero depends on the features: embeddings of unrelated
    pictures are seldom at right angles.

    Args:
        features: (n, d), one row a sample, tensor or array of any real dtype, or chunks of it.
        prompt_embeds: (n, c), the prompt of each sample; all samples are of one prompt if None.
        kernel: accepted for the shared signature, unused; it is always the cosine.
        bandwidth: unused.
        cond_bandwidth: unused.
        progress: called with the blocks done and their total.

    Returns:
        A mean cosine, -1 to 1.

    Raises:
        ShapeError: an argument is not a matrix, or the rows do not match.
        ArgumentError: one is empty or not finite, a sample is a row of zeros, or no prompt has two
            samples.
    """
    steps = Steps(progress, count_blocks({"features": features}))
    groups = None if prompt_embeds is None else _groups(prompt_embeds)
    sums, sizes, seen = None, None, 0
    for block in stream("features", features, zeros=False):
        unit, rows = normalize(block), len(block)
        group = _next(groups, seen, rows).to(unit.device)
        if sums is None:
            size = 1 if groups is None else int(groups.max()) + 1
            sums, sizes = unit.new_zeros(size + 1, unit.shape[1]), unit.new_zeros(size + 1)
        assert sizes is not None
        sums.index_add_(0, group, unit.to(sums.device))
        sizes.index_add_(0, group, sizes.new_ones(rows))
        seen += rows
        steps.advance()
    if groups is not None and seen != len(groups):
        raise _unmatched(seen, len(groups), "in all")
    assert sums is not None  # a stream without rows has raised
    assert sizes is not None
    sums, sizes = sums[:-1], sizes[:-1]  # the last is of prompts with one sample
    pairs = sizes > 1
    if not bool(pairs.any()):
        raise ArgumentError(
            f"features holds {seen} samples and no two of one prompt. Samples belong together "
            "where their rows of prompt_embeds are identical."
        )
    # Rows of length 1: those of a group add up to its size and the cosines of its pairs.
    sums, sizes = sums[pairs], sizes[pairs]
    return float(((sums.square().sum(1) - sizes) / (sizes * (sizes - 1))).mean())


def _groups(prompt_embeds: Array) -> Tensor:
    """(n,) number of the prompt of each sample, -1 where it has one sample only."""
    found: dict[bytes, int] = {}
    numbers: list[int] = []
    for block in Table("prompt_embeds", prompt_embeds).blocks():
        rows = (block + 0.0).cpu().numpy()  # which makes -0 equal to 0
        numbers += [found.setdefault(row.tobytes(), len(found)) for row in rows]
    group = torch.tensor(numbers)
    several = torch.bincount(group) > 1
    return torch.where(several, several.cumsum(0) - 1, -1)[group]


def _next(groups: Tensor | None, start: int, rows: int) -> Tensor:
    if groups is None:
        return torch.zeros(rows, dtype=torch.long)
    if start + rows > len(groups):
        raise _unmatched(start + rows, len(groups), "or more")
    group = groups[start : start + rows]
    return torch.where(group < 0, int(groups.max()) + 1, group)


def _unmatched(samples: int, prompts: int, more: str) -> ShapeError:
    return ShapeError(
        f"prompt_embeds must have one row per sample; it has {prompts} rows, and features "
        f"{samples} {more}."
    )
