"""`callback`: guidance through diffusers' own hook, `callback_on_step_end`."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparke._guiders import CFG_INTERVAL, SCALE, SCORE, Given, compares_prompts, guider_of
from sparke.backends import _callback_host, _encodings, _latent_push, _prompts, _schedulers
from sparke.backends._guided import scheduler_of
from sparke.backends._prompt_reader import PromptSource
from sparke.errors import ArgumentError, GuidanceWarning, MissingPrompts
from sparke.guidance import having
from sparke.protocols import (
    ConditionHook,
    EncoderHook,
    GuidanceScaleHook,
    Guider,
    Memory,
    ModelHook,
    NoiseHook,
    Run,
    Score,
    State,
)
from sparke.schedules import Schedule

__all__ = ["StepEndCallback", "callback"]

BEYOND: tuple[type[Any], ...] = (NoiseHook, ConditionHook, ModelHook, EncoderHook)
"""Hooks of what is over by the end of a step."""


def callback(
    score: str | Score = SCORE,
    *,
    guider: Given | None = None,
    memory: Memory | str | None = None,
    scale: float = SCALE,
    prompt_embeds: PromptSource | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    schedule: Schedule | str | None = None,
    in_batch: bool | None = None,
    cfg_interval: tuple[float, float] | str | None = CFG_INTERVAL,
    **score_options: Any,
) -> StepEndCallback:
    """A ``callback_on_step_end`` for diffusers' pipelines that makes different pictures.

    It takes the arguments of `sparke.wrap` and does what a wrapped pipeline does, one step later
    and with less to see; where the pipeline may be wrapped, wrap it. See
    [StepEndCallback][sparke._callback.StepEndCallback] for the differences.

    Args:
        score: how difference is measured; a name (``sparke.scores()``) or a Score; ``"cond-rke"``
            unless told otherwise.
        guider: in place of the one made from the other arguments: a guider's name, a score's, a
            guider, or a sequence of these; see [wrap][sparke.wrap].
        memory: where finished samples are kept, or a memory's name; a new ring of 1024 if None.
        scale: strength; 0 leaves the pipeline's output bit-identical.
        prompt_embeds: (b, c), (b, tokens, c), a pair of the latter with its mask, or a function of
            the callback's tensors; the pipeline's own ``prompt_embeds`` if None.
        features: latents -> rows to compare; flattened latents if None.
        schedule: length of the push at a step; see `sparke.schedules`.
        in_batch: whether samples of one batch repel each other; True if None, or with `guider` what
            is that guider's own default.
        cfg_interval: where the pipeline's classifier-free guidance stays on; see DiversityGuider.
        **score_options: the score's own, e.g. ``bandwidth=0.8``; with `guider`, that guider's own.

    Returns:
        The callback, with attributes ``guider``, ``memory`` and ``tensor_inputs``.

    Raises:
        UnknownName: no such score or guider; near matches are in the message.
        ArgumentError: an option has a forbidden value or would reach no guider; a guider acts where
            no callback reaches (initial noise, prompt embeddings, inside the network).

    Example:
        ```python
        guide = sparke.callback(score="cond-rke")
        pipe(
            prompt,
            callback_on_step_end=guide,
            callback_on_step_end_tensor_inputs=guide.tensor_inputs,
        )
        ```
    """
    made = guider_of(
        guider,
        score,
        memory,
        scale=scale,
        features=features,
        schedule=schedule,
        in_batch=in_batch,
        cfg_interval=cfg_interval,
        **score_options,
    )
    return StepEndCallback(made, prompt_embeds)


class StepEndCallback:
    r"""Pushes latents after a step as if its denoised estimate had been displaced before it.

    With sigma and sigma' noise over signal before and after the step and alpha' the share of signal
    after it, a displacement d of the denoised estimate moves the latents by
    $\alpha' d\,(1 - \sigma'/\sigma)$, exactly what a DDIM, Euler or first-order DPM-Solver++ step
    makes of it. Higher-order solvers would have used it again in later steps; here they do not.

    What is different from a wrapped pipeline:

    - The first step is not pushed where the scheduler keeps neither the latents it started from nor
      an estimate (DDIM, Euler, flow-matching Euler): a callback never sees the initial noise.
    - The first evaluation has the user's guidance scale; `cfg_interval` acts from the second on,
      and only in pipelines whose loop reads the scale from the pipeline.
    - Schedulers with fresh noise that keep no denoised estimate (DDPM, Euler ancestral, LCM outside
      its own pipeline) and SASolver cannot be guided from here. A GuidanceWarning says so, once a
      run; samples are kept in memory all the same. With DDIM the callback cannot see ``eta``: leave
      it at 0.
    - For LatentConsistencyModelPipeline add ``"denoised"`` to the tensor inputs.

    A run begins with step 0 and writes its samples to memory at its last step; one that fails or is
    interrupted writes nothing. One callback serves one run at a time.

    Args:
        guider: displaces the denoised estimate.
        prompt_embeds: in place of the pipeline's own.

    Raises:
        ArgumentError: the guider has a hook that no callback reaches.
    """

    def __init__(self, guider: Guider, prompt_embeds: PromptSource | None = None) -> None:
        for hook in BEYOND:
            for member in having(guider, hook):
                raise ArgumentError(
                    f"a callback comes after each step and reaches no {hook.__name__}, which "
                    f"{member!r} needs. Use sparke.wrap(pipe, guider=...) instead."
                )
        self.guider = guider
        self._prompt_embeds = prompt_embeds
        self._origins: weakref.WeakKeyDictionary[Any, Tensor | None] = weakref.WeakKeyDictionary()
        self._track: _latent_push.Track | None = None
        self._scale: _callback_host.HeldScale | None = None
        self._cond: Tensor | None = None
        self._shape: torch.Size | None = None
        self._warned = False

    def __repr__(self) -> str:
        return f"sparke.callback(guider={self.guider!r})"

    @property
    def memory(self) -> Memory | None:
        """The guider's."""
        return getattr(self.guider, "memory", None)

    @property
    def tensor_inputs(self) -> list[str]:
        """What to give as ``callback_on_step_end_tensor_inputs``."""
        own = self._prompt_embeds is None and compares_prompts(self.guider)
        return ["latents", "prompt_embeds"] if own else ["latents"]

    def __call__(
        self, pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """`callback_kwargs`, its latents pushed; the very same tensors where nothing is pushed.

        Raises:
            UnsupportedTarget: the pipeline's scheduler cannot be read.
            MissingPrompts: the score compares prompts and none came along.
            ArgumentError: no latents came along.
        """
        latents = callback_kwargs.get("latents")
        if not isinstance(latents, Tensor):
            raise ArgumentError(
                f"{type(pipeline).__name__} handed no latents to the callback. Call it with "
                "callback_on_step_end_tensor_inputs=guide.tensor_inputs, where guide is what "
                "sparke.callback returned."
            )
        if step == 0 or self._track is None or self._shape != latents.shape:
            self._begin(pipeline, latents, callback_kwargs)
        track, scale = self._track, self._scale
        assert track is not None
        assert scale is not None
        estimate = callback_kwargs.get("denoised")
        passed = track.arrived(timestep, latents, estimate)
        obstacle = self._obstacle(pipeline, track, estimate)
        if obstacle is not None:
            self._warn(pipeline, obstacle)
        elif passed is not None:
            state = State(passed.x, passed.denoised, passed.step, self._cond)
            move = passed.gain * self.guider(state).to(passed.denoised)
            if bool(move.any()):
                latents = track.pushed(latents, move)
                callback_kwargs["latents"] = latents
                if estimate is not None and track.is_last:
                    callback_kwargs["denoised"] = latents  # this is what gets decoded
        track.leave(latents)
        interrupted = bool(getattr(pipeline, "_interrupt", False))
        if step + 1 >= _callback_host.total_steps(pipeline, track.scheduler) or interrupted:
            scale.release(pipeline)
            self._track = None
            if track.is_last and not interrupted:
                self.guider.finish(latents.detach().clone())
        elif obstacle is None and isinstance(hook := self.guider, GuidanceScaleHook):
            scale.choose(pipeline, lambda own: hook.on_guidance_scale(track.next_step(), own))
        return callback_kwargs

    def _begin(self, pipeline: Any, latents: Tensor, tensors: Mapping[str, Any]) -> None:
        self._track = None
        scheduler = scheduler_of(pipeline)
        arguments = {"eta": _callback_host.default(pipeline, "eta")}
        eta = _schedulers.fresh_noise(scheduler, arguments)
        track = _latent_push.Track(scheduler, eta)
        self._cond, cond_origin = self._prompts(pipeline, latents, tensors)
        self.guider.begin(
            Run(
                shape=latents.shape,
                device=latents.device,
                dtype=latents.dtype,
                cond=self._cond,
                cond_origin=cond_origin,
                sigma_data=getattr(pipeline, "sigma_data", None),
                eta=eta,
            )
        )
        self._shape, self._warned = latents.shape, False
        self._scale = _callback_host.HeldScale(pipeline)
        self._track = track

    def _prompts(
        self, pipeline: Any, latents: Tensor, tensors: Mapping[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(b, c) prompts of the run and the (c,) point they are compared from."""
        batch, given = len(latents), self._prompt_embeds
        if given is not None:
            given = given(tensors) if callable(given) else given
            return _prompts.pool(given, batch, latents.device), None
        embeds = tensors.get("prompt_embeds")
        encoding = None
        if embeds is not None:
            encoding = _callback_host.encoding(pipeline, embeds, batch)
        if encoding is None:
            if compares_prompts(self.guider):
                raise MissingPrompts(
                    "the score compares prompts and the callback got no prompt_embeds. Call the "
                    "pipeline with callback_on_step_end_tensor_inputs=guide.tensor_inputs, where "
                    "guide is what sparke.callback returned; or give prompt_embeds= to "
                    "sparke.callback, or use an unconditional score such as 'rke'."
                )
            return None, None
        if pipeline not in self._origins:
            self._origins[pipeline] = _callback_host.origin(pipeline, encoding.embeds)
        origin = self._origins[pipeline]
        pooled = encoding.pooled().to(latents.device)
        if origin is not None:
            origin = origin.to(latents.device) if len(origin) == pooled.shape[1] else None
        return _encodings.rows_of(pooled, batch), origin

    def _obstacle(
        self, pipeline: Any, track: _latent_push.Track, estimate: Tensor | None
    ) -> str | None:
        if not _callback_host.takes_latents(pipeline):
            return "it ignores the latents that a callback returns"
        return track.obstacle(estimate)

    def _warn(self, pipeline: Any, why: str) -> None:
        if self._warned:
            return
        self._warned = True
        offers = "denoised" in getattr(pipeline, "_callback_tensor_inputs", ())
        cure = "Add 'denoised' to callback_on_step_end_tensor_inputs, or use" if offers else "Use"
        warnings.warn(
            f"{type(pipeline).__name__} goes on unguided: {why}. {cure} sparke.wrap(pipe), which "
            "reaches the estimate before the step.",
            GuidanceWarning,
            stacklevel=3,
        )
