"""The emoji model as a pipeline of diffusers, under any scheduler that can run it."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from sparke import checks
from sparke.errors import ArgumentError, UnknownName, UnsupportedTarget
from sparke.models.emoji._adapter import EmojiDenoiser
from sparke.models.emoji._diffusers import pipeline_class
from sparke.models.emoji.model import EmojiModel, load

__all__ = ["pipeline"]

_TRAIN_TIMESTEPS = 1000
_SCHEDULER = "DPMSolverMultistepScheduler"


def pipeline(
    scheduler: Any = _SCHEDULER,
    *,
    prediction_type: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The emoji model as a ``diffusers.DiffusionPipeline``.

    It is called as Stable Diffusion's pipelines are, ``pipe("dog face", num_images_per_prompt=4)``,
    and its scheduler is exchanged as theirs,
    ``pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)``. A scheduler made
    here, by its name, has a noise table from ``sigma_min`` to ``sigma_max`` of the model spaced
    after Karras et al. (arXiv 2206.00364, eq. 5), so that runs of DPM-Solver, UniPC and Euler go
    through ``EmojiModel.sigmas``; so does FlowMatchEuler, to which the pipeline hands those levels.
    FlowMatchHeun takes no levels and spaces its own evenly in flow time.

    Args:
        scheduler: name of one of diffusers' schedulers, an instance, or None for
            DPMSolverMultistepScheduler.
        prediction_type: what the network is to answer: "epsilon", "v_prediction" or "sample". If
            None, what the scheduler says, and "epsilon" for a scheduler made here. Flow matching
            schedulers read a velocity and take no choice.
        device: where to put the model.
        dtype: type of its parameters and of the latents.

    Returns:
        An ``EmojiPipeline``, which is a ``diffusers.DiffusionPipeline``; ``help(pipe)`` describes
        its call. ``save_pretrained`` and ``from_pretrained`` are not supported: the weights ship
        with sparke.

    Raises:
        MissingHost: diffusers is not installed.
        UnknownName: diffusers has no scheduler of that name.
        UnsupportedTarget: the scheduler cannot run a continuous model of this kind.
        ArgumentError: the scheduler expects another prediction, or clips what it reads.
    """
    with checks.host("diffusers", "runs the pipeline", "diffusers"):
        import diffusers
    model = load(device, dtype)
    if scheduler is None or isinstance(scheduler, str):
        made = _named(diffusers, scheduler or _SCHEDULER, model, prediction_type)
    else:
        made = scheduler
    network = EmojiDenoiser(model)
    told = network.follow(made).prediction
    if prediction_type is not None and told != prediction_type:
        raise ArgumentError(
            f"prediction_type={prediction_type!r} must be what the scheduler reads; "
            f"{type(made).__name__} reads {told!r}. Leave it out, or make the scheduler with it."
        )
    return pipeline_class()(network, made)


def _named(host: Any, name: str, model: EmojiModel, prediction_type: str | None) -> Any:
    known = [n for n in dir(host) if n.endswith("Scheduler")]
    if name not in known:
        raise UnknownName("scheduler", name, known)
    kind = getattr(host, name)
    takes = inspect.signature(kind.__init__).parameters
    wanted: dict[str, Any] = {"num_train_timesteps": _TRAIN_TIMESTEPS}
    if "trained_betas" in takes:
        wanted |= {
            "prediction_type": prediction_type or "epsilon",
            "trained_betas": _betas(model),
            "use_karras_sigmas": True,
            "clip_sample": False,
            "set_alpha_to_one": True,
        }
    else:
        wanted |= {
            "sigma_min": model.sigma_min,
            "sigma_max": model.sigma_max,
            "sigma_data": model.sigma_data,
        }
        if prediction_type is not None:
            wanted["prediction_type"] = prediction_type
    try:
        made = kind(**{key: value for key, value in wanted.items() if key in takes})
    except TypeError as error:
        raise UnsupportedTarget(
            f"scheduler {name} is not of the kinds supported: {error}"
        ) from error
    if "trained_betas" in takes:
        # What this scheduler has no use for waits in its config for those made from it.
        made.register_to_config(**{k: v for k, v in wanted.items() if k not in takes})
    return made


def _betas(model: EmojiModel) -> list[float]:
    """Betas whose running product of 1 - beta is 1 / (1 + sigma^2), on the model's own levels."""
    sigmas = model.sigmas(_TRAIN_TIMESTEPS)[:-1].flip(0).double().cpu()
    kept = 1 / (1 + sigmas.square())
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    betas: list[float] = (1 - kept / before).tolist()
    return betas
