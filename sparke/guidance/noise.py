"""Designed starts: the initial noise of a batch, spread out."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, GuidanceWarning
from sparke.guidance import _draws
from sparke.protocols import Run, State

__all__ = ["Noise"]

KINDS = ("orthogonal", "antithetic", "latin", "pink")


class Noise:
    r"""Replaces the initial noise of a batch by noise that is spread out on purpose.

    The first three kinds leave every single sample exactly what it was, a draw from
    $N(0, \sigma_0^2 I)$, and change only how the samples of a batch go together. They need not be
    told $\sigma_0$. With a batch of one they change nothing.

    - ``"orthogonal"``: the rows of the batch at right angles, each as long as it was. The frame
      is Haar-distributed, from a QR decomposition of the noise itself with positive diagonal, and
      does not depend on the lengths (arXiv 1610.09072). Batches of more rows than a latent has
      dimensions are made orthogonal in blocks. Independent noise in many dimensions is nearly
      orthogonal already, so this changes little.
    - ``"antithetic"``: neighbours in pairs, $x_{2i+1} = -x_{2i}$ (arXiv 2506.06185). The last of
      an odd batch stays.
    - ``"latin"``: a Latin hypercube (McKay, Beckman, Conover 1979): in each dimension, the values
      of b samples fall one into each b-th of the normal distribution, ranked as their own noise is:
      $z_{ik} = \Phi^{-1}((\operatorname{rank}_k(i) + v_{ik}) / b)$, v uniform. The sample then
      takes the direction of $z_i$ and keeps its length. Exact in the marginal for any dimension;
      the strata themselves are met up to that length, about $1/\sqrt{d}$.

    The fourth changes the marginal, and warns of it:

    - ``"pink"``: each sample, by itself, is filtered to a power spectrum of $1/f^\alpha$ over its
      last two dimensions, the variance of every pixel kept. Low frequencies get more noise than
      the model was trained to find there, and make what it reads as layout and tint.

    A start is all this decides: a solver without fresh noise carries it to the end, one that adds
    its own forgets it. It knows of no memory. Starts made for one prompt are best called in a batch
    of that prompt: rows are taken in the order they come. Not used where a run starts from an image
    instead of noise.

    Args:
        kind: one of the four.
        alpha: of ``"pink"`` alone, at least 0; 0 is white, and leaves the noise as it is. 1 if
            None.

    Raises:
        ArgumentError: no such kind; `alpha` with another kind than pink.
    """

    def __init__(self, kind: str = "orthogonal", *, alpha: float | None = None) -> None:
        self.kind = checks.choice("kind", kind, KINDS)
        if alpha is not None and kind != "pink":
            raise ArgumentError(
                f"alpha={alpha} would go unread: it is the slope of kind='pink', got {kind!r}."
            )
        self.alpha = checks.positive("alpha", 1.0 if alpha is None else alpha, zero=True)
        if kind == "pink" and self.alpha:
            warnings.warn(
                "kind='pink' starts from noise that the model was not trained on: single pictures "
                "change too, not only how those of a batch differ. The other kinds do not do that.",
                GuidanceWarning,
                stacklevel=2,
            )
        self._seeds: tuple[int, ...] = ()

    def __repr__(self) -> str:
        if self.kind != "pink":
            return f"Noise({self.kind!r})"
        return f"Noise('pink', alpha={self.alpha})"

    @property
    def exclusive(self) -> frozenset[str]:
        """The initial noise, unless it is left as it is."""
        return frozenset({"noise"}) - self.idle

    @property
    def idle(self) -> frozenset[str]:
        """The initial noise, where pink noise of slope 0 leaves it as it is."""
        white = self.kind == "pink" and self.alpha == 0
        return frozenset({"noise"} if white else ())

    def begin(self, run: Run) -> None:
        """Take the samples' seeds.

        Raises:
            ArgumentError: pink noise for latents without a height and a width.
        """
        self._seeds = ()
        if self.kind == "pink" and len(run.shape) < 4:
            raise ArgumentError(
                "kind='pink' needs latents (batch, ..., height, width), got shape "
                f"{tuple(run.shape)}: packed or flat latents have no frequencies to shape."
            )
        self._seeds = _draws.seeds_of(run)

    def __call__(self, state: State) -> Tensor:
        """Zeros: the start is all there is to it."""
        return torch.zeros_like(state.denoised)

    def finish(self, x: Tensor) -> None:
        """Forget the run."""
        self._seeds = ()

    def on_noise(self, x: Tensor) -> Tensor:
        """Noise of the same shape, dtype and scale, computed in float64 on the CPU."""
        alone = self.alpha == 0 if self.kind == "pink" else len(x) < 2
        if alone or not self._seeds:
            return x
        if self.kind == "antithetic":
            return _antithetic(x)
        given = x.detach().to("cpu", torch.float64)
        if self.kind == "pink":
            made = _pink(given, self.alpha)
        elif self.kind == "latin":
            made = _latin(given.flatten(1), self._seeds).view_as(given)
        else:
            blocks = given.flatten(1).split(given[0].numel())
            made = torch.cat([_orthogonal(block) for block in blocks]).view_as(given)
        return made.to(x)


def _antithetic(x: Tensor) -> Tensor:
    made = x.clone()
    made[1::2] = -x[: len(x) - 1 : 2]
    return made


def _orthogonal(x: Tensor) -> Tensor:
    """(b, d) rows at right angles, b at most d, each of the length it has."""
    frame, triangle = torch.linalg.qr(x.T)
    # Without it the frame would carry the decomposition's own choice of signs, not Haar's.
    frame = frame * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(frame)
    made: Tensor = frame.T * x.norm(dim=1, keepdim=True)
    return made


def _latin(x: Tensor, seeds: tuple[int, ...]) -> Tensor:
    """(b, d) one row in each b-th of the normal distribution, dimension by dimension."""
    d = x.shape[1]
    generators = [_draws.generator(seed, "latin") for seed in seeds]
    # The length of a row must not depend on what its direction is made from: it is lent another
    # one, of a draw of its own, and given back its own in the end.
    draws = [torch.randn(d, generator=g, dtype=x.dtype) for g in generators]
    lent = torch.stack([draw.norm() for draw in draws])[:, None]
    within = torch.stack([torch.rand(d, generator=g, dtype=x.dtype) for g in generators])
    length = x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    z = _stratified(lent * x / length, within)
    made: Tensor = length * z / z.norm(dim=1, keepdim=True)
    return made


def _stratified(z: Tensor, within: Tensor) -> Tensor:
    """(b, d) standard normal from ranks among the rows and (b, d) places within the strata."""
    least = torch.finfo(z.dtype).eps / 4  # 0 and 1 are where the normal distribution has no number
    share = (z.argsort(0).argsort(0) + within) / len(z)
    normal: Tensor = torch.special.ndtri(share.clamp(least, 1 - 2 * least))
    return normal


def _pink(x: Tensor, alpha: float) -> Tensor:
    """Amplitudes times f^(-alpha/2) over the last two dimensions, with the mean power kept."""
    h, w = x.shape[-2:]
    down, across = torch.fft.fftfreq(h, dtype=x.dtype), torch.fft.fftfreq(w, dtype=x.dtype)
    frequency = torch.hypot(down[:, None], across).clamp_min(1 / max(h, w))
    amplitude = frequency ** (-alpha / 2)
    amplitude = amplitude / math.sqrt(float(amplitude.square().mean()))
    filtered: Tensor = torch.fft.ifft2(torch.fft.fft2(x) * amplitude).real
    return filtered


build = Noise
