"""Every command on the pages would be taken; the quick ones are run."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparke.cli import main
from tests.docs.blocks import ROOT, pages
from tests.docs.commands import Refused, check, split, told

COMMANDS = sorted({tuple(words) for path in pages() for words in told(path)})
QUICK = ("scores", "guiders", "generate", "--version", "--help")


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 30
    assert {words[0] for words in COMMANDS} >= {"sparke", "make", "pip", "python"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_would_be_taken(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(words, monkeypatch)


def _quick(path: Path) -> list[list[str]]:
    """What can be run with nothing else at hand, or with what the page has made before."""
    commands = [words[1:] for words in told(path, blocks_only=True) if words[0] == "sparke"]
    made = {words[words.index("--out") + 1] for words in commands if "--out" in words}
    return [
        words
        for words in commands
        if words[:1] and (words[0] in QUICK or (words[0] == "eval" and made & set(words)))
    ]


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in pages() if _quick(p)],
)
def test_quick_commands_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for arguments in _quick(page):
        assert main(arguments) == 0
    if page.name == "quickstart.md":  # from its first line to its last
        assert {path.name for path in tmp_path.iterdir()} >= {
            "bank.safetensors", "pictures", "without", "with", "sparke-eval.html"
        }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "sparke scors",
        "sparke generate dog --stps 3",
        "sparke demo --cfg much",
        "make dem",
        "pip install '.[difusers]'",
        "python -m benchmarks.gird",
        "python -m benchmarks.grid --sedes 3",
        "python -m benchmarks --quick",
        "python examples/contextual_region.py",
        "python examples/contextual_regions.py --nonsense",
        "sparkle demo",
    ],
)
def test_a_wrong_command_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (words,) = split(text)
    with pytest.raises(Refused):
        check(words, monkeypatch)
    capsys.readouterr()


def test_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Say `make demo` or `sparke scores`, not `sparke.scores()`.\n\n"
        "```sh\nOMP_NUM_THREADS=1 python -m benchmarks.grid \\\n  --seeds 2  # long\n```\n"
    )
    assert told(page) == [
        ["python", "-m", "benchmarks.grid", "--seeds", "2"],
        ["make", "demo"],
        ["sparke", "scores"],
    ]


def test_every_benchmark_is_on_the_page() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    runnable = [
        path.stem
        for path in sorted((ROOT / "benchmarks").glob("*.py"))
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    assert len(runnable) >= 16
    assert [name for name in runnable if f"`python -m benchmarks.{name}" not in page] == []
