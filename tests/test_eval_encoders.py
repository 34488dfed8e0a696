"""Encoders by name, offline, and folders of pictures through any callable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sparke.errors import ArgumentError, MissingHost, ShapeError, SparkeError, UnknownName
from sparke.features.encoders import ImageEncoder, image_encoder, text_encoder
from sparke.images import image_features
from sparke.models import emoji
from tests.eval_pictures import command, folder, picture

SIDE = 32


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return folder(tmp_path / "pictures", ["x"], 5)


def pixels(where: Path) -> Tensor:
    """(n, h, w, 3), 0 to 255."""
    files = sorted(where.glob("*.png"))
    return torch.from_numpy(np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files]))


# callables


def test_a_callable_gets_pictures_in_0_to_1(tmp_path: Path) -> None:
    for i in range(5):
        picture(tmp_path / f"{i}.png", i, size=(8, 8))
    seen: list[Tensor] = []

    def encode(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch.flatten(1).double()

    steps: list[tuple[int, int]] = []
    rows = image_features(
        tmp_path, encode, image_size=8, batch_size=2, progress=lambda *done: steps.append(done)
    )
    assert [len(batch) for batch in seen] == [2, 2, 1]
    assert all(batch.dtype == torch.float32 for batch in seen)
    assert torch.equal(torch.cat(seen), pixels(tmp_path).permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(rows, torch.cat(seen).flatten(1))
    assert (rows.dtype, rows.requires_grad) == (torch.float32, False)
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_pictures_cover_the_size_and_lose_their_sides(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("lime", (10, 0, 30, 20))
    wide.save(tmp_path / "wide.png")
    got: list[Tensor] = []

    def encode(batch: Tensor) -> Tensor:
        got.append(batch)
        return batch.flatten(1)

    image_features([tmp_path / "wide.png"], encode, image_size=10)
    lime = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(got[0][..., 1:-1], lime.expand(1, 3, 10, 8), atol=0.1, rtol=0)
    image_features([tmp_path / "wide.png"], encode)
    assert got[1].shape == (1, 3, 224, 224)
    encode.image_size = 6  # type: ignore[attr-defined]
    image_features([tmp_path / "wide.png"], encode)
    assert got[2].shape == (1, 3, 6, 6)


def test_results_do_not_depend_on_the_batch(pictures: Path) -> None:
    torch.testing.assert_close(
        image_features(pictures, "emoji", batch_size=1), image_features(pictures, "emoji")
    )


@pytest.mark.parametrize("batch", [0, -1, True, 2.0])
def test_batches_must_be_whole(batch: Any, pictures: Path) -> None:
    with pytest.raises(ArgumentError, match="batch_size"):
        image_features(pictures, "pixels", batch_size=batch)


def test_rows_of_changing_width_are_refused(pictures: Path) -> None:
    with pytest.raises(ShapeError, match="width 6144 for one batch and 3072"):
        image_features(
            pictures,
            lambda x: x.reshape(len(x), -1)[:, : 3072 * len(x)],
            batch_size=2,
            image_size=64,
        )


@pytest.mark.parametrize("wrong", [3, None, object(), [1]])
def test_what_is_no_encoder(wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="a name or a callable"):
        image_encoder(wrong)
    with pytest.raises(ArgumentError, match="a name or a callable"):
        text_encoder(wrong)


@pytest.mark.parametrize("size", [0, -3, 1.5, True])
def test_sizes_must_be_whole(size: Any) -> None:
    with pytest.raises(ArgumentError, match="image_size"):
        image_encoder(lambda x: x, image_size=size)


def test_an_encoder_needs_to_say_what_it_wants(pictures: Path) -> None:
    with pytest.raises(ArgumentError, match="neither prepare nor image_size"):
        image_features(pictures, ImageEncoder("mine", lambda x: x, "nothing"))


# by name


def test_pixels_are_the_picture(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png", i, size=(32, 32))
    wanted = pixels(tmp_path).permute(0, 3, 1, 2).float().flatten(1) / 255
    assert torch.equal(image_features(tmp_path, "pixels"), wanted)
    assert "crude" in image_encoder("pixels").compares


def test_emoji_is_the_judge(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png", i, size=(32, 32))
    images = pixels(tmp_path).permute(0, 3, 1, 2).float() / 127.5 - 1
    wanted = emoji.load_judge().features(images)
    torch.testing.assert_close(image_features(tmp_path, "emoji"), wanted)


def test_code_of_your_own(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_encoders.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    image_size = 16\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.drop = torch.nn.Dropout(0.5)\n"
        "    def forward(self, x):\n"
        "        return self.drop(x).mean((2, 3))\n"
        "class Both:\n"
        "    net = Net()\n"
        "both = Both()\n"
    )
    for name in ("own_encoders:both.net", "own_encoders.py:both.net"):
        rows = image_features(pictures, name)
        assert rows.shape == (5, 3)
        assert torch.equal(rows, image_features(pictures, name))  # no dropout
    assert image_encoder("own_encoders:both.net").image_size == (16, 16)


@pytest.mark.parametrize(
    "name", ["", "clip", "pixels:", "pixels:8", "emoji:", "timm", "timm:", "transformers:", ":f"]
)
def test_names_of_no_form(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"not known|must be module:function"):
        image_encoder(name)


# timm


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    where = tmp_path_factory.mktemp("timm")
    model = timm.create_model("test_resnet.r160_in1k", num_classes=7)
    timm.models.save_for_hf(model, where, safe_serialization=True)
    return where


def test_timm_by_folder_and_by_checkpoint(timm_folder: Path, pictures: Path) -> None:
    import timm

    rows = image_features(pictures, f"timm:{timm_folder}")
    model = timm.create_model(
        "test_resnet.r160_in1k", checkpoint_path=timm_folder / "model.safetensors", num_classes=7
    ).eval()
    config = timm.data.resolve_model_data_config(model)
    prepare: Any = timm.data.create_transform(**config, is_training=False)
    batch = torch.stack([prepare(Image.open(f).convert("RGB")) for f in sorted(pictures.iterdir())])
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(batch), pre_logits=True)
    torch.testing.assert_close(rows, wanted)
    name = f"timm:test_resnet.r160_in1k@{timm_folder / 'model.safetensors'}"
    torch.testing.assert_close(image_features(pictures, name), wanted)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("timm:resnet18.a1_in1k", ArgumentError, "--download"),
        ("timm:resnet10t", ArgumentError, "not on this disk"),
        ("timm:resnet1000", UnknownName, "resnet"),
        ("timm:../nowhere", UnknownName, "nowhere"),
        ("timm:resnet18@nothing.safetensors", ArgumentError, "must be a .safetensors file"),
        ("timm:resnet18@weights.pth", ArgumentError, "must be a .safetensors file"),
        ("timm:resnet18@damaged.safetensors", ArgumentError, "cannot be loaded"),
        ("timm:bare", ArgumentError, "no config.json"),
        ("timm:pickled", ArgumentError, "no model.safetensors"),
    ],
)
def test_timm_that_is_not_there(
    name: str, error: type[SparkeError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    Path("weights.pth").write_bytes(b"")
    Path("damaged.safetensors").write_bytes(b"12345678")
    Path("bare").mkdir()
    Path("pickled").mkdir()
    Path("pickled", "config.json").write_text("{}")
    Path("pickled", "pytorch_model.bin").write_bytes(b"")
    no_network(monkeypatch)
    with pytest.raises(error, match=said):
        image_encoder(name)


def test_timm_weights_of_an_earlier_download_are_found(
    timm_folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def cached(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(timm_folder / "model.safetensors")

    no_network(monkeypatch)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    rows = image_features(pictures, "timm:test_resnet.r160_in1k")
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors")]
    torch.testing.assert_close(rows, image_features(pictures, f"timm:{timm_folder}"))


def test_downloads_happen_when_asked_for_only(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    asked: list[dict[str, Any]] = []

    def create(**options: Any) -> nn.Module:
        asked.append(options)
        raise OSError("no network here")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ArgumentError, match="no network here"):
        image_encoder("timm:resnet18.a1_in1k", download=True)
    assert asked == [{"model_name": "resnet18.a1_in1k", "pretrained": True, "num_classes": 0}]


# transformers

TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of CLIP, DINOv2 and a ViT whose pooling was never trained."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    where = tmp_path_factory.mktemp("transformers")
    words = {"hello": 0, "a": 1, "dog": 2, "</s>": 3, "<unk>": 4}
    clip = transformers.CLIPConfig(
        vision_config={**TINY, "image_size": SIDE, "patch_size": 16},
        text_config={**TINY, "vocab_size": 5, "max_position_embeddings": 6, "eos_token_id": 3},
        projection_dim=8,
    )
    vit = {**TINY, "image_size": SIDE, "patch_size": 16}
    size = {"height": SIDE, "width": SIDE}
    for name, model in {
        "clip": transformers.CLIPModel(clip),
        "dino": transformers.Dinov2Model(transformers.Dinov2Config(**vit)),
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(**vit)),
    }.items():
        model.save_pretrained(where / name)
        transformers.ViTImageProcessor(size=size).save_pretrained(where / name)
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="</s>", model_max_length=6
    ).save_pretrained(where / "clip")
    return where


def prepared(pictures: Path) -> Tensor:
    """(n, 3, SIDE, SIDE), resized and normalised as the folder's file tells."""
    files = sorted(pictures.iterdir())
    small = [
        Image.open(f).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for f in files
    ]
    batch = torch.from_numpy(np.stack([np.asarray(one) for one in small]))
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1


