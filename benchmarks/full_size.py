"""UNets of full size with random weights, in pipelines without text encoders and VAE."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
UNETS: dict[str, dict[str, Any]] = {
    "sd1.5": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
    },
}
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def pipeline(model: str, device: str, dtype: torch.dtype) -> Any:
    """A pipeline of that UNet with weights that keep activations finite, and nothing else."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[model])
    torch.nn.Module.to(unet, dtype)
    unet.to_empty(device=device).requires_grad_(False).eval()
    # Drawing every weight would take longer than the benchmark.
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, weight in unet.named_parameters():
        if weight.ndim == 1:
            weight.fill_(float(name.endswith("weight")))
            continue
        for part in weight.view(-1).split(len(block)):
            torch.mul(block[: len(part)], weight[0].numel() ** -0.5, out=part)
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if model == "sdxl":
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        pipe = StableDiffusionXLPipeline(
            unet=unet, scheduler=EulerDiscreteScheduler(**NOISE), **parts
        )
    else:
        parts |= {"safety_checker": None, "feature_extractor": None}
        scheduler = DPMSolverMultistepScheduler(**NOISE)
        pipe = StableDiffusionPipeline(
            unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
