"""smalldiffusion's samplers: generators ``samples(model, sigmas, gam, mu, ..., xt, cond)``.

A wrapped sampler has the same signature, plus ``prompt_embeds``, and yields the same latents. It is
called with a model of ours in place of its own, whose noise predictions are moved so that the clean
image they stand for is displaced. Samples are finished when the generator is: who stops earlier has
a run that wrote nothing to memory.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from sparke import Guider, Step
from sparke.errors import GuidanceWarning, ShapeError
from sparke.guidance import having
from sparke.protocols import (
    ConditionHook,
    EncoderHook,
    Evaluation,
    EvaluationHook,
    GuidanceScaleHook,
    ModelHook,
    NoiseHook,
    Run,
    State,
)
from torch import Tensor

__all__ = ["accepts", "attach"]

Sampler = Callable[..., Iterator[Tensor]]
Prompts = Tensor | Callable[[Mapping[str, Any]], Tensor]


def accepts(target: object) -> bool:
    """Whether `target` is a generator function with the parameters of smalldiffusion's sampler."""
    if not inspect.isgeneratorfunction(target):
        return False
    names = list(inspect.signature(target).parameters)
    wanted = {"gam", "mu", "cfg_scale", "batchsize", "xt", "cond", "accelerator"}
    return names[:2] == ["model", "sigmas"] and wanted <= {*names} and "prompt_embeds" not in names


