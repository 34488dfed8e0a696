"""The class of the emoji model's pipeline."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from sparke.errors import ArgumentError, ShapeError
from sparke.models.emoji._adapter import EmojiDenoiser
from sparke.models.emoji._inputs import check_offered, check_prompts
from sparke.models.emoji.model import EmojiModel

__all__ = ["Emoji", "pipeline_class"]

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@functools.cache
def pipeline_class() -> type[Emoji]:
    """The class EmojiPipeline: `Emoji`, and a ``diffusers.DiffusionPipeline``."""
    from diffusers import DiffusionPipeline

    class EmojiPipeline(Emoji, DiffusionPipeline):  # type: ignore[misc]
        __doc__ = Emoji.__doc__

    return EmojiPipeline


class Emoji:
    """Draws 32x32 emoji from prompts; made by ``sparke.models.emoji.pipeline``.

    Latents are (b, 320), without further structure. ``save_pretrained`` and ``from_pretrained`` are
    not supported.

    Args:
        transformer: the model; not one really, but hooks look for a denoiser under this name.
        scheduler: takes the steps.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
    ]

    reference_prompts = (
        "cat face",
        "woman singer",
        "flexed biceps",
        "airplane",
        "alarm clock",
        "mushroom",
        "guitar",
        "castle",
        "rainbow",
        "hamburger",
        "robot",
        "umbrella",
        "mermaid",
        "key",
        "whale",
        "sunflower",
    )
    """Unrelated prompts; guidance compares prompts as seen from the mean of their embeddings."""

    # What diffusers' pipelines bring along.
    transformer: Any
    scheduler: Any
    register_modules: Callable[..., None]
    progress_bar: Callable[..., Any]
    numpy_to_pil: Callable[..., Any]
    maybe_free_model_hooks: Callable[[], None]
    _execution_device: torch.device

    def __init__(self, transformer: EmojiDenoiser, scheduler: Any) -> None:
        super().__init__()
        transformer.follow(scheduler)
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def sigma_data(self) -> float:
        """Root mean square of the data's standard deviation over the latent dimensions."""
        return self._model.sigma_data

    @property
    def guidance_scale(self) -> float:
        """Of the present or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether that call evaluates the negative prompt too."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Times in its table, one or two a step."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked, by setting ``_interrupt``, to leave the remaining steps out."""
        return self._interrupt

    @property
    def _model(self) -> EmojiModel:
        model: EmojiModel = self.transformer.model
        return model

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed prompts, each repeated for its images.

        Returns:
            (b, c) embeddings of the prompts, and of the negative ones or None without guidance.

        Raises:
            UnknownWords: the model does not know a word of a prompt.
            ArgumentError: there are not as many negative prompts as prompts.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self._model.encode(
                [prompt] if isinstance(prompt, str) else prompt or []
            )
        rows = len(prompt_embeds)
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            texts = negative_prompt or ""
            texts = [texts] * rows if isinstance(texts, str) else texts
            if len(texts) != rows:
                raise ArgumentError(
                    f"negative_prompt must be one string or as many as prompts ({rows}); "
                    f"got {len(texts)}."
                )
            negative_prompt_embeds = self._model.encode(texts)

        def repeated(embeds: Tensor) -> Tensor:
            moved = embeds.to(device, self.transformer.dtype)
            return moved.repeat_interleave(num_images_per_prompt, 0)

        if not do_classifier_free_guidance or negative_prompt_embeds is None:
            return repeated(prompt_embeds), None
        return repeated(prompt_embeds), repeated(negative_prompt_embeds)

    def prepare_latents(
        self,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """(b, 320) noise at the first level of the scheduler, drawn or made of unit noise given."""
        from diffusers.utils.torch_utils import randn_tensor

        shape = (batch_size, *self._model.latent_shape)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ArgumentError(
                f"generator must be one or a list of {batch_size}, one for each image; got a list "
                f"of {len(generator)}."
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ShapeError(f"latents must have shape {shape}; got {tuple(latents.shape)}.")
        first = getattr(self.scheduler, "init_noise_sigma", None)
        if first is None:  # flow matching: beside the noise there is a share of the signal
            first = self.transformer.levels(float(self.scheduler.timesteps[0])).sigma
        scaled: Tensor = latents.to(device, dtype) * first
        return scaled

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 6.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> Any:
        """Draw pictures.

        Args:
            prompt: names from ``EmojiModel.prompts``, with ``style:`` and ``tone:`` words.
            num_inference_steps: steps of the scheduler.
            guidance_scale: w of classifier-free guidance (arXiv 2207.12598); none at 1 or below.
                The default is high, as people set it: there the modes of a prompt collapse.
            negative_prompt: what to guide away from; nothing in particular if None.
            num_images_per_prompt: pictures of each prompt; those of one prompt come together.
            eta: of DDIM (arXiv 2010.02502), for schedulers that take it.
            generator: draws the noise; one, or one for each picture.
            latents: (b, 320) unit noise to begin with.
            prompt_embeds: (p, c) in place of `prompt`.
            negative_prompt_embeds: (p, c) in place of `negative_prompt`.
            output_type: "pil", "np" for (b, 32, 32, 3) and "pt" for (b, 3, 32, 32), both in [0, 1],
                or "latent" for (b, 320).
            return_dict: whether to return an ``ImagePipelineOutput``, else a tuple.
            callback_on_step_end: called after each step with the pipeline, the step's index, its
                time and a dictionary of tensors; returns those of them it replaces. Under guidance
                ``prompt_embeds`` has 2b rows, the negative ones first.
            callback_on_step_end_tensor_inputs: names of these tensors; ``["latents"]`` if None.

        Raises:
            UnknownWords: the model does not know a word of a prompt.
            ArgumentError: an argument has a value that is not offered.
            ShapeError: a tensor has the wrong shape.
        """
        wanted = callback_on_step_end_tensor_inputs or ["latents"]
        check_prompts(
            self._model.null_embeds(1).shape[1],
            {"prompt": prompt, "negative_prompt": negative_prompt},
            {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds},
        )
        check_offered(
            "callback_on_step_end_tensor_inputs", wanted, among=self._callback_tensor_inputs
        )
        check_offered("output_type", [output_type], among=_OUTPUT_TYPES)
        for name, count in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if count < 1:
                raise ArgumentError(f"{name} must be at least 1; got {count}.")
        self._guidance_scale, self._interrupt = float(guidance_scale), False
        device, guided = self._execution_device, self.do_classifier_free_guidance
        embeds, avoided = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            guided,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        batch = len(embeds)
        embeds = embeds if avoided is None else torch.cat([avoided, embeds])
        timesteps = self._set_timesteps(num_inference_steps, device)
        self._num_timesteps = len(timesteps)
        x = self.prepare_latents(batch, self.transformer.dtype, device, generator, latents)
        takes = inspect.signature(self.scheduler.step).parameters
        extra = {"eta": eta, "generator": generator}
        extra = {name: value for name, value in extra.items() if name in takes}
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                entering = torch.cat([x, x]) if guided else x
                if hasattr(self.scheduler, "scale_model_input"):
                    entering = self.scheduler.scale_model_input(entering, t)
                (output,) = self.transformer(
                    entering, t, encoder_hidden_states=embeds, return_dict=False
                )
                if guided:
                    away, toward = output.chunk(2)
                    output = away + self.guidance_scale * (toward - away)
                x = self.scheduler.step(output, t, x, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    held = {
                        "latents": x,
                        "prompt_embeds": embeds,
                        "negative_prompt_embeds": avoided,
                    }
                    shown = {name: held[name] for name in wanted}
                    held |= callback_on_step_end(self, i, t, shown)
                    x, embeds = held["latents"], held["prompt_embeds"]
                progress.update()
        images = self._finished(x, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        from diffusers import ImagePipelineOutput

        return ImagePipelineOutput(images=images)

    def _set_timesteps(self, steps: int, device: torch.device) -> Tensor:
        """Set the scheduler's times; flows get the model's own levels, as sigma / (1 + sigma)."""
        levels = self.transformer.follow(self.scheduler)
        takes = inspect.signature(self.scheduler.set_timesteps).parameters
        if levels.is_flow and "sigmas" in takes:
            sigmas = self._model.sigmas(steps)[:-1].double().cpu()
            flow = (sigmas / (1 + sigmas)).tolist()
            self.scheduler.set_timesteps(sigmas=flow, num_inference_steps=steps, device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)
        self.transformer.follow(self.scheduler)
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    def _finished(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = (self._model.decode(latents).float() + 1) / 2
        if output_type == "pt":
            return images
        pixels = rearrange(images, "b c h w -> b h w c").cpu().numpy()
        return pixels if output_type == "np" else self.numpy_to_pil(pixels)
