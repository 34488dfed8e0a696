"""The command line: what it makes, and that whatever goes wrong is one line and an exit code."""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import sparke
from sparke._cli import demonstration, files, sampling, sheet
from sparke.cli import main
from sparke.memory import RingMemory
from sparke.models import emoji
from sparke.protocols import Features

ROOT = Path(__file__).parents[1]
PROMPTS = ("woman health worker", "dog face")
FIGURES = {"effective_modes", "vendi", "name_accuracy", "name_accuracy_cnn"}
MISSING = """
import sys
sys.modules[sys.argv[1]] = None
sys.argv[1:] = sys.argv[2:]
from sparke.cli import main
sys.exit(main())
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty folder; its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(argv)
        return code, *capsys.readouterr()

    return call


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(done: tuple[int, str, str], *said: str, code: int | None = None) -> None:
    """One readable line on stderr, a bad exit code, nothing else."""
    status, out, err = done
    assert status != 0 if code is None else status == code
    assert out == ""
    assert err.startswith("sparke: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert len(err) < 500
    assert err[:-1].isprintable()
    assert "Traceback" not in err
    assert "SPARKE_TRACEBACK" not in err
    for words in said:
        assert words in err


# demo


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


# generate

SMALL = ("-n", "4", "--steps", "6", "--seed", "7")


def test_memory_grows_and_is_heeded(run: Run, tmp_path: Path) -> None:
    call = ("generate", "woman health worker", *SMALL, "--memory", "bank.safetensors")
    code, out, err = run(*call, "--out", "a")
    assert (code, err) == (0, "")
    assert "memory: 0 -> 4 pictures (bank.safetensors)" in out
    assert "seed: 7" in out
    assert "4" in run(*call, "--out", "b")[1]
    bank = RingMemory.load(tmp_path / "bank.safetensors")
    assert (len(bank), bank.capacity) == (8, 4096)
    run("generate", "woman health worker", *SMALL, "--out", "c")
    first, again, alone = (
        [(tmp_path / out / f"woman-health-worker-000{i}.png").read_bytes() for i in range(1, 5)]
        for out in "abc"
    )
    assert first == alone
    assert all(x != y for x, y in zip(first, again, strict=True))


def test_capacity_keeps_the_newest(run: Run, tmp_path: Path) -> None:
    call = ("generate", "pizza", *SMALL, "--memory", "bank.safetensors", "--capacity", "6")
    run(*call)
    assert "memory: 4 -> 6 pictures" in run(*call)[1]
    assert "memory: 6 -> 6 pictures" in run(*call[:-2])[1]
    assert RingMemory.load(tmp_path / "bank.safetensors").capacity == 6


def test_no_file_is_ever_replaced(run: Run, tmp_path: Path) -> None:
    call = ("generate", "woman health worker", "style:noto pizza", *SMALL, "--out", "pictures")
    code, out, _ = run(*call)
    assert code == 0
    assert f"{Path('pictures/woman-health-worker-0001.png')} ... woman-health" in out
    first = tree(tmp_path)
    assert set(first) == {
        f"pictures/{stem}-000{i}.png"
        for stem in ("woman-health-worker", "style-noto-pizza")
        for i in range(1, 5)
    }
    (tmp_path / "pictures" / "woman-health-worker-0041.png").write_text("mine", encoding="utf-8")
    assert run(*call)[0] == 0
    second = tree(tmp_path)
    assert first.items() <= second.items()
    assert second["pictures/woman-health-worker-0041.png"] == b"mine"
    assert {f"pictures/woman-health-worker-00{i}.png" for i in range(42, 46)} < set(second)
    assert len(second) == 17


def test_sizes_and_batches(run: Run, tmp_path: Path) -> None:
    assert (
        run("generate", "pizza", "-n", "5", "--batch", "2", "--steps", "2", "--size", "48")[0] == 0
    )
    pictures = sorted((tmp_path / "out").iterdir())
    assert len(pictures) == 5
    for path in pictures:
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((48, 48), "RGB")
    # As other programs would write them, not private as temporary files are.
    (tmp_path / "probe").touch()
    assert stat.S_IMODE(pictures[0].stat().st_mode) == stat.S_IMODE(
        (tmp_path / "probe").stat().st_mode
    )


def test_a_name_taken_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_greatest", lambda where, stem: 0)
    assert files.create_next(tmp_path, "pizza", b"one").name == "pizza-0001.png"
    assert files.create_next(tmp_path, "pizza", b"two").name == "pizza-0002.png"
    assert (tmp_path / "pizza-0001.png").read_bytes() == b"one"


def test_no_hard_links_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    files.create(tmp_path / "a", b"one")
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "a", b"two")
    assert tree(tmp_path) == {"a": b"one"}


# interruptions and failures


class Interrupting:
    """A sampler during which Ctrl-C is pressed, in the second call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Any = None,
        callback: Any = None,
        disable: Any = None,
    ) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            signal.raise_signal(signal.SIGINT)
        return x * 0


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "pizza", *SMALL, "--batch", "2", "--memory", "bank.safetensors"),
        ("demo", "pizza", "--force"),
    ],
)
def test_ctrl_c_while_drawing(
    argv: tuple[str, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("generate", "pizza", *SMALL, "--memory", "bank.safetensors")
    run("demo", "pizza", "-n", "2", "--steps", "2")
    before = tree(tmp_path)
    monkeypatch.setattr("k_diffusion.sampling.sample_dpmpp_2m", Interrupting())
    # A test run in the background of a shell inherits a SIGINT that is ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        refused(run(*argv), "interrupted", code=130)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["picture", "memory"])
def test_nothing_is_left_of_a_call_that_fails_while_writing(
    stop: Any, where: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("generate", "pizza", *SMALL, "--memory", "bank.safetensors")
    run(*call)
    before = tree(tmp_path)

    def fail(self: object, *_: object) -> None:
        raise stop

    def write(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        if "0007" in self.name:
            raise stop
        return len(data)

    if where == "picture":
        monkeypatch.setattr(Path, "write_bytes", write)
    else:
        monkeypatch.setattr(os, "replace", fail)
    done = run(*call)
    refused(done, "interrupted" if stop is KeyboardInterrupt else "No space left")
    monkeypatch.undo()
    assert tree(tmp_path) == before


# hostile input


@pytest.mark.parametrize("command", ["demo", "generate"])
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([""], "empty prompt"),
        (["pizza", " \t\n "], "empty prompt"),
        (["xyzzy"], "unknown word 'xyzzy'"),
        (["pizaz"], "near: pizza"),
        (["☃ \u202e\x1b[31m dög\nface\0"], "unknown word"),
        (["\udcff\udcfe"], "unknown word"),
        (["style:noto style:blob pizza"], "at most one style"),
        (["x" * 100_000], "100000 characters"),
        (["pizza " * 20_000], "characters"),
        (["pizza"] * 65, "at most 64"),
        (["pizza", "-n", "0"], "-n"),
        (["pizza", "-n", "-1"], "-n"),
        (["pizza", "-n", "1e9"], "-n"),
        (["pizza", "-n", "9" * 5000], "-n"),
        (["pizza", "--cfg", "nan"], "--cfg"),
        (["pizza", "--cfg", "-1"], "--cfg"),
        (["pizza", "--cfg", "1e300"], "--cfg"),
        (["pizza", "--scale", "inf"], "--scale"),
        (["pizza", "--scale", "nan"], "--scale"),
        (["pizza", "--scale", "-1"], "--scale"),
        (["pizza", "--steps", "0"], "--steps"),
        (["pizza", "--seed", "-1"], "--seed"),
        (["pizza", "--seed", "9" * 30], "--seed"),
        (["pizza", "--score", "cond_rky"], "Did you mean 'cond-rke'"),
        (["pizza", "--score", ""], "not a known score"),
        (["pizza", "--out", "file"], "file is a file"),
        (["pizza", "--out", "file/below"], "cannot write to the folder"),
        (["pizza", "--out", "/proc/nothing"], "cannot write to the folder"),
        (["pizza", "--out", "long" * 1000], "cannot write to the folder"),
        (["pizza", "--no-such-option"], "--no-such-option"),
        (["pizza", "--out"], "--out"),
    ],
)
def test_bad_arguments(command: str, argv: list[str], said: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    refused(run(command, *argv), said)
    assert tree(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
    "argv", [["nonsense"], ["--nonsense"], ["generate"], ["scores", "extra"], ["guiders", "x"]]
)
def test_wrong_usage(argv: list[str], run: Run) -> None:
    refused(run(*argv), "--help", code=2)


def test_the_demo_wants_concepts(run: Run) -> None:
    refused(run("demo", "dog pizza"), "dog pizza", code=1)


def damage(kind: str, path: Path) -> None:
    """Write a memory file that is none."""
    rows = Features(torch.zeros(3, 320), torch.zeros(3, 128))
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(bytes(range(256)) * 100)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"x": os.system}))
    elif kind == "torch":
        torch.save({"x": torch.zeros(3, 320)}, path)
    elif kind == "huge header":
        path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    elif kind == "other safetensors":
        save_file({"x": torch.zeros(3, 320)}, path)
    elif kind == "another width":
        memory = RingMemory()
        memory.commit(Features(torch.zeros(3, 64), torch.zeros(3, 128)))
        memory.save(path)
    elif kind == "another encoder":
        memory = RingMemory()
        memory.commit(Features(torch.zeros(3, 320), torch.zeros(3, 768)))
        memory.save(path)
    elif kind == "no prompts":
        memory = RingMemory()
        memory.commit(Features(torch.zeros(3, 320)))
        memory.save(path)
    else:
        memory = RingMemory()
        memory.commit(rows)
        memory.save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[:-50])


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "noise",
        "pickle",
        "torch",
        "huge header",
        "other safetensors",
        "another width",
        "another encoder",
        "no prompts",
        "cut off",
    ],
)
def test_damaged_and_foreign_memories(kind: str, run: Run, tmp_path: Path) -> None:
    damage(kind, tmp_path / "bank")
    before = tree(tmp_path)
    refused(run("generate", "pizza", *SMALL, "--memory", "bank"), code=1)
    assert tree(tmp_path) == before


