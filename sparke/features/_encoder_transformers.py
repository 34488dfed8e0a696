"""Encoders of transformers, from a folder or by their name on the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError
from sparke.features._encoder import ImageEncoder
from sparke.kernels import normalize

__all__ = ["transformers_encoder", "transformers_text_encoder"]


def transformers_encoder(name: str, model: str, *, download: bool, device: str) -> ImageEncoder:
    """CLIP's image features at unit length, or the pooled output of a vision model.

    Args:
        name: as it was asked for.
        model: a folder, or a name on the hub.
        download: whether what is not on disk may be fetched.
        device: of the model.

    Raises:
        MissingHost: transformers is not installed.
        ArgumentError: the model or its preparation is not on disk, or gives no pooled output.
    """
    with checks.host("transformers", "loads this encoder", "transformers"):
        from transformers import AutoImageProcessor, AutoModel
    network = _loaded(AutoModel, name, model, download).to(device)
    processor = _loaded(AutoImageProcessor, name, model, download)
    clip = hasattr(network, "get_image_features")

    def prepare(picture: Any) -> Tensor:
        pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"]
        return pixels[0]

    def encode(pixels: Tensor) -> Tensor:
        if clip:
            return normalize(_pooled(network.get_image_features(pixel_values=pixels)).float())
        return _pooled(network(pixel_values=pixels)).flatten(1)

    seen = "the image features, at unit length," if clip else "the pooled features"
    return ImageEncoder(
        name,
        encode,
        f"{seen} of {type(network).__name__} from {Path(model).name}.",
        prepare=prepare,
        device=device,
    )


def transformers_text_encoder(
    name: str, model: str, *, download: bool, device: str
) -> Callable[[list[str]], Tensor]:
    """CLIP's text features, or the pooled output of a text model; texts cut to its length.

    Raises:
        MissingHost: transformers is not installed.
        ArgumentError: the model or its tokenizer is not on disk, or gives no pooled output.
    """
    with checks.host("transformers", "loads this encoder", "transformers"):
        from transformers import AutoModel, AutoTokenizer
    network = _loaded(AutoModel, name, model, download).to(device)
    tokenizer = _loaded(AutoTokenizer, name, model, download)

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        if hasattr(network, "get_text_features"):
            return _pooled(network.get_text_features(**tokens))
        return _pooled(network(**tokens))

    return encode


def _loaded(kind: Any, name: str, model: str, download: bool) -> Any:
    weights = {"use_safetensors": True, "output_loading_info": True}
    is_model = hasattr(kind, "from_config")
    source = model if download else _on_disk(name, model)
    try:
        with _quiet(not download):
            found = kind.from_pretrained(
                source,
                local_files_only=not download,
                trust_remote_code=False,
                **(weights if is_model else {}),
            )
    # What transformers raises depends on the model's class: OSError, ValueError, KeyError, ...
    except Exception as error:
        raise ArgumentError(
            f"encoder {name!r}: {kind.__name__} cannot load {model!r} "
            f"({type(error).__name__}: {error}). A folder needs config.json, safetensors "
            "weights, and what its processor or tokenizer saves."
        ) from error
    if not is_model:
        return found
    network, told = found
    if missing := sorted(told["missing_keys"]):
        raise ArgumentError(
            f"encoder {name!r}: the file has no weights for {', '.join(missing[:3])}, so that what "
            f"{type(network).__name__} returns would be random. Pool the features in code of your "
            "own: file.py:function."
        )
    return network.eval().requires_grad_(False)


def _on_disk(name: str, model: str) -> str:
    """The folder of a model: given, or where an earlier download left it.

    A name is never handed on to transformers: even told to use local files only, it may call the
    hub for other ends.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model).is_dir():
        return model
    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        found = None
    if isinstance(found, str):
        return str(Path(found).parent)
    raise ArgumentError(
        f"encoder {name!r} is not on this disk. Add --download (download=True) to fetch it, or "
        "name a folder that save_pretrained() wrote: transformers:FOLDER."
    )


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Without the bars and reports of transformers, which would stand among ours."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    if wanted:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _pooled(out: Any) -> Tensor:
    for key in ("image_embeds", "text_embeds", "pooler_output"):
        if isinstance(found := getattr(out, key, None), Tensor):
            return found
    if isinstance(out, Tensor):
        return out
    raise ArgumentError(
        f"{type(out).__name__} has no pooled output, one row for each input. Pool it in code of "
        "your own: --encoder file.py:function."
    )
