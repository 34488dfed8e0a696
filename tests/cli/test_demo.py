"""`sparke demo`: the sheet, the figures, and what is never replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import sparke
from sparke._cli import demonstration, sampling, sheet
from sparke.cli import main
from sparke.models import emoji
from tests.cli.common import Run, refused, tree

PROMPTS = ("woman health worker", "dog face")
FIGURES = {"effective_modes", "vendi", "name_accuracy", "name_accuracy_cnn"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a small demo."""
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    options = ["-n", "10", "--steps", "8", "--seed", "3", "--cfg", "5"]
    assert main(["demo", "--out", str(out), "--prompts", *PROMPTS, *options]) == 0
    return out


@sampling.one_thread()
def drawn(steps: int, cfg: float, seed: int, n: int) -> dict[str, list[Tensor]]:
    """The demo's pictures, drawn once more without the command line."""
    from k_diffusion.sampling import sample_dpmpp_2m

    model = emoji.load()
    generator = torch.Generator().manual_seed(seed)
    images: dict[str, list[Tensor]] = {"unguided": [], "guided": []}
    for prompt in PROMPTS:
        x = torch.randn(n, 320, generator=generator) * model.sigma_max
        extra = {"cond": model.encode([prompt] * n), "cond_scale": cfg}
        for half, sampler in (
            ("unguided", sample_dpmpp_2m),
            ("guided", sparke.wrap(sample_dpmpp_2m)),
        ):
            with torch.no_grad():
                latents = sampler(model, x, model.sigmas(steps), extra_args=extra, disable=True)
            images[half].append(model.decode(latents))
    return images


def test_demo_writes_the_sheet_and_the_figures(demo: Path) -> None:
    assert set(tree(demo)) == {"contact-sheet.png", "demo.json"}
    told = json.loads((demo / "demo.json").read_text(encoding="utf-8"))
    assert told["settings"] == {
        "sampler": "k_diffusion sample_dpmpp_2m",
        "steps": 8,
        "cfg": 5.0,
        "seed": 3,
        "n": 10,
        "prompts": list(PROMPTS),
        "score": "cond-rke",
    }
    assert told["versions"]["sparke"] == sparke.__version__
    assert set(told["versions"]) == {"sparke", "python", "torch", "k-diffusion"}
    assert [row["prompt"] for row in told["prompts"]] == list(PROMPTS)
    for half in ("unguided", "guided"):
        assert set(told["overall"][half]) == FIGURES | {"seconds"}
        assert told["overall"][half]["seconds"] > 0
        for row in told["prompts"]:
            assert set(row[half]) == FIGURES


def test_the_figures_are_those_of_the_pictures(demo: Path) -> None:
    told = json.loads((demo / "demo.json").read_text(encoding="utf-8"))
    judge = emoji.load_judge()
    for half, images in drawn(steps=8, cfg=5.0, seed=3, n=10).items():
        verdict = judge(torch.cat(images))
        ids = judge.ids(PROMPTS).repeat_interleave(10)
        nearest, network = judge.name_accuracy(verdict, ids)
        vendi = [sparke.metrics.vendi(judge.features(x), kernel="cosine") for x in images]
        overall = told["overall"][half]
        assert overall["effective_modes"] == pytest.approx(judge.effective_modes(verdict, ids))
        assert overall["name_accuracy"] == pytest.approx(nearest)
        assert overall["name_accuracy_cnn"] == pytest.approx(network)
        assert overall["vendi"] == pytest.approx(sum(vendi) / 2)
        for name in FIGURES:
            mean = sum(row[half][name] for row in told["prompts"]) / 2
            assert overall[name] == pytest.approx(mean)


def test_the_sheet_shows_the_pictures(demo: Path) -> None:
    images = drawn(steps=8, cfg=5.0, seed=3, n=10)
    inner = (8, 8, sheet.TILE - 8, sheet.TILE - 8)
    with Image.open(demo / "contact-sheet.png") as opened:
        shown = opened.convert("RGB")
    panel = sheet._span(8) + 2 * sheet.PAD
    assert shown.width == 2 * panel + sheet.GUTTER + 2 * sheet.MARGIN
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    top = sheet.HEADER + sheet.LABEL + sheet.PAD
    for half, left in (
        ("unguided", sheet.MARGIN + sheet.PAD),
        ("guided", sheet.MARGIN + panel + sheet.GUTTER + sheet.PAD),
    ):
        # The second picture of the second line.
        x, y = left + sheet.TILE + sheet.GAP, top + sheet.TILE + sheet.GAP
        tile = shown.crop((x, y, x + sheet.TILE, y + sheet.TILE)).crop(inner)
        (wanted,) = sheet.to_images(images[half][0][9:], sheet.TILE)
        assert tile.tobytes() == wanted.crop(inner).tobytes()


