"""The extension points of sparke and the values they exchange.

Protocols are structural: an object with the right methods conforms, nobody inherits from sparke.
This module imports torch and nothing of sparke.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Backend",
    "Calibrated",
    "Closed",
    "ConditionHook",
    "Crowded",
    "EncoderHook",
    "Evaluation",
    "EvaluationHook",
    "Exclusive",
    "Features",
    "Fused",
    "GuidanceScaleHook",
    "Guider",
    "Idle",
    "Memory",
    "ModelHook",
    "NoiseHook",
    "PromptWeighted",
    "Requires",
    "Run",
    "Score",
    "Selection",
    "Spread",
    "State",
    "Step",
    "Weigh",
    "Yielding",
]

Weigh = Callable[[Tensor, Tensor], Tensor]
"""Prompt kernel: (b, c) query prompts, (n, c) row prompts -> (b, n) log weights, at most 0."""


@dataclass(frozen=True)
class Features:
    """Rows to compare.

    Attributes:
        x: (n, d), one row a sample.
        cond: (n, c) prompt embeddings, row i of `cond` belongs to row i of `x`; None if prompts
            play no part.
    """

    x: Tensor
    cond: Tensor | None = None

    def __len__(self) -> int:
        return int(self.x.shape[0])


@dataclass(frozen=True)
class Selection(Features):
    """Rows of a bank, seen by b queries.

    Attributes:
        log_weight: (b, n), logarithm of each row's weight for each query, at most 0; ``-inf`` hides
            a row from a query. None: every row counts in full, or by the score's prompt kernel
            where it has one.
        mates: the rows are the queries themselves, still being generated, row i hidden from
            query i.
        norms: (n,) squared norms of ``x - center``, in float32 or better, from
            [squared_norms][sparke.ops.squared_norms]; they spare each step a reading of the rows.
            None: not known. Whoever changes `x` leaves them out.
        center: (d,) the point the norms are about; given together with them.
    """

    log_weight: Tensor | None = None
    mates: bool = False
    norms: Tensor | None = None
    center: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """Where in the noise schedule one evaluation of the denoiser stands.

    `sigma` is noise standard deviation over signal scale (flow time t is sigma/(1+sigma)), so every
    host speaks one unit. `index` is exact for samplers that evaluate once per step and approximate
    for Heun, DPM-2 and churn, which is why schedules are functions of sigma.

    Attributes:
        index: number of schedule entries above `sigma`.
        sigma: noise level of this evaluation.
        sigma_next: the next lower level of the schedule; 0 at the end.
        total: number of steps, None where the host does not fix it beforehand.
    """

    index: int
    sigma: float
    sigma_next: float
    total: int | None = None


@dataclass(frozen=True)
class Requires:
    """What a score needs, as data, checked before the first step.

    Attributes:
        cond: prompt embeddings.
        batch: smallest number of samples generated together.
    """

    cond: bool = False
    batch: int = 1


@dataclass(frozen=True)
class Run:
    """What is known before the first evaluation of one sampler run.

    Attributes:
        shape: shape of the latents, batch first.
        device: where they live.
        dtype: their dtype.
        cond: (b, c) prompt embeddings or None.
        cond_origin: (c,) the point prompts are compared from: what this encoder says of any prompt
            at all. None: the origin.
        sigma_data: standard deviation per dimension of the host's data, None if the host does not
            tell.
        eta: share of fresh noise the sampler adds at each step: 0 for ODE solvers, 1 for ancestral
            ones.
        seeds: one number per sample, read off its initial noise: the same noise gives the same
            seed, in whatever batch. Empty where the host shows no noise. Guiders that draw random
            numbers draw them from these and leave the host's generators alone.
    """

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    cond: Tensor | None = None
    sigma_data: float | None = None
    eta: float = 0.0
    cond_origin: Tensor | None = None
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """One call of the denoiser's network, as known before it is made.

    Attributes:
        step: where in the schedule.
        branches: the prompts its rows are for, in order, ``"cond"`` or ``"uncond"``; each branch
            has `batch` rows, row i of a branch belongs to sample i. ``("uncond", "cond")`` is a
            call with the rows of classifier-free guidance side by side. Empty where the host does
            not tell.
        batch: samples generated together.
    """

    step: Step
    branches: tuple[str, ...]
    batch: int


@dataclass(frozen=True)
class State:
    """One evaluation of the denoiser, as a guider sees it.

    Attributes:
        x: (b, ...) noisy latents the denoiser was called with.
        denoised: (b, ...) its estimate of the clean latents, after classifier-free guidance.
        step: where in the schedule.
        cond: (b, c) prompt embeddings or None.
        conditional: returns the prediction before classifier-free guidance, (b, ...), evaluating
            the host once more where needed; None where the host does not show it.
        evaluate: the denoiser as a differentiable function of x at this sigma; None where the host
            does not allow a second evaluation.
        again: evaluates the host at this very x once more, (b, ...) the prediction before
            classifier-free guidance, under whatever the guider's hooks do to the model meanwhile;
            None where the host does not allow it.
    """

    x: Tensor
    denoised: Tensor
    step: Step
    cond: Tensor | None = None
    conditional: Callable[[], Tensor] | None = None
    evaluate: Callable[[Tensor], Tensor] | None = None
    again: Callable[[], Tensor] | None = None


@runtime_checkable
class Score(Protocol):
    """How different each query is from a bank, larger is more different."""

    @property
    def requires(self) -> Requires:
        """What the score needs; checked before the first step."""
        ...

    def __call__(self, query: Features, bank: Features) -> Tensor:
        """(b,) values for b query rows against n bank rows; differentiable in ``query.x``."""
        ...


@runtime_checkable
class Closed(Protocol):
    """A score that knows its gradient in closed form."""

    def direction(self, query: Features, bank: Features) -> Tensor:
        """(b, d) gradient of the score in ``query.x``; must equal autograd's."""
        ...


