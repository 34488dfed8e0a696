"""`sparke generate`: pictures, the memory they fill, and the files they go to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from PIL import Image

from sparke._cli import files
from sparke.memory import RingMemory
from tests.cli.common import SMALL, Run, refused, tree


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
    assert "memory" not in run("generate", "pizza", *SMALL, "--out", "d")[1]
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


def test_a_link_to_a_memory_goes_on_leading_there(run: Run, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    call = ("generate", "pizza", *SMALL, "--memory")
    run(*call, "disk/bank")
    (tmp_path / "link").symlink_to("disk/bank")
    assert run(*call, "link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert len(RingMemory.load(tmp_path / "disk" / "bank")) == 8


def test_a_memory_takes_no_pictures_place(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    call = ("generate", "pizza", *SMALL, "--memory", "out/pizza-0001.png")
    refused(run(*call), "changed by another process", code=1)
    assert tree(tmp_path) == {}


def test_names_are_printed_without_their_control_characters(run: Run, tmp_path: Path) -> None:
    name = "a\x1b[31m\nb\u202e"
    code, out, _ = run("generate", "pizza", "-n", "1", "--steps", "1", "--out", name)
    assert code == 0
    assert (tmp_path / name / "pizza-0001.png").exists()
    assert "a\\x1b[31m\\nb\\u202e" in out
    assert "\x1b" not in out


def test_a_planted_link_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis").write_text("mine", encoding="utf-8")
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / ".pizza-0001.png.guessed").symlink_to("thesis")
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "pizza-0001.png", b"one")
    assert (tmp_path / "thesis").read_text(encoding="utf-8") == "mine"