def test_clip_is_its_image_features_at_unit_length(models: Path, pictures: Path) -> None:
    import transformers

    rows = image_features(pictures, f"transformers:{models / 'clip'}", batch_size=2)
    model = transformers.CLIPModel.from_pretrained(models / "clip").eval()
    with torch.no_grad():
        seen = model.vision_model(pixel_values=prepared(pictures)).pooler_output
        wanted = nn.functional.normalize(model.visual_projection(seen))
    torch.testing.assert_close(rows, wanted, atol=2e-2, rtol=0)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))


def test_dino_is_its_pooled_output(models: Path, pictures: Path) -> None:
    import transformers

    rows = image_features(pictures, f"transformers:{models / 'dino'}")
    model = transformers.Dinov2Model.from_pretrained(models / "dino").eval()
    with torch.no_grad():
        wanted = model(pixel_values=prepared(pictures)).last_hidden_state[:, 0]
    assert rows.shape == (5, 16)
    torch.testing.assert_close(rows, wanted, atol=0.1, rtol=0)


def test_pooling_that_was_never_trained_is_refused(models: Path) -> None:
    with pytest.raises(ArgumentError, match=r"pooler.*would be random"):
        image_encoder(f"transformers:{models / 'vit'}")


def test_texts(models: Path) -> None:
    encode = text_encoder(f"transformers:{models / 'clip'}")
    rows = encode(["a dog", "hello", "a dog"] * 50)
    assert rows.shape == (150, 8)
    torch.testing.assert_close(rows[0], rows[2])
    assert not torch.allclose(rows[0], rows[1])
    counted = text_encoder(lambda texts: torch.tensor([[float(len(t))] for t in texts]))
    assert counted(["a", "abc"]).tolist() == [[1.0], [3.0]]
    for name in ("pixels", "timm:resnet18", "transformers:", "x"):
        with pytest.raises(ArgumentError, match="text encoder"):
            text_encoder(name)