def test_demo_replaces_nothing_unless_forced(run: Run, tmp_path: Path) -> None:
    few = ("demo", "pizza", "-n", "2", "--steps", "2")
    code, out, err = run(*few)
    assert (code, err) == (0, "")
    for words in ("unguided", "sparke.wrap(sampler)", "effective modes", "Vendi", "right name"):
        assert words in out
    assert out.endswith(f"{Path('demo/contact-sheet.png')}\n{Path('demo/demo.json')}\n")
    first = tree(tmp_path)

    code, out, _ = run(*few, "--seed", "1")
    assert code == 0
    assert out.endswith(f"{Path('demo/contact-sheet-2.png')}\n{Path('demo/demo-2.json')}\n")
    second = tree(tmp_path)
    assert len(second) == 4
    assert first.items() <= second.items()

    # One of a pair is enough to make a name taken.
    (tmp_path / "demo" / "demo-3.json").write_text("mine", encoding="utf-8")
    assert run(*few)[0] == 0
    assert (tmp_path / "demo" / "contact-sheet-4.png").exists()
    assert not (tmp_path / "demo" / "contact-sheet-3.png").exists()

    before = tree(tmp_path)
    code, out, _ = run(*few, "--seed", "1", "--force")
    after = tree(tmp_path)
    assert code == 0
    assert set(after) == set(before)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"demo/contact-sheet.png", "demo/demo.json"}
    assert after["demo/contact-sheet.png"] == before["demo/contact-sheet-2.png"]


def test_prompts_can_be_given_in_three_ways(run: Run, tmp_path: Path) -> None:
    few = ("-n", "1", "--steps", "1")
    assert run("demo", "--prompts", "pizza", "Dog  FACE", "pizza", *few)[0] == 0
    assert run("demo", "pizza", "dog face", *few)[0] == 0
    assert run("demo", "--prompts", "pizza", "--prompts", "dog face", *few)[0] == 0
    settings = [
        json.loads(path.read_text(encoding="utf-8"))["settings"]
        for path in sorted((tmp_path / "demo").glob("*.json"))
    ]
    assert len(settings) == 3
    assert all(one["prompts"] == ["pizza", "dog face"] for one in settings)


def test_scale_0_makes_both_halves_alike(run: Run, tmp_path: Path) -> None:
    few = ("pizza", "-n", "4", "--steps", "4")
    assert run("demo", *few, "--scale", "0", "--score", "rke")[0] == 0
    told = json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8"))
    (row,) = told["prompts"]
    assert row["unguided"] == row["guided"]
    assert told["settings"]["scale"] == 0
    assert told["settings"]["score"] == "rke"


def test_one_thread_is_enough_and_the_others_are_given_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, load = [], emoji.load

    def watched() -> emoji.EmojiModel:
        seen.append(torch.get_num_threads())
        return load()

    monkeypatch.setattr(emoji, "load", watched)
    before = torch.get_num_threads()
    run("demo", "pizza", "-n", "1", "--steps", "1")
    run("generate", "nothing")
    assert seen == [1, 1]
    assert torch.get_num_threads() == before


def test_the_default_prompts_are_concepts_with_and_without_tones() -> None:
    prompts = demonstration.PROMPTS
    assert set(prompts) <= set(emoji.EVALUATION_PROMPTS)
    assert len(set(prompts)) == 8
    assert len(set(prompts) & set(emoji.load().toned_prompts)) == 4


@pytest.mark.parametrize("n", [1, 8, 9, 64])
def test_sheets_of_any_size(n: int) -> None:
    images = torch.rand(n, 3, 32, 32) * 2 - 1
    row = sheet.Row(
        "woman health worker style:twemoji tone:medium-light", (images, -images), (1, 2)
    )
    drawn = sheet.contact_sheet([row, row], "title", "settings", ("left", "right"))
    lines = -(-n // 8)
    assert drawn.height > 2 * lines * sheet.TILE
    assert drawn.width >= 2 * min(n, 8) * sheet.TILE


def test_the_demo_wants_concepts(run: Run) -> None:
    refused(run("demo", "dog pizza"), "dog pizza", code=1)
