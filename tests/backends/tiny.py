"""Tiny pipelines of diffusers' own classes: random weights, real text encoders, no downloads.

`ALL["sd"].make()` builds one, and `pipe(**ALL["sd"].arguments(["a cat", "a dog"]))` calls it.
Every call but DiT's returns latents; `latents` takes them from whatever the pipeline returned.
Parts of one name and one shape have the same weights in every pipeline.
"""

from __future__ import annotations

import functools
import math
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

WIDTH = 32  # of every text encoder but the T5 of SD3, which holds two CLIPs side by side
SIDE = 16  # of a picture, in pixels; the latents of most have half of it
LENGTH = 64  # tokens of a prompt, where the caller chooses


def _text(prompts: Sequence[str]) -> dict[str, Any]:
    return {"prompt": list(prompts)}


def _with_image(prompts: Sequence[str]) -> dict[str, Any]:
    """One picture a prompt, to start from or to be controlled by; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return {**_text(prompts), "image": torch.rand(len(prompts), 3, SIDE, SIDE, generator=generator)}


def _with_negative(prompts: Sequence[str]) -> dict[str, Any]:
    return {**_text(prompts), "negative_prompt": ["a blur"] * len(prompts)}


def _as_classes(prompts: Sequence[str]) -> dict[str, Any]:
    """Labels in place of prompts; the thousandth of DiT means no label."""
    return {"class_labels": [zlib.crc32(prompt.encode()) % 1000 for prompt in prompts]}


@dataclass(frozen=True)
class Tiny:
    """One pipeline: how to build it and what to call it with."""

    name: str
    make: Callable[[], Any]
    call: dict[str, Any]
    prompts: Callable[[Sequence[str]], dict[str, Any]] = _text

    def arguments(self, prompts: Sequence[str], *, seed: int = 0, **changes: Any) -> dict[str, Any]:
        """Everything one call takes; lists and generator are new, since hosts change both."""
        generator = torch.Generator().manual_seed(seed)
        return {**self.call, **self.prompts(prompts), "generator": generator, **changes}


@functools.cache
def shared(name: str) -> Any:
    """A pipeline built once for all tests that leave it as they found it."""
    return ALL[name].make()


def latents(output: Any) -> Tensor:
    """The samples of an output, whatever the pipeline wrapped them in.

    DiT has no way to hand out latents: its samples are pictures, decoded and clamped.
    """
    for name in ("images", "frames"):
        output = getattr(output, name, output)
    if isinstance(output, tuple):
        output = output[0]
    return torch.as_tensor(output)


def with_scheduler(pipe: Any, name: str, **changes: Any) -> Any:
    """The same pipeline, now with diffusers' scheduler of this name."""
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changes)
    return pipe


# --- weights


def randomise(model: nn.Module) -> None:
    """Draws every weight anew so that activations keep the scale of one.

    diffusers zeroes the last layer of several blocks, which would hide the prompt, and leaves
    padding tokens uninitialised.
    """
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            noise = torch.randn_like(weight)
            if isinstance(module, nn.Embedding):
                drawn = noise
            elif weight.dim() < 2:
                drawn = 0.1 * noise + float(name == "weight")  # of a norm
            else:
                drawn = noise / math.sqrt(weight[0].numel())
            weight.data.copy_(drawn)


def _quiet(blocks: Any) -> None:
    """No progress bars; modular pipelines pass that on to their outermost blocks only."""
    if hasattr(blocks, "set_progress_bar_config"):
        blocks.set_progress_bar_config(disable=True)
    for block in getattr(blocks, "sub_blocks", {}).values():
        _quiet(block)


def _finish(pipe: Any) -> Any:
    """Random weights, no dropout, no progress bars."""
    for name, model in pipe.components.items():
        if isinstance(model, nn.Module):
            torch.manual_seed(zlib.crc32(name.encode()))  # so that pipelines share weights
            randomise(model)
            if isinstance(model, diffusers.ControlNetModel):
                # Five convolutions in a row leave little of the picture.
                model.controlnet_cond_embedding.conv_out.weight.data.mul_(8)
            model.eval()  # built from a config, they are in training mode
    _quiet(pipe)
    _quiet(getattr(pipe, "_blocks", None))
    return pipe


