"""Train the denoiser and write ``weights.safetensors``.

    python training/emoji/train.py --data data --out sparke/models/emoji/weights.safetensors

The data set is projected on its principal components, and the components are rounded to the
eight bits they are stored in before training, so that the network learns in exactly the space it
will be used in. Single-threaded on a CPU a run is reproducible to the last bit on one machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from emoji_data import EmojiData, load_dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparke.models.emoji.denoiser import Arch, Denoiser, PromptEncoder

PROGRESS = 500
SIGMA_MIN, SIGMA_MAX = 0.1, 100.0
LOG_SIGMA_MEAN, LOG_SIGMA_STD = 0.6, 1.6


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run besides data and sizes.

    ``tone_said`` and ``style_said`` are the chances that a caption names them. Both stay below a
    half: prompts that name neither must go on covering all tones and styles. ``name_dropped`` is
    the chance that a caption leaves out the name, ``all_dropped`` that it is empty, for CFG.
    ``tone_weight`` multiplies the loss where the tone is said. It moves no optimum, as the caption
    is part of the condition; it spends capacity on telling neighbouring tones apart.
    """

    samples: int = 5_000_000
    batch: int = 512
    rate: float = 2e-3
    warmup: int = 100
    constant: float = 0.4
    decay: float = 1e-3
    average: float = 0.999
    tone_said: float = 0.4
    style_said: float = 0.3
    tone_weight: float = 1.0
    name_dropped: float = 0.02
    all_dropped: float = 0.1
    seed: int = 0

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.samples // self.batch

    def rate_at(self, step: int) -> float:
        """Learning rate: warm-up, constant, then a cosine to a hundredth."""
        done = step / self.steps
        fall = max(0.0, (done - self.constant) / (1 - self.constant))
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fall))
        return self.rate * min(1.0, (step + 1) / self.warmup) * cosine


@dataclass(frozen=True)
class Space:
    """A rounded orthonormal basis: components int8 (3072, k), scale (k,), mean (3072,)."""

    components: Tensor
    scale: Tensor
    mean: Tensor

    @property
    def basis(self) -> Tensor:
        """(3072, k) columns of unit length up to rounding."""
        return self.components.float() * self.scale


def principal_space(data: EmojiData, k: int) -> Space:
    """Principal components of the images under the weights training draws them with."""
    pixels = data.images.flatten(1).double()
    weights = data.draw_weights
    mean = weights @ pixels
    centred = (pixels - mean) * weights.sqrt().unsqueeze(1)
    # Fewer images than pixels: the small Gram matrix has the same spectrum.
    values, left = torch.linalg.eigh(centred @ centred.T)
    basis = centred.T @ left.flip(1)[:, :k] / values.flip(0)[:k].sqrt()
    peak = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * peak.sign()
    scale = basis.abs().amax(0) / 127
    components = (basis / scale).round().to(torch.int8)
    return Space(components, scale.float(), mean.float())


