"""CADS: noise in the prompt embeddings, less and less of it (arXiv 2310.17347)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, ShapeError
from sparke.guidance import _draws, _vectors
from sparke.protocols import Run, State, Step

__all__ = ["CADS"]

TIMES = ("progress", "flow", "vp")
BETA_START, BETA_END, TRAIN_STEPS = 0.00085, 0.012, 1000
"""The noise schedule that Stable Diffusion 1, 2 and XL were trained with, linear in sqrt(beta)."""


class CADS:
    r"""Condition-annealed sampling: the prompt is blurred at first and clear in the end.

    At each step the denoiser is given, in place of the clean prompt embeddings y,

    $$\hat y = \sqrt{\gamma(t)}\, y + s \sqrt{1 - \gamma(t)}\, n, \qquad n \sim N(0, I),$$

    $$y' = \psi \left( \frac{\hat y - \operatorname{mean} \hat y}{\operatorname{std} \hat y}
      \operatorname{std} y + \operatorname{mean} y \right) + (1 - \psi)\, \hat y,$$

    with $\gamma = 1$ for $t \le \tau_1$, 0 for $t \ge \tau_2$, and linear between; t falls from 1
    (noise) to 0 (data). Equations and defaults are those of arXiv 2310.17347; 0.6, 0.9, 0.25 and 1
    are what its authors use with Stable Diffusion. They take mean and std over the whole tensor;
    here it is the whole embedding of one sample, all its tokens and channels, so that samples do
    not depend on their batch mates. With a batch of one and no padding both are the same.

    Noise is fresh at each step and always added to the clean embeddings. It is drawn from the
    sample's seed and the step, so the same start gives the same picture, a step evaluated twice
    sees the same noise, and no generator of the host's is moved. Padding tokens and the null prompt
    of classifier-free guidance are left alone; pooled vectors are annealed like tokens, by
    themselves. Prompt kernels of other guiders go on reading the clean prompts.

    It claims the condition: a chain takes one CADS, because two would draw the same noise from the
    same seeds. Give one a larger s instead.

    It knows of no other sample: neither of batch mates nor of memory. With psi 0 the embeddings
    lose their scale at early steps, and large s costs prompt fidelity. Where nothing conditions the
    denoiser by embeddings (unconditional models, class labels looked up inside the network), it
    does nothing.

    Args:
        s: standard deviation of the noise in units of the embeddings, at least 0. 0 is off: the
            embeddings are passed on as they are, whatever psi.
        tau1: time below which the embeddings are clean.
        tau2: time above which they are noise alone.
        psi: share of the rescaled embeddings in the result, between 0 and 1.
        time: t of a [Step][sparke.protocols.Step]: ``"progress"``, 1 - index/total, which is the
            authors' on their evenly spaced timesteps; ``"flow"``, sigma/(1 + sigma), the time of
            flow models; ``"vp"``, the training time of Stable Diffusion 1, 2 and XL at this sigma,
            for other spacings of theirs, such as Karras'; or a function of the step. Solvers that
            choose their own steps have no progress: there it is flow time, and one draw of noise
            serves the whole run, because such solvers reject steps on which the model jumps.

    Raises:
        ArgumentError: an option has a forbidden value.
    """

    def __init__(
        self,
        s: float = 0.25,
        *,
        tau1: float = 0.6,
        tau2: float = 0.9,
        psi: float = 1.0,
        time: str | Callable[[Step], float] = "progress",
    ) -> None:
        self.s = checks.positive("s", s, zero=True)
        self.tau1 = checks.positive("tau1", tau1, zero=True)
        self.tau2 = checks.positive("tau2", tau2, zero=True)
        self.psi = checks.positive("psi", psi, zero=True)
        if self.tau1 > self.tau2:
            raise ArgumentError(
                f"tau1 must be at most tau2, got {tau1} and {tau2}: the embeddings are noise above "
                "tau2 and clean below tau1."
            )
        if self.psi > 1:
            raise ArgumentError(f"psi must be at most 1, got {psi}: it is a share.")
        if not callable(time):
            checks.choice("time", time, TIMES)
        self.time = time
        self._seeds: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return (
            f"CADS(s={self.s}, tau1={self.tau1}, tau2={self.tau2}, psi={self.psi}, "
            f"time={self.time!r})"
        )

    @property
    def exclusive(self) -> frozenset[str]:
        """The prompt embeddings, where there is noise to add to them."""
        return frozenset({"condition"}) - self.idle

    @property
    def idle(self) -> frozenset[str]:
        """The prompt embeddings, where there is no noise to add to them."""
        return frozenset({"condition"} if self.s == 0 else ())

    def begin(self, run: Run) -> None:
        """Take the samples' seeds."""
        self._seeds = _draws.seeds_of(run)

    def __call__(self, state: State) -> Tensor:
        """Zeros: CADS acts on the condition alone."""
        return torch.zeros_like(state.denoised)

    def finish(self, x: Tensor) -> None:
        """Forget the run."""
        self._seeds = ()

    def gamma(self, step: Step) -> float:
        """Share of the embeddings' variance that is theirs at this step, in [0, 1]."""
        t = self.time(step) if callable(self.time) else _time(self.time, step)
        if t <= self.tau1:
            return 1.0
        return 0.0 if t >= self.tau2 else (self.tau2 - t) / (self.tau2 - self.tau1)

    def on_condition(self, prompt_embeds: Tensor, step: Step, mask: Tensor | None = None) -> Tensor:
        """The annealed embeddings; the very object given where there is nothing to anneal.

        Args:
            prompt_embeds: (b, tokens, c) or (b, c), clean, row i of sample i.
            step: where in the schedule.
            mask: (b, tokens), true for tokens of the prompt; the others are left as they are.

        Raises:
            ShapeError: rows are not those of the run, or the mask is not theirs.
        """
        gamma = 1.0 if self.s == 0 or not self._seeds else self.gamma(step)
        if gamma == 1:
            return prompt_embeds
        if len(prompt_embeds) != len(self._seeds):
            raise ShapeError(
                f"prompt_embeds has {len(prompt_embeds)} rows and the run {len(self._seeds)} "
                "samples. CADS gives each sample noise of its own: give one row per sample."
            )
        if mask is not None and mask.shape != prompt_embeds.shape[:2]:
            raise ShapeError(
                f"the mask of prompt_embeds must be {tuple(prompt_embeds.shape[:2])}, got "
                f"{tuple(mask.shape)}."
            )
        said = None if mask is None else mask.to(prompt_embeds.device).bool()
        moment = None if step.total is None else step.index
        form = (prompt_embeds.ndim, prompt_embeds.shape[-1])
        annealed = prompt_embeds.clone()
        for i, seed in enumerate(self._seeds):
            tokens = prompt_embeds[i] if said is None else prompt_embeds[i, said[i]]
            # Keyed by form, or a pooled vector would be given the first tokens' noise.
            generator = _draws.generator(seed, "cads", moment, *form)
            noisy = self._annealed(_vectors.working(tokens), gamma, generator).to(tokens)
            if said is None:
                annealed[i] = noisy
            else:
                annealed[i, said[i]] = noisy
        return annealed

    def _annealed(self, y: Tensor, gamma: float, generator: torch.Generator) -> Tensor:
        """One sample's embedding, (tokens, c) or (c,)."""
        if y.numel() < 2:
            return y  # of so little there is no spread to keep
        noise = torch.randn(y.shape, generator=generator).to(y)
        noisy = math.sqrt(gamma) * y + self.s * math.sqrt(1 - gamma) * noise
        rescaled = (noisy - noisy.mean()) / noisy.std() * y.std() + y.mean()
        return self.psi * rescaled + (1 - self.psi) * noisy


def _time(name: str, step: Step) -> float:
    """T in [0, 1], 1 is noise."""
    if name == "vp":
        return _training_time(step.sigma)
    if name == "flow" or step.total is None:
        return 1.0 if math.isinf(step.sigma) else step.sigma / (1 + step.sigma)
    return 1 - min(step.index, step.total) / step.total


def _training_time(sigma: float) -> float:
    r"""Where $\int_0^t \beta = \log(1 + \sigma^2)$ and $\sqrt\beta$ is linear in t, at most 1."""
    if math.isinf(sigma):
        return 1.0
    low, high = math.sqrt(BETA_START), math.sqrt(BETA_END)
    cube = low**3 + 3 * (high - low) / TRAIN_STEPS * math.log1p(sigma**2)
    return min(float((cube ** (1 / 3) - low) / (high - low)), 1.0)


build = CADS
