"""What the reader of a docstring has at hand already: the models and pictures its example uses.

Classes of diffusers whose weights would have to be downloaded are tiny ones with random weights,
under their own names; all else is what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sparke
from sparke.models import emoji
from tests.backends import tiny

__all__ = ["SETTINGS"]

Setting = Callable[[pytest.MonkeyPatch], dict[str, Any]]


class _XL:
    """``StableDiffusionXLPipeline`` in small."""

    @staticmethod
    def from_pretrained(*_: Any, **__: Any) -> Any:
        pipe = tiny.ALL["sdxl"].make()
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _wrap(_: pytest.MonkeyPatch) -> dict[str, Any]:
    import k_diffusion

    model = emoji.load()
    return {
        "sparke": sparke,
        "k_diffusion": k_diffusion,
        "StableDiffusionXLPipeline": _XL,
        "memory": sparke.memory.RingMemory(),
        "model": model,
        "embeds": model.encode(["princess"] * 2),
        "noise": model.sigma_max * torch.randn(2, *model.latent_shape),
        "sigmas": model.sigmas(4),
    }


def _callback(_: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"sparke": sparke, "pipe": emoji.pipeline(), "prompt": "princess"}


def _shared(_: pytest.MonkeyPatch) -> dict[str, Any]:
    from k_diffusion.sampling import sample_euler

    return {
        "sparke": sparke,
        "sample_euler": sample_euler,
        "RingMemory": sparke.memory.RingMemory,
        "DiversityGuider": sparke.DiversityGuider,
        "SharedMemory": sparke.guidance.SharedMemory,
    }


def _pictures(_: pytest.MonkeyPatch) -> dict[str, Any]:
    import sparke.images
    from sparke.guidance import Novelty

    folder = Path("pictures")
    folder.mkdir()
    for number, image in enumerate(emoji.pipeline()("princess", num_images_per_prompt=2).images):
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("princess", encoding="utf-8")
    return {"sparke": sparke, "pipe": tiny.ALL["sd"].make(), "Novelty": Novelty}


def _blocks(_: pytest.MonkeyPatch) -> dict[str, Any]:
    from diffusers import modular_pipelines

    import sparke.backends.modular

    class StableDiffusionXLAutoBlocks(modular_pipelines.StableDiffusionXLAutoBlocks):  # type: ignore[misc]
        def init_pipeline(self, *_: Any) -> Any:
            return super().init_pipeline()

    return {
        "sparke": sparke,
        "guider": sparke.DiversityGuider(),
        "StableDiffusionXLAutoBlocks": StableDiffusionXLAutoBlocks,
    }


def _published(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    import diffusers

    kind = diffusers.StableDiffusionXLPipeline
    patch.setattr(kind, "from_pretrained", _XL.from_pretrained)
    patch.setattr(kind, "to", lambda self, *_: self)
    return {}


SETTINGS: dict[tuple[str, str], Setting] = {
    ("sparke/_wrap.py", "wrap"): _wrap,
    ("sparke/_callback.py", "callback"): _callback,
    ("sparke/guidance/_shared.py", "SharedMemory"): _shared,
    ("sparke/images.py", "reference_images"): _pictures,
    ("sparke/images.py", "image_features"): _pictures,
    ("sparke/backends/modular.py", "insert"): _blocks,
    ("sparke/compat/__init__.py", "module"): _published,
}
"""By file and owner of the docstring; for others the example has to bring everything itself."""
