"""`sparke scores` and `guiders`, help and version."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import sparke
from sparke.models import emoji
from tests.cli.common import Run


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
    assert 'sparke.wrap(target, guider="cads")' in out


def test_prompts_lists_all_that_can_be_said(run: Run) -> None:
    model = emoji.load()
    code, out, err = run("prompts")
    assert (code, err) == (0, "")
    listed = {entry.strip() for line in out.splitlines() for entry in line.split("  ")}
    assert listed >= {*model.prompts, *model.vocabulary.known}
    assert f"{len(model.prompts)} prompts" in out


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


@pytest.mark.parametrize("columns", ["0", "1", "-5", "x", "9" * 20])
def test_tables_and_help_can_be_read_at_any_width(
    columns: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERMINAL_WIDTH", columns)
    code, out, err = run("scores")
    assert (code, err) == (0, "")
    assert "cond-rke" in out
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert "generate" in out
    assert max(map(len, out.splitlines())) <= 400
    assert os.environ["COLUMNS"] == columns
