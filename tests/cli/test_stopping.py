"""Interruptions and failures: nothing half-written, nothing left, the memory as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sparke._cli import files, generation
from sparke.memory import RingMemory
from tests.cli.common import SMALL, Run, refused, tree


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

    whole = Path.open

    def half(self: Path, *args: Any, **options: Any) -> Any:
        file = whole(self, *args, **options)
        if "0007" in self.name:
            with file:
                file.write(b"half of it")
            raise stop
        return file

    if where == "picture":
        monkeypatch.setattr(Path, "open", half)
    else:
        monkeypatch.setattr(os, "replace", fail)
    done = run(*call)
    refused(done, "interrupted" if stop is KeyboardInterrupt else "No space left")
    monkeypatch.undo()
    assert tree(tmp_path) == before


@pytest.fixture
def can_be_interrupted() -> Iterator[None]:
    """A test run in the background of a shell inherits signals that are ignored."""
    handlers: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    inherited = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in inherited.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("can_be_interrupted")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_while_pictures_are_written(
    number: int, code: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait until the picture at hand is noted, and then all of them are taken back."""
    call = ("generate", "pizza", *SMALL, "--memory", "bank.safetensors")
    run(*call)
    before = tree(tmp_path)
    claim = files._claim

    def stopped(temporary: Path, path: Path) -> None:
        claim(temporary, path)
        if "0006" in path.name:
            signal.raise_signal(number)

    monkeypatch.setattr(files, "_claim", stopped)
    refused(run(*call), "interrupted" if code == 130 else f"signal {number}", code=code)
    assert tree(tmp_path) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("can_be_interrupted")
def test_what_is_done_stays_done(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the memory knows the pictures they are not taken back."""
    save = RingMemory.save

    def saved(self: RingMemory, path: Path) -> None:
        save(self, path)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RingMemory, "save", saved)
    code, out, err = run("generate", "pizza", *SMALL, "--memory", "bank")
    assert (code, err) == (0, "")
    assert "0 -> 4" in out
    assert len(tree(tmp_path)) == 5


def test_a_memory_saved_by_another_meanwhile_is_not_lost(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("generate", "pizza", *SMALL, "--memory", "bank")
    run(*call)
    draw = generation._draw

    def slowly(*args: Any) -> Tensor:
        theirs = RingMemory.load("bank")
        theirs.commit(theirs.features)
        theirs.save("bank")
        return draw(*args)

    monkeypatch.setattr(generation, "_draw", slowly)
    before = set(tree(tmp_path))
    refused(run(*call), "changed by another process", "Run the command again", code=1)
    assert set(tree(tmp_path)) == before
    assert len(RingMemory.load(tmp_path / "bank")) == 8