def _repeatable(build: Callable[[], Any]) -> Callable[[], Any]:
    """The same weights at every call; the caller's random numbers are left alone."""

    @functools.wraps(build)
    def make() -> Any:
        with torch.random.fork_rng(devices=[]):
            return _finish(build())

    return make


# --- text


def _clip_tokenizer() -> Any:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _clip(*, projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def _t5_tokenizer() -> Any:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits, *",.!?'-"]
    vocab = [(piece, -float(i > 2)) for i, piece in enumerate(pieces)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=LENGTH)


def _qwen_tokenizer() -> Any:
    marks = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    vocab = {word: i for i, word in enumerate((*sorted(ByteLevel.alphabet()), *marks))}
    template = (
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks[:2])})
    return tokenizer


_QWEN: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _qwen3() -> Any:
    return transformers.Qwen3Model(transformers.Qwen3Config(**_QWEN, head_dim=8))


def _qwen_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_QWEN, "rope_parameters": rope}, vision_config=vision
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _t5(kind: str = "T5", *, width: int = WIDTH) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=80, d_model=width, d_kv=8, d_ff=width, num_layers=2, num_heads=4
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


# --- the families


def _vae(**config: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIDE,
        **config,
    )


_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_UNET: dict[str, Any] = {
    "sample_size": SIDE // 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def _sd_parts() -> dict[str, Any]:
    return {
        "unet": diffusers.UNet2DConditionModel(
            **_UNET, cross_attention_dim=WIDTH, attention_head_dim=2
        ),
        "vae": _vae(),
        "text_encoder": _clip(),
        "tokenizer": _clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        "scheduler": diffusers.DDIMScheduler(
            **_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
    }


def _sdxl_parts() -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(
        **_UNET,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )
    return {
        "unet": unet,
        "vae": _vae(),
        "text_encoder": _clip(),
        "text_encoder_2": _clip(projection=True),
        "tokenizer": _clip_tokenizer(),
        "tokenizer_2": _clip_tokenizer(),
        "scheduler": diffusers.EulerDiscreteScheduler(**_NOISE, steps_offset=1),
    }


def _controlnet(unet: Any) -> Any:
    return diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))


@_repeatable
def _sd() -> Any:
    return diffusers.StableDiffusionPipeline(**_sd_parts())


@_repeatable
def _sd_v() -> Any:
    pipe = diffusers.StableDiffusionPipeline(**_sd_parts())
    return with_scheduler(pipe, "DDIMScheduler", prediction_type="v_prediction")


@_repeatable
def _sd_img2img() -> Any:
    return diffusers.StableDiffusionImg2ImgPipeline(**_sd_parts())


@_repeatable
def _sd_controlnet() -> Any:
    parts = _sd_parts()
    return diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=_controlnet(parts["unet"])
    )


@_repeatable
def _lcm() -> Any:
    unet = diffusers.UNet2DConditionModel(
        **_UNET, cross_attention_dim=WIDTH, attention_head_dim=2, time_cond_proj_dim=8
    )
    scheduler = diffusers.LCMScheduler(**_NOISE, clip_sample=False, set_alpha_to_one=True)
    return diffusers.LatentConsistencyModelPipeline(
        **{**_sd_parts(), "unet": unet, "scheduler": scheduler}
    )


@_repeatable
def _sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(**_sdxl_parts(), add_watermarker=False)


@_repeatable
def _sdxl_controlnet() -> Any:
    parts = _sdxl_parts()
    return diffusers.StableDiffusionXLControlNetPipeline(
        **parts, controlnet=_controlnet(parts["unet"]), add_watermarker=False
    )


@_repeatable
def _sdxl_modular() -> Any:
    pipe = diffusers.modular_pipelines.StableDiffusionXLAutoBlocks().init_pipeline()
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=5.0)
    pipe.update_components(**_sdxl_parts(), guider=guider)
    return pipe


@_repeatable
def _pixart_sigma() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        cross_attention_dim=24,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,  # the second half, a variance, goes unused
        num_layers=2,
        sample_size=SIDE // 2,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer,
        vae=_vae(),
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(**_NOISE),
    )


