"""Gaussian mixtures with prompts: denoisers known in closed form, to measure guidance on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from sparke.errors import ShapeError, UnknownName

__all__ = ["GaussianMixture", "Verdict"]

PROMPTS = [f"{n} {what}" for what in ("cat", "ship", "tree", "star") for n in ("a", "one")]
WEIGHTS = (0.60, 0.15, 0.10, 0.07, 0.05, 0.03)
EMBED = 32
RHO = 7.0
"""Spacing of the noise levels (arXiv 2206.00364)."""


@dataclass(frozen=True)
class Verdict:
    """What the judge saw in b samples.

    Attributes:
        mode: (b,) nearest mode of the sample's own prompt, 0 to 5.
        faithful: (b,) whether the sample could be a draw from that mode.
    """

    mode: Tensor
    faithful: Tensor


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    r"""A denoiser ``model(x, sigma, cond=..., cond_scale=...)`` without error: x = x0 + sigma e.

    Clean samples of prompt p come from $\sum_k w_{pk} N(\mu_{pk}, s^2 I)$: six modes, one of which
    holds 60 %. Eight prompts are four groups of two that nearly agree in their modes and in their
    embeddings, as paraphrases do. The denoiser is the posterior mean

    $$D(x, \sigma) = \frac{s^2 x + \sigma^2 \sum_k r_k \mu_k}{s^2 + \sigma^2}, \qquad
      r = \operatorname{softmax}_k \left( \log w_k - \frac{\|x - \mu_k\|^2}{2(s^2 + \sigma^2)}
      \right),$$

    so $(D - x)/\sigma^2$ is the score of the noisy density (Tweedie). Without a prompt it is that
    of the eight prompts in equal shares, and classifier-free guidance extrapolates from there.

    It is a test bed, not a picture model: what ranks first here need not on a trained network,
    whose estimates at high noise differ.

    Attributes:
        means: (8, 6, d) centres of the modes.
        weights: (8, 6) shares of the modes, rows sum to 1.
        embeds: (8, 32) prompt embeddings, unit vectors.
        std: s, the same in every direction.
        sigma_min: lowest noise level of `sigmas`, above its final 0.
        sigma_max: highest.
    """

    means: Tensor
    weights: Tensor
    embeds: Tensor
    std: float
    sigma_min: float
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        self._centred, self._log_shares, self._basis  # noqa: B018  outside any inference mode

    @classmethod
    def planar(cls, seed: int = 0, dtype: torch.dtype = torch.float32) -> GaussianMixture:
        """In two dimensions: groups on a circle of radius 6, modes on rings of radius 2."""
        g = torch.Generator().manual_seed(seed)
        quarter, sixth = torch.arange(4) * torch.pi / 2, torch.arange(6) * torch.pi / 3
        groups = 6 * _on_circle(quarter + torch.pi / 4)[:, None]
        modes = groups + 2 * _on_circle(sixth) + 0.15 * _normal(g, 4, 6, 2)
        twins = modes.repeat_interleave(2, 0) + 0.1 * _normal(g, 8, 6, 2)
        return cls(*_labelled(twins, g, dtype), 0.25, 0.03)

    @classmethod
    def structured(
        cls, seed: int = 0, dim: int = 4096, dtype: torch.dtype = torch.float32
    ) -> GaussianMixture:
        """In many dimensions: offsets that all samples, a group, a mode and a twin share."""
        g = torch.Generator().manual_seed(seed)
        groups = 0.75 * _normal(g, dim) + 0.5 * _normal(g, 4, 1, dim)
        modes = groups + 0.35 * _normal(g, 4, 6, dim)
        twins = modes.repeat_interleave(2, 0) + 0.05 * _normal(g, 8, 6, dim)
        return cls(*_labelled(twins, g, dtype), 0.15, 0.02)

    @property
    def prompts(self) -> list[str]:
        """The eight prompts; twins are neighbours."""
        return list(PROMPTS)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (d,)."""
        return tuple(self.means.shape[2:])

    @cached_property
    def sigma_data(self) -> float:
        """Standard deviation per dimension of one prompt's samples, root mean square over all."""
        share = self.weights[..., None].double()
        means = self.means.double()
        spread = (share * (means - (share * means).sum(1, keepdim=True)).square()).sum(1)
        return float((spread.mean() + self.std**2).sqrt())

    def to(self, device: torch.device | str) -> GaussianMixture:
        """The same mixture on another device."""
        means, weights, embeds = (t.to(device) for t in (self.means, self.weights, self.embeds))
        return replace(self, means=means, weights=weights, embeds=embeds)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(b, 32) embeddings of b prompts.

        Raises:
            UnknownName: a prompt is none of ``prompts``.
        """
        return self.embeds[self._rows(prompts)]

    def sigmas(self, steps: int) -> Tensor:
        """(steps + 1,) noise levels from `sigma_max` to `sigma_min`, then 0."""
        high, low = self.sigma_max ** (1 / RHO), self.sigma_min ** (1 / RHO)
        levels = torch.linspace(high, low, steps, dtype=torch.float64) ** RHO
        return F.pad(levels, (0, 1)).to(self.means)

    def sample(self, prompts: Sequence[str], generator: torch.Generator | None = None) -> Tensor:
        """(b, d) exact draws, one of each of b prompts."""
        rows = self._rows(prompts)
        modes = torch.multinomial(self.weights[rows].cpu(), 1, generator=generator).squeeze(1)
        noise = torch.randn(len(rows), *self.latent_shape, generator=generator)
        return self.means[rows, modes.to(rows.device)] + self.std * noise.to(self.means)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Tensor | None = None,
        uncond: object = None,
        cond_scale: float = 1.0,
    ) -> Tensor:
        """(b, d) posterior mean of the clean sample, differentiable in x.

        Args:
            x: (b, d) noisy samples.
            sigma: (b,) or a number, their noise levels.
            cond: (b, 32) prompt embeddings, read as the nearest prompt; None for all prompts.
            uncond: ignored; hosts of classifier-free guidance pass it.
            cond_scale: w in D_all + w (D_prompt - D_all); 1 is the prompt's alone.

        Raises:
            ShapeError: x or cond has another shape.
        """
        b, d = x.shape[0], self.means.shape[2]
        for name, value, width in (("x", x, d), ("cond", cond, EMBED)):
            if value is not None and value.shape != (b, width):
                raise ShapeError(f"{name} must be ({b}, {width}), got {tuple(value.shape)}.")
        modes, half_squares, center = self._centred
        z = x.to(modes) - center
        noise = torch.as_tensor(sigma).to(modes).expand(b)[:, None].square()
        total = noise + self.std**2
        logits = (z @ modes.mT - half_squares) / total
        share = torch.softmax(logits + self._log_shares[-1], 1)
        if cond is not None:
            nearest = (cond.to(modes) @ self.embeds.mT).argmax(1)
            own = torch.softmax(logits + self._log_shares[nearest], 1)
            share = own if cond_scale == 1 else share + cond_scale * (own - share)
        return (self.std**2 / total * z + noise / total * (share @ modes) + center).to(x)

    @torch.no_grad()
    def judge(self, x: Tensor, prompts: Sequence[str]) -> Verdict:
        """The mode each of (b, d) samples belongs to, and whether it is a likely draw of it.

        Faithful is a sample whose difference from the nearest mode of its own prompt, within the
        space spanned by all modes, is at most 3 s long in two dimensions (98.9 % of exact draws)
        and (sqrt(n) + 2) s in n = 48 (99.7 %). Where there are further dimensions they hold noise
        alone, and its standard deviation must be below 1.5 s. Samples smoother than the mixture's
        pass.
        """
        x, own = x.to(self.means), self.means[self._rows(prompts)]
        distance, mode = (x[:, None] - own).norm(dim=-1).min(1)
        inside = (x - own[torch.arange(len(x)), mode]) @ self._basis
        width, space = self._basis.shape
        faithful = inside.norm(dim=1) <= self.std * (3 if space == 2 else space**0.5 + 2)
        if rest := width - space:
            outside = (distance.square() - inside.square().sum(1)).clamp_min(0) / rest
            faithful &= outside.sqrt() < 1.5 * self.std
        return Verdict(mode, faithful)

    def effective_modes(self, verdict: Verdict, prompts: Sequence[str]) -> float:
        """exp(entropy) of the faithful samples' modes, 1 to 6, averaged over the prompts given.

        A prompt without a faithful sample counts as 0.
        """
        rows, found = self._rows(prompts), []
        for row in rows.unique():
            mine = verdict.mode[(rows == row) & verdict.faithful]
            share = mine.bincount(minlength=len(WEIGHTS)).double() / max(len(mine), 1)
            found.append(float(torch.special.entr(share).sum().exp()) if len(mine) else 0.0)
        return sum(found) / len(found)

    def _rows(self, prompts: Sequence[str]) -> Tensor:
        for prompt in prompts:
            if prompt not in PROMPTS:
                raise UnknownName("prompt", prompt, PROMPTS)
        return torch.tensor([PROMPTS.index(p) for p in prompts], device=self.means.device)

    @cached_property
    def _centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """(48, d) modes less their mean (float32 needs that), half their squares, that mean."""
        center = self.means.mean((0, 1))
        modes = self.means.flatten(0, 1) - center
        return modes, modes.square().sum(1) / 2, center

    @cached_property
    def _log_shares(self) -> Tensor:
        """(9, 48) of the modes in each prompt, -inf in the others', and in all prompts together."""
        own = torch.block_diag(*self.weights)
        return torch.cat([own, own.mean(0, keepdim=True)]).log()

    @cached_property
    def _basis(self) -> Tensor:
        """(d, min(d, 48)) orthonormal basis of the space of the modes."""
        basis: Tensor = torch.linalg.qr(self.means.flatten(0, 1).mT)[0]
        return basis


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _on_circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)


def _labelled(
    means: Tensor, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, (8, 6) weights and (8, 32) embeddings."""
    orders = torch.stack([torch.randperm(len(WEIGHTS), generator=generator) for _ in range(4)])
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)[orders].repeat_interleave(2, 0)
    common = F.normalize(_normal(generator, EMBED), dim=0)
    groups = F.normalize(F.normalize(_normal(generator, 4, EMBED), dim=1) + 0.8 * common, dim=1)
    twins = groups.repeat_interleave(2, 0) + 0.15 / EMBED**0.5 * _normal(generator, 8, EMBED)
    return means.to(dtype), weights.to(dtype), F.normalize(twins, dim=1).to(dtype)