def test_a_huge_capacity_takes_no_room(run: Run, tmp_path: Path) -> None:
    memory = RingMemory(10**17)
    memory.commit(Features(torch.zeros(3, 320), torch.zeros(3, 128)))
    memory.save(tmp_path / "bank")
    status, out, err = run("generate", "pizza", *SMALL, "--memory", "bank")
    assert (status, err) == (0, "")
    assert "3 -> 7" in out


@pytest.mark.parametrize("path", [".", "", "long" * 100, "nothing/bank", "/dev/null", "file/bank"])
def test_places_where_no_memory_can_be(path: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(run("generate", "pizza", *SMALL, "--memory", path), code=1)
    assert set(tree(tmp_path)) == {"file"}


def test_an_error_of_ours_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(emoji, "load", broken)
    assert run("demo") == (
        1,
        "",
        "sparke: unexpected RuntimeError: two lines (SPARKE_TRACEBACK=1 shows where)\n",
    )
    monkeypatch.setenv("SPARKE_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="two"):
        run("demo")


# the rest


def test_scores_lists_all(run: Run) -> None:
    code, out, err = run("scores")
    assert (code, err) == (0, "")
    for name in sparke.scores():
        assert f" {name} " in out
    for paper in ("arXiv 2506.10173", "arXiv 2210.02410", "NeurIPS 2023"):
        assert paper in out


def test_scores_lists_plugins_and_outlives_broken_ones(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "sparke_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparke-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[sparke.scores]\nours = sparke_plugin:Ours\nbroken = sparke_plugin:Nothing\n"
    )
    (tmp_path / "sparke_plugin.py").write_text(
        "from sparke.scores import RKE\n\n\nclass Ours(RKE):\n"
        '    """Counts [a] thing.\n\n    See arXiv:1234.56789."""\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, err = run("scores")
    assert (code, err) == (0, "")
    for words in (" ours ", "Counts [a] thing.", "1234.56789", "sparke-plugin", "cannot be used"):
        assert words in out


def test_guiders_lists_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    code, out, err = run("guiders")
    assert (code, err) == (0, "")
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") == 6}
    assert set(rows) - {""} == set(sparke.guidance.names())
    for name, said in {
        "cads": ("arXiv 2310.17347", "on_condition", "sparke"),
        "interval": ("arXiv 2404.07724", "on_guidance_scale"),
        "diversity": ("arXiv 2506.10173", "finished samples"),
    }.items():
        assert all(words in rows[name] for words in said)
    assert "on_" not in rows["diversity"].replace("on_guidance_scale", "")
    assert "sparke scores" in out


def test_guiders_lists_plugins_and_outlives_broken_ones(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "sparke_pushes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparke-pushes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[sparke.guiders]\nours = sparke_pushes:made\nbare = sparke_pushes:bare\n"
        "broken = sparke_pushes:Nothing\n"
    )
    (tmp_path / "sparke_pushes.py").write_text(
        "from sparke.guidance.cads import CADS\n\n\ndef made(needed) -> CADS:\n"
        '    """Pushes [a] thing.\n\n    See arXiv:1234.56789."""\n\n\ndef bare(): ...\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "150")
    code, out, err = run("guiders")
    assert (code, err) == (0, "")
    (ours,) = (line for line in out.splitlines() if " ours " in line)
    for words in ("Pushes [a] thing.", "1234.56789", "on_condition", "sparke-pushes"):
        assert words in ours
    assert "(no description)" in next(line for line in out.splitlines() if " bare " in line)
    assert "cannot be used" in out


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"sparke {sparke.__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("demo", "generate", "scores", "guiders"))
    assert run()[0] == 2
    for command in ("demo", "generate", "scores", "guiders"):
        code, out, err = run(command, "--help")
        assert (code, err) == (0, "")
        assert "Usage: sparke" in out


@pytest.mark.parametrize(
    ("missing", "extra"),
    [
        ("typer", 'pip install "sparke[demo]"'),
        ("rich", 'pip install "sparke[demo]"'),
        ("PIL", 'pip install "sparke[demo]"'),
        ("k_diffusion", 'pip install "sparke[k-diffusion]"'),
    ],
)
def test_a_missing_extra_is_named(missing: str, extra: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MISSING, missing, "demo", "--out", str(tmp_path / "demo")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    refused((done.returncode, done.stdout, done.stderr), extra, code=1)
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_and_the_host_is_quiet(tmp_path: Path) -> None:
    argv = ["generate", "pizza", "-n", "1", "--steps", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "sparke", *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "pizza-0001.png").exists()
