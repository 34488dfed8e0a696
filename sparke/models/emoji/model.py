"""The emoji model: prompts in, latents denoised, pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from os import PathLike
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from sparke.errors import ArgumentError, ShapeError
from sparke.models.emoji import _file
from sparke.models.emoji.denoiser import Arch, Denoiser, PromptEncoder, shapes
from sparke.models.emoji.prompts import Vocabulary

__all__ = ["EmojiModel", "load"]

_SIDE = 32
_MOST_BLOCKS = 256


class EmojiModel(nn.Module):
    """A text-to-image diffusion model of 2.2 M parameters that draws 32x32 emoji.

    It denoises in the space of the leading principal components of the pictures: the noise is
    isotropic and the basis orthonormal, so this is pixel diffusion in a subspace. Called as
    k-diffusion calls its models, it gives with EDM preconditioning (arXiv 2206.00364), v the
    variance of the data along each dimension and s the noise level:

        D(x, s, c) = v / (s^2 + v) x + s sqrt(v) / sqrt(s^2 + v) F(x / sqrt(s^2 + v), s, c)

    and with classifier-free guidance (arXiv 2207.12598) of scale w:

        denoised = D(x, s, uncond) + w (D(x, s, cond) - D(x, s, uncond))

    What it is not: a model that generalises. It was trained on 1649 pictures and nearly memorises
    them: without guidance, samples lie at a median RMSE of 0.084 (pixels in [-1, 1]) from the
    nearest of them, where the principal components alone lose 0.060. Its use is that it has many
    known modes to a prompt and, like the big models, loses them under guidance. Tone words are the
    weakest: 71 % of samples obey them exactly without guidance, 80 % at scale 3.

    Attributes:
        prompts: Names of the concepts; any of them is a prompt.
        toned_prompts: Those of them that are drawn in several skin tones.
        styles: Drawing styles; a prompt asks for one with ``style:noto``.
        tones: Skin tones; a prompt asks for one with ``tone:dark``.
        latent_shape: Shape of one latent.
        sigma_min: Least noise level to sample at, std of the noise in pixel units.
        sigma_max: Greatest noise level, where sampling starts.
        sigma_data: Root mean square of the data's std over the latent dimensions.
    """

    latent_mean: Tensor
    latent_std: Tensor
    basis: Tensor

    def __init__(self, about: dict[str, Any], mean: Tensor, std: Tensor, basis: Tensor) -> None:
        super().__init__()
        arch = Arch(**about["arch"])
        self.prompts: list[str] = list(about["prompts"])
        self.toned_prompts: list[str] = list(about["toned"])
        self.styles: list[str] = list(about["styles"])
        self.tones: list[str] = list(about["tones"])
        self.vocabulary = Vocabulary(
            tuple(about["vocabulary"]), tuple(self.styles), tuple(self.tones)
        )
        self.latent_shape: tuple[int] = (arch.latent,)
        self.sigma_min = float(about["sigma_min"])
        self.sigma_max = float(about["sigma_max"])
        self.sigma_data = float(std.double().square().mean().sqrt())
        sizes = (len(self.vocabulary.words), len(self.styles), len(self.tones))
        self.prompt = PromptEncoder(*sizes, arch)
        self.denoiser = Denoiser(arch)
        self.register_buffer("latent_mean", mean)
        self.register_buffer("latent_std", std)
        self.register_buffer("basis", basis)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts.

        Args:
            prompts: b prompts: a name from ``prompts`` and, where wanted, ``style:`` and ``tone:``
                words. The empty prompt is the unconditional one.

        Returns:
            (b, c) prompt embeddings. Word order is lost: the encoder sums the words.

        Raises:
            UnknownWords: A word is not in the vocabulary; near matches are named.
            ArgumentError: A prompt has two styles or two tones.
        """
        words, style, tone = self.vocabulary.indices(prompts)
        device = self.basis.device
        embeds: Tensor = self.prompt(words.to(device), style.to(device), tone.to(device))
        return embeds

    def null_embeds(self, b: int) -> Tensor:
        """(b, c) embeddings of the empty prompt, the unconditional side of guidance."""
        return self.encode([""]).repeat(b, 1)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Tensor | None = None,
        uncond: Tensor | None = None,
        cond_scale: float = 1.0,
    ) -> Tensor:
        """Denoise; the equation is in the description of the class.

        Args:
            x: (b, 320) noisy latents, clean latents plus sigma times unit noise.
            sigma: (b,) noise levels, or one for all rows.
            cond: (b, c) or (1, c) prompt embeddings; None denoises without a prompt.
            uncond: (b, c) or (1, c) embeddings to guide away from; None is the empty prompt.
            cond_scale: Guidance scale w. At 1 the network is evaluated once, on ``cond`` alone;
                otherwise ``cond`` and ``uncond`` are evaluated in one batch of 2b.

        Returns:
            (b, 320) denoised latents. A row depends on no other row.

        Raises:
            ShapeError: A tensor has the wrong shape.
        """
        b = self._check_latents(x)
        if sigma.numel() not in (1, b) or sigma.ndim > 1:
            raise ShapeError(f"sigma must have shape ({b},), one level a row; got {_shape(sigma)}")
        sigma = sigma.reshape(-1).expand(b)
        wanted = self.null_embeds(b) if cond is None else self._rows("cond", cond, b)
        if cond_scale == 1.0:
            return self._denoise(x, sigma, wanted)
        avoided = self.null_embeds(b) if uncond is None else self._rows("uncond", uncond, b)
        both = self._denoise(x.repeat(2, 1), sigma.repeat(2), torch.cat([wanted, avoided]))
        toward, away = both.chunk(2)
        guided: Tensor = away + cond_scale * (toward - away)
        return guided

    def _denoise(self, x: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        # Half precision has too few digits for sigma^2 + v at sigma 100: scale in float32.
        wide = torch.promote_types(self.basis.dtype, torch.float32)
        level, noisy = sigma.to(wide).unsqueeze(-1), x.to(wide)
        std = self.latent_std.to(wide)
        total = level.square() + std.square()
        scaled = (noisy * total.rsqrt()).to(self.basis.dtype)
        raw = self.denoiser(scaled, level.squeeze(-1).log(), embeds.to(self.basis.dtype))
        kept = std.square() / total * noisy
        clean: Tensor = kept + level * std * total.rsqrt() * raw.to(wide)
        return clean.to(x.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Turn (b, 320) latents into (b, 3, 32, 32) RGB images, clamped to [-1, 1].

        Raises:
            ShapeError: ``latents`` is not (b, 320).
        """
        self._check_latents(latents)
        pixels = self.latent_mean + latents.to(self.basis.dtype) @ self.basis.T
        images: Tensor = rearrange(pixels, "b (c h w) -> b c h w", c=3, h=_SIDE)
        return images.clamp(-1, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Project (b, 3, 32, 32) RGB images in [-1, 1] to (b, 320) latents.

        A picture unlike the training set loses what the 320 components cannot express.

        Raises:
            ShapeError: ``images`` is not (b, 3, 32, 32).
        """
        if images.ndim != 4 or images.shape[1:] != (3, _SIDE, _SIDE):
            raise ShapeError(f"images must have shape (b, 3, 32, 32); got {_shape(images)}")
        pixels: Tensor = rearrange(images.to(self.basis.dtype), "b c h w -> b (c h w)")
        return (pixels - self.latent_mean) @ self.basis

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels after Karras et al. (arXiv 2206.00364, eq. 5, rho 7), then 0.

            s_i = (max^(1/7) + i / (steps - 1) (min^(1/7) - max^(1/7)))^7

        Returns:
            (steps + 1,) float32 levels, falling from ``sigma_max`` to ``sigma_min``, then 0.

        Raises:
            ArgumentError: ``steps`` is below 1.
        """
        if steps < 1:
            raise ArgumentError(f"steps must be at least 1; got {steps}")
        high, low = self.sigma_max ** (1 / 7), self.sigma_min ** (1 / 7)
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        levels = (high + ramp * (low - high)) ** 7
        return torch.cat([levels, levels.new_zeros(1)]).float().to(self.basis.device)

    def _check_latents(self, latents: Tensor) -> int:
        if latents.ndim != 2 or latents.shape[1:] != self.latent_shape:
            dims = self.latent_shape[0]
            raise ShapeError(f"latents must have shape (b, {dims}); got {_shape(latents)}")
        return latents.shape[0]

    def _rows(self, name: str, embeds: Tensor, b: int) -> Tensor:
        width = self.prompt.words.embedding_dim + 2 * self.prompt.styles.embedding_dim
        if embeds.ndim != 2 or embeds.shape[0] not in (1, b) or embeds.shape[1] != width:
            raise ShapeError(f"{name} must have shape ({b}, {width}); got {_shape(embeds)}")
        return embeds.expand(b, -1)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def load(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    weights: str | PathLike[str] | None = None,
) -> EmojiModel:
    """Load the emoji model, in evaluation mode and with gradients off for its parameters.

    Gradients with respect to its inputs work as usual.

    Args:
        device: Where to put it.
        dtype: Type of its parameters; noise levels are handled in float32 at least.
        weights: Path of other weights written by ``training/emoji/train.py``.

    Returns:
        The model.

    Raises:
        ArgumentError: ``weights`` cannot be read, is damaged, or not of this model.
    """
    about, tensors = _file.read("weights.safetensors", weights, shapes=_shapes)
    mean = tensors.pop("latent.mean").float()
    std = tensors.pop("latent.std").float()
    basis = tensors.pop("latent.components").float() * tensors.pop("latent.scale").float()
    model = EmojiModel(about, mean, std, basis)
    # Every shape was compared; the three buffers are there already.
    model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, strict=False)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _shapes(about: dict[str, Any], _: _file.Found) -> _file.Found:
    """The tensors of a file whose header says this; nothing of their size is allocated."""
    told = about.get("arch")
    if not isinstance(told, dict) or set(told) != {field.name for field in fields(Arch)}:
        raise ValueError("its header does not tell the sizes of the network")
    arch = Arch(**{key: _file.size(told, key) for key in told})
    if arch.blocks > _MOST_BLOCKS:
        raise ValueError(f"its header has blocks={arch.blocks}, expected at most {_MOST_BLOCKS}")
    for key in ("prompts", "toned"):
        _file.texts(about, key)
    if _file.level(about, "sigma_min") >= _file.level(about, "sigma_max"):
        raise ValueError("its header has a sigma_min that is not below sigma_max")
    words, styles, tones = (_file.texts(about, key) for key in ("vocabulary", "styles", "tones"))
    pixels = 3 * _SIDE**2
    return shapes(len(words), len(styles), len(tones), arch) | {
        "latent.mean": (pixels,),
        "latent.std": (arch.latent,),
        "latent.scale": (arch.latent,),
        "latent.components": (pixels, arch.latent),
    }
