"""A judge of samples: which concept, style and skin tone a picture shows, by two methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sparke.errors import ArgumentError, ShapeError
from sparke.models.emoji import _file
from sparke.models.emoji.classifier import Classifier

__all__ = ["Judge", "References", "Verdict", "load_judge"]

_POOL = 2


@dataclass(frozen=True)
class Verdict:
    """What a judge saw in b pictures; all (b,).

    Args:
        name: Index in ``Judge.prompts``, by the nearest reference image.
        style: Index in ``Judge.styles``, likewise.
        tone: Index in ``Judge.tones``, likewise; 0 also where a concept has no skin tones.
        mode: Index of the nearest reference image itself.
        distance: Root mean square difference from it, both pooled to 16x16, pixels in [-1, 1].
        name_cnn: Index in ``Judge.prompts``, by the convolutional network.
    """

    name: Tensor
    style: Tensor
    tone: Tensor
    mode: Tensor
    distance: Tensor
    name_cnn: Tensor


@dataclass(frozen=True)
class References:
    """The real pictures, one for each mode.

    Args:
        images: (n, 3, 16, 16) in [-1, 1].
        name: (n,) index in ``Judge.prompts``.
        style: (n,) index in ``Judge.styles``.
        tone: (n,) index in ``Judge.tones``.
    """

    images: Tensor
    name: Tensor
    style: Tensor
    tone: Tensor


class Judge(nn.Module):
    """Names the concept, style and tone of 32x32 pictures.

    Two methods that fail in different ways: the nearest of the real pictures after 2x2 average
    pooling, which also gives style and tone, and a convolutional network trained on distorted real
    pictures. It is a judge of this model's samples, not of pictures at large: the nearest
    reference is unmoved by noise and blur but not by a shift of two pixels.

    Attributes:
        prompts: Names of the concepts, in the order of ``EmojiModel.prompts``.
        styles: Drawing styles.
        tones: Skin tones.
        references: The real pictures and their labels.
    """

    reference_images: Tensor
    reference_labels: Tensor

    def __init__(
        self,
        prompts: Sequence[str],
        styles: Sequence[str],
        tones: Sequence[str],
        images: Tensor,
        labels: Tensor,
    ) -> None:
        super().__init__()
        self.prompts, self.styles, self.tones = list(prompts), list(styles), list(tones)
        self.classifier = Classifier(len(self.prompts))
        self.register_buffer("reference_images", images, persistent=False)
        self.register_buffer("reference_labels", labels, persistent=False)

    @property
    def references(self) -> References:
        """The real pictures, pooled to 16x16, and their labels."""
        return References(self.reference_images, *self.reference_labels.unbind(0))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Verdict:
        """Judge (b, 3, 32, 32) RGB images in [-1, 1].

        Raises:
            ShapeError: ``images`` is not (b, 3, 32, 32).
        """
        images = self._check(images)
        pooled = rearrange(F.avg_pool2d(images, _POOL), "b c h w -> b (c h w)")
        known = rearrange(self.reference_images, "n c h w -> n (c h w)")
        # The default, by matrix product, blurs small distances and ties rows to their batch.
        exact = "donot_use_mm_for_euclid_dist"
        distance, mode = torch.cdist(pooled, known, compute_mode=exact).min(dim=1)
        name, style, tone = self.reference_labels[:, mode].unbind(0)
        rms = distance / known.shape[1] ** 0.5
        return Verdict(name, style, tone, mode, rms, self.classifier(images).argmax(dim=1))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Embed (b, 3, 32, 32) images in [-1, 1] as (b, 128), for diversity scores.

        Raises:
            ShapeError: ``images`` is not (b, 3, 32, 32).
        """
        embedded: Tensor = self.classifier.features(self._check(images))
        return embedded

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """(b,) indices in ``prompts`` of the concepts that these prompts ask for.

        ``style:`` and ``tone:`` words are left aside, and so is the order of words.

        Raises:
            ArgumentError: A prompt does not name exactly one of the concepts.
        """
        index = {frozenset(name.split()): i for i, name in enumerate(self.prompts)}
        found: list[int] = []
        for prompt in prompts:
            words = frozenset(word for word in prompt.lower().split() if ":" not in word)
            if words not in index:
                raise ArgumentError(f"prompt {prompt!r} must name one of the judge's prompts")
            found.append(index[words])
        return torch.tensor(found, dtype=torch.long, device=self.reference_labels.device)

    def name_accuracy(self, verdict: Verdict, prompt_ids: Tensor) -> tuple[float, float]:
        """Shares of pictures that show their prompt, by nearest reference and by network.

        Args:
            verdict: Of b pictures.
            prompt_ids: (b,) concepts asked for, from ``ids``.
        """
        nearest = (verdict.name == prompt_ids).double().mean()
        network = (verdict.name_cnn == prompt_ids).double().mean()
        return float(nearest), float(network)

    def effective_modes(self, verdict: Verdict, prompt_ids: Tensor) -> float:
        """Number of modes in use: the mean over prompts of exp(H) in mode frequencies.

        H = -sum_m p_m ln p_m over the nearest references of the pictures of a prompt that show
        it; a prompt none of whose pictures shows it counts 0. It grows with the number of
        pictures to a prompt: compare equal numbers only.

        Args:
            verdict: Of b pictures.
            prompt_ids: (b,) concepts asked for, from ``ids``.
        """
        totals: list[float] = []
        for prompt in set(prompt_ids.tolist()):
            shown = verdict.mode[(prompt_ids == prompt) & (verdict.name == prompt)]
            share = shown.bincount().double() / max(len(shown), 1)
            entropy = -torch.xlogy(share, share).sum()
            totals.append(float(entropy.exp()) if len(shown) else 0.0)
        return sum(totals) / max(len(totals), 1)

    def _check(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1:] != (3, 32, 32):
            raise ShapeError(f"images must have shape (b, 3, 32, 32); got {tuple(images.shape)}")
        return images.to(self.reference_images)


