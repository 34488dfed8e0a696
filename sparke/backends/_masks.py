"""Attention masks of prompts, in whatever form networks take them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["present"]


def present(mask: Tensor) -> Tensor:
    """(b, tokens) bool, true for tokens of the prompt.

    Args:
        mask: (b, tokens) booleans, integers, zeros and ones, or a bias to be added to attention,
            which is 0 for tokens and very negative for padding; with any number of dimensions of
            length 1 between.
    """
    mask = mask.reshape(mask.shape[0], mask.shape[-1]) if mask.ndim > 2 else mask
    if not mask.is_floating_point():
        return mask != 0
    # No device is made to wait for which of the two forms it is.
    return torch.where(mask.amax() > 0, mask > 0.5, mask > -0.5)