@runtime_checkable
class Crowded(Protocol):
    """A score that can tell how crowded it is around a query."""

    def crowding(self, query: Features, bank: Features) -> Tensor:
        """(b,) in [0, 1): 0 when nothing in the bank is near; the push is scaled by it."""
        ...


@runtime_checkable
class Fused(Protocol):
    """A score that gets gradient and crowding from one reading of the bank."""

    def direction_and_crowding(self, query: Features, bank: Features) -> tuple[Tensor, Tensor]:
        """(b, d) and (b,), as [Closed][sparke.protocols.Closed] and Crowded give them."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """A score with constants to be read off the bank once per generation."""

    def calibrate(self, bank: Features) -> Score:
        """The same score with those constants fixed."""
        ...


@runtime_checkable
class PromptWeighted(Protocol):
    """A score that weighs rows by their prompts."""

    def log_weight(self, query_cond: Tensor, bank_cond: Tensor) -> Tensor:
        """(b, c), (n, c) -> (b, n) log weights, computed once per generation."""
        ...


@runtime_checkable
class Spread(Protocol):
    """A selection whose rows lie on several ranks; all of them call its methods together.

    Only scores with a true attribute ``across`` are given one: what they would read of it otherwise
    is this rank's rows alone.
    """

    def across(
        self,
        read: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]],
        query: Tensor,
        width: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(b,) log sums and (b, d) means over the rows of all ranks, detached.

        `read` takes (B, d) queries, (B, n) log weights or None, and (B, 1) bandwidths, and gives
        the log sum of the exponents and the softmax-weighted mean over this rank's rows.
        """
        ...

    def witnesses(self) -> Selection:
        """Rows of all ranks to read constants off, with this rank's queries' weights."""
        ...


@runtime_checkable
class Memory(Protocol):
    """Finished samples, kept."""

    def __len__(self) -> int: ...

    def commit(self, items: Features) -> None:
        """Append finished samples."""
        ...

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        """The rows that matter for these prompts, detached, in float32, with log weights.

        Called once per generation. `weigh` is the prompt kernel of the score that will read them;
        without it, rows are weighted by `cond` with the memory's own kernel, or not at all when
        `cond` is None.
        """
        ...


@runtime_checkable
class Guider(Protocol):
    """Displaces `denoised`.

    ``begin`` freezes what the guider knows, ``__call__`` is then a pure function of the state until
    ``finish`` receives the finished samples. A run that fails never reaches ``finish``.
    """

    def begin(self, run: Run) -> None: ...

    def __call__(self, state: State) -> Tensor:
        """Displacement of ``state.denoised``, same shape; zeros when inactive."""
        ...

    def finish(self, x: Tensor) -> None: ...