class Captions:
    """Turns labels into word, style and tone indices, some of them left unsaid."""

    def __init__(self, data: EmojiData, vocabulary: list[str], recipe: Recipe) -> None:
        index = {word: i + 1 for i, word in enumerate(vocabulary)}
        longest = max(len(name.split()) for name in data.names)
        rows = [[index[word] for word in name.split()] for name in data.names]
        self.words = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        self.data, self.recipe, self.toned = data, recipe, data.toned

    def draw(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Caption the images with these indices: (b, n) words, (b,) style, (b,) tone."""
        b, recipe, data = len(rows), self.recipe, self.data
        nothing = torch.rand(b) < recipe.all_dropped
        name_said = ~nothing & (torch.rand(b) >= recipe.name_dropped)
        style_said = ~nothing & (torch.rand(b) < recipe.style_said)
        tone_said = ~nothing & (torch.rand(b) < recipe.tone_said) & self.toned[data.name[rows]]
        words = self.words[data.name[rows]] * name_said.unsqueeze(1)
        return words, (data.style[rows] + 1) * style_said, (data.tone[rows] + 1) * tone_said


def train(
    data: EmojiData, space: Space, arch: Arch, recipe: Recipe, start: dict[str, Tensor] | None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Train from scratch, or from the weights ``start``.

    Yields:
        The step and the averaged weights of encoder and denoiser with the latents' stds, every
        ``PROGRESS`` steps and at the end.
    """
    torch.manual_seed(recipe.seed)
    vocabulary = vocabulary_of(data)
    encoder = PromptEncoder(len(vocabulary), len(data.styles), len(data.tones), arch)
    net = nn.ModuleDict({"prompt": encoder, "denoiser": Denoiser(arch)})
    if start is not None:
        net.load_state_dict(start)
    averaged = copy.deepcopy(net).requires_grad_(False)
    optimiser = torch.optim.AdamW(
        net.parameters(), recipe.rate, betas=(0.9, 0.99), weight_decay=recipe.decay, fused=True
    )
    latents = (data.images.flatten(1) - space.mean) @ space.basis
    weights = data.draw_weights.float()
    std = (weights @ latents.square()).sqrt()
    importance = std / std.mean()
    captions = Captions(data, vocabulary, recipe)
    started, smooth = time.time(), math.nan
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate_at(step)
        rows = torch.multinomial(weights, recipe.batch, replacement=True)
        clean = latents[rows]
        log_sigma = torch.randn(recipe.batch) * LOG_SIGMA_STD + LOG_SIGMA_MEAN
        sigma = log_sigma.exp().unsqueeze(1)
        noisy = clean + sigma * torch.randn_like(clean)
        total = sigma.square() + std.square()
        words, style, tone = captions.draw(rows)
        embeds = net["prompt"](words, style, tone)
        raw = net["denoiser"](noisy * total.rsqrt(), log_sigma, embeds)
        # What F must say for c_skip x + c_out F to be the clean latent.
        wanted = (clean - std.square() / total * noisy) * total.sqrt() / (sigma * std)
        emphasis = 1 + (recipe.tone_weight - 1) * (tone > 0).float()
        loss = ((raw - wanted).square().mul(importance).mean(1) * emphasis).mean() / emphasis.mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            blend = 1 - min(recipe.average, (step + 1) / (step + 11))
            torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), blend)
        smooth = loss.item() if math.isnan(smooth) else 0.99 * smooth + 0.01 * loss.item()
        if (step + 1) % PROGRESS == 0 or step + 1 == recipe.steps:
            per_second = (step + 1) * recipe.batch / (time.time() - started)
            print(
                f"step {step + 1}/{recipe.steps} loss {smooth:.4f} {per_second:.0f}/s", flush=True
            )
            yield step + 1, {**averaged.state_dict(), "latent.std": std}


def vocabulary_of(data: EmojiData) -> list[str]:
    """Every word that occurs in a name, sorted."""
    return sorted({word for name in data.names for word in name.split()})


def write(
    path: Path, data: EmojiData, space: Space, arch: Arch, recipe: Recipe, net: dict[str, Tensor]
) -> None:
    """Write the weights in one move, so that a reader never sees half a file."""
    half = {k: v.half() for k, v in net.items() if k != "latent.std"}
    tensors = {
        **half,
        "latent.std": net["latent.std"],
        "latent.mean": space.mean.half(),
        "latent.components": space.components,
        "latent.scale": space.scale,
    }
    about = {
        "arch": asdict(arch),
        "vocabulary": vocabulary_of(data),
        "prompts": data.names,
        "styles": data.styles,
        "tones": data.tones,
        "toned": [name for name, toned in zip(data.names, data.toned, strict=True) if toned],
        "sigma_min": SIGMA_MIN,
        "sigma_max": SIGMA_MAX,
        "artwork": data.artwork,
        "recipe": asdict(recipe),
    }
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"emoji": json.dumps(about)})
    part.chmod(0o644)  # safetensors writes for the owner only, and a wheel keeps the mode
    part.replace(path)


def learned(path: Path) -> dict[str, Tensor]:
    """The network's weights in a file that this script wrote."""
    tensors = load_file(path)
    return {k: v.float() for k, v in tensors.items() if not k.startswith("latent.")}


def main() -> None:
    """Parse the command line, train and write."""
    parser = argparse.ArgumentParser(description="Train the emoji denoiser.")
    parser.add_argument("--data", type=Path, required=True, help="folder of build_dataset.py")
    parser.add_argument("--out", type=Path, required=True, help="weights.safetensors to write")
    parser.add_argument("--samples", type=int, default=Recipe.samples, help="images seen in all")
    parser.add_argument("--rate", type=float, default=Recipe.rate, help="highest learning rate")
    parser.add_argument("--tone-weight", type=float, default=Recipe.tone_weight)
    parser.add_argument("--resume", type=Path, help="weights to start from")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(
        samples=arguments.samples, rate=arguments.rate, tone_weight=arguments.tone_weight
    )
    data, arch = load_dataset(arguments.data), Arch()
    start = None if arguments.resume is None else learned(arguments.resume)
    space = principal_space(data, arch.latent)
    for step, net in train(data, space, arch, recipe, start):
        unfinished = step < recipe.steps
        path = arguments.out.with_suffix(".unfinished") if unfinished else arguments.out
        write(path, data, space, arch, recipe, net)
    print(f"wrote {arguments.out}: {arguments.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
