"""Encoders by name: what turns pictures, or prompts, into the rows that are compared.

| name | what it is | needs |
|---|---|---|
| ``pixels`` | the picture itself, 32×32; crude | nothing |
| ``emoji`` | the judge of the emoji model that ships with sparke | nothing |
| ``timm:NAME`` | weights of timm by name | ``sparke[timm]`` |
| ``timm:FOLDER`` | a folder that ``timm.models.save_for_hf`` wrote | ``sparke[timm]`` |
| ``timm:NAME@FILE.safetensors`` | an architecture of timm and a checkpoint | ``sparke[timm]`` |
| ``transformers:FOLDER``, ``transformers:NAME`` | CLIP-like models: image features; vision models \
such as DINOv2: pooled output | ``sparke[transformers]`` |
| ``module:function`` or ``file.py:function`` | code of your own | nothing |

Nothing is ever downloaded unless ``download=True``: a name whose weights are not on disk is an
error that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError
from sparke.features import _encoder_own_code, _encoder_timm, _encoder_transformers
from sparke.features._encoder import ImageEncoder, rows_from

__all__ = ["ImageEncoder", "image_encoder", "text_encoder"]

PIXELS = 32
IMAGE_SIZE = 224
TEXTS_AT_ONCE = 64
FORMS = (
    "pixels, emoji, timm:NAME, timm:FOLDER, timm:NAME@FILE.safetensors, transformers:FOLDER, "
    "transformers:NAME, module:function or file.py:function"
)
TEXT_FORMS = "transformers:FOLDER, transformers:NAME, module:function or file.py:function"


def image_encoder(
    encoder: str | ImageEncoder | Callable[[Tensor], Tensor],
    *,
    image_size: int | None = None,
    download: bool = False,
    device: str = "cpu",
) -> ImageEncoder:
    """An encoder of pictures, by name or from any torch callable.

    A callable, given or named ``module:function``, gets RGB pictures (b, 3, S, S), float32 in
    [0, 1], on `device`, scaled to cover S×S and cut to their middle; it returns (b, d). S is
    `image_size`, else the callable's attribute ``image_size``, else 224. Mean and standard
    deviation are its own business.

    Encoders of timm and transformers prepare pictures as they were trained to, and nothing of it
    can be changed here.

    Args:
        encoder: a name of the table above; a callable; or an ImageEncoder, returned as it is.
        image_size: side S in pixels, for callables.
        download: whether weights that are not on disk may be fetched.
        device: where the encoder computes.

    Raises:
        ArgumentError: the name is of no known form, or what it names cannot be loaded.
        UnknownName: timm knows no such model.
        MissingHost: timm or transformers is needed and not installed.

    Example:
        ```python
        import torch
        from sparke.features.encoders import image_encoder

        crude = image_encoder("pixels")
        own = image_encoder(lambda pictures: pictures.mean((2, 3)), image_size=64)
        assert own(torch.rand(5, 3, 64, 64)).shape == (5, 3)
        ```
    """
    if isinstance(encoder, ImageEncoder):
        return encoder
    if image_size is not None:
        checks.whole("image_size", image_size)
    if not isinstance(encoder, str):
        if not callable(encoder):
            raise ArgumentError(f"encoder must be a name or a callable, got {encoder!r}.")
        return _of_callable(getattr(encoder, "__name__", "encoder"), encoder, image_size, device)
    kind, _, rest = encoder.partition(":")
    fixed = kind in ("pixels", "emoji", "timm", "transformers")
    if fixed and image_size is not None:
        raise ArgumentError(
            f"image_size={image_size} would go nowhere: {encoder!r} has a size of its own."
        )
    if encoder in ("pixels", "emoji"):
        return _pixels() if encoder == "pixels" else _emoji()
    if kind == "timm" and rest:
        return _encoder_timm.timm_encoder(encoder, rest, download=download, device=device)
    if kind == "transformers" and rest:
        load = _encoder_transformers.transformers_encoder
        return load(encoder, rest, download=download, device=device)
    if fixed or not rest:
        raise ArgumentError(f"encoder={encoder!r} is not known. Known are {FORMS}.")
    found = _encoder_own_code.callable_named(encoder, device)
    return _of_callable(encoder, found, image_size, device)


def text_encoder(
    encoder: str | Callable[[list[str]], Any],
    *,
    download: bool = False,
    device: str = "cpu",
) -> Callable[[list[str]], Tensor]:
    """An encoder of prompts: list of n strings -> (n, c) rows, float32, on the CPU.

    Args:
        encoder: ``transformers:FOLDER`` or ``transformers:NAME`` of a CLIP-like or text model;
            ``module:function`` or ``file.py:function`` of code that takes a list of at most 64
            strings and returns a tensor; or such a callable.
        download: whether weights that are not on disk may be fetched.
        device: where it computes.

    Raises:
        ArgumentError: the name is of no known form, or what it names cannot be loaded.
        MissingHost: transformers is needed and not installed.
    """
    if isinstance(encoder, str):
        name = encoder
        kind, _, rest = encoder.partition(":")
        if not rest or kind == "timm":
            raise ArgumentError(f"text encoder {encoder!r} is not known. Known are {TEXT_FORMS}.")
        if kind == "transformers":
            load = _encoder_transformers.transformers_text_encoder
            run: Callable[[list[str]], Any] = load(name, rest, download=download, device=device)
        else:
            run = _encoder_own_code.callable_named(name, device)
    elif callable(encoder):
        run, name = encoder, getattr(encoder, "__name__", "text encoder")
    else:
        raise ArgumentError(f"text encoder must be a name or a callable, got {encoder!r}.")

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        parts = [texts[i : i + TEXTS_AT_ONCE] for i in range(0, len(texts), TEXTS_AT_ONCE)]
        return torch.cat([rows_from(run, part, len(part), name) for part in parts])

    return encode


def _of_callable(
    name: str, run: Callable[[Tensor], Any], image_size: int | None, device: str
) -> ImageEncoder:
    own = getattr(run, "image_size", None)
    own = own if isinstance(own, int) and not isinstance(own, bool) and own > 0 else IMAGE_SIZE
    side = own if image_size is None else image_size
    compares = "whatever your function compares."
    return ImageEncoder(name, run, compares, image_size=(side, side), device=device)


def _pixels() -> ImageEncoder:
    return ImageEncoder(
        "pixels",
        lambda pictures: pictures.flatten(1),
        f"colours at places, of the picture scaled to {PIXELS}x{PIXELS}. It is crude: an object "
        "moved by a tenth of the picture counts as another one, and what is shown does not matter.",
        image_size=(PIXELS, PIXELS),
    )


def _emoji() -> ImageEncoder:
    from sparke.models import emoji

    judge = emoji.load_judge()
    return ImageEncoder(
        "emoji",
        lambda pictures: judge.features(pictures * 2 - 1),
        "the features of a network trained to name emoji, scaled to 32x32. It is for pictures of "
        "the emoji model (sparke generate) and knows nothing of others.",
        image_size=(32, 32),
    )