@runtime_checkable
class GuidanceScaleHook(Protocol):
    """Optional hook of a guider: choose the classifier-free guidance scale of an evaluation."""

    def on_guidance_scale(self, step: Step, guidance_scale: float) -> float: ...


@runtime_checkable
class NoiseHook(Protocol):
    """Optional hook of a guider: change the initial noise, once, after ``begin``.

    Hosts call it only where the run starts from pure noise, with latents at their own scale: a run
    that starts from an image has none to change.
    """

    def on_noise(self, x: Tensor) -> Tensor:
        """(b, ...) initial latents in place of x, same shape and dtype."""
        ...


@runtime_checkable
class ConditionHook(Protocol):
    """Optional hook of a guider: change the prompt embeddings the denoiser sees at a step.

    Given the clean embeddings every time; only conditional rows, never those of the null prompt. A
    network that takes several (tokens, and a pooled vector) has each changed by a call of its own.
    """

    def on_condition(self, prompt_embeds: Tensor, step: Step, mask: Tensor | None = None) -> Tensor:
        """(b, tokens, c) or (b, c) embeddings, same shape and dtype.

        `mask`, (b, tokens), is true for tokens of the prompt and false for padding; None where the
        host tells none. Prompts of different lengths, which some hosts keep in a list, come padded
        with a mask; tokens that are all zeros count as padding.
        """
        ...


@runtime_checkable
class ModelHook(Protocol):
    """Optional hook of a guider: hold the denoiser's blocks hooked while sampling runs."""

    def on_model(self, model: Any) -> AbstractContextManager[None]:
        """Entered before the first evaluation, left after the last, whatever happens between.

        `model` is the network (a torch module) where the host shows it: a pipeline's unet or
        transformer, a k-diffusion model. Hosts with several call it for each.
        """
        ...


@runtime_checkable
class EvaluationHook(Protocol):
    """Optional hook of a guider: be told of each call of the network just before it is made."""

    def on_evaluation(self, evaluation: Evaluation) -> None: ...


@runtime_checkable
class EncoderHook(Protocol):
    """Optional hook of a guider: have the prompts encoded a second time, differently.

    Where the host encodes prompts itself, it does so again inside this context, and
    ``State.again`` then gives the network those embeddings in place of the prompts' own. It may be
    called before ``begin``; a ``contextlib.nullcontext()`` in return spares the second encoding.
    """

    def on_encoder(self, encoder: Any) -> AbstractContextManager[None]:
        """Held around the second encoding; `encoder` is a text encoder, a torch module."""
        ...


@runtime_checkable
class Exclusive(Protocol):
    """Optional attribute of a guider: what it decides alone.

    Two guiders that claim the same cannot be chained; saying so is an error before the first step.
    """

    @property
    def exclusive(self) -> frozenset[str]:
        """Names of hooks without their ``on_``, under its present settings.

        ``"guidance_scale"`` where it holds classifier-free guidance at scales of its own or
        replaces it; ``"noise"`` where it puts other noise in place of the host's; ``"condition"``,
        ``"model"``, ``"evaluation"``, ``"encoder"``. Empty where it claims nothing.
        """
        ...


@runtime_checkable
class Yielding(Protocol):
    """Optional attribute of a guider: what it leaves to whoever claims it."""

    @property
    def yields(self) -> frozenset[str]:
        """Names as in [Exclusive][sparke.protocols.Exclusive].

        In a chain with a guider that claims one of them, this one's hook of that name is not
        called.
        """
        ...


@runtime_checkable
class Idle(Protocol):
    """Optional attribute of a guider: hooks it has no use for under its present settings."""

    @property
    def idle(self) -> frozenset[str]:
        """Names as in [Exclusive][sparke.protocols.Exclusive].

        Hosts neither call these hooks nor warn where they cannot: CADS of strength 0 wants no
        prompt embeddings.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """Brings a guider to one kind of host. A module with these two functions conforms."""

    def accepts(self, target: object) -> bool:
        """Whether this backend can wrap `target`."""
        ...

    def attach(self, target: Any, guider: Guider, *, prompt_embeds: Any = None) -> Any:
        """The wrapped target, of the target's own kind.

        It may take further options by keyword; `sparke.wrap` passes ``prompt_encoder`` to those
        that do.
        """
        ...
