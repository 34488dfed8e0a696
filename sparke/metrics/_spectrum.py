"""The spectra that measures are taken of."""

from __future__ import annotations

import torch
from torch import Tensor


def spectrum(matrix: Tensor, scale: float = 1.0) -> Tensor:
    """(k, k) symmetric -> (k,) eigenvalues, 0 where below what rounding makes of `scale`.

    `scale` is a bound on the eigenvalues: 1 of a matrix of trace 1.
    """
    values = torch.linalg.eigvalsh(matrix)
    return torch.where(values > len(values) * torch.finfo(values.dtype).eps * scale, values, 0.0)
