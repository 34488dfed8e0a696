"""The arena as pictures: one for each bed and way, a panel for each cell."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).parent.parent / "docs" / "images"
MARKS = "osv^D<>PXh*d"


def draw(points: Sequence[dict[str, Any]], folder: Path = IMAGES) -> list[Path]:
    """Write ``arena-BED-WAY.png``; returns their paths. Nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: pip install matplotlib")
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    methods = list(dict.fromkeys(p["method"] for p in points))
    colours = pyplot.get_cmap("tab20")
    style = {m: (colours(i % 20), MARKS[i % len(MARKS)]) for i, m in enumerate(methods)}
    for bed, way in dict.fromkeys((p["bed"], p["way"]) for p in points):
        here = [p for p in points if (p["bed"], p["way"]) == (bed, way)]
        cells = list(dict.fromkeys((p["cfg"], p["steps"]) for p in here))
        columns = max(1, len(cells) // 2)
        figure, axes = pyplot.subplots(
            -(-len(cells) // columns), columns, figsize=(4.2 * columns, 7.2), squeeze=False
        )
        for axis, (cfg, steps) in zip(axes.flat, cells, strict=False):
            axis.set_title(f"CFG {cfg:g}, {steps} steps")
            axis.set_xlabel("fidelity")
            axis.set_ylabel("effective modes")
            axis.axvspan(0.0, 0.95, color="0.92")
            for method in methods:
                line = sorted(
                    (p["strength"], p["fidelity"], p["modes"], p["default"])
                    for p in here
                    if (p["method"], p["cfg"], p["steps"]) == (method, cfg, steps)
                )
                if not line:
                    continue
                colour, mark = style[method]
                ours = method.startswith("sparke")
                axis.plot(
                    [f for _, f, _, _ in line],
                    [m for _, _, m, _ in line],
                    color=colour, marker=mark, markersize=4, label=method,
                    linewidth=2.2 if ours else 0.9, zorder=3 if ours else 2,
                )  # fmt: skip
                at = [(f, m) for _, f, m, default in line if default]
                axis.scatter(*zip(*at, strict=True), color=colour, marker=mark, s=70, zorder=4)
            axis.set_xlim(0.93, 1.002)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncol=6, frameon=False, fontsize=8)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        path = folder / f"arena-{bed}-{way}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
        print(f"drawn in {path.relative_to(IMAGES.parent.parent)}")
    return written
