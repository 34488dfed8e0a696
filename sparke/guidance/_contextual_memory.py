"""Repulsion of text tokens from those of earlier generations, kept as means over tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparke.errors import ShapeError
from sparke.guidance._contextual_push import read, rounding, sized
from sparke.protocols import Calibrated, Features, Score, Selection

__all__ = ["Pool", "Remembered"]


class Pool:
    r"""Means of a sample's tokens over runs of equal size, and displacements of the means.

    With P the (groups, T) matrix of means, $q = P f$; to first order the tokens move $q$ by
    $\Delta$ when each moves by $P^T \Delta$, all tokens of a run alike.

    Args:
        tokens: (B, T, C).
        mask: (B, T), true for tokens that count; None counts all.
        groups: runs of each sample's tokens; fewer tokens than runs leave some empty.
    """

    def __init__(self, tokens: Tensor, mask: Tensor | None, groups: int) -> None:
        seen = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.to(tokens)
        place = (seen.cumsum(1) - 1).clamp_min(0)
        group = (place * groups / seen.sum(1, keepdim=True).clamp_min(1)).floor().long()
        run = torch.nn.functional.one_hot(group.clamp_max(groups - 1), groups).to(tokens)
        run = run * seen[:, :, None]
        self.size = run.sum(1)
        self._mean = run / self.size.clamp_min(1)[:, None]

    def means(self, tokens: Tensor) -> Tensor:
        """(B, T, C) -> (B, groups, C)."""
        return self._mean.mT @ tokens

    def spread(self, moves: Tensor) -> Tensor:
        """(B, groups, C) -> (B, T, C), its transpose."""
        return self._mean @ moves


class Remembered:
    """What memory holds of every block, as frozen when the run began.

    Args:
        score: reads it.
        bank: rows of all blocks side by side, with prompt weights.
        cond: (B, c) prompts of the run.
        groups: means kept of each block.
    """

    def __init__(self, score: Score, bank: Selection, cond: Tensor | None, groups: int) -> None:
        self._score, self._bank, self._cond, self._groups = score, bank, cond, groups
        self._known: dict[int, tuple[Score, Selection]] = {}

    def push(
        self,
        block: tuple[int, int],
        tokens: Tensor,
        pool: Pool,
        *,
        eta: float,
        rounds: int,
        normalize: bool,
    ) -> Tensor:
        r"""(B, T, C) displacements away from what earlier samples had after this block.

        The rounds are those of [apart][sparke.guidance._contextual_push.apart], for the score of
        the means; nothing but means is needed to know the tokens' lengths as well.

        Args:
            block: its number, and how many there are.
            tokens: (B, T, C) of each sample, padding at zero.
            pool: takes their means.
            eta: length of all moves together, in lengths of the tokens.
            rounds: M.
            normalize: False moves by gradients as they are.

        Raises:
            ShapeError: memory is of another model.
        """
        score, bank = self._of(*block, tokens.shape[2])
        bank = replace(bank, x=bank.x.to(tokens))
        means, total = pool.means(tokens), tokens.new_zeros(())
        squared = tokens.flatten(1).square().sum(1)
        share = torch.where(pool.size > 0, pool.size.clamp_min(1).rsqrt(), 0.0)[:, :, None]
        noise = rounding(tokens)
        for _ in range(rounds):
            rows = means.flatten(1)
            gradient, crowding = read(score, Features(rows, self._cond), bank)
            # Tokens move by the gradient over the size of their run, the root of it in length.
            away = gradient.view_as(means) * share
            length = squared.sqrt() if normalize else None
            move = crowding[:, None] * sized(away.flatten(1), rows, length, noise)
            move = eta / rounds * move.view_as(means) * share
            squared = squared + 2 * (means * pool.size[:, :, None] * move).flatten(1).sum(1)
            squared = squared + (pool.size[:, :, None] * move.square()).flatten(1).sum(1)
            means, total = means + move, total + move * pool.size[:, :, None]
        return pool.spread(total)

    def _of(self, block: int, blocks: int, width: int) -> tuple[Score, Selection]:
        if block not in self._known:
            held, needed = self._bank.x.shape[1], blocks * self._groups * width
            if held != needed:
                raise ShapeError(
                    f"memory holds rows of width {held}, and {blocks} blocks with "
                    f"{self._groups} means of {width} channels make {needed}. Another model, other "
                    "blocks, another memory_tokens, and the latents other guiders keep, each need "
                    "a memory of their own."
                )
            start = block * self._groups * width
            rows = self._bank.x[:, start : start + self._groups * width]
            bank = Selection(rows, self._bank.cond, self._bank.log_weight)
            score = self._score
            score = score.calibrate(bank) if isinstance(score, Calibrated) else score
            self._known[block] = (score, bank)
        return self._known[block]
