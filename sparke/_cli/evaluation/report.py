"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparke import checks
from sparke._cli.evaluation import plots
from sparke._cli.evaluation.changes import SAME
from sparke._cli.evaluation.explain import number
from sparke._cli.evaluation.nearest import Pair
from sparke._cli.evaluation.sets import Set, printable
from sparke._cli.evaluation.told import Told
from sparke.backends._pictures import opened

TEMPLATE = Path(__file__).with_name("report.html.jinja")
THUMBNAIL = 112
STRIP = 8
MOST_ROWS = 500
"""Prompts in the table of all prompts; the JSON file has the rest."""


def html(told: Told, kernel: str) -> bytes:
    """The whole file.

    Raises:
        MissingHost: matplotlib or jinja2 is not installed.
        ArgumentError: a picture that was there is not any more.
    """
    with checks.host("jinja2", "writes the report", "eval"):
        import jinja2
    # Whatever a prompt or a file's name holds is text; only the plots are markup, and our own.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = printable
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    prompts = told.prompts
    found = template.render(
        told=told,
        number=number,
        colours=plots.COLOURS,
        pairs=[_shown(n.pairs, s.of, s.of) for s, n in zip(told.sets, told.nearest, strict=True)],
        copies=[
            _shown(pairs, one.of, told.reference)
            for one, pairs in zip(told.sets, told.copies, strict=False)
            if told.reference is not None
        ],
        strips=[_strips(told, i) for i in range(len(told.changes))],
        prompts=prompts[:MOST_ROWS],
        more_prompts=max(0, len(prompts) - MOST_ROWS),
        most_in_plot=plots.MOST_PROMPTS,
        plots=_plots(told, kernel),
    )
    return found.encode("utf-8", errors="replace")


def _plots(told: Told, kernel: str) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "by_prompt": Markup(plots.by_prompt(told.sets, told.changes)) if told.prompts else None,
        "gains": [
            Markup(plots.gains(change, i)) if len(change.prompts) > 1 else None
            for i, change in enumerate(told.changes)
        ],
        "likeness": Markup(plots.likeness(told.sets, told.nearest, kernel)),
    }


def _strips(told: Told, index: int) -> list[dict[str, Any]]:
    """Pictures of the prompts that gained and lost most, before and after."""
    change = told.changes[index]
    ends = {"Gained most": change.prompts[:1], "Lost most": change.prompts[-1:]}
    strips: list[dict[str, Any]] = []
    for said, (found,) in ((s, p) for s, p in ends.items() if p):
        if found.by > SAME if said == "Gained most" else found.by < -SAME:
            rows = [_strip(told, i, found.prompt) for i in (0, index + 1)]
            strips.append({"said": said, "prompt": found.prompt, "rows": rows})
    return [strip for strip in strips if all(row["pictures"] for row in strip["rows"])]


def _strip(told: Told, index: int, prompt: str) -> dict[str, Any]:
    one = told.sets[index]
    files = one.of.files or ()
    rows = [i for i, word in enumerate(one.prompts or ()) if word == prompt]
    found = [(one.of.names[i], files[i]) for i in rows[:STRIP] if files]
    return {
        "index": index,
        "vendi": number(one.by_prompt[prompt].vendi, 2),
        "n": len(rows),
        "shown": len(found),
        "pictures": [{"name": name, "data": _thumbnail(file)} for name, file in found],
    }


def _shown(pairs: Sequence[Pair], first: Set, second: Set) -> list[dict[str, Any]]:
    return [
        {
            "likeness": f"{pair.likeness:.3f}",
            "pictures": [
                {"name": one.names[i], "data": _thumbnail(one.files[i]) if one.files else None}
                for one, i in ((first, pair.first), (second, pair.second))
            ],
        }
        for pair in pairs
    ]


def _thumbnail(file: Path) -> str:
    """A small picture as a data URL."""
    picture = opened(file)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
