"""Pictures as a pipeline's latents, and captions as its prompt embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparke.backends import _encodings
from sparke.errors import ArgumentError

__all__ = ["caption_rows", "check_options", "check_vae", "latents_of", "size_of"]

PACKING = ("latents", "batch_size", "num_channels_latents", "height", "width")
PROMPTS_AT_ONCE = 16


def size_of(
    pipeline: Any, height: int | None, width: int | None, *, own: bool = True
) -> tuple[int, int]:
    """Height and width of pictures: as given, or those the pipeline draws unless told otherwise.

    Args:
        pipeline: that tells its usual size, or None.
        height: in pixels.
        width: in pixels.
        own: the pipeline's own VAE will encode them, which does not take every size.

    Raises:
        ArgumentError: no size is given and the pipeline tells none, or its latents do not allow it.
    """
    usual = _usual_size(pipeline)
    down = usual[0] if height is None else height
    across = usual[1] if width is None else width
    if down is None or across is None:
        who = "nobody" if pipeline is None else f"not even {type(pipeline).__name__}"
        raise ArgumentError(
            "height and width must be given, those of the pictures you will draw: "
            f"{who} tells them."
        )
    unit = _factor(pipeline) * (2 if _packs(pipeline) else 1) if own else 1
    for name, value in (("height", down), ("width", across)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % unit:
            raise ArgumentError(f"{name} must be a multiple of {unit} above 0, got {value!r}.")
    return down, across


def check_vae(pipeline: Any) -> nn.Module:
    """The pipeline's VAE.

    Raises:
        ArgumentError: it has none that encodes pictures.
    """
    vae = getattr(pipeline, "vae", None)
    if not isinstance(vae, nn.Module) or not callable(getattr(vae, "encode", None)):
        raise ArgumentError(
            f"{type(pipeline).__name__} has no vae that encodes pictures. Give encode=, a function "
            "of pictures (b, 3, height, width) in [-1, 1] that returns its latents."
        )
    return vae


def latents_of(pipeline: Any, pictures: Tensor) -> Tensor:
    """(b, 3, height, width) in [-1, 1] -> (b, ...) clean latents as its scheduler knows them.

    The mean of the encoder's distribution, shifted and scaled as the pipeline's own, and packed
    where it packs them.

    Raises:
        ArgumentError: the pipeline has no VAE of a known kind.
    """
    vae, packs = check_vae(pipeline), _packs(pipeline)
    weight = next(vae.parameters())
    device = getattr(pipeline, "_execution_device", weight.device)
    pixels = pictures.to(device, weight.dtype)
    video = any(isinstance(part, nn.Conv3d) for part in vae.modules())
    encode: Any = vae.encode
    encoded = encode(pixels.unsqueeze(2) if video else pixels)
    latents = _normalized(_mean(encoded).float(), vae.config)
    if not packs:
        return latents
    if video:
        latents = latents.squeeze(2)
    packed: Tensor = pipeline._pack_latents(latents, *latents.shape)
    return packed


def caption_rows(
    pipeline: Any,
    captions: Sequence[str],
    prompt_encoder: Callable[[list[str]], Any] | None,
    options: Mapping[str, Any],
) -> Tensor:
    """(n, c) embeddings, pooled as those of a guided call's prompts are.

    Raises:
        ArgumentError: the pipeline cannot encode prompts, or not in a way that is understood.
    """
    different = list(dict.fromkeys(captions))
    rows = []
    for first in range(0, len(different), PROMPTS_AT_ONCE):
        part = different[first : first + PROMPTS_AT_ONCE]
        if prompt_encoder is not None:
            rows.append(_encodings.encoded(prompt_encoder, part))
        else:
            rows.append(_own_rows(pipeline, part, options))
    table = torch.cat(rows).float().cpu()
    number = {caption: i for i, caption in enumerate(different)}
    return table[[number[caption] for caption in captions]]


def check_options(pipeline: Any, options: Mapping[str, Any]) -> None:
    """Raise unless the pipeline's ``encode_prompt`` takes these options."""
    if not options:
        return
    takes = _parameters(getattr(pipeline, "encode_prompt", None))
    unknown = [name for name in options if name not in takes]
    if unknown:
        raise ArgumentError(
            f"{', '.join(unknown)} is no option of reference_images, nor of the encode_prompt of "
            f"{type(pipeline).__name__} ({', '.join(takes) or 'it has none'})."
        )


