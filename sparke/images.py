"""Pictures in files as rows of features: for guiders, and for metrics."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparke import checks
from sparke.backends import _images, _pictures
from sparke.errors import ArgumentError, ShapeError
from sparke.features.encoders import ImageEncoder, image_encoder
from sparke.protocols import Features

__all__ = ["image_features", "reference_images"]

READERS = 4
"""Threads that decode pictures."""


def reference_images(
    source: _pictures.Source,
    pipeline: Any = None,
    *,
    captions: _pictures.Captions = "auto",
    height: int | None = None,
    width: int | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
    prompt_encoder: Callable[[list[str]], Any] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 8,
    progress: bool = True,
    **encode_options: Any,
) -> Features:
    """Pictures as clean latents of a pipeline of diffusers, with their captions as prompts.

    Each picture is turned as its EXIF data say, laid on white where it is transparent, scaled to
    cover the size, cut to its middle and encoded by the pipeline's VAE: the mean of its
    distribution, shifted, scaled and packed as the pipeline does. Captions are encoded by the
    pipeline's own ``encode_prompt`` and pooled as the prompts of a guided call are, so that the two
    can be compared. The rows lie on the CPU, in float32, in the order of the files' names.

    Known are pipelines of one AutoencoderKL or the like, Flux and QwenImage, and for pictures video
    models that draw one frame; for others give `encode`.

    Args:
        source: a folder, of which the pictures are taken by name and folders inside it are not; or
            files.
        pipeline: whose latents are wanted; None with `encode`.
        captions: one for each picture, in order or by file name; None for none. ``"auto"``: those
            of ``captions.csv`` in the folder (columns file and caption, with a line of titles or
            without), else of a ``.txt`` file beside each picture, else none.
        height: of the pictures that will be drawn; the pipeline's usual one if None.
        width: of the same.
        encode: pictures (b, 3, height, width) in [-1, 1] -> (b, ...) latents, in place of the VAE.
        prompt_encoder: list of strings -> (n, c), in place of the pipeline's encoding; give
            `sparke.wrap` the same.
        features: latents -> rows (b, d), where the guider compares those; flattened latents if
            None.
        batch_size: pictures encoded at once.
        progress: show the pipeline's own progress bar where there is more than one batch.
        **encode_options: arguments of the pipeline's call that reach its ``encode_prompt``, such as
            ``max_sequence_length``, where calls will not leave them at their default.

    Returns:
        Features of n rows, for [ReferenceMemory][sparke.memory.reference.ReferenceMemory],
        [Novelty][sparke.guidance.novelty.Novelty] and [CVSG][sparke.guidance.cvsg.CVSG].

    Raises:
        ArgumentError: no pictures; one that cannot be read, or whose latents are not finite, by its
            name; a caption is missing; the pipeline is of another kind; an option is unknown.
        ShapeError: `encode` or `features` returned something else than one row for each picture.
        MissingHost: Pillow is not installed.

    Example:
        ```python
        import sparke.images
        from sparke.guidance import Novelty

        seen = sparke.images.reference_images("pictures", pipe)
        pipe = sparke.wrap(pipe, guider=Novelty(seen))
        ```
    """
    if pipeline is None and encode is None:
        raise ArgumentError("pipeline or encode must be given; got neither.")
    checks.whole("batch_size", batch_size)
    if encode is None:
        _images.check_vae(pipeline)
    _images.check_options(pipeline, encode_options)
    files = _pictures.files_of(source)
    told = _pictures.captions_of(files, source, captions)
    size = _images.size_of(pipeline, height, width, own=encode is None)
    bar = _bar(pipeline, len(files), shown=progress and len(files) > batch_size)
    with torch.no_grad(), bar as shown:
        rows = []
        for first in range(0, len(files), batch_size):
            part = files[first : first + batch_size]
            pictures = torch.stack([_pictures.read(file, *size) for file in part])
            latents = _images.latents_of(pipeline, pictures) if encode is None else encode(pictures)
            found = latents.flatten(1) if features is None else features(latents)
            rows.append(_checked(found, [file.name for file in part]))
            if shown is not None:
                shown.update(len(part))
        cond = None
        if told is not None:
            cond = _images.caption_rows(pipeline, told, prompt_encoder, encode_options)
    _freed(pipeline)
    return Features(torch.cat(rows), cond)


def image_features(
    source: _pictures.Source,
    encoder: str | ImageEncoder | Callable[[Tensor], Tensor],
    *,
    image_size: int | None = None,
    batch_size: int = 32,
    download: bool = False,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Pictures in files as rows for the measures of `sparke.metrics`, by any encoder.

    Pictures are turned as their EXIF data say and laid on white where they are transparent, then
    prepared as the encoder wants them. One batch of pictures is in memory at a time.

    Args:
        source: a folder, of which the pictures are taken by name and folders inside it are not; or
            files.
        encoder: a name, such as ``"timm:FOLDER"``, or any torch callable; see
            [encoders][sparke.features.encoders].
        image_size: side in pixels of the pictures that a callable gets.
        batch_size: pictures encoded at once.
        download: whether weights that are not on disk may be fetched.
        device: where the encoder computes.
        progress: called with the pictures done and all of them, after each batch.

    Returns:
        (n, d) rows, float32, on the CPU, in the order of the files' names.

    Raises:
        ArgumentError: no pictures; one that cannot be read, by its name; an encoder that cannot be
            loaded, fails, or returns numbers that are not finite.
        ShapeError: the encoder returned something else than one row for each picture.
        MissingHost: Pillow, or a package that the encoder is from, is not installed.

    Example:
        ```python
        import sparke.images

        rows = sparke.images.image_features("pictures", "pixels")
        print(sparke.metrics.vendi(rows))
        ```
    """
    checks.whole("batch_size", batch_size)
    files = _pictures.files_of(source)
    chosen = image_encoder(encoder, image_size=image_size, download=download, device=device)
    rows: list[Tensor] = []
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(files), batch_size):
            part = files[first : first + batch_size]
            rows.append(chosen(torch.stack(list(pool.map(lambda f: _prepared(f, chosen), part)))))
            if rows[-1].shape[1] != rows[0].shape[1]:
                raise ShapeError(
                    f"the encoder {chosen.name!r} returned rows of width {rows[0].shape[1]} for "
                    f"one batch and {rows[-1].shape[1]} for another; all must be alike."
                )
            if progress is not None:
                progress(first + len(part), len(files))
    return torch.cat(rows)


