"""The noise a run starts from: a number for each sample, and whether there is anything else in it.

Nothing here draws a random number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_white", "obstacle", "seeds"]

PARTWAY = ("timestep", "timesteps", "latent_timestep", "strength", "initial_audio_waveforms")
"""What pipelines are told when they make latents of a picture and some noise."""

READ = 1 << 16
"""Numbers of a sample that its seed is made of, spread evenly over it."""
DEVIATIONS = 5.0
"""Noise is not taken for white noise once in about a million runs."""


def seeds(x: Tensor) -> tuple[int, ...]:
    """One number for each sample, in [0, 2^63), by what is in it: equal rows have equal numbers.

    Args:
        x: (b, ...) initial latents.
    """
    rows = x.detach().flatten(1)
    rows = rows[:, :: max(1, -(-rows.shape[1] // READ))]
    table = rows.to("cpu", torch.float32).contiguous().numpy()
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in table)
    return tuple(int.from_bytes(digest, "little") >> 1 for digest in digests)


def is_white(x: Tensor, std: float | None = None) -> bool:
    """Whether samples look like independent normal numbers and nothing else.

    Neighbours in each dimension must be uncorrelated, as they are not in images, and the root mean
    square must be `std`; both to within what chance does to a single sample.

    Args:
        x: (b, ...) latents.
        std: standard deviation of the noise, None for any.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    power = x.square().mean()
    size = max(x[:1].numel(), 1)
    if std is not None:
        off = abs(float(power.sqrt()) / std - 1)
        if not off <= DEVIATIONS / math.sqrt(2 * size):
            return False
    found = []
    for dim in range(1, x.ndim):
        if x.shape[dim] > 1:
            first, second = (x.narrow(dim, i, x.shape[dim] - 1) for i in (0, 1))
            pairs = first[:1].numel()
            found.append((first * second).mean() / power.clamp_min(1e-30) * math.sqrt(pairs))
    return not found or float(torch.stack(found).abs().max()) <= DEVIATIONS


def obstacle(arguments: Mapping[str, Any], latents: Tensor) -> str | None:
    """Why the latents that a pipeline prepared are not initial noise, None if they are.

    Args:
        arguments: that its ``prepare_latents`` was called with.
        latents: that it returned.
    """
    partway = any(arguments.get(name) is not None for name in PARTWAY)
    if partway and arguments.get("is_strength_max") is not True:
        return "the run starts from a picture, partway down the noise levels"
    if not is_white(latents):
        return "the run starts from latents that are no white noise"
    return None
