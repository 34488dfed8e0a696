"""Diversity guidance: a score, a memory and a schedule, as a displacement of `denoised`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparke import checks, schedules, scores
from sparke.errors import (
    ArgumentError,
    UnknownName,
)
from sparke.guidance import _banks, _cfg_interval, _samples, _score_options, _vectors
from sparke.kernels import normalize
from sparke.memory import RingMemory
from sparke.protocols import (
    Crowded,
    Features,
    Fused,
    Memory,
    Run,
    Score,
    Selection,
    State,
    Step,
)
from sparke.schedules import EveryNth, FewSteps, RemainingNoise, Schedule

__all__ = ["DiversityGuider"]

SCALE = 0.4
LOWEST = 0.3
"""Samples repel each other above this sigma, in units of `sigma_data`."""
FEW_STEPS_LOWEST = 2.0
"""The same under the schedule "few-step", which is stronger and must end sooner."""
FRESH_NOISE = 2.0
"""Fresh noise washes earlier pushes out: at eta 1 they are stronger by 1 plus this."""


class DiversityGuider:
    r"""Pushes each sample away from finished samples and from its batch mates.

    At each evaluation of the denoiser, with D the denoised estimate,

    $$D' = D + \text{scale} \cdot \frac{\sigma_\text{next}^2}{\sigma} \cdot
      \operatorname{clip}_1 \sum_\text{bank} a\, \frac{\nabla s(D)}{\|\nabla s(D)\|}$$

    over two banks, memory and batch mates: s is the score, a in [0, 1) its crowding (where nothing
    is near, nothing is pushed), and $\sigma_\text{next}$ the noise that will
    still be there to absorb the push; the more a step removes of it, the weaker the push. D' is
    then moved so that x - D' keeps the length of x - D. Samplers that add fresh noise, which washes
    early pushes out, are pushed ``1 + 2 eta`` times as hard. Below ``0.3 sigma_data`` nothing is
    pushed. Where the host shows its classifier-free guidance scale, it is held at 1 above
    ``1.6 sigma_data``, or above 5.42 where nobody tells `sigma_data`: guidance extrapolates
    everybody to the same estimate there, and repulsion has nothing to tell apart. The direction is
    SPARKE's (arXiv 2506.10173), the interval and its 5.42 are those of arXiv 2404.07724; the rest
    was chosen by ``benchmarks/sweep.py``.

    It does not preserve the model's distribution: it trades the likeliest picture for another. It
    is a pure function of (x, sigma) between ``begin`` and ``finish``; memory is written once, by
    ``finish``. One guider serves one run at a time.

    Args:
        score: a name, see ``sparke.scores()``, or a [Score][sparke.protocols.Score].
        memory: where finished samples go; a new [RingMemory][sparke.memory.RingMemory] if None.
        scale: length of the push in units of the schedule; 0 leaves the host bit-identical.
        schedule: length of the push at a [Step][sparke.protocols.Step], in the host's units;
            ``RemainingNoise(0.3 * sigma_data, power=1)`` if None; ``"few-step"`` for models of 4 to
            8 steps: ``FewSteps(2 * sigma_data)``.
        reads: what the score sees: ``"denoised"``; ``"conditional"``, the prediction before
            classifier-free guidance (costs an evaluation where that is on); or ``"noisy"``, the
            state itself against clean memory, as published.
        direction: ``"unit"`` as above, or ``"raw"``: scale * schedule^2 * gradient.
        gate: scale a unit direction by the score's crowding. Scores without one are not gated.
        keep_residual: rescale x - D' to the length of x - D.
        jacobian: take the gradient through the denoiser; one more evaluation and its backward.
        sigma_data: standard deviation per dimension of one prompt's samples in the host's units;
            the host's own figure (its attribute ``sigma_data``) if None, else 1.
        in_batch: whether samples of one batch repel each other.
        features: latents (b, ...) -> rows (b, d) to compare, differentiable; flattened latents if
            None. Memory holds these rows.
        cfg_interval: (lo, hi) outside which the host's guidance scale is held at 1; ``"auto"``:
            (0, 1.6 sigma_data), or (0, 5.42) where neither `sigma_data` nor the host tells that;
            None leaves it alone. Acts only while there is something to repel.
        displaces: ``"denoised"``, or ``"latents"``: the next latents of an Euler step move by
            scale * schedule times the norm of x, as published.
        nonfinite: ``"warn"`` and go on unguided, or ``"raise"``.
        **score_options: of the score, when it is given by name.

    Raises:
        ArgumentError: an option has a forbidden value; the batch is smaller than the score needs.
        UnknownName: no such score.
    """

    def __init__(
        self,
        score: str | Score = "cond-rke",
        memory: Memory | None = None,
        *,
        scale: float = SCALE,
        schedule: Schedule | str | None = None,
        reads: str = "denoised",
        direction: str = "unit",
        gate: bool = True,
        keep_residual: bool = True,
        jacobian: bool = False,
        sigma_data: float | None = None,
        in_batch: bool = True,
        features: Callable[[Tensor], Tensor] | None = None,
        cfg_interval: tuple[float, float] | str | None = "auto",
        displaces: str = "denoised",
        nonfinite: str = "warn",
        **score_options: Any,
    ) -> None:
        _score_options.check(DiversityGuider, score, score_options)
        self.score = scores.score(score, **score_options)
        self.memory: Memory = RingMemory() if memory is None else checks.memory("memory", memory)
        self.scale = checks.positive("scale", scale, zero=True)
        self.schedule = schedule
        if isinstance(schedule, str) and schedule not in schedules.NAMES:
            raise UnknownName("schedule", schedule, schedules.NAMES)
        self.reads = checks.choice("reads", reads, ("denoised", "conditional", "noisy"))
        self.direction = checks.choice("direction", direction, ("unit", "raw"))
        self.displaces = checks.choice("displaces", displaces, ("denoised", "latents"))
        self.nonfinite = checks.choice("nonfinite", nonfinite, ("warn", "raise"))
        self.gate, self.keep_residual, self.jacobian = gate, keep_residual, jacobian
        self.sigma_data = None if sigma_data is None else checks.positive("sigma_data", sigma_data)
        self.in_batch, self.features = in_batch, features
        self.cfg_interval = _cfg_interval.checked(cfg_interval)
        if jacobian and reads == "noisy":
            raise ArgumentError("jacobian=True needs reads='denoised' or 'conditional'.")
        self._banks: _banks.Banks | None = None
        self._sigma_data: float | None = None
        self._strength: Schedule = RemainingNoise()
        self._gain = 1.0
        self._told: set[int] = set()

    @classmethod
    def published(
        cls,
        score: str | Score = "cond-rke",
        memory: Memory | None = None,
        *,
        eta: float = 0.03,
        every: int = 10,
        **score_options: Any,
    ) -> DiversityGuider:
        """SPARKE's update as its authors run it (arXiv 2506.10173), for comparison.

        Noisy latents are compared with clean memory, both L2-normalised, with bandwidth 0.8; every
        `every`-th step the latents move by `eta` times their norm. Guidance scales and mates are
        left alone, as there.
        """
        options = {"bandwidth": 0.8, **score_options} if isinstance(score, str) else score_options
        return cls(
            score,
            memory,
            scale=eta,
            schedule=EveryNth(every),
            reads="noisy",
            gate=False,
            keep_residual=False,
            features=_unit_rows,
            displaces="latents",
            in_batch=False,
            cfg_interval=None,
            **options,
        )

    def __repr__(self) -> str:
        return (
            f"DiversityGuider({self.score!r}, {self.memory!r}, scale={self.scale}, "
            f"reads={self.reads!r}, in_batch={self.in_batch}, cfg_interval={self.cfg_interval!r})"
        )

    @property
    def exclusive(self) -> frozenset[str]:
        """The guidance scale, where a `cfg_interval` is given in numbers."""
        held = self.scale != 0 and isinstance(self.cfg_interval, tuple)
        return frozenset({"guidance_scale"} if held else ())

    @property
    def yields(self) -> frozenset[str]:
        """The guidance scale, where `cfg_interval` is ``"auto"``."""
        return frozenset({"guidance_scale"} if self.cfg_interval == "auto" else ())

    @property
    def idle(self) -> frozenset[str]:
        """The guidance scale, where there is no `cfg_interval` or nothing is pushed."""
        unused = self.cfg_interval is None or self.scale == 0
        return frozenset({"guidance_scale"} if unused else ())

    def begin(self, run: Run) -> None:
        """Freeze memory's rows and prompt weights for one run; check what can be checked.

        Raises:
            MissingPrompts: the score compares prompts and there are none, here or in memory.
            ShapeError: memory holds rows or prompts of another width.
            ArgumentError: the batch is smaller than the score requires.
        """
        self._banks, self._told = None, set()
        _banks.check(self.score, run)
        told = self._sigma_data = self.sigma_data or run.sigma_data
        # The few-step schedule was measured with fresh noise, and is strong enough for it.
        self._gain = 1.0 if isinstance(self.schedule, str) else 1 + FRESH_NOISE * run.eta
        self._strength = self._scheduled(told or 1.0)
        self._banks = _banks.freeze(
            self.score,
            self.memory,
            run,
            in_batch=self.in_batch,
            flat=self.features in (None, _unit_rows),
        )

    def __call__(self, state: State) -> Tensor:
        """Displacement of ``state.denoised``, (b, ...) in its dtype; zeros when inactive.

        Raises:
            NonFiniteGuidance: it is not finite and `nonfinite` is ``"raise"``.
        """
        strength = self.scale * self._strength(state.step)
        if strength == 0 or not self._banks:
            return torch.zeros_like(state.denoised)
        length = _vectors.length(state, strength, self.displaces)
        if self.displaces == "denoised":
            length = length * self._gain
        delta = length * self._push(state, strength, self._banks)
        if self.keep_residual:
            delta = _vectors.kept_residual(state.x, state.denoised, delta)
        checked = _samples.checked(delta, state.step, self.nonfinite, self._told)
        return checked.to(state.denoised.dtype)

    def finish(self, x: Tensor) -> None:
        """Commit the finished samples, (b, ...), to memory; rows that are not finite are left out.

        A guider of scale 0 keeps memory too: what was generated unguided is history as well.
        """
        cond = None if self._banks is None else self._banks.kept_cond
        _samples.keep(self.memory, _samples.finished(x, self.features), cond)
        self._banks = None

    def on_guidance_scale(self, step: Step, guidance_scale: float) -> float:
        """1 outside `cfg_interval` while there is something to repel, else the scale given."""
        if self.cfg_interval is None or self.scale == 0 or not self._banks:
            return guidance_scale
        lo, hi = _cfg_interval.ends(self.cfg_interval, self._sigma_data)
        return guidance_scale if lo < step.sigma <= hi else 1.0

    def _scheduled(self, sigma_data: float) -> Schedule:
        if isinstance(self.schedule, str):
            return FewSteps(FEW_STEPS_LOWEST * sigma_data)
        return self.schedule or RemainingNoise(LOWEST * sigma_data, power=1)

    def _push(self, state: State, strength: float, banks: _banks.Banks) -> Tensor:
        """(b, ...) sum over the banks, at most of length 1 when the direction is a unit one."""
        rows, pull = _samples.query(state, self.features, self.reads, jacobian=self.jacobian)
        query = Features(rows, banks.cond)
        total = rows.new_zeros(())
        for score, bank in banks.sources(rows):
            gradient, crowding = self._direction(score, query, bank)
            pulled = pull(gradient)
            if self.direction == "raw":
                total = total + strength * pulled
            else:
                total = total + _vectors.rowwise(crowding, pulled) * _vectors.unit(pulled)
        if self.direction == "raw":
            return total
        return total / _vectors.norm(total).clamp_min(1.0)

    def _direction(self, score: Score, query: Features, bank: Selection) -> tuple[Tensor, Tensor]:
        if self.gate and isinstance(score, Fused):
            return score.direction_and_crowding(query, bank)
        gradient = _vectors.ascent(score, query, bank)
        if self.gate and isinstance(score, Crowded):
            return gradient, score.crowding(query, bank)
        return gradient, gradient.new_ones(len(gradient))


def _unit_rows(x: Tensor) -> Tensor:
    return normalize(x.flatten(1))


build = DiversityGuider