def load_judge(
    device: torch.device | str = "cpu", *, weights: str | PathLike[str] | None = None
) -> Judge:
    """Load the judge that belongs to the emoji model, in evaluation mode.

    Args:
        device: Where to put it.
        weights: Path of another judge written by ``training/emoji/train_judge.py``.

    Raises:
        ArgumentError: ``weights`` cannot be read, is damaged, or no judge.
    """
    about, tensors = _file.read("judge.safetensors", weights, shapes=_shapes)
    images = tensors.pop("reference.images").float() / 127.5 - 1
    labels = tensors.pop("reference.labels").long()
    judge = Judge(about["prompts"], about["styles"], about["tones"], images, labels)
    for row, names in zip(labels, (judge.prompts, judge.styles, judge.tones), strict=True):
        if int(row.min()) < 0 or int(row.max()) >= len(names):
            raise ArgumentError(
                f"weights={str(weights)!r} cannot be used: a label is {int(row.max())}, and there "
                f"are {len(names)} names. Restore the file from a copy."
            )
    # Every shape was compared; only counters that training alone reads are not in the file.
    judge.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, strict=False)
    return judge.to(device).eval().requires_grad_(False)


def _shapes(about: dict[str, Any], there: _file.Found) -> _file.Found:
    """The tensors of a file whose header says this."""
    prompts = _file.texts(about, "prompts")
    for key in ("styles", "tones"):
        _file.texts(about, key)
    # The header does not tell how many references there are.
    references = max(1, (there.get("reference.labels") or (0,))[-1])
    # One name, then as many as there are: a header may tell of more than there is memory for.
    learned = {key: tuple(tensor.shape) for key, tensor in Classifier(1).state_dict().items()}
    learned["name.weight"] = (len(prompts), *learned["name.weight"][1:])
    learned["name.bias"] = (len(prompts),)
    found: _file.Found = {
        "reference.images": (references, 3, 16, 16),
        "reference.labels": (3, references),
    }
    return found | {
        f"classifier.{key}": shape
        for key, shape in learned.items()
        if not key.endswith("num_batches_tracked")
    }
