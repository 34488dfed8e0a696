"""The network: a bag-of-words prompt encoder and an MLP denoiser modulated by prompt and noise.

Both are plain modules that know tensors only. Words, pictures and files are the business of
``sparke.models.emoji.model``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SIGMA_FEATURES = 64
_SIGMA_MAX_FREQUENCY = 100.0


@dataclass(frozen=True)
class Arch:
    """Sizes of the network; stored in the header of the weights.

    Args:
        latent: Dimensions of a latent.
        width: Channels of the residual stream.
        hidden: Channels inside a residual block.
        blocks: Number of residual blocks.
        cond: Channels of the joint code of prompt and noise level.
        word: Dimensions of the part of a prompt embedding that says what is drawn.
        attribute: Dimensions of each of the two parts that say its style and its tone.
    """

    latent: int = 320
    width: int = 384
    hidden: int = 480
    blocks: int = 4
    cond: int = 128
    word: int = 64
    attribute: int = 32

    @property
    def embed(self) -> int:
        """Dimensions of a prompt embedding."""
        return self.word + 2 * self.attribute


class PromptEncoder(nn.Module):
    """Embed a prompt as [words | style | tone], each part in dimensions of its own.

    With word vectors w_i, the first part is sum_i w_i / sqrt(n): the order of the words is lost.
    Style and tone have their own dimensions because, averaged into the words, they were drowned.
    Index 0 means "not said" for all three and has a learned vector; a prompt that says nothing is
    the unconditional one.

    Args:
        words: Size of the vocabulary without "not said".
        styles: Number of styles without "not said".
        tones: Number of tones without "not said".
        arch: Sizes.
    """

    def __init__(self, words: int, styles: int, tones: int, arch: Arch) -> None:
        super().__init__()
        self.words = nn.Embedding(words + 1, arch.word)
        self.styles = nn.Embedding(styles + 1, arch.attribute)
        self.tones = nn.Embedding(tones + 1, arch.attribute)

    def forward(self, words: Tensor, style: Tensor, tone: Tensor) -> Tensor:
        """Embed prompts.

        Args:
            words: (b, n) word indices, padded with 0 on any side.
            style: (b,) style indices, 0 where not said.
            tone: (b,) tone indices, 0 where not said.

        Returns:
            (b, embed) prompt embeddings.
        """
        said = (words > 0).to(self.words.weight.dtype).unsqueeze(-1)
        count = said.sum(dim=1)
        total = (self.words(words) * said).sum(dim=1)
        pooled = total / count.clamp(min=1).sqrt()
        pooled = torch.where(count > 0, pooled, self.words.weight[0])
        return torch.cat([pooled, self.styles(style), self.tones(tone)], dim=-1)


class Block(nn.Module):
    """Residual block: h + W_2 silu(W_1 (norm(h) * (1 + scale) + shift)), modulated by the code."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(arch.width, elementwise_affine=False)
        self.modulate = nn.Linear(arch.cond, 2 * arch.width)
        self.expand = nn.Linear(arch.width, arch.hidden)
        self.contract = nn.Linear(arch.hidden, arch.width)
        # Zeros make every block the identity at first, which lets the depth train fast.
        for layer in (self.modulate, self.contract):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, code: Tensor) -> Tensor:
        """Apply to (b, width) features under a (b, cond) code."""
        scale, shift = self.modulate(code).chunk(2, dim=-1)
        inner: Tensor = self.expand(self.norm(h) * (1 + scale) + shift)
        update: Tensor = self.contract(F.silu(inner))
        return h + update


class Denoiser(nn.Module):
    """The raw network F of EDM preconditioning; see ``EmojiModel`` for what wraps it.

    Args:
        arch: Sizes.
    """

    frequencies: Tensor

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        half = _SIGMA_FEATURES // 2
        frequencies = torch.exp(torch.linspace(0, math.log(_SIGMA_MAX_FREQUENCY), half))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.of_sigma = nn.Sequential(
            nn.Linear(_SIGMA_FEATURES, arch.cond), nn.SiLU(), nn.Linear(arch.cond, arch.cond)
        )
        self.of_prompt = nn.Sequential(
            nn.Linear(arch.embed, arch.cond), nn.SiLU(), nn.Linear(arch.cond, arch.cond)
        )
        self.enter = nn.Linear(arch.latent, arch.width)
        self.blocks = nn.ModuleList([Block(arch) for _ in range(arch.blocks)])
        self.norm = nn.LayerNorm(arch.width)
        self.leave = nn.Linear(arch.width, arch.latent)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, log_sigma: Tensor, embeds: Tensor) -> Tensor:
        """Evaluate the raw network.

        Args:
            x: (b, latent) noisy latents scaled to unit variance.
            log_sigma: (b,) natural logarithm of the noise level.
            embeds: (b, embed) prompt embeddings.

        Returns:
            (b, latent) raw outputs of unit variance.
        """
        angles = log_sigma.unsqueeze(-1) / 5 * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype)
        code = F.silu(self.of_sigma(waves) + self.of_prompt(embeds))
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, code)
        raw: Tensor = self.leave(self.norm(h))
        return raw


def shapes(words: int, styles: int, tones: int, arch: Arch) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters, of a ``PromptEncoder`` and of a ``Denoiser``.

    Known without making them: a header that asks for terabytes is refused before they are.
    """
    linear = {
        "of_sigma.0": (arch.cond, _SIGMA_FEATURES),
        "of_sigma.2": (arch.cond, arch.cond),
        "of_prompt.0": (arch.cond, arch.embed),
        "of_prompt.2": (arch.cond, arch.cond),
        "enter": (arch.width, arch.latent),
        "leave": (arch.latent, arch.width),
    }
    for i in range(arch.blocks):
        linear[f"blocks.{i}.modulate"] = (2 * arch.width, arch.cond)
        linear[f"blocks.{i}.expand"] = (arch.hidden, arch.width)
        linear[f"blocks.{i}.contract"] = (arch.width, arch.hidden)
    found: dict[str, tuple[int, ...]] = {
        "prompt.words.weight": (words + 1, arch.word),
        "prompt.styles.weight": (styles + 1, arch.attribute),
        "prompt.tones.weight": (tones + 1, arch.attribute),
        "denoiser.norm.weight": (arch.width,),
        "denoiser.norm.bias": (arch.width,),
    }
    for name, shape in linear.items():
        found[f"denoiser.{name}.weight"], found[f"denoiser.{name}.bias"] = shape, shape[:1]
    return found