@_repeatable
def _dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=SIDE // 2,
    )
    return diffusers.DiTPipeline(
        transformer=transformer,
        vae=_vae(),
        scheduler=diffusers.DDIMScheduler(**_NOISE, clip_sample=False),
    )


@_repeatable
def _sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=SIDE // 2,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_vae(shift_factor=0.1),
        text_encoder=_clip(projection=True),
        text_encoder_2=_clip(projection=True),
        text_encoder_3=_t5(width=2 * WIDTH),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        tokenizer_3=_t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@_repeatable
def _flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        vae=_vae(shift_factor=0.1),
        text_encoder=_clip(),
        text_encoder_2=_t5(),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


@_repeatable
def _qwen() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    tokenizer = _qwen_tokenizer()
    pipe = diffusers.QwenImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=_qwen_vl(),
        tokenizer=tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    # The template drops its first 34 tokens, a number that fits the words of the real tokenizer.
    start = "<|im_start|>user\n"
    pipe.prompt_template_encode = f"{start}{{}}<|im_end|>\n"
    pipe.prompt_template_encode_start_idx = len(tokenizer(start).input_ids)
    return pipe


@_repeatable
def _zimage() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[512, 32, 32],
    )
    return diffusers.ZImagePipeline(
        transformer=transformer,
        vae=_vae(shift_factor=0.1),
        text_encoder=_qwen3(),
        tokenizer=_qwen_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@_repeatable
def _wan() -> Any:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=_t5("UMT5"),
        tokenizer=_t5_tokenizer(),
        scheduler=scheduler,
    )


@_repeatable
def _kandinsky3() -> Any:
    unet = diffusers.Kandinsky3UNet(
        time_embedding_dim=16,
        groups=2,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(8, 16, 16, 16),
        cross_attention_dim=16,
        encoder_hid_dim=WIDTH,
    )
    movq = diffusers.VQModel(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=2,
    )
    return diffusers.Kandinsky3Pipeline(
        unet=unet,
        movq=movq,
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
        scheduler=diffusers.DDPMScheduler(**_NOISE, clip_sample=False),
    )


_CALL: dict[str, Any] = {
    "height": SIDE,
    "width": SIDE,
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "output_type": "latent",
}
_LONG = {**_CALL, "max_sequence_length": LENGTH}
_BIG = {**_LONG, "height": 2 * SIDE, "width": 2 * SIDE}


def _without(call: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return {**{name: value for name, value in call.items() if name not in names}, **more}


_IMG2IMG_CALL = _without(_CALL, "height", "width", strength=0.8)
_MODULAR_CALL = _without(_CALL, "guidance_scale", output="images")  # the guider has the scale
_PIXART_CALL = {**_LONG, "use_resolution_binning": False, "clean_caption": False}
_DIT_CALL = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "pt"}
_QWEN_CALL = _without(_BIG, "guidance_scale", true_cfg_scale=5.0)
ALL = {
    tiny.name: tiny
    for tiny in (
        Tiny("sd", _sd, _CALL),
        Tiny("sd-v", _sd_v, _CALL),
        Tiny("sd-img2img", _sd_img2img, _IMG2IMG_CALL, _with_image),
        Tiny("sd-controlnet", _sd_controlnet, _CALL, _with_image),
        Tiny("lcm", _lcm, _CALL),
        Tiny("sdxl", _sdxl, _CALL),
        Tiny("sdxl-controlnet", _sdxl_controlnet, _CALL, _with_image),
        Tiny("sdxl-modular", _sdxl_modular, _MODULAR_CALL),
        Tiny("pixart-sigma", _pixart_sigma, _PIXART_CALL),
        Tiny("dit", _dit, _DIT_CALL, _as_classes),
        Tiny("sd3", _sd3, _LONG),
        Tiny("flux", _flux, _LONG),
        Tiny("qwen", _qwen, _QWEN_CALL, _with_negative),
        Tiny("zimage", _zimage, {**_LONG, "max_sequence_length": 96}),
        Tiny("wan", _wan, {**_BIG, "num_frames": 5}),
        Tiny("kandinsky3", _kandinsky3, {**_CALL, "height": 64, "width": 64}),
    )
}
