"""One call of the operation, checked and in its working dtype."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """What an implementation is given; n and b are at least 1.

    Attributes:
        query: (b, d) in float32 or float64, the dtype of all sums.
        rows: (n, d) in any float dtype, on the same device.
        log_weight: (b, n) in the dtype of `query`, or None for zeros.
        scale: (b, 1), one over the squared bandwidth.
        center: (d,) a point near the rows.
        norms: (n,) squared norms of ``rows - center``, None where they are not known.
        wants_mean: False where only the log sums are asked for; means may then be empty.
    """

    query: Tensor
    rows: Tensor
    log_weight: Tensor | None
    scale: Tensor
    center: Tensor
    norms: Tensor | None
    wants_mean: bool = True
