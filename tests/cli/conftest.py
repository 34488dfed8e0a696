"""Commands are run in this process, in an empty folder, with one model for all."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from sparke.cli import main
from sparke.models import emoji
from tests.cli.common import Run

LOAD, LOAD_JUDGE = functools.cache(emoji.load), functools.cache(emoji.load_judge)


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that ships is read once: nothing writes to it."""
    monkeypatch.setattr(emoji, "load", LOAD)
    monkeypatch.setattr(emoji, "load_judge", LOAD_JUDGE)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty folder; its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(argv)
        return code, *capsys.readouterr()

    return call
