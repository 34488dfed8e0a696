"""A run's samples: as rows to compare, told apart by prompt, checked and kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparke.errors import ArgumentError, GuidanceWarning, NonFiniteGuidance, ShapeError
from sparke.guidance import _vectors
from sparke.kernels import RELEVANT, prompt_log_weight
from sparke.protocols import Features, Memory, Requires, Run, Score, State, Step

COND_BANDWIDTH = 0.35
"""Of the prompt kernel that tells prompts apart (arXiv 2506.10173)."""


@dataclass(frozen=True)
class Heard:
    """Numbers of the samples of one run that were warned of, whichever guider of a chain did.

    Attributes:
        unguided: because their guidance was not finite.
        unkept: because they were not finite themselves in the end.
    """

    unguided: set[int] = field(default_factory=set)
    unkept: set[int] = field(default_factory=set)


_HEARD: ContextVar[Heard | None] = ContextVar("_HEARD", default=None)


@contextmanager
def heard_once(heard: Heard) -> Iterator[None]:
    """Have the guiders asked in here warn of each sample once between them."""
    token = _HEARD.set(heard)
    try:
        yield
    finally:
        _HEARD.reset(token)


def rows_of(x: Tensor, features: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(b, d) rows to compare: flattened latents, or what `features` makes of them.

    Raises:
        ShapeError: `features` returned something else.
    """
    rows = x.flatten(1) if features is None else features(x)
    if rows.ndim != 2 or rows.shape[0] != x.shape[0]:
        raise ShapeError(
            f"features must return ({x.shape[0]}, width) rows, got {tuple(rows.shape)}."
        )
    return rows


