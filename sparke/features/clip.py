"""What a picture shows, as CLIP sees it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparke import checks
from sparke.errors import ArgumentError, ShapeError
from sparke.kernels import normalize

__all__ = ["ClipFeatures"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIZE = 224


class ClipFeatures:
    r"""Latents, decoded by a VAE and seen by an image encoder: (b, c, h, w) -> (b, d), unit rows.

    $$f(z) = \frac{E(P(V(z)))}{\|E(P(V(z)))\|}$$

    with V the decoder, P the encoder's own preparation (the shorter side to `image_size` pixels by
    bicubic interpolation with antialiasing, the middle cut out, mean and standard deviation of its
    training data) and E the encoder. All of it is differentiable. c-VSG (arXiv 2406.04551) guides
    in this space, and SPARKE (arXiv 2506.10173) offers it beside latents.

    For ``features=`` of [wrap][sparke._wrap.wrap] and
    [DiversityGuider][sparke.guidance.diversity.DiversityGuider]; memory then holds these rows.
    Every guided evaluation decodes and backpropagates through decoder and encoder, which costs far
    more time and memory than flattened latents do. The decoded picture is not clamped: a clamp
    would stop the gradient of saturated pixels. A decoder in half precision may overflow (that of
    SDXL does), and such samples go on unguided with a warning; give it in float32 or bfloat16.

    It is not for packed or video latents: unpack them first,
    ``features=lambda x: clip(unpack(x))``.

    Args:
        model: a CLIPVisionModelWithProjection or CLIPModel of transformers; an object with
            ``encode_image``, such as OpenAI's; any function of prepared pictures (b, 3, h, w) that
            returns (b, d); or a folder or hub id, which transformers loads, in evaluation mode.
        vae: decodes latents, such as ``pipe.vae``. Its ``scaling_factor``, ``shift_factor``,
            ``latents_mean`` and ``latents_std`` are undone first.
        image_size: side of the prepared picture in pixels; the encoder's own if None, else 224.
        mean: of the encoder's training data, one number a channel, for pixels in [0, 1].
        std: standard deviation of the same.
        **load_options: for transformers' ``from_pretrained``, when `model` is a folder or an id.

    Raises:
        MissingHost: `model` is to be loaded and transformers is not installed.
        ArgumentError: it cannot be loaded, or an argument has a forbidden value.
    """

    def __init__(
        self,
        model: Any,
        vae: Any,
        *,
        image_size: int | None = None,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
        **load_options: Any,
    ) -> None:
        if isinstance(model, (str, os.PathLike)):
            model = _loaded(os.fspath(model), load_options)
        elif load_options:
            raise ArgumentError(
                f"model is loaded already, so {', '.join(load_options)} would go nowhere. Give a "
                "folder or an id, or leave them out."
            )
        if not callable(getattr(vae, "decode", None)) or not hasattr(vae, "config"):
            raise ArgumentError(
                f"vae must decode latents, as pipe.vae does; {type(vae).__name__} has no decode() "
                "or no config."
            )
        self.model, self.vae = model, vae
        self._encode = _encoder(model)
        self.image_size = _size(model) if image_size is None else image_size
        if isinstance(self.image_size, bool) or not (
            isinstance(self.image_size, int) and self.image_size > 0
        ):
            raise ArgumentError(
                f"image_size must be a whole number of pixels above 0, got {self.image_size!r}."
            )
        self._mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __repr__(self) -> str:
        return f"ClipFeatures({type(self.model).__name__}, {type(self.vae).__name__})"

    def __call__(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) latents as the pipeline scales them -> (b, d) unit rows, float32.

        Raises:
            ShapeError: latents of another shape, or an encoder that returns no (b, d).
        """
        return self.of_images(self.decode(latents)).to(latents.device)

    def decode(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) latents -> (b, 3, H, W) pictures in about [-1, 1], float32."""
        if latents.ndim != 4:
            raise ShapeError(
                f"ClipFeatures decodes latents (b, c, h, w), got {tuple(latents.shape)}. Unpack "
                "them first: features=lambda x: clip(unpack(x))."
            )
        z = _like(self.vae, latents)
        told = {name: getattr(self.vae.config, name, None) for name in _SCALES}
        z = z / (told["scaling_factor"] or 1.0)
        if told["latents_mean"] is not None and told["latents_std"] is not None:
            mean, std = (z.new_tensor(told[n]).view(-1, 1, 1) for n in _SCALES[2:])
            z = z * std + mean
        elif told["shift_factor"]:
            z = z + told["shift_factor"]
        pictures: Tensor = self.vae.decode(z, return_dict=False)[0]
        return pictures.float()

    def of_images(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) pictures in [-1, 1] -> (b, d) unit rows, float32."""
        pixels = self._prepared(images.float() / 2 + 0.5)
        rows = self._encode(_like(self.model, pixels))
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(images):
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ShapeError(f"the image encoder must return ({len(images)}, width), got {got}.")
        return normalize(rows.float())

    def _prepared(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        size = self.image_size
        # Rounded down, as CLIP's own preparation does.
        target = (
            (size, size * width // height) if height <= width else (size * height // width, size)
        )
        if target != (height, width):
            images = F.interpolate(images, target, mode="bicubic", antialias=True)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        images = images[..., top : top + size, left : left + size]
        return (images - self._mean.to(images)) / self._std.to(images)


_SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def _like(module: Any, x: Tensor) -> Tensor:
    """X where the module's parameters are and in their dtype."""
    parameters = getattr(module, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return x if first is None else x.to(first)


def _encoder(model: Any) -> Any:
    """The function of prepared pictures in a model."""
    named = ("encode_image", "get_image_features")
    run = next((getattr(model, name) for name in named if hasattr(model, name)), model)
    if not callable(run):
        raise ArgumentError(
            f"model={model!r} is no image encoder: give one of transformers' CLIP models, an "
            "object with encode_image(), a function of pictures, a folder or a hub id."
        )

    def encode(pixels: Tensor) -> Any:
        out = run(pixels)
        for name in ("image_embeds", "pooler_output"):
            if isinstance(found := getattr(out, name, None), Tensor):
                return found
        return out

    return encode


def _size(model: Any) -> int:
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    found = getattr(config, "image_size", None)
    if found is None:
        found = getattr(getattr(model, "visual", None), "input_resolution", None)
    return SIZE if found is None else int(found)


def _loaded(name: str, options: dict[str, Any]) -> Any:
    with checks.host("transformers", "loads image encoders", "diffusers"):
        from transformers import CLIPVisionModelWithProjection
    try:
        model = CLIPVisionModelWithProjection.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"model={name!r} could not be loaded: {error} Give a local folder, a hub id that can "
            "be reached, or a loaded CLIPVisionModelWithProjection."
        ) from error
    return model.eval().requires_grad_(False)
