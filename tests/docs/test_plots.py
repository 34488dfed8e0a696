"""Pictures: the plots say what the results say, and every picture is there and used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import plots
from benchmarks._report import RESULTS
from tests.docs.blocks import ROOT, pages

IMAGES = ROOT / "docs" / "images"


def test_pictures_are_there_and_used() -> None:
    shown = set()
    for page in pages():
        for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            picture = page.parent / link
            assert picture.is_file(), f"{page.name} shows {link}"
            shown.add(picture.resolve())
    assert {path.resolve() for path in IMAGES.glob("*.png")} == shown


@pytest.mark.parametrize("name", plots.PLOTS)
def test_plot_has_the_figures_of_the_results(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[plots.Line] = []
    figure = plots._figure

    def kept(
        path: Path, columns: dict[str, list[plots.Line]], *args: object, **more: object
    ) -> None:
        drawn.extend(line for lines in columns.values() for line in lines)
        figure(path, columns, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(plots, "_figure", kept)
    plots.PLOTS[name](tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    source, key = ("grid", "rows") if name == "steps" else ("arena", "points")
    rows = json.loads((RESULTS / f"{source}.json").read_text())[key]
    modes = {value for row in rows for at, value in row.items() if at.startswith("modes")}
    found = [point for line in drawn for point in line.points]
    assert len(found) >= 20
    assert {point[1] for point in found} <= modes
    assert all(0 <= point[2] <= 1 for point in found)


def test_the_default_is_among_what_is_drawn() -> None:
    rows = json.loads((RESULTS / "arena.json").read_text())["points"]
    scales = {row["strength"] for row in rows if row["method"] == "sparke" and row["default"]}
    assert scales == {0.4}