def _prepared(file: Path, encoder: ImageEncoder) -> Tensor:
    """(3, h, w), as the encoder wants it."""
    picture = _pictures.opened(file)
    if encoder.prepare is not None:
        return encoder.prepare(picture)
    if encoder.image_size is None:
        raise ArgumentError(f"the encoder {encoder.name!r} has neither prepare nor image_size.")
    pixels = _pictures.covering(picture, *encoder.image_size) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _bar(pipeline: Any, total: int, *, shown: bool) -> Any:
    bar = getattr(pipeline, "progress_bar", None)
    return bar(total=total) if shown and callable(bar) else nullcontext()


def _checked(rows: Tensor, names: list[str]) -> Tensor:
    if rows.ndim != 2 or len(rows) != len(names):
        raise ShapeError(
            f"encode and features must give one row for each of {len(names)} pictures, got "
            f"{tuple(rows.shape)}."
        )
    good = torch.isfinite(rows).all(1).tolist()
    for name, is_good in zip(names, good, strict=True):
        if not is_good:
            raise ArgumentError(
                f"the latents of {name!r} are not finite. An encoder in half precision may "
                "overflow; give it in float32 or bfloat16, pipe.vae.to(torch.float32)."
            )
    return rows.float().cpu()


def _freed(pipeline: Any) -> None:
    """Let a pipeline that offloads its models do so, as it does after a call."""
    free = getattr(pipeline, "maybe_free_model_hooks", None)
    if callable(free):
        free()
