"""The data set as tensors, shared by the training scripts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class EmojiData:
    """Images (n, 3, 32, 32) in [-1, 1] with (n,) labels, and the words the labels stand for."""

    images: Tensor
    name: Tensor
    style: Tensor
    tone: Tensor
    names: list[str]
    styles: list[str]
    tones: list[str]
    artwork: dict[str, str]

    @property
    def toned(self) -> Tensor:
        """(names,) whether a concept is drawn in several skin tones."""
        toned = torch.zeros(len(self.names), dtype=torch.bool)
        toned[self.name[self.tone > 0]] = True
        return toned

    @property
    def draw_weights(self) -> Tensor:
        """(n,) chances of drawing an image: a concept weighs the root of its number of images.

        Between one image one vote, which starves the concepts without skin tones, and one concept
        one vote, which starves the modes of those with them.
        """
        count = torch.bincount(self.name, minlength=len(self.names)).double()
        weights = count[self.name].rsqrt()
        return weights / weights.sum()


def load_dataset(folder: Path) -> EmojiData:
    """Read what build_dataset.py wrote to ``folder``."""
    tensors = load_file(folder / "dataset.safetensors")
    about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    images = tensors["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
    return EmojiData(
        images=images.contiguous(),
        name=tensors["name"],
        style=tensors["style"],
        tone=tensors["tone"],
        names=about["names"],
        styles=about["styles"],
        tones=about["tones"],
        artwork=about["artwork"],
    )
