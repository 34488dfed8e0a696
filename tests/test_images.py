"""Pictures in files as the latents of real pipelines, with captions as their prompts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import sparke
from sparke.errors import ArgumentError, ShapeError
from sparke.features import ClipFeatures
from sparke.guidance.cvsg import CVSG
from sparke.guidance.novelty import Novelty
from sparke.images import reference_images
from sparke.models import emoji
from sparke.protocols import Run, State
from tests.backends import tiny

CAPTIONS = ["a cat in the snow", "a dog in the snow", "two foxes"]
NAMED = ("sd", "sd-v", "lcm", "sdxl", "pixart-sigma", "sd3", "flux", "qwen", "zimage", "wan")
OF_ENCODER = ("max_sequence_length", "clean_caption")


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8)
    Image.fromarray(pixels, mode=None if mode == "RGB" else mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
        (tmp_path / f"{i}.txt").write_text(f"{CAPTIONS[i]}\n", encoding="utf-8")
    return tmp_path


def pixels_of(folder: Path) -> Tensor:
    """(n, 3, h, w) in [-1, 1] of pictures that need no scaling."""
    found = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(found) / 127.5 - 1).float().permute(0, 3, 1, 2)


class Spy:
    """A guider that writes down what a run looks like."""

    def begin(self, run: Run) -> None:
        self.run = run

    def __call__(self, state: State) -> Tensor:
        return torch.zeros_like(state.denoised)

    def finish(self, x: Tensor) -> None:
        self.x = x


def called(name: str, pipe: Any, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """What one call of a pipeline gave, and those of its arguments that its encoder sees."""
    frames = {"num_frames": 1} if name == "wan" else {}
    arguments = tiny.ALL[name].arguments(CAPTIONS, **frames, **changes)
    size = {side: arguments.get(side, tiny.SIDE) for side in ("height", "width")}
    return pipe(**arguments), {**size, **{k: arguments[k] for k in OF_ENCODER if k in arguments}}


@pytest.mark.parametrize("name", NAMED)
def test_rows_and_captions_are_those_a_guided_call_compares(name: str, folder: Path) -> None:
    pipe, spy = tiny.shared(name), Spy()
    _, arguments = called(name, sparke.wrap(pipe, guider=spy))
    found = reference_images(folder, pipe, **arguments)
    assert found.x.shape == (3, spy.run.shape[1:].numel())
    assert found.cond is not None
    assert spy.run.cond is not None
    assert torch.equal(found.cond, spy.run.cond)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-sigma", "sd3", "zimage", "dit"])
def test_the_pipeline_decodes_rows_to_what_its_vae_makes_of_the_pictures(
    name: str, folder: Path
) -> None:
    pipe = tiny.shared(name)
    found = reference_images(folder, pipe, captions=None, height=16, width=16)
    with torch.no_grad():
        middle = pipe.vae.encode(pixels_of(folder)).latent_dist.mean
        expected = pipe.vae.decode(middle, return_dict=False)[0]
        # Which undoes scale and shift on its own account.
        ours = ClipFeatures(nn.Flatten(), pipe.vae).decode(found.x.view(middle.shape))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_packed_rows_unpack_to_the_pictures_latents(name: str, folder: Path) -> None:
    pipe = tiny.shared(name)
    found = reference_images(folder, pipe, captions=None, height=16, width=16)
    packed = found.x.view(3, -1, 16)
    unpacked = pipe._unpack_latents(packed, 16, 16, pipe.vae_scale_factor)
    with torch.no_grad():
        pixels = pixels_of(folder)
        if name == "flux":
            expected = pipe.vae.encode(pixels).latent_dist.mean
            config = pipe.vae.config
            expected = (expected - config.shift_factor) * config.scaling_factor
        else:  # whose tiny VAE has mean 0 and standard deviation 1
            expected = pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mean
    torch.testing.assert_close(unpacked, expected)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-sigma", "dit"])
def test_without_a_size_pictures_are_as_large_as_those_the_pipeline_draws(
    name: str, folder: Path
) -> None:
    found = reference_images(folder, tiny.shared(name), captions=None)
    assert found.x.shape == (3, 4 * 8 * 8)


def test_latents_mean_and_std_are_undone(folder: Path) -> None:
    pipe = tiny.ALL["qwen"].make()
    plain = reference_images(folder, pipe, captions=None, height=16, width=16)
    pipe.vae.register_to_config(latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    moved = reference_images(folder, pipe, captions=None, height=16, width=16)
    torch.testing.assert_close(moved.x, (plain.x - 0.5) / 2)


# The pictures themselves.


def decoded(folder: Path, height: int, width: int) -> Tensor:
    """What the encoder is given."""
    seen: list[Tensor] = []

    def encode(pictures: Tensor) -> Tensor:
        seen.append(pictures)
        return pictures[:, :1]

    options: dict[str, Any] = {"captions": None, "height": height, "width": width}
    reference_images(folder, encode=encode, **options)
    return torch.cat(seen)


def test_pixels_are_in_minus_one_to_one(folder: Path) -> None:
    torch.testing.assert_close(decoded(folder, 16, 16), pixels_of(folder))


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (61, 20)])
def test_pictures_are_scaled_to_cover_and_the_middle_is_cut_out(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    width, height = size
    image = Image.new("RGB", size, "red")
    # The middle square is blue.
    left, top = (width - 20) // 2, (height - 20) // 2
    image.paste("blue", (left, top, left + 20, top + 20))
    image.save(tmp_path / "one.png")
    (seen,) = decoded(tmp_path, 10, 10)
    inner = seen[:, 2:-2, 2:-2]
    assert seen.shape == (3, 10, 10)
    blue = torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1).expand_as(inner)
    torch.testing.assert_close(inner, blue, rtol=0, atol=0.05)


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(decoded(tmp_path, 8, 8), torch.ones(1, 3, 8, 8))


def test_pictures_are_turned_as_they_say(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 2))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    (seen,) = decoded(tmp_path, 8, 8)
    assert bool((seen[:, -2:] == 1).all())
    assert bool((seen[:, :6] == -1).all())


@pytest.mark.parametrize(
    ("mode", "name"), [("L", "png"), ("P", "gif"), ("LA", "png"), ("1", "bmp"), ("CMYK", "jpg")]
)
def test_every_mode_is_read(tmp_path: Path, mode: str, name: str) -> None:
    Image.new("RGB", (8, 8), "white").convert(mode).save(tmp_path / f"one.{name}")
    assert torch.equal(decoded(tmp_path, 8, 8), torch.ones(1, 3, 8, 8))


def test_a_folder_is_read_by_name_and_files_as_they_are_given(folder: Path) -> None:
    picture(folder / "a.PNG", 7)
    (folder / ".hidden.png").write_text("not a picture")
    (folder / "notes.md").write_text("not a picture")
    (folder / "more").mkdir()
    picture(folder / "more" / "b.png", 8)
    options: dict[str, Any] = {"captions": None, "height": 16, "width": 16}
    whole = reference_images(folder, tiny.shared("sd"), **options)
    assert len(whole) == 4
    chosen = reference_images(
        [folder / "2.png", str(folder / "0.png")], tiny.shared("sd"), **options
    )
    torch.testing.assert_close(chosen.x, whole.x[[2, 0]])


def test_batches_change_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.ALL["sd"].make()
    options: dict[str, Any] = {"height": 16, "width": 16}
    whole = reference_images(folder, pipe, **options)
    single = reference_images(folder, pipe, batch_size=1, **options)
    torch.testing.assert_close(single.x, whole.x)
    assert "it/s" not in capsys.readouterr().err  # that pipeline is told to show no bars
    pipe.set_progress_bar_config(disable=False)
    reference_images(folder, pipe, **options)
    reference_images(folder, pipe, batch_size=1, progress=False, **options)
    assert "3/3" not in capsys.readouterr().err
    reference_images(folder, pipe, batch_size=1, **options)
    assert "3/3" in capsys.readouterr().err


def test_the_pipeline_is_left_as_it_was(folder: Path) -> None:
    pipe = tiny.shared("sd")
    before, state = dict(vars(pipe)), torch.get_rng_state()
    found = reference_images(folder, pipe)
    assert dict(vars(pipe)) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.x.requires_grad
    assert (found.x.dtype, found.x.device.type) == (torch.float32, "cpu")


def test_features_see_the_latents(folder: Path) -> None:
    pipe = tiny.shared("sd")
    plain = reference_images(folder, pipe, captions=None)
    pooled = reference_images(folder, pipe, captions=None, features=lambda z: z.mean((2, 3)))
    torch.testing.assert_close(pooled.x, plain.x.view(3, 4, 8, 8).mean((2, 3)))


# Captions.


def cond_of(folder: Path, captions: Any = "auto") -> Tensor | None:
    return reference_images(folder, tiny.shared("sd"), captions=captions).cond


TABLES = {
    "bare": "0.png,{0}\n1.png,{1}\n2.png,{2}\n",
    "in another order": "2.png,{2}\n\n0.png,{0}\n1.png,{1}\n",
    "titled": "file,caption\n0.png,{0}\n1.png,{1}\n2.png,{2}\n",
    "titled as elsewhere": "id,text,file_name\n7,{0},0.png\n8,{1},1.png\n9,{2},2.png\n",
    "quoted, with a mark": '\ufeff0.png,"{0}"\n1.png,"{1}"\n2.png,"{2}"\n',
    "with paths": "pictures/0.png,{0}\npictures/1.png,{1}\npictures/2.png,{2}\n",
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_captions_come_from_a_table(folder: Path, table: str) -> None:
    expected = cond_of(folder, CAPTIONS)
    for text in folder.glob("*.txt"):
        text.write_text("something else entirely")
    (folder / "captions.csv").write_text(table.format(*CAPTIONS), encoding="utf-8")
    found = cond_of(folder)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def test_captions_come_from_text_files_or_as_they_are_given(folder: Path) -> None:
    found = [
        cond_of(folder),
        cond_of(folder, CAPTIONS),
        cond_of(folder, {f"{i}.png": caption for i, caption in enumerate(CAPTIONS)}),
    ]
    assert all(f is not None and torch.equal(f, found[0]) for f in found if found[0] is not None)
    assert found[0] is not None
    assert cond_of(folder, None) is None
    for text in folder.glob("*.txt"):
        text.unlink()
    assert cond_of(folder) is None


def test_a_caption_is_encoded_once_however_many_pictures_have_it(folder: Path) -> None:
    asked: list[str] = []

    def encoder(prompts: list[str]) -> Tensor:
        asked.extend(prompts)
        return torch.tensor([[float(len(p)), 1.0] for p in prompts])

    found = reference_images(
        folder, tiny.shared("sd"), captions=["a", "bb", "a"], prompt_encoder=encoder
    )
    assert asked == ["a", "bb"]
    assert found.cond is not None
    assert found.cond.tolist() == [[1, 1], [2, 1], [1, 1]]


# What it refuses.


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: [p.unlink() for p in f.glob("*.png")], {}, "has no pictures in it"),
        (lambda f: (f / "1.png").write_text("no"), {}, r"1\.png' cannot be read as a picture"),
        (
            lambda f: (f / "1.png").write_bytes((f / "1.png").read_bytes()[:90]),
            {},
            r"1\.png' cannot be read as a picture",
        ),
        (lambda f: (f / "1.txt").unlink(), {}, r"no caption for 1\.png"),
        (lambda f: (f / "captions.csv").write_text("0.png,a\n"), {}, r"for 1\.png, 2\.png"),
        (lambda f: (f / "captions.csv").write_text("0.png\n"), {}, "needs two columns"),
        (lambda f: None, {"captions": ["a"]}, "one string for each of 3"),
        (lambda f: None, {"captions": "all"}, "captions must be"),
        (lambda f: None, {"height": 15}, "height must be a multiple of 2"),
        (lambda f: None, {"width": 0}, "width must be a multiple of 2"),
        (lambda f: None, {"batch_size": 0}, "batch_size"),
        (lambda f: None, {"max_length": 3}, "max_length is no option"),
    ],
)
def test_what_is_wrong_is_named(
    folder: Path, change: Any, options: dict[str, Any], message: str
) -> None:
    change(folder)
    with pytest.raises(ArgumentError, match=message):
        reference_images(folder, tiny.shared("sd"), **options)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    pipe = tiny.shared("sd")
    with pytest.raises(ArgumentError, match="is no folder"):
        reference_images(tmp_path / "nowhere", pipe)
    with pytest.raises(ArgumentError, match="is no file"):
        reference_images([tmp_path / "0.png"], pipe)
    with pytest.raises(ArgumentError, match="names no file"):
        reference_images([], pipe)
    with pytest.raises(ArgumentError, match="pipeline or encode"):
        reference_images(tmp_path)


def test_pipelines_of_another_kind_are_told_from_the_start(folder: Path) -> None:
    with pytest.raises(ArgumentError, match=r"Kandinsky3Pipeline has no vae.*encode="):
        reference_images(folder, tiny.shared("kandinsky3"))
    with pytest.raises(ArgumentError, match=r"DiTPipeline cannot encode captions"):
        reference_images(folder, tiny.shared("dit"))
    with pytest.raises(ArgumentError, match="height and width must be given"):
        reference_images(folder, encode=lambda pictures: pictures)

    class Otherwise(type(tiny.shared("flux"))):  # type: ignore[misc]
        @staticmethod
        def _pack_latents(latents: Tensor) -> Tensor:
            return latents

    odd = object.__new__(Otherwise)
    object.__setattr__(odd, "__dict__", vars(tiny.shared("flux")))
    with pytest.raises(ArgumentError, match="packs its latents in a way of its own"):
        reference_images(folder, odd, height=16, width=16)


def test_latents_that_are_not_finite_are_named(folder: Path) -> None:
    def encode(pictures: Tensor) -> Tensor:
        latents = pictures.clone()
        latents[1] = math.inf
        return latents

    options: dict[str, Any] = {"captions": None, "height": 16, "width": 16}
    with pytest.raises(ArgumentError, match=r"latents of '1\.png' are not finite"):
        reference_images(folder, encode=encode, **options)
    with pytest.raises(ShapeError, match="one row for each of 3 pictures"):
        reference_images(folder, encode=lambda pictures: pictures[:2], **options)


# All the way.


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_pipeline_is_guided_by_pictures(name: str, folder: Path) -> None:
    pipe = tiny.shared(name)
    bare, arguments = called(name, pipe)
    found = reference_images(folder, pipe, **arguments)
    # Random weights draw nothing like pictures: only a wide kernel finds those near.
    for guider in (Novelty(found, bandwidth=100.0), CVSG(found)):
        guided, _ = called(name, sparke.wrap(pipe, guider=guider))
        assert not torch.equal(tiny.latents(guided), tiny.latents(bare))
    for off in (Novelty(found, bandwidth=100.0, scale=0), CVSG(found, scale=0)):
        same, _ = called(name, sparke.wrap(pipe, guider=off))
        assert torch.equal(tiny.latents(same), tiny.latents(bare))


def test_the_model_that_ships_takes_its_own_encoder(tmp_path: Path) -> None:
    pipe = emoji.pipeline()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe("dog face", num_images_per_prompt=3, generator=generator).images
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    found = reference_images(
        tmp_path,
        pipe,
        captions=["dog face"] * 3,
        encode=pipe.transformer.model.encode_images,
        height=32,
        width=32,
    )
    generator.manual_seed(0)
    latents = pipe(
        "dog face", num_images_per_prompt=3, generator=generator, output_type="latent"
    ).images
    # But for rounding to bytes and pixels cut off at white.
    assert float(torch.cosine_similarity(found.x, latents).min()) > 0.99
    spy = Spy()
    sparke.wrap(pipe, guider=spy)("dog face", num_inference_steps=2)
    assert found.cond is not None
    assert spy.run.cond is not None
    assert torch.equal(found.cond[:1], spy.run.cond)
