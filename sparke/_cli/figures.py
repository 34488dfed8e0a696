"""How varied and how right the pictures of the demo are, as numbers."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import sparke
from sparke.models.emoji import Judge

HALVES = ("unguided", "guided")


@dataclass(frozen=True)
class Figures:
    """Of some pictures.

    Args:
        effective_modes: exp of the entropy of the modes seen, per prompt.
        vendi: Vendi score (cosine kernel on the judge's features), per prompt.
        name_accuracy: share that shows its prompt, by the nearest real picture.
        name_accuracy_cnn: likewise, by the judge's network.
    """

    effective_modes: float
    vendi: float
    name_accuracy: float
    name_accuracy_cnn: float


@dataclass(frozen=True)
class Half:
    """One half of the demo.

    Args:
        images: (prompts, n, 3, 32, 32) in [-1, 1].
        prompts: figures of each prompt.
        seconds: time its sampling took.
    """

    images: Tensor
    prompts: tuple[Figures, ...]
    seconds: float

    @property
    def overall(self) -> Figures:
        """Mean over the prompts."""
        rows = torch.tensor([list(asdict(one).values()) for one in self.prompts])
        return Figures(*rows.double().mean(dim=0).tolist())


def judged(judge: Judge, images: Tensor, prompts: Sequence[str], seconds: float) -> Half:
    """Judge (prompts, n, 3, 32, 32) images in [-1, 1]."""
    return Half(
        images, tuple(of(judge, p, x) for p, x in zip(prompts, images, strict=True)), seconds
    )


def of(judge: Judge, prompt: str, images: Tensor) -> Figures:
    """Judge (n, 3, 32, 32) images of one prompt."""
    verdict = judge(images)
    ids = judge.ids([prompt]).repeat(len(images))
    # The cosine kernel has no bandwidth to follow the data: the halves are measured alike.
    vendi = sparke.metrics.vendi(judge.features(images), kernel="cosine")
    return Figures(judge.effective_modes(verdict, ids), vendi, *judge.name_accuracy(verdict, ids))


def report(
    settings: dict[str, Any], prompts: Sequence[str], halves: dict[str, Half]
) -> dict[str, Any]:
    """Everything the demo tells, for JSON."""
    return {
        "settings": settings,
        "versions": versions(),
        "overall": {
            name: {**asdict(half.overall), "seconds": round(half.seconds, 3)}
            for name, half in halves.items()
        },
        "prompts": [
            {"prompt": prompt, **{name: asdict(half.prompts[i]) for name, half in halves.items()}}
            for i, prompt in enumerate(prompts)
        ],
    }


def versions() -> dict[str, str]:
    """Versions of what the pictures depend on."""
    found = {"sparke": sparke.__version__, "python": platform.python_version()}
    return found | {package: _version(package) for package in ("torch", "k-diffusion")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
