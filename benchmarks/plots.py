"""The plots of "Choosing a score and a strength": python -m benchmarks.plots.

Nothing is measured here. What is drawn stands in ``benchmarks/results``: strength and interval in
``arena.json``, numbers of steps in ``grid.json``; the trained model that ships, modes above, the
share of right names below. Drawn on white, so that dark pages can show them too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._arena_plot import IMAGES
from benchmarks._report import RESULTS

Row = dict[str, Any]
WAYS = {"sequential": "one at a time, with memory", "batches": "16 at once"}
COLOURS = {1.0: "#1b6ca8", 3.0: "#b5541c", 6.0: "#3d7a3a"}
"""By guidance scale; dark enough for white, and told apart by the colour-blind."""


@dataclass
class Line:
    """What is drawn in one colour and style: points (x, modes, names)."""

    label: str
    colour: str
    style: str = "-"
    points: list[tuple[float, float, float]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    folder = parser.parse_args().out
    for name, draw in PLOTS.items():
        path = folder / f"choosing-{name}.png"
        draw(path)
        print(f"drawn in {path}")


def strength(path: Path) -> None:
    """Modes and names against `scale`, in 25 steps, beside the unguided model."""
    points = _read("arena", "points")
    columns = {}
    for way, title in WAYS.items():
        lines = []
        for cfg, colour in COLOURS.items():
            line = Line(f"CFG {cfg:g}", colour)
            here = {"bed": "emoji", "way": way, "cfg": cfg, "steps": 25}
            (bare,) = _of(points, method="unguided", **here)
            line.points.append((OFF, bare["modes"], bare["fidelity"]))
            for p in _of(points, method="sparke", **here):
                line.points.append((p["strength"], p["modes"], p["fidelity"]))
            lines.append(line)
        columns[title] = lines
    ticks = {OFF: "unguided"} | {2.0**i / 10: f"{2.0**i / 10:g}" for i in range(1, 6)}
    _figure(path, columns, "scale", marked=0.4, ticks=ticks, names=(0.975, 1.002))


OFF = 0.1


def interval(path: Path) -> None:
    """Modes and names where guidance is held off above a noise level, and nothing else is done."""
    points = _read("arena", "points")
    columns = {}
    for steps in (25, 6):
        lines = []
        for cfg in (3.0, 6.0):
            here = {"bed": "emoji", "way": "sequential", "cfg": cfg, "steps": steps}
            line = Line(f"CFG {cfg:g}", COLOURS[cfg])
            for p in _of(points, method="interval", **here):
                line.points.append((p["strength"], p["modes"], p["fidelity"]))
            (bare,) = _of(points, method="unguided", **here)
            line.points.append((ALWAYS, bare["modes"], bare["fidelity"]))
            (alone,) = _of(points, method="unguided", **here | {"cfg": 1.0})
            line.points.insert(0, (NEVER, alone["modes"], alone["fidelity"]))
            lines.append(line)
        columns[f"{steps} steps"] = lines
    label = "guidance on below this noise, in standard deviations of the data"
    _figure(path, columns, label, marked=1.6, ticks=TICKS)


NEVER, ALWAYS = 0.4, 6.4
TICKS = {NEVER: "never on", 0.8: "0.8", 1.6: "1.6", 3.2: "3.2", ALWAYS: "always on"}


def steps(path: Path) -> None:
    """Modes and names against the number of steps, unguided and with the default."""
    rows = _read("grid", "rows")
    columns = {}
    for way, title in WAYS.items():
        lines = []
        for cfg, colour in COLOURS.items():
            for label, key, style in (("unguided", "", ":"), ("sparke", " default", "-")):
                line = Line(f"CFG {cfg:g}, {label}", colour, style)
                for row in _of(rows, way=way, cfg=cfg):
                    names = (row[f"names{key}"] + row[f"names_cnn{key}"]) / 2
                    line.points.append((row["steps"], row[f"modes{key}"], names))
                lines.append(line)
        columns[title] = lines
    ticks = {4.0: "4", 8.0: "8", 25.0: "25"}
    _figure(path, columns, "steps", ticks=ticks, names=(0.0, 1.04))


PLOTS: dict[str, Callable[[Path], None]] = {
    "strength": strength,
    "interval": interval,
    "steps": steps,
}


def _read(name: str, key: str) -> list[Row]:
    rows: list[Row] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))[key]
    return rows


def _of(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _figure(
    path: Path,
    columns: dict[str, list[Line]],
    label: str,
    *,
    ticks: dict[float, str],
    marked: float | None = None,
    names: tuple[float, float] | None = None,
) -> None:
    """Modes above names, one column for each title, x in powers of two; `marked` is the default."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(columns), figsize=(4.6 * len(columns), 5.6), squeeze=False,
        sharex=True, sharey="row", height_ratios=(3, 2), facecolor="white",
    )  # fmt: skip
    for (above, below), (title, lines) in zip(axes.T, columns.items(), strict=True):
        above.set_title(title, fontsize=11)
        below.set_xlabel(label, fontsize=9)
        for line in lines:
            x, modes, right = zip(*sorted(line.points), strict=True)
            style = {"color": line.colour, "linestyle": line.style, "marker": "o", "markersize": 4}
            above.plot(x, modes, label=line.label, **style)
            below.plot(x, right, **style)
        for axis in (above, below):
            axis.grid(color="0.9")
            axis.set_xscale("log", base=2)
            if marked is not None:
                axis.axvline(marked, color="0.6", linewidth=0.8, zorder=1)
            axis.set_xticks(list(ticks), list(ticks.values()), fontsize=9)
            axis.minorticks_off()
    axes[0, 0].set_ylabel("effective modes per prompt")
    axes[1, 0].set_ylabel("right names")
    if names is not None:
        axes[1, 0].set_ylim(*names)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.01 + 0.035 * -(-len(labels) // 3), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
