"""The calls of SPARKE's published pipelines (arXiv 2506.10173), run by sparke.

```python
from sparke.compat import get_diffusion_pipeline

pipe = get_diffusion_pipeline("sdxl").to("cuda")
image = pipe(
    "a photo of a man", algorithm="cond-rke", criteria_guidance_scale=0.03, guidance_freq=10
).images[0]
```

For scripts that exist. New code says [wrap][sparke._wrap.wrap].
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sparke.compat._history import RKEGuidedSampling as RKEGuidedSampling
from sparke.compat._hosts import pipeline
from sparke.compat._published import published

__all__ = ["RKEGuidedSampling", "get_diffusion_pipeline"]


def get_diffusion_pipeline(
    name: str = "sdv2.1",
    model: str | os.PathLike[str] | Any = None,
    *,
    exact: bool = False,
    prompt_encoder: Callable[[list[str]], Any] | None = None,
    **pipeline_options: Any,
) -> Any:
    """A pipeline of diffusers whose call also takes the keywords of SPARKE's published pipelines.

    Without strengths (`criteria_guidance_scale`, `guidance_freq`, `sigma_image`) a call is guided
    as [wrap][sparke._wrap.wrap] does by default. With any of them the published update runs: every
    ``guidance_freq``-th step the latents move by ``criteria_guidance_scale`` times their norm, away
    from earlier samples, both L2-normalised. ``criteria=None`` or ``criteria_guidance_scale=0``
    leaves a call bare. Every keyword, and where sparke differs, is in a table on the page "Calls of
    the published pipelines".

    A folder or an id is loaded by diffusers, in the dtype and on the device `pipeline_options` say;
    the published function always moved to CUDA in float16.

    Args:
        name: ``sdv1.5``, ``sdv2.1``, ``sdxl``, ``controlnet_pose_sdv1.5``,
            ``controlnet_pose_sdxl``, ``pixart-sigma``, ``kandinsky-3`` or ``dit-xl-2``.
        model: a loaded pipeline of that kind, a local folder, or a hub id; the usual public one,
            downloaded by diffusers where it is not yet, if None.
        exact: run the published update always, with what their code does and their paper does not
            say: the Gaussian kernel unsquared for longer histories, history written only when a
            guided step meets timestep 20, 1 or 0, prompts compared from the origin.
        prompt_encoder: list of strings -> (n, c) embeddings to compare prompts by; the pipeline's
            own text encoder if None. Theirs is CLIP ViT-B/32.
        **pipeline_options: for diffusers' ``from_pretrained``, e.g. ``torch_dtype``.

    Returns:
        The pipeline, of its own class and with its own attributes. Further: ``memory``, which calls
        fill, and ``reset()``, which empties it. Its call raises ArgumentError, before anything
        runs, for a keyword that nobody takes or a value that has no meaning here.

    Raises:
        UnknownName: no such name; near matches are in the message.
        MissingHost: diffusers is not installed.
        ArgumentError: the model cannot be loaded or is of another kind.
    """
    return published(pipeline(name, model, pipeline_options), exact, prompt_encoder)
