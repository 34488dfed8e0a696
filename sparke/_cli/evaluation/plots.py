"""The report's plots, as SVG that takes its ink from the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

from sparke import checks
from sparke._cli.evaluation.changes import Changes
from sparke._cli.evaluation.measures import Measured
from sparke._cli.evaluation.nearest import Nearest
from sparke._cli.evaluation.sets import printable

# Okabe and Ito: told apart by colour-blind eyes, on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = ("o", "s", "D", "^", "v", "P")
INK, FAINT = "#010203", "#040506"
"""Stand for colours of the page."""
WIDTH = 4.9
MOST_PROMPTS = 30
LONGEST = 26


def by_prompt(sets: Sequence[Measured], changes: Sequence[Changes]) -> str:
    """A dot for each set and prompt: its effective number of pictures."""
    names = _chosen(sets, changes)
    figure, axes = _figure(len(names))
    for row in range(len(names)):
        axes.axhline(row, color=FAINT, linewidth=0.8, zorder=0)
    for i, one in enumerate(sets):
        found = [(one.by_prompt[p].vendi, row) for row, p in enumerate(names) if p in one.by_prompt]
        x, y = zip(*found, strict=True) if found else ((), ())
        axes.scatter(
            x, y, color=COLOURS[i], marker=MARKS[i], s=42, label=printable(one.of.label), zorder=3
        )
    _rows(axes, names)
    axes.set_xlim(left=0)
    axes.set_xlabel("effective number of pictures (Vendi)")
    _legend(figure, axes, len(sets))
    return _svg(figure, "by-prompt")


def gains(change: Changes, index: int) -> str:
    """A bar for each prompt: what it gained or lost."""
    rows = _ends(change.prompts)
    figure, axes = _figure(len(rows))
    colours = [COLOURS[2] if c.by >= 0 else COLOURS[1] for c in rows]
    axes.barh(range(len(rows)), [c.by for c in rows], color=colours, height=0.6)
    axes.axvline(0, color=INK, linewidth=1)
    for row, c in enumerate(rows):
        axes.annotate(
            f"{round(c.by, 2) + 0.0:+.2f}",
            (c.by, row),
            xytext=(4 if c.by >= 0 else -4, 0),
            textcoords="offset points",
            ha="left" if c.by >= 0 else "right",
            va="center",
            fontsize=9.5,
            color=INK,
        )
    axes.margins(x=0.18)
    _rows(axes, [c.prompt for c in rows])
    axes.set_xlabel("change of the effective number of pictures")
    return _svg(figure, f"gains-{index}")


def likeness(sets: Sequence[Measured], nearest: Sequence[Nearest], kernel: str) -> str:
    """Share of the pictures whose nearest one is at least so alike."""
    figure, axes = _figure(7)
    for i, (one, found) in enumerate(zip(sets, nearest, strict=True)):
        values = found.likeness.sort(descending=True).values.tolist()
        share = [(k + 1) / len(values) for k in range(len(values))]
        axes.step(
            [1.0, *values] if kernel == "gaussian" else values,
            [0.0, *share] if kernel == "gaussian" else share,
            where="post",
            color=COLOURS[i],
            linewidth=2,
            label=printable(one.of.label),
        )
    axes.set_ylim(0, 1.02)
    if kernel == "gaussian":
        axes.set_xlim(1.04, -0.04)
    else:
        axes.invert_xaxis()
    axes.set_xlabel("likeness to the nearest picture")
    axes.set_ylabel("share of pictures")
    axes.grid(color=FAINT, linewidth=0.8)
    _legend(figure, axes, len(sets))
    return _svg(figure, "likeness")


def _chosen(sets: Sequence[Measured], changes: Sequence[Changes]) -> list[str]:
    """Prompts to show: all; or where there are many, those that changed most, or vary most."""
    if changes and changes[0].prompts:
        return [c.prompt for c in _ends(changes[0].prompts)]
    first = sets[0].by_prompt
    return sorted(first, key=lambda p: -first[p].vendi)[:MOST_PROMPTS]


def _ends(rows: Sequence[Any]) -> list[Any]:
    if len(rows) <= MOST_PROMPTS:
        return list(rows)
    half = MOST_PROMPTS // 2
    return [*rows[:half], *rows[-half:]]


def _figure(rows: int) -> tuple[Any, Any]:
    with checks.host("matplotlib", "draws the plots of the report", "eval"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(WIDTH, 1.0 + 0.3 * max(rows, 2)), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(colors=INK, labelsize=10.5, length=0, pad=6)
    axes.xaxis.label.set(color=INK, fontsize=10.5)
    axes.yaxis.label.set(color=INK, fontsize=10.5)
    return figure, axes


def _rows(axes: Any, names: Sequence[str]) -> None:
    short = [printable(n if len(n) <= LONGEST else f"{n[: LONGEST - 1]}…") for n in names]
    # Dollars in a prompt are no formulas.
    axes.set_yticks(range(len(names)), short, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _legend(figure: Any, axes: Any, sets: int) -> None:
    if sets > 1:
        found = figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside upper left",
            ncols=3,
            frameon=False,
            fontsize=10.5,
            labelcolor=INK,
        )
        for text in found.get_texts():
            text.set_parse_math(False)


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Letters stay letters: small, searchable, in the page's font. Ids must differ between plots.
    told = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    with matplotlib.rc_context(told), warnings.catch_warnings():
        # The page's font has letters that matplotlib's has not.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns|xmlns:xlink)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?)', r"\1\2", text, count=1)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for token, colour in ((INK, "currentColor"), (FAINT, "var(--faint)")):
        text = text.replace(token, colour)
    # Ids and what refers to them.
    text = re.sub(r'id="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]*)"', rf'href="#{name}-\1"', text)
    return re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)
