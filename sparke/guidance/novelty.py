"""Novelty guidance: away from pictures that exist already."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparke.errors import ArgumentError
from sparke.guidance import _score_options
from sparke.kernels import QuantileRule
from sparke.memory.reference import ReferenceMemory
from sparke.protocols import Features, Memory, Run, Score, State, Step
from sparke.schedules import Schedule

__all__ = ["Novelty", "build"]

SCALE = 1.0
WITHOUT_PROMPTS = QuantileRule(factor=0.3)
"""Where prompts do not tell which rows matter the kernel must: it is narrower."""


class Novelty:
    r"""Pushes each sample away from a fixed set of reference rows.

    SPARKE's novelty form (arXiv 2506.10173): with z the sample, $y_j$ the rows of the reference
    and $t_j$ their prompts, it ascends

    $$s(z) = -\log \sum_j k_T(t_j, p)^2\, k(y_j, z)^2,$$

    the logarithm of what z adds below the line of the conditional RKE of reference and sample
    together. The direction is attention over the reference, $z - \sum_j p_j y_j$. It is
    [DiversityGuider][sparke.guidance.diversity.DiversityGuider], every option of which it takes,
    with a [ReferenceMemory][sparke.memory.reference.ReferenceMemory] in the place of history: the
    push has the length of the noise that remains, fades where no row of the reference is near, and
    holds classifier-free guidance off at high noise.

    It lowers similarity to the reference in the space of its features; it does not guarantee a
    distance, removes no concept, and is no protection against copies: a model that has learnt a
    picture by heart may still draw it.

    Args:
        reference: Features of (n, d) rows with or without prompts; a tensor (n, ...) of clean
            latents, to which `features` is applied; or a ReferenceMemory.
        memory: where finished samples are kept, and repelled from too; nowhere if None.
        score: a name, see ``sparke.scores()``, or a Score. If None, cond-rke where prompts can be
            compared (the reference has them, there is a memory, or `in_batch`), else rke; and,
            against a reference without prompts, with a bandwidth of 0.3 times the 75 % quantile of
            distances in place of 0.5.
        scale: length of the push in units of the schedule; 0 leaves the host bit-identical.
        features: latents (b, ...) -> rows (b, d), differentiable; flattened latents if None.
        schedule: as for DiversityGuider.
        in_batch: whether samples of one batch repel each other as well.
        cfg_interval: as for DiversityGuider.
        **options: DiversityGuider's, and those of a score given by name.

    Raises:
        ArgumentError: an option has a forbidden value; two memories are given.
        ShapeError: `reference` is no rows.
        UnknownName: no such score.
    """

    def __init__(
        self,
        reference: ReferenceMemory | Features | Tensor,
        memory: Memory | None = None,
        *,
        score: str | Score | None = None,
        scale: float = SCALE,
        features: Callable[[Tensor], Tensor] | None = None,
        schedule: Schedule | str | None = None,
        in_batch: bool = False,
        cfg_interval: tuple[float, float] | str | None = "auto",
        **options: Any,
    ) -> None:
        held = _held(reference, memory, features)
        if score is None:
            prompts = held.has_prompts
            score = "cond-rke" if prompts or in_batch or held.history is not None else "rke"
            if not prompts:
                options = {"bandwidth": WITHOUT_PROMPTS, **options}
        # Siblings do not import each other; the family they are members of knows both.
        diversity = sys.modules[__package__].DiversityGuider
        _score_options.check(Novelty, score, options, diversity)
        self._guider: Any = diversity(
            score,
            held,
            scale=scale,
            features=features,
            schedule=schedule,
            in_batch=in_batch,
            cfg_interval=cfg_interval,
            **options,
        )

    def __repr__(self) -> str:
        guider = self._guider
        return (
            f"Novelty({guider.memory!r}, score={guider.score!r}, scale={guider.scale}, "
            f"in_batch={guider.in_batch}, cfg_interval={guider.cfg_interval!r})"
        )

    @property
    def memory(self) -> ReferenceMemory:
        """The reference, and the history beside it."""
        memory: ReferenceMemory = self._guider.memory
        return memory

    @property
    def score(self) -> Score:
        """What reads it."""
        score: Score = self._guider.score
        return score

    @property
    def in_batch(self) -> bool:
        """Whether samples of one batch repel each other as well."""
        return bool(self._guider.in_batch)

    @in_batch.setter
    def in_batch(self, value: bool) -> None:
        self._guider.in_batch = value

    @property
    def exclusive(self) -> frozenset[str]:
        """The guidance scale, where a `cfg_interval` is given in numbers."""
        claimed: frozenset[str] = self._guider.exclusive
        return claimed

    @property
    def yields(self) -> frozenset[str]:
        """The guidance scale, where `cfg_interval` is ``"auto"``."""
        left: frozenset[str] = self._guider.yields
        return left

    @property
    def idle(self) -> frozenset[str]:
        """The guidance scale, where there is no `cfg_interval` or nothing is pushed."""
        unused: frozenset[str] = self._guider.idle
        return unused

    def begin(self, run: Run) -> None:
        """Freeze the reference's rows and prompt weights for one run.

        Raises:
            MissingPrompts: prompts are to be compared and there are none.
            ShapeError: the reference holds rows or prompts of another width.
        """
        self._guider.begin(run)

    def __call__(self, state: State) -> Tensor:
        """Displacement of ``state.denoised``, (b, ...) in its dtype; zeros when inactive."""
        delta: Tensor = self._guider(state)
        return delta

    def finish(self, x: Tensor) -> None:
        """Commit the finished samples to the history, if there is one."""
        self._guider.finish(x)

    def on_guidance_scale(self, step: Step, guidance_scale: float) -> float:
        """1 outside `cfg_interval`, else the scale given."""
        scale: float = self._guider.on_guidance_scale(step, guidance_scale)
        return scale


def _held(
    reference: ReferenceMemory | Features | Tensor,
    memory: Memory | None,
    features: Callable[[Tensor], Tensor] | None,
) -> ReferenceMemory:
    """The reference with its history."""
    if not isinstance(reference, ReferenceMemory):
        told = features if isinstance(reference, Tensor) else None
        return ReferenceMemory(reference, history=memory, features=told)
    if memory is None:
        return reference
    if reference.history is not None:
        raise ArgumentError(
            "the reference has a history already, so memory would go nowhere. Give one of the two."
        )
    return reference.beside(memory)


build = Novelty
