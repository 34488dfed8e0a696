"""Contextualized Vendi score guidance: unlike what was made, like what the context holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparke import checks
from sparke.guidance import _banks, _contexts, _samples, _score_options, _vectors
from sparke.memory import RingMemory
from sparke.protocols import Features, Memory, Run, Score, Selection, State
from sparke.schedules import EveryNth, RemainingNoise, Schedule
from sparke.scores import score as score_of

__all__ = ["CVSG", "build"]

Sources: TypeAlias = Sequence[tuple[Score, Selection]]

PUBLISHED_SCALE, PUBLISHED_EVERY = 0.05, 5
GENTLE_SCALE, GENTLE_LOWEST = 2.0, 0.3


class CVSG:
    r"""Contextualized Vendi score guidance (c-VSG, arXiv 2406.04551).

    With z the features of the sample being generated, M those of samples made before and E those
    of exemplars, real pictures of the context that is wanted, it ascends

    $$g = \nabla \big[ V(M \cup z) - \beta\, V(E \cup z) \big], \qquad
      x_t \leftarrow x_t + \text{scale}\, \frac{\|x_t\|}{\|g\|}\, g,$$

    V being the Vendi score, the effective number of distinct samples: z is to add to what was made
    and not to what the exemplars already span. Published: CLIP features of the decoded estimate of
    x0, cosine kernel, beta 2, scale 0.04 to 0.07, every 5th of 50 steps, memory kept per object
    over all regions. Any [Score][sparke.protocols.Score] takes the place of V.

    As published the latents move; here `denoised` moves by so much that an Euler step moves them
    likewise. What differs from the authors' code: the first sample, without memory, is pulled to
    its exemplars (there it is unguided); a batch may be larger than one, and its samples count as
    made for each other; finished samples are kept whatever the schedule is; the gradient stops at
    the estimate of x0 unless `jacobian` is set (there it goes through the network, and what is
    decoded is a blend of x_t and that estimate).

    It does not check that exemplars are what they are said to be, and it takes their variety for
    that of the world: what they lack, it pulls away from. The gradient is always brought to full
    length, so it pushes also where nothing is crowded.

    It is a pure function of (x, sigma) between ``begin`` and ``finish``; one guider serves one run
    at a time.

    Args:
        exemplars: of the wanted context: Features of (n, d) rows, a tensor (n, ...) of clean
            latents, or a ReferenceMemory; or several such sets by the name of their context. A
            score that compares prompts weighs those that have some; others count in full.
        memory: where finished samples go; a new [RingMemory][sparke.memory.RingMemory] if None.
        score: a name, see ``sparke.scores()``, or a Score.
        beta: weight of the contextual term; 0 leaves Vendi score guidance.
        scale: length of the push; 0 leaves the host bit-identical. If None, 0.05 times the norm of
            x, or 2 times the schedule where `displaces` is ``"denoised"``.
        schedule: when; every 5th step if None, or ``RemainingNoise(0.3 * sigma_data, power=1)``
            where `displaces` is ``"denoised"``.
        context: which set each sample goes by, where `exemplars` are several: a name; names, one
            for each sample; a function of the (b, c) prompt embeddings that returns such names; or
            (c,) or (k, c) prompt embeddings by name, of which the nearest to the sample's decides.
            If None, the sets' own prompts are those embeddings.
        features: latents (b, ...) -> rows (b, d), differentiable, such as
            [ClipFeatures][sparke.features.clip.ClipFeatures]; flattened latents if None.
            Exemplars and memory hold these rows.
        reads: ``"conditional"``, the prediction before classifier-free guidance, as published (one
            more evaluation where the host does not have it at hand), or ``"denoised"``.
        jacobian: take the gradient through the denoiser, which the host must allow to be evaluated
            again; what it reads is then `denoised`.
        displaces: ``"latents"`` as above; or ``"denoised"``, gently, in DiversityGuider's units:
            the push is as long as the noise that remains, and x - D keeps its length.
        in_batch: whether samples of one batch count as made for each other.
        sigma_data: standard deviation per dimension of the data, for the gentle form's schedule.
        nonfinite: ``"warn"``, once a run of each sample, and go on unguided, or ``"raise"``.
        **score_options: of the score, when it is given by name; for ``"vendi"`` the cosine kernel
            is the default, as published.

    Raises:
        ArgumentError: an option has a forbidden value, or a context is not told.
        ShapeError: exemplars are no rows.
        UnknownName: no such score.
    """

    def __init__(
        self,
        exemplars: _contexts.Exemplars,
        memory: Memory | None = None,
        *,
        score: str | Score = "vendi",
        beta: float = 2.0,
        scale: float | None = None,
        schedule: Schedule | None = None,
        context: _contexts.Context | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        reads: str = "conditional",
        jacobian: bool = False,
        displaces: str = "latents",
        in_batch: bool = True,
        sigma_data: float | None = None,
        nonfinite: str = "warn",
        **score_options: Any,
    ) -> None:
        if score == "vendi":
            score_options = {"kernel": "cosine", **score_options}
        _score_options.check(CVSG, score, score_options)
        self.score = score_of(score, **score_options)
        self.contexts = _contexts.Contexts(exemplars, context, features)
        self.memory: Memory = RingMemory() if memory is None else checks.memory("memory", memory)
        self.beta = checks.positive("beta", beta, zero=True)
        self.displaces = checks.choice("displaces", displaces, ("latents", "denoised"))
        published = displaces == "latents"
        usual = PUBLISHED_SCALE if published else GENTLE_SCALE
        self.scale = checks.positive("scale", usual if scale is None else scale, zero=True)
        self.schedule = EveryNth(PUBLISHED_EVERY) if published and schedule is None else schedule
        self.reads = checks.choice("reads", reads, ("conditional", "denoised"))
        self.nonfinite = checks.choice("nonfinite", nonfinite, ("warn", "raise"))
        self.sigma_data = None if sigma_data is None else checks.positive("sigma_data", sigma_data)
        self.features, self.jacobian, self.in_batch = features, jacobian, in_batch
        self._banks: _banks.Banks | None = None
        self._exemplars: list[tuple[Tensor, Score, Selection]] = []
        self._strength: Schedule = RemainingNoise()
        self._told: set[int] = set()

    def __repr__(self) -> str:
        return (
            f"CVSG({self.contexts!r}, {self.memory!r}, score={self.score!r}, beta={self.beta}, "
            f"scale={self.scale}, displaces={self.displaces!r}, in_batch={self.in_batch})"
        )

    def begin(self, run: Run) -> None:
        """Freeze memory and the exemplars of each sample's context for one run.

        Raises:
            MissingPrompts: the score or the choice of a context needs prompts and there are none.
            ShapeError: memory, exemplars and the run are of different widths.
            ArgumentError: the contexts told are not those of the batch; the batch is smaller than
                the score requires.
        """
        self._banks, self._told = None, set()
        _banks.check(self.score, run)
        flat = self.features is None
        self._exemplars = []
        for rows, exemplars in self.contexts.of(run):
            cond = None if run.cond is None else run.cond[rows]
            part = replace(run, shape=torch.Size((len(rows), *run.shape[1:])), cond=cond)
            held = _banks.freeze(self.score, exemplars, part, in_batch=False, flat=flat)
            if held.bank is not None:
                self._exemplars.append((rows, held.bank_score, held.bank))
        told = self.sigma_data or run.sigma_data or 1.0
        self._strength = self.schedule or RemainingNoise(GENTLE_LOWEST * told, power=1)
        self._banks = _banks.freeze(self.score, self.memory, run, in_batch=self.in_batch, flat=flat)

    def __call__(self, state: State) -> Tensor:
        """Displacement of ``state.denoised``, (b, ...) in its dtype; zeros when inactive.

        Raises:
            NonFiniteGuidance: it is not finite and `nonfinite` is ``"raise"``.
        """
        banks, strength = self._banks, self.scale * self._strength(state.step)
        if banks is None or strength == 0 or not (banks or (self.beta and self._exemplars)):
            return torch.zeros_like(state.denoised)
        rows, pull = _samples.query(state, self.features, self.reads, jacobian=self.jacobian)
        # A broken sample would stop the eigenvalues of all.
        whole = torch.isfinite(rows).all(1)
        safe = torch.where(whole[:, None], rows, 0.0)
        gradient = self._gradient(Features(safe, banks.cond), banks.sources(rows))
        pulled = pull(torch.where(whole[:, None], gradient, torch.nan))
        delta = _vectors.length(state, strength, self.displaces) * _vectors.unit(pulled)
        if self.displaces == "denoised":
            delta = _vectors.kept_residual(state.x, state.denoised, delta)
        checked = _samples.checked(delta, state.step, self.nonfinite, self._told)
        return checked.to(state.denoised.dtype)

    def finish(self, x: Tensor) -> None:
        """Commit the finished samples, (b, ...), to memory; rows that are not finite are left out.

        A guider of scale 0 keeps memory too: what was generated unguided is history as well.
        """
        cond = None if self._banks is None else self._banks.kept_cond
        _samples.keep(self.memory, _samples.finished(x, self.features), cond)
        self._banks, self._exemplars = None, []

    def _gradient(self, query: Features, made: Sources) -> Tensor:
        """(b, d) of what was made, minus beta times that of the exemplars."""
        total = torch.zeros_like(query.x)
        for score, bank in made:
            total = total + _vectors.ascent(score, query, bank)
        if self.beta:
            for rows, score, bank in self._exemplars:
                cond = None if query.cond is None else query.cond[rows]
                inside = _vectors.ascent(score, Features(query.x[rows], cond), bank)
                total = total.index_add(0, rows, inside, alpha=-self.beta)
        return total


build = CVSG
