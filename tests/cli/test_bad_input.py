"""Wrong, missing, huge, empty and hostile input: one line and an exit code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparke.memory import RingMemory
from sparke.models import emoji
from sparke.protocols import Features
from tests.cli.common import SMALL, Run, refused, tree


@pytest.mark.parametrize("command", ["demo", "generate"])
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([""], "empty prompt"),
        (["pizza", " \t\n "], "empty prompt"),
        (["xyzzy"], "unknown word 'xyzzy'"),
        (["xyzzy"], "`sparke prompts` lists"),
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
        (["pizza", "--out", ""], "is empty"),
        (["pizza", "--out", " "], "is empty"),
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
    "argv",
    [
        ["nonsense"],
        ["help"],
        ["\x1b[31m\n\udcff"],
        ["--nonsense"],
        ["generate"],
        ["scores", "extra"],
        ["guiders", "x"],
        ["generate", "pizza", "--memory", ""],
    ],
)
def test_wrong_usage(argv: list[str], run: Run) -> None:
    refused(run(*argv), "--help", code=2)


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


@pytest.mark.parametrize("path", [".", "long" * 100, "nothing/bank", "/dev/null", "file/bank"])
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


def test_no_command_shows_the_help_and_says_so(run: Run) -> None:
    code, out, err = run()
    assert code == 2
    assert "Usage: sparke" in out
    refused((code, "", err), "command is missing")


@pytest.mark.parametrize("leads", ["nowhere", "link"])
@pytest.mark.parametrize("option", ["--out", "--memory"])
def test_links_that_lead_nowhere(option: str, leads: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(leads)
    refused(run("generate", "pizza", *SMALL, option, "link"), "leads nowhere", code=1)
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path) == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_memory(run: Run, tmp_path: Path) -> None:
    """Opening one would wait for ever."""
    os.mkfifo(tmp_path / "bank")
    refused(run("generate", "pizza", *SMALL, "--memory", "bank"), "a pipe, not a file", code=1)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no devices here")
def test_a_device_is_no_memory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bank").symlink_to("/dev/zero")
    refused(run("generate", "pizza", *SMALL, "--memory", "bank"), "a device, not a file", code=1)


def test_a_thesis_is_no_memory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("long " * 1000, encoding="utf-8")
    before = tree(tmp_path)
    refused(run("generate", "pizza", *SMALL, "--memory", "thesis.tex"), "thesis.tex", code=1)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_much_at_once(error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(emoji, "load", full)
    refused(run("demo"), "out of memory", "-n", code=1)
