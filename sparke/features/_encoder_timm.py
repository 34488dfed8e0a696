"""Encoders of timm: by the name of their weights, a folder, or an architecture and a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparke import checks
from sparke.errors import ArgumentError, UnknownName
from sparke.features._encoder import ImageEncoder

__all__ = ["timm_encoder"]

WEIGHTS = "model.safetensors"
NEAR = 400
"""Names of timm that share the first letters are offered as near matches, at most so many."""


def timm_encoder(name: str, model: str, *, download: bool, device: str) -> ImageEncoder:
    """The pooled features before the classifier, with timm's own preparation.

    Args:
        name: as it was asked for.
        model: of timm's weights; a folder that timm saved; or ``NAME@FILE.safetensors``.
        download: whether weights that are not on disk may be fetched.
        device: of the model.

    Raises:
        MissingHost: timm is not installed.
        ArgumentError: the weights are not on disk, or do not fit.
        UnknownName: timm has no such model.
    """
    with checks.host("timm", "loads this encoder", "timm"):
        import timm
        import timm.data
    options = _source(timm, name, model, download)
    try:
        network: Any = timm.create_model(num_classes=0, **options).eval().to(device)
    # Files of others, hubs, models that know no num_classes.
    except Exception as error:
        raise ArgumentError(
            f"encoder {name!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    network.requires_grad_(False)
    config = timm.data.resolve_model_data_config(network)
    prepare: Any = timm.data.create_transform(**config, is_training=False)
    return ImageEncoder(
        name,
        network,
        f"the features of {_architecture(network)}, before its classifier.",
        prepare=prepare,
        device=device,
    )


def _architecture(network: Any) -> str:
    config = getattr(network, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(network).__name__)


def _source(timm: Any, name: str, model: str, download: bool) -> dict[str, Any]:
    """Arguments of timm.create_model that read nothing but what is on disk, unless `download`."""
    if Path(model).is_dir():
        for needed in ("config.json", WEIGHTS):
            if not (Path(model) / needed).is_file():
                raise ArgumentError(
                    f"encoder {name!r}: the folder has no {needed}. timm.models.save_for_hf("
                    "model, folder, safe_serialization=True) writes one that has."
                )
        return {"model_name": f"local-dir:{model}", "pretrained": True}
    architecture, at, checkpoint = model.partition("@")
    _check_name(timm, architecture)
    if at:
        if not checkpoint.endswith(".safetensors") or not Path(checkpoint).is_file():
            raise ArgumentError(
                f"encoder {name!r}: {checkpoint!r} must be a .safetensors file that is there."
            )
        overlay = {"file": checkpoint}
    elif download:
        return {"model_name": architecture, "pretrained": True}
    else:
        overlay = {"file": _cached(timm, name, architecture)}
    return {"model_name": architecture, "pretrained": True, "pretrained_cfg_overlay": overlay}


def _check_name(timm: Any, architecture: str) -> None:
    if not timm.is_model(architecture):
        stem = architecture.partition(".")[0]
        known = timm.list_models(f"{stem[:5]}*")[:NEAR] if stem.isidentifier() else []
        raise UnknownName("timm encoder", architecture, known[:20] or ["see timm.list_models()"])


def _cached(timm: Any, name: str, architecture: str) -> str:
    """The weights of a name, where an earlier download left them."""
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(architecture)
    if config is not None and config.hf_hub_id:
        found = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename or WEIGHTS)
        if isinstance(found, str):
            return found
    raise ArgumentError(
        f"the weights of encoder {name!r} are not on this disk. Add --download (download=True) to "
        "fetch them, or name a folder that timm saved, timm:FOLDER, or a checkpoint, "
        f"timm:{architecture}@FILE.safetensors."
    )
