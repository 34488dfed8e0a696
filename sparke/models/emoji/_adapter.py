"""The emoji model behind the face of diffusers' networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparke.models.emoji._levels import Levels
from sparke.models.emoji.model import EmojiModel

__all__ = ["EmojiDenoiser"]


class EmojiDenoiser(nn.Module):
    """The model, called as diffusers' networks are and answering what the scheduler reads.

    The sample alpha x0 + sigma eps is brought to the model's units, x0 + (sigma / alpha) eps, and
    the denoised estimate back to epsilon, v, velocity or itself, whichever the scheduler reads.
    Above ``sigma_max``, at the pure noise where flows begin, the model is asked at ``sigma_max``.

    Args:
        model: denoises.
    """

    levels: Levels

    def __init__(self, model: EmojiModel) -> None:
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.basis.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.model.basis.dtype

    def follow(self, scheduler: Any) -> Levels:
        """Read times and answer as this scheduler, with its present time table, understands them.

        Raises:
            UnsupportedTarget: it cannot run a model of this kind.
            ArgumentError: it expects another prediction, or clips what it reads.
        """
        self.levels = Levels(scheduler)
        return self.levels

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Evaluate the model.

        Args:
            sample: (b, 320), as the scheduler's ``scale_model_input`` returned it.
            timestep: a number, () or (b,), of the scheduler followed.
            encoder_hidden_states: (b, c) prompt embeddings; None is the empty prompt.
            return_dict: whether to return an output with ``sample``, else a tuple.

        Returns:
            (b, 320) model output.
        """
        times = torch.as_tensor(timestep).reshape(-1).tolist()
        found = [self.levels(time) for time in times]
        wide = torch.promote_types(sample.dtype, torch.float32)

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=wide, device=sample.device).unsqueeze(-1)

        ratios = [level.ratio(self.model.sigma_max) for level in found]
        scale = column([r / level.sigma for r, level in zip(ratios, found, strict=True)])
        noisy, sigma = sample.to(wide) * scale, column(ratios).squeeze(-1)
        denoised = self.model(noisy, sigma, cond=encoder_hidden_states)
        of_sample = column([level.of_sample for level in found])
        of_denoised = column([level.of_denoised for level in found])
        answer = (of_sample * sample + of_denoised * denoised).to(sample.dtype)
        if not return_dict:
            return (answer,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=answer)
