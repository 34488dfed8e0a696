"""Random numbers of a guider's own: from a sample's seed, in whatever batch and on any device."""

from __future__ import annotations

import hashlib

import torch

from sparke.protocols import Run

__all__ = ["generator", "seeds_of"]


def generator(seed: int, *key: object) -> torch.Generator:
    """A new generator on the CPU for this sample and this use.

    Args:
        seed: of the sample.
        *key: what is drawn, and when; other keys give independent numbers. Numbers, strings and
            None are told apart by how they print.
    """
    # Neighbouring seeds and steps must not give related streams, so they are hashed together.
    digest = hashlib.blake2b(repr((int(seed), *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def seeds_of(run: Run) -> tuple[int, ...]:
    """One seed per sample; the rows' numbers where the host tells none."""
    return run.seeds or tuple(range(run.shape[0]))
