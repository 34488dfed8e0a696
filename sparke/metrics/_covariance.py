r"""Kernels with finitely many features, whose covariance has the eigenvalues of the kernel matrix.

With unit rows $\phi(x_i)$ such that $k(x_i, x_j) = \langle \phi(x_i), \phi(x_j) \rangle$, the
matrices $\frac{1}{n} \sum_i \phi(x_i) \phi(x_i)^T$ and K/n have the same nonzero eigenvalues. The
first is small where features are few, and adds up over chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparke.errors import ArgumentError
from sparke.kernels import normalize
from sparke.metrics._bandwidth import of_tables
from sparke.metrics._pairs import check_kernel
from sparke.metrics._progress import Steps
from sparke.metrics._room import reserve
from sparke.metrics._rows import Rows, in_chunks, stream, table, widths
from sparke.metrics._whole import whole


class Embedding:
    r"""(n, d) -> (n, features), rows of length 1 whose inner products are the kernel.

    Of the cosine kernel they are the normalised rows. Of the Gaussian they are random and the
    kernel is met on average (Rahimi and Recht, NeurIPS 2007):
    $\phi(x) = \frac{1}{\sqrt r} (\cos \omega_j^T x, \sin \omega_j^T x)_{j \le r}$ with
    $\omega_j$ normal of variance $1/s^2$, drawn once the width is known.

    Args:
        count: r of the Gaussian kernel; None: the cosine kernel.
        bandwidth: s.
        seed: of the draw.
    """

    def __init__(self, count: int | None = None, bandwidth: float = 1.0, seed: int = 0) -> None:
        self.cosine = count is None
        self._count, self._bandwidth, self._seed = count or 0, bandwidth, seed
        self._first: tuple[str, int] | None = None
        self._drawn: tuple[Tensor, Tensor] | None = None

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Of the rows of an argument; all must have one width."""
        self._first = self._first or (name, x.shape[1])
        if self._first[1] != x.shape[1]:
            raise widths(*self._first, name, x.shape[1])
        if self.cosine:
            return normalize(x)
        if self._drawn is None:
            generator = torch.Generator().manual_seed(self._seed)
            size = (x.shape[1], self._count)
            omega = torch.randn(size, generator=generator, dtype=x.dtype) / self._bandwidth
            # Differences do not change, and lose fewer digits to a common offset.
            self._drawn = x.mean(0), omega
        offset, omega = (part.to(x.device) for part in self._drawn)
        angle = (x - offset) @ omega
        features: Tensor = torch.cat([angle.cos(), angle.sin()], 1) / self._count**0.5
        return features


def embedding(
    measure: str,
    sets: dict[str, Rows],
    kernel: str,
    bandwidth: float | None,
    random_features: int | None,
    seed: int,
) -> Embedding | None:
    """Features of the kernel; None where it has infinitely many and random ones were not wanted."""
    check_kernel(kernel, bandwidth)
    if random_features is None:
        return Embedding() if kernel == "cosine" else None
    if kernel == "cosine":
        raise ArgumentError(
            "random_features stand in for the Gaussian kernel; the cosine has features of its own: "
            "leave the option out."
        )
    count = whole("random_features", random_features)
    if bandwidth is None and any(map(in_chunks, sets.values())):
        raise ArgumentError(
            f"bandwidth is None and {measure} was given chunks, which are read once: too late to "
            "choose one. Give bandwidth=shared_bandwidth(...) of some of the samples."
        )
    if bandwidth is None:
        bandwidth = of_tables(*(table(*each, measure) for each in sets.items()))
    return Embedding(count, bandwidth, seed)


def covariance(
    measure: str, name: str, value: Rows, embed: Embedding, steps: Steps, copies: int
) -> Tensor:
    """(features, features) mean of outer products of the embedded rows, of trace 1.

    `copies` of its size must have room: itself and what will be made of it.
    """
    total, rows = None, 0
    for block in stream(name, value, zeros=not embed.cosine):
        phi = embed(name, block)
        if total is None:
            side = (phi.shape[1], phi.shape[1])
            cure = "Use fewer random_features, or features of fewer numbers."
            reserve(measure, side, copies, phi.device, cure)
            total = phi.new_zeros(side)
        phi = phi.to(total.device)
        total.addmm_(phi.mT, phi)
        rows += len(block)
        steps.advance()
    assert total is not None  # a stream without rows has raised
    return total.div_(rows)
