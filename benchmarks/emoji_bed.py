"""The trained model as a test bed, judged by modes and names."""

from __future__ import annotations

import torch
from torch import Tensor

import sparke
from benchmarks.bed import Bed, Figures
from sparke.models import emoji
from sparke.protocols import Guider

PROMPTS = list(emoji.EVALUATION_PROMPTS)


class EmojiBed(Bed):
    """The model that ships with sparke, and its judge."""

    def __init__(
        self, sampler: str = "sample_dpmpp_2m", weights: str | None = None, judge: str | None = None
    ) -> None:
        super().__init__(emoji.load(weights=weights), PROMPTS, sampler)
        self.judge = emoji.load_judge(weights=judge)

    def judged(self, x: Tensor, prompts: list[str]) -> Figures:
        verdict, ids = self.judge(self.model.decode(x)), self.judge.ids(prompts)
        modes = self.judge.effective_modes(verdict, ids)
        return Figures(modes, *self.judge.name_accuracy(verdict, ids))


class PipelineBed(EmojiBed):
    """The same model, judge and noise, reached through its diffusers pipeline.

    Args:
        scheduler: name of one of diffusers' schedulers.
    """

    def __init__(self, scheduler: str) -> None:
        super().__init__()
        self.pipeline = emoji.pipeline(scheduler)
        self.pipeline.set_progress_bar_config(disable=True)

    def run(
        self,
        guider: Guider | None,
        x: Tensor,
        prompts: list[str],
        cfg: float,
        steps: int,
        seed: int = 0,
    ) -> Tensor:
        pipe = self.pipeline if guider is None else sparke.wrap(self.pipeline, guider=guider)
        made: Tensor = pipe(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=cfg,
            latents=x / self.model.sigma_max,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            return_dict=False,
        )[0]
        return made
