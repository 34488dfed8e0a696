"""Repulsion in the contextual space: the text tokens of a batch, between a transformer's blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError, GuidanceWarning
from sparke.guidance import _banks, _blocks, _contextual_options, _score_options, _vectors
from sparke.guidance._contextual_memory import Pool, Remembered
from sparke.guidance._contextual_push import apart, finite
from sparke.memory import RingMemory
from sparke.protocols import Evaluation, Features, Memory, Run, Score, Spread, State
from sparke.scores import score as score_of

__all__ = ["Contextual"]

ETA = 0.02


class Contextual:
    r"""Pushes the text tokens of a batch's samples apart between a transformer's blocks.

    In a multimodal diffusion transformer text tokens pass through the same attention as those of
    the image and soon differ from sample to sample: they carry what each picture is going to be.
    After each such block, in the first steps, the tokens $f_i$ of sample i, flattened to one row,
    move M times by

    $$f_i \leftarrow f_i + \frac{\eta}{M}\, \|f_i\|\, \frac{\nabla_{f_i} L}{\|\nabla_{f_i} L\|},
      \qquad L = -\sum_k \lambda_k \log \lambda_k,$$

    with $\lambda$ the eigenvalues of K/B, K the matrix of cosines of the B rows (on-the-fly
    repulsion in the contextual space, arXiv 2603.28762; L is the logarithm of their Vendi score).
    No gradient passes through the model. The lengths in front of the direction are ours, and make
    one $\eta$ serve models whose tokens differ in size by orders of magnitude;
    ``normalize=False`` moves by $\frac{\eta}{M} \nabla L$, as published, with $\eta$ to be searched
    over decades. In blocks that hold text and image in one sequence, Flux's single-stream ones, all
    tokens are one row, as published. The rows of each branch of classifier-free guidance repel
    each other only.

    Published: M 50 to 100; the first 4 of 28 steps for SD3.5-Large, 1 of 4 for its Turbo, 1 of 20
    for Flux-dev. Costs no evaluation; memory for one float32 copy of the text tokens or two.

    With `memory`, which the paper does not have, samples are also repelled from earlier
    generations: of each block's text tokens, in the first step's conditional evaluation, means over
    a few runs of tokens are kept, and in the first step of later runs the tokens of a run move
    together, away from the means of earlier samples with similar prompts. Both moves together are
    no longer than eta. Rows are committed by ``finish``, so a run that fails leaves none.

    It displaces no denoised estimate and knows no noise level but the first ones: pictures that
    only differ later are left alone. It does not preserve the model's distribution. UNets and
    transformers without text tokens in their blocks have nothing it could push.

    Args:
        score: what the batch maximises: a name or a Score. ``"vendi"``, published, counts all
            samples of a batch; scores that weigh prompts (``"cond-vendi"``, ``"cond-rke"``) leave
            samples of different prompts alone. Given by name it compares cosines, where it can,
            unless told ``kernel=``.
        memory: where means of text tokens are kept, a memory of its own; None remembers nothing.
        eta: length of the push after each block, in lengths of the tokens; 0 installs no hook.
        steps: how many steps push: a whole number, or a share in (0, 1) of all steps, of which it
            is at least the first.
        iterations: M, moves after each block.
        normalize: measure the push in lengths of the tokens; False: as published.
        blocks: for models not known here: class names of blocks, or a function (name, module), to
            the place of the text in what they return: 0, 1, or ``"all"`` tokens.
        memory_score: what reads memory: a name or a Score.
        memory_tokens: means kept of a sample's tokens, each over an equal run of them.
        **score_options: of the score, when it is given by name.

    Raises:
        ArgumentError: an option has a forbidden value; the model has no blocks with text tokens;
            `steps` is a share and the host does not tell how many steps there are.
        UnknownName: no such score.
    """

    own_memory: ClassVar[bool] = True
    """It keeps means of tokens, which no other guider can read."""

    def __init__(
        self,
        score: str | Score = "vendi",
        memory: Memory | None = None,
        *,
        eta: float = ETA,
        steps: float = 0.15,
        iterations: int = 50,
        normalize: bool = True,
        blocks: _blocks.Blocks | None = None,
        memory_score: str | Score = "cond-rke",
        memory_tokens: int = 4,
        **score_options: Any,
    ) -> None:
        _score_options.check(Contextual, score, score_options)
        self.score = _contextual_options.cosine(score, score_options)
        self.memory_score = score_of(memory_score)
        self.memory = None if memory is None else checks.memory("memory", memory)
        self.eta = checks.positive("eta", eta, zero=True)
        self.steps = _contextual_options.first_steps(steps)
        self.iterations = checks.whole("iterations", iterations)
        self.memory_tokens = checks.whole("memory_tokens", memory_tokens)
        self.normalize, self.blocks = normalize, blocks
        self._run: Run | None = None
        self._mates: Tensor | None = None
        self._remembered: Remembered | None = None
        self._keeps_prompts = True
        self._now: Evaluation | None = None
        self._hooked = 0
        self._seen: dict[int, Tensor] = {}
        self._recorded = 0

    def __repr__(self) -> str:
        return (
            f"Contextual({self.score!r}, {self.memory!r}, eta={self.eta}, steps={self.steps}, "
            f"iterations={self.iterations}, normalize={self.normalize})"
        )

    @property
    def idle(self) -> frozenset[str]:
        """Hooks it has no use for: all of them at eta 0."""
        return frozenset() if self.eta else frozenset({"model", "evaluation"})

    def begin(self, run: Run) -> None:
        """Freeze memory's rows and the weights among batch mates.

        Raises:
            MissingPrompts: a score compares prompts and there are none.
            ArgumentError: the batch is smaller than the score requires.

        Warns:
            GuidanceWarning: one sample, and no memory: there is nothing to repel from.
        """
        self._run, self._now, self._remembered, self._seen = None, None, None, {}
        if self.eta == 0:
            return
        _banks.check(self.score, run)
        self._mates = _banks.freeze(self.score, RingMemory(), run, in_batch=True, flat=False).mates
        if self.memory is not None:
            _banks.check(self.memory_score, run)
            banks = _banks.freeze(self.memory_score, self.memory, run, in_batch=False, flat=False)
            self._keeps_prompts = banks.kept_cond is not None
            if isinstance(banks.bank, Spread):
                raise ArgumentError(
                    "this memory is spread over ranks, and contextual repulsion reads rows of one. "
                    "Use ShardedMemory(keep='all')."
                )
            if banks.bank is not None:
                self._remembered = Remembered(
                    self.memory_score, banks.bank, run.cond, self.memory_tokens
                )
        elif run.shape[0] == 1:
            warnings.warn(
                "contextual repulsion has nothing to repel from in a batch of one without a "
                "memory: generate several samples together, or give memory=RingMemory().",
                GuidanceWarning,
                stacklevel=2,
            )
        self._run = run

    def __call__(self, state: State) -> Tensor:
        """Zeros: what it does is done inside the model."""
        return torch.zeros_like(state.denoised)

    def finish(self, x: Tensor) -> None:
        """Commit what the first step's text tokens were, of samples that are finite."""
        run, seen = self._run, self._seen
        self._run, self._now, self._remembered, self._seen = None, None, None, {}
        if run is None or self.memory is None or not seen:
            return
        if len(seen) != self._recorded or len(x) != run.shape[0]:
            return  # blocks were skipped, or these are not the samples of the run
        rows = torch.cat([seen[block] for block in sorted(seen)], 1)
        good = torch.isfinite(rows).all(1) & torch.isfinite(x.detach().flatten(1)).all(1)
        cond = run.cond if self._keeps_prompts else None
        self.memory.commit(Features(rows[good], None if cond is None else cond[good]))

    @contextmanager
    def on_model(self, model: Any) -> Iterator[None]:
        """Hold the model's blocks hooked.

        Raises:
            ArgumentError: it has none with text tokens.
        """
        if self.eta == 0:
            yield
            return
        places = _blocks.found(model, self.blocks)
        first, self._hooked = self._hooked, self._hooked + len(places)
        try:
            with _blocks.edited(places, self, first):
                yield
        finally:
            self._hooked = first

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Note the step, and which rows of the next call are whose."""
        self._now = evaluation if _contextual_options.acts(self.steps, evaluation.step) else None

    def edit(self, block: int, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """What to add to (rows, T, C) tokens after this block; None adds nothing."""
        now, run = self._now, self._run
        if now is None or run is None or now.batch != run.shape[0] or len(tokens) % now.batch:
            return None
        if mask is not None and mask.shape != tokens.shape[:2]:
            mask = None
        branches = len(tokens) // now.batch
        # Where the host does not tell, the prompt comes after the null prompt, as in most.
        told = len(now.branches) == branches
        names = now.branches if told else ("uncond",) * (branches - 1) + ("cond",)
        masks = [None] * branches if mask is None else list(mask.bool().split(now.batch))
        parts = zip(names, _vectors.working(tokens).split(now.batch), masks, strict=True)
        with torch.no_grad():
            changes = [
                self._change(block, part, seen, remember=name == "cond" and now.step.index == 0)
                for name, part, seen in parts
            ]
        return torch.cat(changes)

    def _change(self, block: int, tokens: Tensor, mask: Tensor | None, *, remember: bool) -> Tensor:
        """(B, T, C) displacements of one branch; zeros for padding."""
        if mask is not None:
            tokens = torch.where(mask[:, :, None], tokens, 0.0)
        cond = None if self._run is None else self._run.cond
        change = apart(self.score, tokens, cond, self._mates, mask, **self._moves)
        if not remember or self.memory is None:
            return change
        pool = Pool(tokens, mask, self.memory_tokens)
        if self._remembered is not None:
            away = self._remembered.push(
                (block, self._hooked), tokens + change, pool, **self._moves
            )
            change = self._bounded(change + finite(away), tokens)
        if block not in self._seen:
            self._seen[block] = pool.means(tokens + change).flatten(1)
            self._recorded = self._hooked  # who finishes a run may have unhooked the model before
        return change

    @property
    def _moves(self) -> dict[str, Any]:
        return {"eta": self.eta, "rounds": self.iterations, "normalize": self.normalize}

    def _bounded(self, change: Tensor, tokens: Tensor) -> Tensor:
        """No longer than eta; unbounded as published."""
        if not self.normalize:
            return change
        longest = self.eta * _vectors.norm(tokens)
        return change * (longest / _vectors.norm(change).clamp_min(1e-30)).clamp_max(1.0)


build = Contextual
