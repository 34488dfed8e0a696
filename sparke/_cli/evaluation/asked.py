"""What was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    """The options of the command, as `sparke eval --help` tells them."""

    paths: Sequence[Path]
    command: str
    prompts: Sequence[Path] = ()
    prompts_from_names: bool = False
    text_encoder: str | None = None
    labels: Sequence[Path] = ()
    reference: Path | None = None
    nearest: int = 5
    encoder: str | None = None
    image_size: int | None = None
    download: bool = False
    kernel: str = "gaussian"
    bandwidth: float | None = None
    random_features: int | None = None
    per_prompt: int | None = None
    pairs: int = 6
    batch: int = 32
    device: str = "auto"
    report: Path | None = None
    write_report: bool = True
    json: Path | None = None
    force: bool = False
