"""Entropy rectifying guidance: away from what the network says with blurred attention."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, GuidanceWarning
from sparke.guidance import _attention
from sparke.guidance._attention import Layers
from sparke.guidance._erg_tempered import Temperature, hooked, tempered
from sparke.guidance._erg_told import Told
from sparke.guidance._vectors import working
from sparke.protocols import Evaluation, Run, State, Step

__all__ = ["ERG", "build", "tempered"]

GUIDANCE_SCALE = 3.0
"""Where the host has no scale of its own to take over."""


class ERG:
    r"""Classifier-free guidance whose weak side has its attention rectified (arXiv 2504.13987).

    $$D' = D_\xi(\phi_\text{weak}) + w\,\bigl(D(\phi) - D_\xi(\phi_\text{weak})\bigr)$$

    D is the denoised estimate for the prompt's embeddings $\phi$, and $D_\xi$ that of the same
    network with the logits of chosen attention layers multiplied by tau (I-ERG; see
    [tempered][sparke.guidance.erg.tempered]). What the weak side is conditioned on is `weak`:

    - ``"null"``: the host's null prompt. Only the rows of the unconditional branch are tempered and
      the host combines as ever, by whatever rule it has (that of AdaptiveProjectedGuidance too).
      Costs nothing. With tau = 1 this is classifier-free guidance.
    - ``"prompt"``: the prompt itself, encoded a second time with the logits of every self-attention
      of the text encoder multiplied by `tau_c` (C-ERG); with tau_c = 1, the same embeddings. Works
      without a null prompt: on guidance-distilled, class-conditional and unconditional models.
      Costs an evaluation per step. The host's guidance is held at 1 meanwhile (`cfg`).
    - ``"auto"``: the latter where `tau_c` is not 1, or where the host does no classifier-free
      guidance; the former otherwise.

    Before `kickoff` tau is 1, and where that leaves nothing to do, the host's own guidance acts.
    With tau = tau_c = 1 it is never touched, bit for bit.

    The defaults of `tau`, `layers` and `kickoff` are those of ACE-Step, a public flow model that
    ships with this method; the paper searched them for each of its models. They are no measurement
    of ours: a network without attention, such as the emoji model, cannot be guided so. It is no
    repulsion: samples know nothing of each other or of memory, and what diversity it gives is what
    classifier-free guidance takes away and this does not. Multi-step attention and the factors
    alpha and gamma of the paper, all 1 by its default, are left out.

    Args:
        tau: factor of the denoiser's logits on the weak side; below 1 blurs attention.
        tau_c: factor of the text encoder's; published: below 1 is closer to the prompt, above 1
            more diverse. Needs a host that encodes prompts; for others see ``tempered``.
        guidance_scale: w. None: the scale the host was called with, or 3 where it has none.
        weak: as above.
        cfg: with weak ``"prompt"``, whether this ``"replaces"`` the host's classifier-free
            guidance, or ``"joins"`` it: w - 1 times D - D_xi is added to its result.
        kickoff: share of the steps done before tau comes in, from 0 to 1.
        layers: attention layers of the denoiser, as ``tempered`` takes them.
        encoder_layers: the same of the text encoder; None is all of them, as published.
        branches: for hosts that do not tell which rows of a call are for which prompt, such as
            denoisers of k-diffusion that guide inside: ``("uncond", "cond")`` is one call with the
            rows of the null prompt first.

    Raises:
        ArgumentError: an option has a forbidden value; the host does not allow what it asks for.
    """

    def __init__(
        self,
        tau: float = 0.01,
        *,
        tau_c: float = 1.0,
        guidance_scale: float | None = None,
        weak: str = "auto",
        cfg: str = "replaces",
        kickoff: float = 0.25,
        layers: Layers = (0.625, 0.83),
        encoder_layers: Layers = None,
        branches: Sequence[str] = (),
    ) -> None:
        self.tau = checks.positive("tau", tau, zero=True)
        self.tau_c = checks.positive("tau_c", tau_c, zero=True)
        self.guidance_scale = (
            None
            if guidance_scale is None
            else checks.positive("guidance_scale", guidance_scale, zero=True)
        )
        self.weak = checks.choice("weak", weak, ("auto", "null", "prompt"))
        self.cfg = checks.choice("cfg", cfg, ("replaces", "joins"))
        self.kickoff = checks.positive("kickoff", kickoff, zero=True)
        if self.kickoff > 1:
            raise ArgumentError(f"kickoff is a share of the steps, at most 1; got {kickoff!r}.")
        self.layers = _attention.checked("layers", layers)
        self.encoder_layers = _attention.checked("encoder_layers", encoder_layers)
        self.branches = tuple(branches)
        if self.branches and sorted(self.branches) != ["cond", "uncond"]:
            raise ArgumentError(
                f"branches must be ('uncond', 'cond') or ('cond', 'uncond'), got {branches!r}."
            )
        if self.tau_c != 1:
            if weak == "null":
                raise ArgumentError("tau_c is for weak='prompt': the null prompt says nothing.")
            self.weak = "prompt"
        self._temperature = Temperature()
        self._told = Told()
        self._entered = 0
        self._begun = self._encoded = self._looking = self._acted = False

    def __repr__(self) -> str:
        return (
            f"ERG({self.tau}, tau_c={self.tau_c}, guidance_scale={self.guidance_scale}, "
            f"weak={self.weak!r}, cfg={self.cfg!r}, kickoff={self.kickoff}, layers={self.layers!r})"
        )

    @property
    def exclusive(self) -> frozenset[str]:
        """The guidance scale, where it is set here or held at 1."""
        if self.weak == "prompt":
            claimed = self.cfg == "replaces" and self._strong
        else:
            claimed = self.guidance_scale is not None
        return frozenset({"guidance_scale"} if claimed else ())

    @property
    def idle(self) -> frozenset[str]:
        """The encoder with tau_c = 1; all hooks with tau = 1 as well, but for a scale set here."""
        gone = {"encoder"} if self.tau_c == 1 else set()
        if not self._strong:
            gone |= {"model", "evaluation"}
            if self.weak == "prompt" or self.guidance_scale is None:
                gone |= {"guidance_scale"}
        return frozenset(gone)

    def begin(self, run: Run) -> None:
        """Start afresh."""
        self._forget()
        self._begun = True
        self._temperature.to(run.device)
        self._temperature.set(1.0)

    def __call__(self, state: State) -> Tensor:
        """Displacement of ``state.denoised``, (b, ...) in its dtype.

        Zeros unless the weak side is the prompt's: the null prompt's is the host's to combine.

        Raises:
            ArgumentError: the host does not allow what the options ask for.
        """
        step = state.step
        nothing = torch.zeros_like(state.denoised)
        if not (self._begun and self._entered and self._strong):
            return nothing
        if not self._of_prompt(step):
            self._told.check_null(step.sigma, wanted=self.weak == "null")
            return nothing
        self._check_prompt(state)
        scale = self._scale(step)
        if scale == 1 or not self._acts(step):
            return nothing
        weak = self._look_again(state)
        strong = state.denoised if state.conditional is None else state.conditional()
        self._acted = True
        delta = (scale - 1) * (working(strong) - working(weak))
        return delta.detach().to(state.denoised.dtype)

    def finish(self, x: Tensor) -> None:
        """Warn if a run was not changed at all though it should have been."""
        if self._strong and self._told and not self._acted:
            warnings.warn(
                "ERG changed nothing in this run: no network was called for the null prompt while "
                "tau was in force. weak='prompt' needs no null prompt.",
                GuidanceWarning,
                stacklevel=2,
            )
        self._forget()

    def on_guidance_scale(self, step: Step, guidance_scale: float) -> float:
        """The host's scale, the one set here, or 1 where this replaces it."""
        if not self._begun:
            return guidance_scale
        self._told.show(step.sigma, guidance_scale)
        if self.weak == "prompt":
            held = self.cfg == "replaces" and self._entered and self._acts(step)
            return 1.0 if held else guidance_scale
        return guidance_scale if self.guidance_scale is None else self.guidance_scale

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Set the temperature of each row of the call about to be made.

        Raises:
            ArgumentError: the host's attention layers split its rows themselves.
        """
        if not self._begun or self._looking:
            return
        step = evaluation.step
        names = evaluation.branches or self.branches
        if self.tau != 1 and names.count("cond") > 1:
            raise ArgumentError(
                "this host does perturbed attention guidance, whose attention layers split the "
                "rows of a call that ERG tells apart. Turn that off (pag_scale=0), or leave ERG "
                "out."
            )
        weak = 1.0 if self.weak == "prompt" else self._tau(step)
        rows = [weak if name == "uncond" else 1.0 for name in names] or [1.0]
        if self._entered:
            self._told.call(step.sigma, names)
            self._acted |= any(row != 1 for row in rows)
        if len(rows) > 1:
            rows = [row for row in rows for _ in range(evaluation.batch)]
        self._temperature.set(*rows)

    @contextmanager
    def on_model(self, model: Any) -> Iterator[None]:
        """Hold the queries of the chosen layers hooked; with tau = 1, none.

        Raises:
            ArgumentError: `model` has no such layers, or they make their queries out of reach.
        """
        self._entered += 1
        try:
            queries = [] if self.tau == 1 else _attention.queries(model, self.layers)
            with hooked(queries, self._temperature):
                yield
        finally:
            self._entered -= 1
            if not self._entered:
                self._encoded = False
                self._temperature.set(1.0)

    @contextmanager
    def on_encoder(self, encoder: Any) -> Iterator[None]:
        """Hold the queries of a text encoder scaled by `tau_c`, for the second encoding.

        Raises:
            ArgumentError: `encoder` has no such layers, or they make their queries out of reach.
        """
        with tempered(encoder, self.tau_c, layers=self.encoder_layers):
            yield
        self._encoded = True

    @property
    def _strong(self) -> bool:
        return self.tau != 1 or self.tau_c != 1

    def _forget(self) -> None:
        self._told = Told()
        self._begun = self._looking = self._acted = False

    def _tau(self, step: Step) -> float:
        """Tau, 1 before the kick-off."""
        # Adaptive solvers have no count of steps; 1 / (1 + sigma) is the signal's share of x.
        done = step.index / step.total if step.total else 1 / (1 + step.sigma)
        return self.tau if done >= self.kickoff else 1.0

    def _acts(self, step: Step) -> bool:
        return self._tau(step) != 1 or self.tau_c != 1

    def _of_prompt(self, step: Step) -> bool:
        """Whether the weak side of this step is the prompt's."""
        if self.weak != "auto":
            return self.weak == "prompt"
        return not self._told.guided(step.sigma)

    def _scale(self, step: Step) -> float:
        if self.guidance_scale is not None:
            return self.guidance_scale
        told = self._told.scale(step.sigma)
        return GUIDANCE_SCALE if told is None else told

    def _check_prompt(self, state: State) -> None:
        """Raise unless the host can be asked about the prompt, weakened if need be."""
        if state.again is None:
            raise ArgumentError(
                "weak='prompt' evaluates the network twice a step, which this host does not allow; "
                "weak='null' needs its classifier-free guidance only."
            )
        if self.tau_c != 1 and not self._encoded:
            raise ArgumentError(
                "tau_c needs a host that encodes prompts, and this one encoded none: it was given "
                "embeddings or class labels. Encode prompts yourself, within "
                "tempered(text_encoder, tau_c), and hand the result on as those of the null prompt "
                "(uncond=, negative_prompt_embeds=), with tau_c=1 here."
            )
        if self.cfg == "replaces":
            self._told.check_held(state.step.sigma)

    def _look_again(self, state: State) -> Tensor:
        """The host's prediction for the prompt, weakened or not, with tempered attention."""
        assert state.again is not None
        self._looking = True
        self._temperature.set(self._tau(state.step))
        try:
            return state.again()
        finally:
            self._looking = False
            self._temperature.set(1.0)


build = ERG
