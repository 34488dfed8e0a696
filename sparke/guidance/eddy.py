"""EDDY: motion within a batch that leaves each sample's own law alone (arXiv 2605.06553)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError
from sparke.guidance import _draws, _eddy, _samples, _vectors
from sparke.protocols import Run, State, Step

__all__ = ["EDDY"]

FIRST = 0.2
"""Published share of the steps for the approximation."""
PROBES = 25
"""Published number of Hutchinson's probes."""


class EDDY:
    r"""Divergence-free drift between the samples of a batch (arXiv 2605.06553), in honest forms.

    For an antisymmetric matrix field A, $\psi = \operatorname{div} A + A \nabla \log p$ (row by
    row) does not change p: $\operatorname{div}(p \psi) = \operatorname{div} \operatorname{div} (p
    A) = 0$. For sample i of a batch,

    $$A_i = \frac{1}{n_i} \sum_j \bigl( r_{ij} v_{ij}^T - v_{ij} r_{ij}^T \bigr), \qquad
      r_{ij} = -\nabla_{x_i} k(x_i, x_j), \qquad
      \operatorname{div} A_i = \frac{1}{n_i} \sum_j (\Delta k_{ij} I - \nabla^2 k_{ij}) v_{ij}$$

    over its $n_i$ mates of the same prompt, k a Gaussian kernel of bandwidth h. (The paper prints
    the divergence with the opposite sign, which is not that of this A.) The v must not depend on
    $x_i$; here $v_{ij} = \sigma^2 \nabla \log p(x_j) = D_j - x_j$, the mate's own residual. In the
    time $-\log \sigma$, in which a sampler moves x by D - x, the drift is $\sigma^2 \psi$, so

    $$D_i \leftarrow D_i + \text{scale} \cdot \sigma^2 \psi_i, \qquad
      \sigma^2 \psi_i = \sigma^2 \operatorname{div} A_i + A_i (D_i - x_i).$$

    **exact=True.** All in closed form, with $h = \text{bandwidth} \sqrt{d (\sigma^2 +
    \sigma_\text{data}^2)}$, a function of sigma alone: a width read off the samples would depend on
    $x_i$. What one sample is by itself stays what it was, if four things hold: D is the posterior
    mean of the data the sampler draws from, so classifier-free guidance is off wherever this acts;
    the initial noises are independent; the steps are short enough for the drift; the denoiser is
    right. Then, however, the samples also *stay* independent, and a batch covers no more modes in
    expectation than without.

    **exact=False**, as published: $\nabla^2 k\, v$ by finite differences of the gradient and
    $\Delta k$ by Hutchinson's estimate, through any `features`, in the first fifth of the steps.
    Marginals are *not* exactly preserved. Features read the denoised estimate; the derivative of
    the estimate in x is taken as the multiple of the identity by which its spread in the batch is
    smaller, their bandwidth is bandwidth/sqrt(2) times their median distance, and guidance may
    be on. Without features the kernel compares noisy latents, with h as above.

    **divergence=False** leaves $\operatorname{div} A$ out. The samples then no longer stay
    independent and a batch does cover more. With this v the mean over independent mates is still a
    field that preserves p, for $\mathbb E_j[(\Delta k_{ij} I - \nabla^2 k_{ij}) v_{ij}] = 0$ by
    parts, so that one sample's law changes to second order in `scale` only. This is not in the
    paper. On latents it costs as little as the exact form.

    What it is not: no memory of earlier batches, and with exact=True no gain in coverage. Cost per
    step without calls of the denoiser: $O(b^2 d)$ on latents in closed form; otherwise
    2 probes + 4 evaluations of the features and 2 (b - 1) + 1 of their gradients (published, with
    SDXL: 8.0 to 23.0 s for a batch).

    Args:
        scale: strength, dimensionless; 0 leaves the host bit-identical. Published ones are not
            stated in these units.
        exact: see above.
        divergence: see above; False with exact=True is an error.
        features: latents (b, ...) -> (b, m) rows, differentiable, row by row, best in float32: its
            second differences are taken.
        bandwidth: of the kernel, see above.
        probes: of Hutchinson's estimate.
        eps: finite difference, as a share of the median distance within the batch.
        first: share of the steps, from the noisy end, in which it acts; 0.2 if None, or 1 if exact.
            Where the number of steps is not fixed beforehand, those with 1/(1 + sigma) below it.
        sigma_data: standard deviation per dimension of the data in the host's units; the host's own
            figure if None, else 1.
        prompt_aware: only samples of one prompt move each other, where prompts are known.
        nonfinite: ``"warn"`` and go on unguided, or ``"raise"``.

    Raises:
        ArgumentError: an option has a forbidden value, or does not go with ``exact=True``; while
            sampling, just before an evaluation at which ``exact=True`` acts and classifier-free
            guidance is on, which is the first one where it is on throughout.
    """

    on_guidance_scale: Callable[[Step, float], float]

    def __init__(
        self,
        scale: float = 1.0,
        *,
        exact: bool = False,
        divergence: bool = True,
        features: Callable[[Tensor], Tensor] | None = None,
        bandwidth: float = 1.0,
        probes: int = PROBES,
        eps: float = 0.05,
        first: float | None = None,
        sigma_data: float | None = None,
        prompt_aware: bool = True,
        nonfinite: str = "warn",
    ) -> None:
        self.scale = checks.positive("scale", scale, zero=True)
        if exact and not divergence:
            raise ArgumentError(
                "divergence=False changes what a batch is, and exact=True promises that it does "
                "not. Leave one of them out."
            )
        if exact and features is not None:
            raise ArgumentError(
                "exact=True needs the kernel's Hessian in closed form, which is known on latents "
                "only. Leave features out, or give exact=False for the published approximation."
            )
        self.exact, self.divergence, self.features = exact, divergence, features
        self.bandwidth = checks.positive("bandwidth", bandwidth)
        self.probes, self.eps = checks.whole("probes", probes), checks.positive("eps", eps)
        self.first = checks.positive("first", (1 if exact else FIRST) if first is None else first)
        if self.first > 1:
            raise ArgumentError(f"first must be a share of the steps, at most 1, got {first!r}.")
        self.sigma_data = None if sigma_data is None else checks.positive("sigma_data", sigma_data)
        self.prompt_aware = prompt_aware
        self.nonfinite = checks.choice("nonfinite", nonfinite, ("warn", "raise"))
        if exact:
            # An attribute of this one, or hosts would do the work of a hook that never objects.
            self.on_guidance_scale = self._unguided
        self._unit = 1.0
        self._seeds: tuple[int, ...] = ()
        self._mates: Tensor | None = None
        self._told: set[int] = set()

    def __repr__(self) -> str:
        form = f"exact={self.exact}" if self.divergence else "divergence=False"
        reads = "noisy latents" if self.features is None else "features of denoised"
        return f"EDDY(scale={self.scale}, {form}, first={self.first}, reads {reads})"

    @property
    def exclusive(self) -> frozenset[str]:
        """The initial noise where ``exact=True``: it has to be the host's, independent."""
        return frozenset({"noise"} if self.exact and self.scale else ())

    def begin(self, run: Run) -> None:
        """Find who moves whom; a sample without mates of its prompt is left alone."""
        self._mates, self._told = None, set()
        mates = _samples.alike(run, prompt_aware=self.prompt_aware)
        if self.scale == 0 or not bool(mates.any()):
            return
        self._mates = mates
        self._unit = self.sigma_data or run.sigma_data or 1.0
        self._seeds = _draws.seeds_of(run)

    def __call__(self, state: State) -> Tensor:
        """Displacement of ``state.denoised``, (b, ...) in its dtype; zeros in later steps.

        Raises:
            NonFiniteGuidance: it is not finite and `nonfinite` is ``"raise"``.
        """
        if self._mates is None or not self._acts(state.step):
            return torch.zeros_like(state.denoised)
        with torch.inference_mode(False), torch.no_grad():
            x, denoised = (_vectors.working(t.detach().clone()) for t in (state.x, state.denoised))
            both = torch.stack([x, denoised], 1).flatten(1)
            both, mates, good = _samples.sound(both, self._mates)
            x, denoised = both.view(len(x), 2, *x.shape[1:]).unbind(1)
            weight = mates / self._mates.sum(1, keepdim=True).clamp_min(1).to(x)
            delta = self.scale * self._drift(x, denoised, weight, state.step)
            delta = torch.where(_vectors.rowwise(good, delta), delta, torch.nan)
        delta = _samples.checked(delta, state.step, self.nonfinite, self._told)
        return delta.to(state.denoised.dtype)

    def finish(self, x: Tensor) -> None:
        """End the run; nothing is kept."""
        self._mates = None

    def _unguided(self, step: Step, guidance_scale: float) -> float:
        """The scale given, which has to be 1 where this acts."""
        if self._mates is not None and guidance_scale != 1 and self._acts(step):
            raise ArgumentError(
                f"EDDY(exact=True) keeps the density whose score is (denoised - x)/sigma^2, and at "
                f"guidance scale {guidance_scale:g} there is none that the sampler follows. Sample "
                "at guidance scale 1, or have guidance on only below the steps in which it acts "
                "(first=... here, and an Interval before it), or give exact=False."
            )
        return guidance_scale

    def _acts(self, step: Step) -> bool:
        done = step.index / step.total if step.total else 1 / (1 + step.sigma)
        return done < self.first

    def _drift(self, x: Tensor, denoised: Tensor, weight: Tensor, step: Step) -> Tensor:
        residual = denoised - x
        if self.exact or (self.features is None and not self.divergence):
            rows = x.flatten(1), residual.flatten(1)
            once = float(self.divergence)
            return _eddy.drift(*rows, weight, step.sigma, self._width(x, step), once).view_as(x)
        y = x if self.features is None else denoised
        seen = _vectors.working(_samples.rows_of(y, self.features))
        mates, near = weight > 0, _eddy.spread(y.flatten(1), weight > 0)
        if self.features is None:
            width, jacobian = self._width(x, step), 1.0
        else:
            # Samples that coincide, in latents or in features, have no distance to be measured in.
            width = self.bandwidth * max(_eddy.spread(seen, mates), 1e-12) / math.sqrt(2)
            jacobian = near / max(_eddy.spread(x.flatten(1), mates), 1e-12)
        return _eddy.estimated(
            _eddy.Pairs(y, lambda z: _samples.rows_of(z, self.features), seen, weight, width),
            residual,
            self._probes(y, step),
            step.sigma,
            step=self.eps * max(near, 1e-6 * step.sigma),
            jacobian=jacobian,
            divergence=self.divergence,
        )

    def _width(self, x: Tensor, step: Step) -> float:
        total = x[0].numel() * (step.sigma**2 + self._unit**2)
        return self.bandwidth * math.sqrt(total)

    def _probes(self, y: Tensor, step: Step) -> Iterator[Tensor]:
        """Random signs, of each sample's own seed and of this noise level."""
        made = [_draws.generator(seed, "eddy", step.sigma) for seed in self._seeds]
        for _ in range(self.probes):
            signs = [torch.randint(2, y.shape[1:], generator=g) for g in made]
            yield 2 * torch.stack(signs).to(y) - 1


build = EDDY
