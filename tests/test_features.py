"""Ready-made features: what CLIP's own preparation and encoder say, with a true gradient."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import sparke
from sparke.errors import ArgumentError, MissingHost, ShapeError
from sparke.features import ClipFeatures
from tests.backends import tiny

SIZE = 32
PROMPTS = ["a cat", "a cat"]


def vision(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
    )
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    tiny.randomise(model)
    return model


def decoder(**config: Any) -> Any:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        **config,
    )
    tiny.randomise(vae)
    return vae.eval()


@pytest.fixture
def clip() -> ClipFeatures:
    return ClipFeatures(vision(), decoder())


@pytest.mark.parametrize("shape", [(40, 56), (56, 40), (16, 16), (SIZE, SIZE)])
def test_pictures_are_prepared_as_the_model_s_own_processor_does(shape: tuple[int, int]) -> None:
    # Away from black and white, where the processor clips what cubic interpolation overshoots.
    pixels = np.random.default_rng(0).integers(90, 160, (*shape, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    seen: list[Tensor] = []

    def encode(prepared: Tensor) -> Tensor:
        seen.append(prepared)
        return prepared.flatten(1)

    clip = ClipFeatures(encode, decoder(), image_size=SIZE)
    array = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float()
    clip.of_images(array / 127.5 - 1)
    assert seen[0].shape == expected.shape
    # It rounds to 8 bits, a step of which is 1/255/std.
    assert torch.allclose(seen[0], expected, atol=0.03)


def test_rows_are_the_encoder_s_at_unit_length(clip: ClipFeatures) -> None:
    images = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    rows = clip.of_images(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    with torch.no_grad():
        expected = clip.model(pixel_values=((images + 1) / 2 - mean) / std).image_embeds
    assert rows.shape == (3, 12)
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.allclose(rows, expected / expected.norm(dim=1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.5},
        {"scaling_factor": 0.5, "shift_factor": 0.25},
        {
            "scaling_factor": 0.5,
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [1.0, 2.0, 0.5, 1.5],
        },
    ],
)
def test_the_scale_of_latents_is_undone(config: dict[str, Any]) -> None:
    vae = decoder(**config)
    clip = ClipFeatures(vision(), vae)
    z = torch.randn(2, 4, 8, 8)
    if "latents_mean" in config:
        mean, std = (
            torch.tensor(config[n]).view(1, 4, 1, 1) for n in ("latents_mean", "latents_std")
        )
        scaled = (z - mean) * 0.5 / std
    else:
        scaled = (z - config.get("shift_factor", 0.0)) * 0.5
    with torch.no_grad():
        assert torch.allclose(clip.decode(scaled), vae.decode(z).sample, atol=1e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    clip = ClipFeatures(vision().double(), decoder().double())
    # Rows come back in float32, so the differences are taken before that.
    torch.manual_seed(2)
    z = torch.randn(1, 4, 4, 4)
    weight = torch.randn(12)

    def value(latents: Tensor) -> Tensor:
        return (clip(latents) @ weight).sum()

    leaf = z.clone().requires_grad_()
    (found,) = torch.autograd.grad(value(leaf), leaf)
    assert found.abs().max() > 1e-3
    for _ in range(3):
        direction = torch.randn_like(z)
        h = 3e-3
        with torch.no_grad():
            numeric = (value(z + h * direction) - value(z - h * direction)) / (2 * h)
        assert float(numeric) == pytest.approx(float((found * direction).sum()), rel=0.03, abs=1e-3)


def test_other_encoders_serve() -> None:
    clip = vision()
    pictures = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    expected = ClipFeatures(clip, decoder()).of_images(pictures)

    class Outer(nn.Module):
        visual = SimpleNamespace(input_resolution=SIZE)

        def encode_image(self, pixels: Tensor) -> Tensor:
            found: Tensor = clip(pixels).image_embeds
            return found

    def function(pixels: Tensor) -> Tensor:
        found: Tensor = clip(pixels).image_embeds
        return found

    assert torch.equal(ClipFeatures(Outer(), decoder()).of_images(pictures), expected)
    by_function = ClipFeatures(function, decoder(), image_size=SIZE)
    assert torch.equal(by_function.of_images(pictures), expected)
    assert ClipFeatures(function, decoder()).image_size == 224


def test_a_whole_clip_model_serves() -> None:
    part = vision()
    text = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config=part.config.to_dict(), projection_dim=12
    )
    whole = transformers.CLIPModel(config).eval()
    whole.vision_model.load_state_dict(part.vision_model.state_dict())
    whole.visual_projection.load_state_dict(part.visual_projection.state_dict())
    pictures = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    found = ClipFeatures(whole, decoder()).of_images(pictures)
    assert torch.allclose(found, ClipFeatures(part, decoder()).of_images(pictures), atol=1e-6)


def test_a_folder_is_loaded(tmp_path: Path) -> None:
    model = vision()
    model.save_pretrained(tmp_path)
    z = torch.randn(2, 4, 8, 8)
    loaded = ClipFeatures(tmp_path, decoder(), local_files_only=True)
    with torch.no_grad():
        assert torch.allclose(loaded(z), ClipFeatures(model, decoder())(z), atol=1e-6)
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"nowhere.*loaded.*hub id"):
        ClipFeatures(str(tmp_path / "nowhere"), decoder(), local_files_only=True)
    with pytest.raises(ArgumentError, match="revision would go nowhere"):
        ClipFeatures(vision(), decoder(), revision="main")
    with pytest.raises(ArgumentError, match="has no decode"):
        ClipFeatures(vision(), None)
    with pytest.raises(ArgumentError, match="no image encoder"):
        ClipFeatures(3, decoder())
    with pytest.raises(ArgumentError, match="image_size"):
        ClipFeatures(vision(), decoder(), image_size=0)
    with pytest.raises(ShapeError, match=r"b, c, h, w.*unpack"):
        ClipFeatures(vision(), decoder())(torch.zeros(1, 16, 8))
    with pytest.raises(ShapeError, match=r"\(2, width\).*\(2, 3, 224, 224\)"):
        ClipFeatures(lambda x: x, decoder()).of_images(torch.zeros(2, 3, 8, 8))


def test_transformers_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingHost, match=r"sparke\[diffusers\]"):
        ClipFeatures("some/model", decoder())


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_pipeline_is_guided_in_the_encoder_s_space(name: str) -> None:
    bare = tiny.shared(name)
    clip = ClipFeatures(vision(), bare.vae)
    memory = sparke.memory.RingMemory(8)
    pipe = sparke.wrap(bare, features=clip, memory=memory, scale=2.0)
    first = tiny.latents(pipe(**tiny.ALL[name].arguments(PROMPTS)))
    plain = tiny.latents(bare(**tiny.ALL[name].arguments(PROMPTS)))
    with torch.no_grad():
        assert torch.allclose(memory.features.x, clip(first), atol=1e-5)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, plain)
    again = tiny.latents(pipe(**tiny.ALL[name].arguments(PROMPTS)))
    assert not torch.equal(again, first)
    assert len(memory) == 4


def test_guidance_in_the_encoder_s_space_spreads_rows() -> None:
    bare = tiny.shared("sd")
    clip = ClipFeatures(vision(), bare.vae)

    def spread(scale: float) -> float:
        pipe = sparke.wrap(bare, features=clip, scale=scale, cfg_interval=None)
        pipe(**tiny.ALL["sd"].arguments(["a cat"] * 4, num_inference_steps=12))
        x = pipe.memory.features.x
        return 1 - float((x @ x.T).fill_diagonal_(0).sum() / 12)

    plain = spread(0.0)
    assert plain < spread(1.0) < spread(2.0)
    assert spread(4.0) > 1.3 * plain
