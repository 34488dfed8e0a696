"""Effective number of modes, given which mode each sample is of."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparke.entropy import check_order, renyi
from sparke.errors import ArgumentError, ShapeError


def effective_modes(
    labels: Iterable[Any], prompts: Iterable[Any] | None = None, *, order: float = 1.0
) -> float:
    r"""Effective number of modes of labelled samples, averaged over prompts.

    $$\frac{1}{|T|} \sum_{t \in T} \exp H_q(p_t), \qquad
      H_q(p) = \tfrac{1}{1-q} \log \sum_l p(l)^q, \quad H_1(p) = -\sum_l p(l) \log p(l)$$

    with $p_t(l)$ the share of the samples of prompt t that have label l (Hill numbers: order 0
    would count the labels, order 1 is the exponential of Shannon's entropy, order 2 one over the
    chance that two samples are alike). It is [vendi][sparke.metrics.vendi] with the kernel that is
    1 between samples of one label and else 0.

    Labels say what counts as different, so it is as good as they are: of a classifier, they are
    its opinion. Few samples show few modes: with n samples of a prompt it is at most n, and below
    the truth. Compare prompts and sets at equal n.

    Args:
        labels: of each of n samples, strings or whole numbers; a list, array or tensor.
        prompts: of each of n samples, strings or whole numbers, or (n, c) rows of embeddings, which
            are one prompt where they are identical. None: all samples are of one prompt.
        order: q above 0, infinity included.

    Returns:
        Effective number of modes, 1 to the number of labels.

    Raises:
        ShapeError: there are not as many prompts as labels.
        ArgumentError: there are no labels, one is neither a string nor a whole number, or `order`
            has a forbidden value.
    """
    check_order(order)
    modes = [_name("labels", i, label) for i, label in enumerate(_items("labels", labels))]
    if not modes:
        raise ArgumentError("labels is empty: there are no samples.")
    if prompts is None:
        groups: list[Hashable] = [None] * len(modes)
    else:
        groups = [_group(i, prompt) for i, prompt in enumerate(_items("prompts", prompts))]
    if len(groups) != len(modes):
        raise ShapeError(
            f"prompts must be one per sample; got {len(groups)} for {len(modes)} labels."
        )
    counts: defaultdict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    for group, mode in zip(groups, modes, strict=True):
        counts[group][mode] += 1
    numbers = [_effective(list(of_prompt.values()), order) for of_prompt in counts.values()]
    return sum(numbers) / len(numbers)


def _effective(counts: list[int], order: float) -> float:
    n = torch.tensor(counts, dtype=torch.float64)
    return float(renyi(n / n.sum(), order).exp())


def _items(name: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ArgumentError(f"{name} must be a list or array, one for each sample, got {values!r}.")
    if isinstance(values, np.ndarray) and not values.ndim:
        raise ArgumentError(f"{name} must be a list or array, one for each sample, got {values}.")
    return list(values)


def _name(name: str, number: int, value: object) -> Hashable:
    if isinstance(value, Tensor) and not value.ndim:
        value = value.item()
    if isinstance(value, (str, int, np.integer, np.bool_)):
        return value
    raise ArgumentError(
        f"{name} must be strings or whole numbers; number {number} is {value!r}. Of scores of "
        "classes, give the argmax."
    )


def _group(number: int, prompt: object) -> Hashable:
    if isinstance(prompt, Tensor):
        prompt = prompt.detach().cpu().double().numpy()
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1 and prompt.dtype.kind in "fiub":
        return (prompt.astype(np.float64) + 0.0).tobytes()
    return _name("prompts", number, prompt)