@pytest.mark.parametrize("make", [image_encoder, text_encoder])
def test_transformers_that_are_not_there(
    make: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    no_network(monkeypatch)
    with pytest.raises(ArgumentError, match=r"not on this disk.*--download"):
        make("transformers:openai/clip-vit-base-patch32")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ArgumentError, match="cannot load"):
        make(f"transformers:{tmp_path / 'bare'}")


def test_models_of_an_earlier_download_are_found(
    models: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda name, file: str(models / name[3:] / file)
    )
    no_network(monkeypatch)
    rows = image_features(pictures, "transformers:me/clip")
    assert torch.equal(rows, image_features(pictures, f"transformers:{models / 'clip'}"))
    assert text_encoder("transformers:me/clip")(["a dog"]).shape == (1, 8)


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection is an error that no except of a library catches."""

    class Connected(BaseException):
        pass

    def connect(*_: object, **__: object) -> None:
        raise Connected

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    monkeypatch.setattr("socket.create_connection", connect)


@pytest.mark.parametrize(
    ("name", "extra"), [("timm:resnet18", "timm"), ("transformers:x", "transformers")]
)
def test_a_missing_package_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, extra, None)
    with pytest.raises(MissingHost, match=rf'pip install "sparke\[{extra}\]"'):
        image_encoder(name)


def test_the_command_uses_them(
    timm_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["pictures", "--encoder", f"timm:{timm_folder}", "--json", "o.json", "--no-report"]
    assert command(*argv, "--bandwidth", "1.5") == 0
    from sparke import metrics

    got = json.loads(Path("o.json").read_text())
    rows = image_features(pictures, f"timm:{timm_folder}")
    wanted = metrics.vendi(rows, bandwidth=1.5)
    assert got["sets"][0]["measures"]["vendi"] == pytest.approx(wanted)
    assert "test_resnet" in got["settings"]["what it compares"]