def read(
    x: Tensor, features: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(b, d) rows, detached, and the way back from a gradient in them to one in `x`."""
    if features is not None:
        return _vectors.through(x, None, lambda z: rows_of(z, features))
    base = _vectors.working(x.detach())
    return base.flatten(1), lambda gradient: gradient.view_as(base)


def query(
    state: State, features: Callable[[Tensor], Tensor] | None, reads: str, *, jacobian: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(b, d) rows a score compares, and the way back from their gradient to latents.

    Args:
        state: of the evaluation.
        features: latents -> rows, or None.
        reads: ``"denoised"``, ``"noisy"``, or ``"conditional"`` where the host shows that.
        jacobian: read the denoiser evaluated once more instead, back to the noisy latents.
    """
    if jacobian:
        return evaluated(state, features)
    base = state.x if reads == "noisy" else state.denoised
    if reads == "conditional" and state.conditional is not None:
        base = state.conditional()
    return read(base, features)


def finished(x: Tensor, features: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(b, d) rows of finished samples, to be kept."""
    with torch.no_grad():
        return rows_of(_vectors.working(x.detach()), features)


def evaluated(
    state: State, features: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """As `read`, of the denoiser evaluated once more: the way back ends in the noisy latents.

    Raises:
        ArgumentError: the host cannot be evaluated again.
    """
    return _vectors.through(state.x, evaluation(state), lambda z: rows_of(z, features))


def evaluation(state: State) -> Callable[[Tensor], Tensor]:
    """The denoiser as a function of x, for ``jacobian=True``.

    Raises:
        ArgumentError: the host cannot be evaluated again.
    """
    if state.evaluate is None:
        raise ArgumentError("jacobian=True needs a host that can be evaluated again.")
    return state.evaluate


def several(name: str, run: Run) -> None:
    """Raise unless the run has two samples or more, which `name` needs.

    Raises:
        ArgumentError: it has one.
    """
    if run.shape[0] < 2:
        raise ArgumentError(
            f"{name} repels the samples of one batch from each other and needs at least 2, got "
            f"{run.shape[0]}. Generate several together, or use a guider with a memory, such as "
            "'spell' or 'diversity'."
        )


def from_origin(run: Run, prompts: Tensor) -> Tensor:
    """(n, c) prompts as they are compared in this run: seen from its origin of prompts."""
    origin = run.cond_origin
    return prompts if origin is None else prompts - origin.to(prompts)


@dataclass(frozen=True)
class SamePrompt:
    """A score that sees the rows of a query's own prompt in full, and no others.

    Prompts are the same where the squared Gaussian kernel of their embeddings, L2-normalised,
    bandwidth 0.35, is above 0.1: paraphrases count as one.
    """

    score: Score

    @property
    def requires(self) -> Requires:
        """What the score itself does."""
        return self.score.requires

    def __call__(self, query: Features, bank: Features) -> Tensor:
        """(b,) the score's own values; a bank's weights are its own affair."""
        return self.score(query, bank)

    def log_weight(self, query_cond: Tensor, bank_cond: Tensor) -> Tensor:
        """(b, c), (n, c) -> (b, n), 0 for the same prompt and -inf for another."""
        weight = prompt_log_weight(query_cond, bank_cond, COND_BANDWIDTH)
        return torch.where(weight > RELEVANT, 0.0, -torch.inf)


def alike(run: Run, *, prompt_aware: bool = True) -> Tensor:
    """(b, b), true for two different samples of one batch that are of the same prompt.

    What is the same as the same is the same, so that a batch falls into groups.
    """
    b = run.shape[0]
    mates = torch.ones(b, b, dtype=torch.bool, device=run.device)
    if prompt_aware and run.cond is not None:
        cond = from_origin(run, run.cond)
        weight = prompt_log_weight(cond, cond, COND_BANDWIDTH)
        near = (weight > RELEVANT).to(run.device, torch.float32)
        for _ in range(b.bit_length()):
            near = ((near @ near) > 0).float()
        mates = near > 0
    return mates & ~torch.eye(b, dtype=torch.bool, device=run.device)


def sound(rows: Tensor, mates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with zeros in place of broken samples, mates without them, (b,) which are sound.

    One broken sample must not break its mates: they no longer see it.
    """
    good = torch.isfinite(rows).all(1)
    rows = torch.where(good[:, None], rows, 0.0)
    return rows, mates & good & good[:, None], good


def checked(delta: Tensor, step: Step, nonfinite: str, told: set[int]) -> Tensor:
    """`delta`, detached, zeros for samples where it is not finite.

    Args:
        delta: (b, ...).
        step: to name it.
        nonfinite: ``"warn"`` or ``"raise"``.
        told: numbers of samples that were warned of in this run, and are not again; those warned of
            now join them. A chain has one such set for all its guiders.

    Raises:
        NonFiniteGuidance: there are such samples and `nonfinite` is ``"raise"``.
    """
    delta = delta.detach()
    good = torch.isfinite(delta.flatten(1)).all(1)
    if bool(good.all()):
        return delta
    message = (
        f"guidance is not finite at step {step.index} (sigma {step.sigma:.4g}) for "
        f"{int((~good).sum())} of {len(good)} samples"
    )
    if nonfinite == "raise":
        raise NonFiniteGuidance(f"{message}; nonfinite='warn' would go on unguided.")
    if _news(good, told if (heard := _HEARD.get()) is None else heard.unguided):
        warnings.warn(f"{message}; they go on unguided.", GuidanceWarning, stacklevel=3)
    return torch.where(_vectors.rowwise(good, delta), delta, 0.0)


def keep(memory: Memory, rows: Tensor, cond: Tensor | None) -> None:
    """Commit finished samples; rows that are not finite are left out, and said to be."""
    good = torch.isfinite(rows).all(1)
    heard = _HEARD.get()
    if not bool(good.all()) and _news(good, set() if heard is None else heard.unkept):
        warnings.warn(
            f"{int((~good).sum())} of {len(rows)} finished samples are not finite; they are "
            "not kept in memory.",
            GuidanceWarning,
            stacklevel=3,
        )
    memory.commit(Features(rows[good], None if cond is None else cond[good]))


def _news(good: Tensor, told: set[int]) -> bool:
    """Whether a broken sample is not among those told, which all of them now join."""
    broken = set((~good).nonzero().flatten().tolist())
    new = not broken <= told
    told |= broken
    return new