def _own_rows(pipeline: Any, captions: list[str], options: Mapping[str, Any]) -> Tensor:
    encode = getattr(pipeline, "encode_prompt", None)
    if not callable(encode):
        raise ArgumentError(
            f"{type(pipeline).__name__} cannot encode captions. Give prompt_encoder=, and the same "
            "to sparke.wrap; or captions=None."
        )
    asked = {
        "device": getattr(pipeline, "_execution_device", None),
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": False,
        **options,
        "prompt": list(captions),  # a list of its own: some pipelines write into it
    }
    # What a call leaves at its default reaches encode_prompt with the call's default.
    usual = {k: p.default for k, p in _parameters(type(pipeline).__call__).items()}
    arguments = {}
    for name, parameter in _parameters(encode).items():
        if name in asked:
            arguments[name] = asked[name]
        elif usual.get(name, parameter.empty) is not parameter.empty:
            arguments[name] = usual[name]
        elif parameter.default is parameter.empty:
            arguments[name] = None
    encoding = _encodings.Encoding.of(encode(**arguments))
    if encoding is None:
        raise ArgumentError(
            f"what encode_prompt of {type(pipeline).__name__} returns is not understood. Give "
            "prompt_encoder=, and the same to sparke.wrap."
        )
    rows: Tensor = _encodings.conditional(encoding.pooled(), len(captions))
    return rows


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    if not callable(function):
        return {}
    every = inspect.signature(function).parameters
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {n: p for n, p in every.items() if p.kind not in variable and n != "self"}


def _mean(encoded: Any) -> Tensor:
    """The encoder's answer, in whichever form."""
    distribution = getattr(encoded, "latent_dist", None)
    if distribution is not None:
        mean: Tensor = distribution.mode()
        return mean
    plain = (getattr(encoded, name, None) for name in ("latents", "latent"))
    found = next((z for z in plain if isinstance(z, Tensor)), None)
    if found is None:
        raise ArgumentError(
            f"the vae's encode() returned {type(encoded).__name__}, which holds no latents that "
            "are known. Give encode=."
        )
    return found


def _normalized(z: Tensor, config: Any) -> Tensor:
    """Latents at the scale of the diffusion model."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        shape = (-1, *[1] * (z.ndim - 2))
        z = (z - z.new_tensor(mean).view(shape)) / z.new_tensor(std).view(shape)
    else:
        z = z - (getattr(config, "shift_factor", None) or 0.0)
    return z * (getattr(config, "scaling_factor", None) or 1.0)


def _packs(pipeline: Any) -> bool:
    """Whether latents travel as rows of patches, as those of Flux do.

    Raises:
        ArgumentError: they are packed in a way of their own.
    """
    pack = getattr(pipeline, "_pack_latents", None)
    if pack is None:
        return False
    if tuple(_parameters(pack)) != PACKING:
        raise ArgumentError(
            f"{type(pipeline).__name__} packs its latents in a way of its own. Give encode=, a "
            "function of pictures (b, 3, height, width) in [-1, 1] that returns them."
        )
    return True


def _factor(pipeline: Any) -> int:
    """Pixels to a latent's side."""
    names = ("vae_scale_factor", "vae_scale_factor_spatial")
    told = (getattr(pipeline, name, None) for name in names)
    blocks = getattr(pipeline.vae.config, "block_out_channels", (1,))
    return next((f for f in told if isinstance(f, int)), 2 ** (len(blocks) - 1))


def _usual_size(pipeline: Any) -> tuple[int | None, int | None]:
    """Of the pictures drawn by a call that says nothing of it."""
    if getattr(pipeline, "vae", None) is None:
        return None, None
    call = _parameters(type(pipeline).__call__)
    fixed = [getattr(call.get(name), "default", None) for name in ("height", "width")]
    if all(isinstance(side, int) and not isinstance(side, bool) for side in fixed):
        return fixed[0], fixed[1]
    told = getattr(pipeline, "default_sample_size", None)
    for name in ("unet", "transformer"):
        config = getattr(getattr(pipeline, name, None), "config", None)
        told = told or getattr(config, "sample_size", None)
    sides = (told, told) if isinstance(told, int) else told
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        return None, None
    return sides[0] * _factor(pipeline), sides[1] * _factor(pipeline)