def attach(target: Sampler, guider: Guider, *, prompt_embeds: Prompts | None = None) -> Sampler:
    """The sampler with guidance inside.

    Args:
        target: the sampler.
        guider: displaces the clean image at each step.
        prompt_embeds: (b, c) embeddings to compare prompts by, or a function of the sampler's
            arguments that returns them. If None, and the call gives none, what the model makes of
            its labels `cond`.

    Returns:
        A generator function with attributes ``guider`` and ``memory``.

    Hooks of the guider: ``on_noise`` where the sampler draws the noise itself; ``on_model`` around
    the run, also between the items of the generator; ``on_evaluation``; ``on_guidance_scale`` where
    there are labels, with w = 1 + cfg_scale. ``on_condition`` and ``on_encoder`` have nothing to
    change: labels are embedded inside the model. A GuidanceWarning says so.
    """
    signature = inspect.signature(target)

    @functools.wraps(target)
    def sampler(*args: Any, **kwargs: Any) -> Iterator[Tensor]:
        per_call = kwargs.pop("prompt_embeds", None)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        model = arguments["model"]
        model.eval()  # as the sampler is about to do: in training, labels are dropped at random
        steps = _steps(model, arguments)
        noise = _drawn(arguments)
        run = _run(arguments, prompt_embeds if per_call is None else per_call)
        guider.begin(run)
        _start(guider, arguments, noise)
        arguments["model"] = _Guided(model, guider, run, steps)
        with ExitStack() as held:
            for member in having(guider, ModelHook):
                held.enter_context(member.on_model(model))
            x = None
            for x in target(*bound.args, **bound.kwargs):
                yield x
        if x is not None:
            guider.finish(x)

    extra = inspect.Parameter("prompt_embeds", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [*signature.parameters.values(), extra]
    wrapped: Any = sampler
    wrapped.__signature__ = signature.replace(parameters=parameters)
    wrapped.guider, wrapped.memory = guider, getattr(guider, "memory", None)
    return sampler


class _Guided:
    """The model, with the displacement in its noise predictions; everything else is the model's."""

    def __init__(self, model: Any, guider: Guider, run: Run, steps: Mapping[float, Step]) -> None:
        self._model, self._guider, self._run, self._steps = model, guider, run, steps
        self._told = having(guider, EvaluationHook)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict_eps_cfg(
        self, x: Tensor, sigma: Tensor, cond: Tensor | None, cfg_scale: float
    ) -> Tensor:
        # The sampler may have rounded the level to the precision of x.
        step = self._steps[min(self._steps, key=lambda level: abs(level - float(sigma)))]
        scale = cfg_scale
        if cond is not None and isinstance(self._guider, GuidanceScaleHook):
            own = 1.0 + cfg_scale
            asked = self._guider.on_guidance_scale(step, own)
            scale = cfg_scale if asked == own else asked - 1.0

        def predicted(z: Tensor, w: float) -> Tensor:
            guided = cond is not None and w != 0
            for member in self._told:
                branches = ("cond", "uncond") if guided else ("cond",)
                member.on_evaluation(Evaluation(step, branches, len(z)))
            eps: Tensor = self._model.predict_eps_cfg(z, sigma, cond, w)
            return eps

        def clean(z: Tensor, w: float = scale) -> Tensor:
            return z - sigma * predicted(z, w)

        def unguided() -> Tensor:
            return clean(x, 0.0)

        eps = predicted(x, scale)
        state = State(x, x - sigma * eps, step, self._run.cond, unguided, clean, unguided)
        return eps - self._guider(state).to(eps) / sigma


def _steps(model: Any, arguments: dict[str, Any]) -> dict[float, Step]:
    """Level of the sampler -> step, in noise over signal.

    Models of noise see x0 + sigma e, whose level is sigma. Flow models, which smalldiffusion marks
    by the name of their class, see (1 - t) x0 + t e, whose level is t / (1 - t).
    """
    arguments["sigmas"] = sigmas = torch.as_tensor(arguments["sigmas"])
    levels = [float(s) for s in sigmas]
    flow = "PredFlow" in type(model).__name__
    ratios = [s / (1 - s) if s < 1 else math.inf for s in levels] if flow else levels
    total = len(levels) - 1
    return {levels[i]: Step(i, ratios[i], ratios[i + 1], total) for i in range(total)}


def _drawn(arguments: dict[str, Any]) -> bool:
    """Draw the initial noise as the sampler would, where it would; whether it was drawn."""
    if arguments["xt"] is not None:
        return False
    # It comes with smalldiffusion.
    from accelerate import Accelerator  # type: ignore[import-untyped,unused-ignore]

    arguments["accelerator"] = arguments["accelerator"] or Accelerator()
    noise = arguments["model"].rand_input(arguments["batchsize"])
    arguments["xt"] = noise.to(arguments["accelerator"].device) * arguments["sigmas"][0]
    return True


def _run(arguments: Mapping[str, Any], prompts: Prompts | None) -> Run:
    x, labels = arguments["xt"], arguments["cond"]
    embed = getattr(arguments["model"], "cond_embed", None)
    rows: Tensor | None = prompts(arguments) if callable(prompts) else prompts
    if rows is None and labels is not None and embed is not None:
        with torch.no_grad():
            rows = embed(labels.to(x.device))
    if rows is not None and (rows.ndim != 2 or len(rows) != len(x)):
        raise ShapeError(
            f"prompt_embeds must be ({len(x)}, c), a row for each sample, got {tuple(rows.shape)}."
        )
    return Run(
        shape=x.shape,
        device=x.device,
        dtype=x.dtype,
        cond=None if rows is None else rows.detach().to(x.device),
        eta=min(1.0, 2 * float(arguments["mu"])),  # mu = 0.5 is DDPM
        seeds=tuple(map(_seed, x.detach().to("cpu", torch.float32))),
    )


def _seed(row: Tensor) -> int:
    """A number that is the same for the same noise."""
    digest = hashlib.blake2b(row.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _start(guider: Guider, arguments: dict[str, Any], noise: bool) -> None:
    """Let the guider change the noise; say which of its hooks are not called."""
    lost: list[Any] = [*having(guider, ConditionHook), *having(guider, EncoderHook)]
    if noise:
        for member in having(guider, NoiseHook):
            arguments["xt"] = member.on_noise(arguments["xt"])
    else:
        lost += having(guider, NoiseHook)
    if lost:
        names = ", ".join(dict.fromkeys(type(member).__name__ for member in lost))
        warnings.warn(
            f"smalldiffusion's sampler goes on without {names}: prompts are embedded inside the "
            "model, and noise given as xt= is left as it is.",
            GuidanceWarning,
            stacklevel=3,
        )
