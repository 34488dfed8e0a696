"""SPELL: sparse repellency, shields around samples and protected pictures (arXiv 2410.06025)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, MissingPrompts, ShapeError
from sparke.guidance import _banks, _samples, _vectors
from sparke.memory import RingMemory
from sparke.protocols import Features, Memory, Run, Selection, State
from sparke.scores import spell

__all__ = ["SPELL"]

RADIUS = 0.25
"""Of the default radius, in units of the distance between two independent samples."""


class SPELL:
    r"""Sparse repellency (SPELL) on the denoised estimate, as published (arXiv 2410.06025).

    Around every row y of the batch, the memory and a protected set lies a shield of radius r. An
    estimate D inside one is moved out along the ray from y, and left alone otherwise:

    $$D_i' = D_i + \lambda \sum_j \left(\frac{r}{\|D_i - y_j\|} - 1\right)_+ (D_i - y_j)$$

    The sum is the gradient of $-\frac12 \sum_j (r - \|D_i - y_j\|)_+^2$, the score of the same
    name. With one row inside r and $\lambda \ge 1$, D' is at distance r or more from it; where
    shields overlap, their pushes may cancel and nothing is promised. Exactly at y there is no ray,
    and no push. The paper's overcompensation, lambda = 1.6, gets samples out sooner.

    What it is not: the promise is about estimates, at the noise levels where it acts. The finished
    sample obeys it as far as the sampler's last steps do, so check pictures that must differ.
    Distance is that of latents, not of what they show. Pushes are as long as r demands, not as the
    noise that is left would absorb: in few dimensions, where samples of one mode naturally lie
    close together, even a small radius costs fidelity.

    The paper sets r per model. The default here is a quarter of the distance between two
    independent samples of one prompt, $r = \frac14 S \sqrt{2 d}$ for d numbers of standard
    deviation S each.

    Its cost is one matrix product with the rows a step, O((b + n) b d), and exact distances to
    those near.

    Args:
        memory: finished samples, shields for later runs; a new
            [RingMemory][sparke.memory.RingMemory] if None.
        radius: r, in the units of the latents; see above if None.
        scale: lambda, published 1.6; 0 leaves the host bit-identical.
        protected: rows that shield in every run, whatever its prompts: a Memory, a Selection or
            Features, or latents (n, ...). They are read when a run begins.
        in_batch: whether samples of one batch repel each other.
        prompt_aware: rows of memory and batch mates count where their prompt is that of the sample,
            where prompts are known; ``False``: all of them, and memory may hold none.
        lo: lowest sigma pushed at, in units of `sigma_data`; published 0.
        sigma_data: S in the host's units; the host's own figure if None, else 1.
        nonfinite: ``"warn"``, once a run of each sample, and go on unguided, or ``"raise"``.

    Raises:
        ArgumentError: an option has a forbidden value.
        ShapeError: `protected` is a tensor without rows.
    """

    def __init__(
        self,
        memory: Memory | None = None,
        *,
        radius: float | None = None,
        scale: float = 1.6,
        protected: Memory | Features | Tensor | None = None,
        in_batch: bool = True,
        prompt_aware: bool = True,
        lo: float = 0.0,
        sigma_data: float | None = None,
        nonfinite: str = "warn",
    ) -> None:
        self.memory: Memory = RingMemory() if memory is None else checks.memory("memory", memory)
        if not isinstance(protected, (Memory, Features, Tensor, type(None))):
            raise ArgumentError(
                "protected must be a Memory, a Selection, Features or a tensor of latents "
                f"(n, ...), got {type(protected).__name__}."
            )
        if isinstance(protected, Tensor) and protected.ndim < 2:
            raise ShapeError(
                f"protected must be latents (n, ...), one row for each; got shape "
                f"{tuple(protected.shape)}. For a single one give latents[None]."
            )
        self.protected = protected
        self.radius = None if radius is None else checks.positive("radius", radius)
        self.scale = checks.positive("scale", scale, zero=True)
        self.lo = checks.positive("lo", lo, zero=True)
        self.in_batch, self.prompt_aware = in_batch, prompt_aware
        self.sigma_data = None if sigma_data is None else checks.positive("sigma_data", sigma_data)
        self.nonfinite = checks.choice("nonfinite", nonfinite, ("warn", "raise"))
        self._banks: _banks.Banks | None = None
        self._shield: Selection | None = None
        self._repellency = spell.SPELL(1.0)
        self._unit = 1.0
        self._told: set[int] = set()

    def __repr__(self) -> str:
        shields = "" if self.protected is None else ", protected=..."
        return (
            f"SPELL({self.memory!r}, radius={self.radius}, scale={self.scale}, "
            f"in_batch={self.in_batch}, prompt_aware={self.prompt_aware}{shields})"
        )

    def begin(self, run: Run) -> None:
        """Freeze the rows that shield, and the radius.

        Raises:
            MissingPrompts: memory holds prompts and the run has none, or the other way round.
            ShapeError: memory or the protected set hold rows of another width.
            ArgumentError: a protected row is not finite.
        """
        self._banks = self._shield = None
        self._told = set()
        self._unit = self.sigma_data or run.sigma_data or 1.0
        apart = self._unit * math.sqrt(2 * run.shape[1:].numel())
        self._repellency = spell.SPELL(RADIUS * apart if self.radius is None else self.radius)
        score = _samples.SamePrompt(self._repellency) if self.prompt_aware else self._repellency
        try:
            banks = _banks.freeze(score, self.memory, run, in_batch=self.in_batch, flat=True)
        except MissingPrompts as error:
            if not self.prompt_aware or run.cond is None:
                raise
            raise MissingPrompts(f"{error} Or let every row shield: prompt_aware=False.") from error
        self._shield = self._shielded(run)
        self._banks = banks

    def __call__(self, state: State) -> Tensor:
        """Displacement of ``state.denoised``, (b, ...) in its dtype; zeros outside all shields.

        Raises:
            NonFiniteGuidance: it is not finite and `nonfinite` is ``"raise"``.
        """
        if self._banks is None or self.scale == 0 or state.step.sigma < self.lo * self._unit:
            return torch.zeros_like(state.denoised)
        rows = _vectors.working(state.denoised.detach()).flatten(1)
        shields = [bank for _, bank in self._banks.sources(rows)]
        if self._shield is not None:
            shields.append(self._shield)
        total = torch.zeros_like(rows)
        for bank in shields:
            total = total + self._repellency.direction(Features(rows), bank)
        # A broken estimate is near nothing; it must be told all the same.
        total = torch.where(torch.isfinite(rows).all(1, keepdim=True), total, torch.nan)
        delta = (self.scale * total).view_as(state.denoised)
        checked = _samples.checked(delta, state.step, self.nonfinite, self._told)
        return checked.to(state.denoised.dtype)

    def finish(self, x: Tensor) -> None:
        """Commit the finished samples, (b, ...), to memory; rows that are not finite are left out.

        A guider of scale 0 keeps memory too.
        """
        cond = None if self._banks is None else self._banks.kept_cond
        _samples.keep(self.memory, _vectors.working(x.detach()).flatten(1), cond)
        self._banks = self._shield = None

    def _shielded(self, run: Run) -> Selection | None:
        """The protected rows, where there are any."""
        given = self.protected
        if given is None or not len(given):
            return None
        if isinstance(given, Tensor):
            given = Features(given.detach().flatten(1))
        elif not isinstance(given, Features):
            given = given.select()
        width = run.shape[1:].numel()
        if given.x.ndim != 2 or given.x.shape[1] != width:
            raise ShapeError(
                f"protected must hold rows of {width} numbers, as latents of shape "
                f"{tuple(run.shape[1:])} have; got {tuple(given.x.shape)}."
            )
        checks.finite("protected", given.x)  # such a row would shield nothing, and nobody told
        weight = given.log_weight if isinstance(given, Selection) else None
        if weight is not None:
            checks.shape("protected.log_weight", weight, (run.shape[0], len(given)))
            weight = weight.to(run.device)
        return Selection(_vectors.working(given.x).to(run.device), None, weight)


build = SPELL
