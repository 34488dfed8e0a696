"""The examples run as they stand, and what their pages say of them is so."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from PIL import Image

from sparke.guidance import DiversityGuider
from sparke.memory import DiskMemory, MemoryFileWarning
from sparke.models import emoji
from tests.example_scripts import EXAMPLES, example

a_year_of_generations = example("a_year_of_generations")
batch_variety = example("batch_variety")
comparing_methods = example("comparing_methods")
my_own_loop = example("my_own_loop")
novelty_against_my_folder = example("novelty_against_my_folder")

ROOT = Path(__file__).parent.parent
SHARED = "pictures.py"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
PROGRAMS = [script for script in SCRIPTS if script != SHARED]
YEAR = ["--prompts", "princess", "dog face", "--steps", "6"]


def table(text: str, titles: str) -> dict[str, list[str]]:
    """The cells of the lines after the one with these titles, by their first column."""
    after = text.split(titles, 1)[1].split("\n\n", 1)[0]
    cells = (re.split(r" {2,}", line.strip()) for line in after.splitlines()[1:] if line.strip())
    return {first: rest for first, *rest in cells}


def process(script: Path, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """The script started as a user does."""
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def public_names(tree: ast.AST) -> Iterator[str]:
    """Modules of sparke that are imported, and names imported from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("sparke"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparke"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_needs_public_names_and_the_shared_module_only(script: str) -> None:
    tree = ast.parse((EXAMPLES / script).read_text(encoding="utf-8"))
    names = list(public_names(tree))
    assert "sparke" in names
    for name in names:
        assert not any(part.startswith("_") for part in name.split(".")), name
        module, _, attribute = name.rpartition(".")
        if module and not is_module(name):
            assert attribute in importlib.import_module(module).__all__, name
    others = {path.removesuffix(".py") for path in SCRIPTS} | {"examples", "benchmarks", "tests"}
    imported = {
        part.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for part in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }
    shared = {SHARED.removesuffix(".py")}
    assert imported & others == (set() if script == SHARED else shared)


def test_a_program_and_the_shared_module_are_all_that_has_to_be_copied(tmp_path: Path) -> None:
    for name in ("batch_variety.py", SHARED):
        shutil.copy(EXAMPLES / name, tmp_path)
    running = process(tmp_path / "batch_variety.py", "-n", "2", "--steps", "2", cwd=tmp_path)
    out, err = running.communicate()
    assert running.returncode == 0, err
    assert out.splitlines()[-1] == "batch_variety.png"
    assert (tmp_path / "batch_variety.png").is_file()


@pytest.mark.parametrize("script", PROGRAMS)
def test_ctrl_c_is_one_line_and_no_traceback(
    script: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pressed() -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emoji, "load_judge", pressed)
    small = {
        "a_year_of_generations.py": [*YEAR, "--weeks", "1"],
        "contextual_regions.py": [],  # the judge comes first
        "my_own_loop.py": ["--steps", "2"],
    }
    with pytest.raises(SystemExit) as ended:
        example(script.removesuffix(".py")).main(small.get(script, ["-n", "2", "--steps", "2"]))
    assert ended.value.code == 130
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("interrupted")
    assert list(tmp_path.glob("*.png")) == []


def test_the_page_and_the_readme_name_every_example() -> None:
    for page in ("docs/examples.md", "examples/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [script for script in SCRIPTS if script not in text] == []


@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_has_more_modes_with_sparke(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheets" / "batch.png"
    asked = ["-n", "12", "--steps", "10", "--seed", str(seed), "--out", str(out)]
    batch_variety.main(asked)
    rows = table(capsys.readouterr().out, "similarity")
    bare, guided = ([float(cell) for cell in rows[f"{w} sparke"]] for w in ("without", "with"))
    assert guided[0] > bare[0] + 1  # 6.0 to 6.2 and 7.6 to 10.7, measured
    assert guided[1] > bare[1] + 1  # 6.0 to 6.9 and 8.6 to 9.2
    assert guided[3] >= 0.9
    with Image.open(out) as sheet:
        assert sheet.size == (12 * 96, 2 * (96 + 24))

    before = out.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        batch_variety.main(asked)
    assert "--force" in capsys.readouterr().err
    batch_variety.main([*asked, "--force", "--scale", "0"])
    rows = table(capsys.readouterr().out, "similarity")
    assert rows["with sparke"] == rows["without sparke"]
    assert out.read_bytes() != before
    assert [path.name for path in out.parent.iterdir()] == ["batch.png"]


def test_an_unknown_word_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        batch_variety.main(["a cat on Mars", "--out", str(tmp_path / "x.png")])
    # The interpreter prints a code that is text, and exits with 1.
    assert isinstance(ended.value.code, str)
    assert "mars" in ended.value.code
    assert "\n" not in ended.value.code
    assert list(tmp_path.iterdir()) == []


def year(out: Path, weeks: int) -> None:
    a_year_of_generations.main([*YEAR, "--weeks", str(weeks), "--out", str(out)])


def rows(out: Path) -> dict[str, torch.Tensor]:
    return {name: DiskMemory(out / name).rows().x for name in ("bare", "forgetting", "memory")}


@pytest.mark.parametrize(
    ("signum", "code", "said"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ""),
        (signal.SIGINT, 130, "interrupted; the same command goes on from here\n"),
    ],
    ids=["killed", "Ctrl-C"],
)
def test_a_year_that_is_stopped_goes_on_and_ends_with_the_same_memory(
    signum: int, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    running = process(
        EXAMPLES / "a_year_of_generations.py",
        *YEAR,
        *("--weeks", "5000", "--out", "broken"),
        cwd=tmp_path,
    )
    while running.poll() is None and not (broken / "memory" / "memory.json").exists():
        time.sleep(0.02)
    running.send_signal(signum)
    _, err = running.communicate()
    assert running.returncode == code, err
    assert err == said

    with warnings.catch_warnings():
        # It tells of the commit that was cut off, if one was.
        warnings.simplefilter("ignore", MemoryFileWarning)
        done = len(DiskMemory(broken / "memory")) // 2
        weeks = done + 2
        year(broken, weeks)
    resumed = capsys.readouterr().out
    year(straight, weeks)
    whole = capsys.readouterr().out
    kept = rows(broken)
    for name, expected in rows(straight).items():
        assert len(expected) == 2 * weeks
        assert torch.equal(kept[name], expected), name
    assert whole.split("princess", 1)[1] == resumed.split("princess", 1)[1]

    # Once more there is nothing left to draw, and no time to tell.
    year(broken, weeks)
    assert table(capsys.readouterr().out, "MB   cost")[str(weeks)][-1] == "-"
    assert len(rows(broken)["memory"]) == 2 * weeks


def test_a_year_with_memory_has_more_modes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    year(tmp_path, 8)
    bare, _, remembering, kept = table(capsys.readouterr().out, "MB   cost")["8"][:4]
    assert float(remembering) > float(bare) + 1
    assert int(kept) == 16
    drawn = rows(tmp_path)
    # Nothing to remember in the first week; something in all others.
    forgetting, remembered = (drawn[name].unflatten(0, (8, 2)) for name in ("forgetting", "memory"))
    same = [torch.equal(a, b) for a, b in zip(forgetting, remembered, strict=True)]
    assert same == [True] + [False] * 7


def test_another_year_is_not_mixed_in(tmp_path: Path) -> None:
    year(tmp_path, 1)
    before = rows(tmp_path)["memory"]
    with pytest.raises(SystemExit, match="give another --out"):
        a_year_of_generations.main([*YEAR, "--seed", "1", "--weeks", "2", "--out", str(tmp_path)])
    assert torch.equal(rows(tmp_path)["memory"], before)


NOVELTY = ["--prompt", "woman health worker", "-n", "8", "--steps", "10"]


@pytest.mark.parametrize("seed", ["0", "1"])
def test_new_pictures_are_farther_from_a_folder(
    seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "novelty"
    asked = [*NOVELTY, "--seed", seed, "--known", "12", "--out", str(out)]
    novelty_against_my_folder.main(asked)
    text = capsys.readouterr().out
    pictures = table(text, "nearest of the folder")
    assert len(pictures) == 8
    figures = table(text, "repeated")
    bare, guided = ([float(cell) for cell in figures[name]] for name in ("without", "with"))
    assert guided[0] > bare[0] + 2  # 5.8 to 7.4 and 12.9 to 14.3, measured
    assert guided[1] < bare[1]
    assert guided[2] > bare[2]
    assert guided[3] >= 0.9
    assert sorted(path.name for path in out.iterdir()) == ["my-pictures", "novelty.png"]
    assert len(list((out / "my-pictures").glob("*.png"))) == 12
    with pytest.raises(SystemExit, match="2"):
        novelty_against_my_folder.main(asked)


def test_a_folder_of_ones_own_is_read_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(SystemExit, match="no pictures"):
        novelty_against_my_folder.main([str(mine), "--out", str(tmp_path / "out")])
    for name, prompt in (("b.png", "princess"), ("ä.webp", "old woman"), ("c.jpg", "pizza")):
        image = emoji.pipeline()(prompt, num_inference_steps=4).images[0].resize((70, 50))
        if name == "b.png":
            image.putalpha(0)  # transparent everywhere: white, not black
        image.save(mine / name)
    (mine / "notes.md").write_text("no picture")
    before = sorted(path.name for path in mine.iterdir())
    novelty_against_my_folder.main([str(mine), *NOVELTY, "--out", str(tmp_path / "out")])
    assert "repeated" in capsys.readouterr().out
    assert sorted(path.name for path in mine.iterdir()) == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["novelty.png"]
    white = novelty_against_my_folder.opened(mine / "b.png")
    assert white.getextrema() == ((255, 255),) * 3
    (mine / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(SystemExit, match=r"broken\.png"):
        novelty_against_my_folder.main([str(mine), *NOVELTY, "--out", str(tmp_path / "more")])


def test_methods_are_compared_and_ones_own_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = DiversityGuider("rke", scale=0.0)
    monkeypatch.setitem(comparing_methods.METHODS, "mine", {"guider": mine})
    out = tmp_path / "methods.png"
    names = ["sparke", "interval", "CADS, then sparke", "mine"]
    asked = ["princess", "-n", "12", "--steps", "10", "--out", str(out)]
    comparing_methods.main([*asked, "--methods", *names])
    found = table(capsys.readouterr().out, "similarity")
    assert set(found) == {"without", *names}
    modes = [float(cells[0]) for cells in found.values()]
    assert modes == sorted(modes, reverse=True)
    assert found["mine"][:4] == found["without"][:4]  # of no strength: the same pictures
    assert len(mine.memory) == 12
    assert float(found["sparke"][0]) > float(found["without"][0]) + 1
    with Image.open(out) as sheet:
        assert sheet.size == (12 * 80, 5 * (80 + 22))


def test_every_method_offered_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "methods.png")
    comparing_methods.main(["dog face", "-n", "2", "--steps", "3", "--out", out])
    found = table(capsys.readouterr().out, "similarity")
    assert set(found) == {comparing_methods.BARE, *comparing_methods.METHODS}


def test_a_loop_of_ones_own_remembers_its_batches(capsys: pytest.CaptureFixture[str]) -> None:
    my_own_loop.main(["princess", "--batches", "3", "--steps", "10"])
    last = table(capsys.readouterr().out, "pictures")["12"]
    assert float(last[1]) > float(last[0]) + 1
