"""Figures in the prose are those of the committed results, as the page rounds them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks._report import RESULTS
from tests.docs.blocks import ROOT


def _rows(name: str, key: str = "rows") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())[key]
    return rows


def _one(rows: list[dict[str, Any]], /, **wanted: Any) -> dict[str, Any]:
    (found,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return found


def _modes(cell: str) -> str:
    """Of "10.19 0.993/0.999"."""
    return f"{float(cell.split()[0]):.1f}"


def _stated() -> Iterator[tuple[str, str]]:
    """Pages, and what they should say."""
    long = {row["guidance"]: f"{row['modes per prompt']:.1f}" for row in _rows("sequential")}
    ours, blind = long["cond-rke (default)"], long["rke, prompts unseen"]
    yield (
        "choosing.md",
        f'go from {long["unguided"]} unguided to {ours} with `"cond-rke"` and {blind} with',
    )

    sweep = _rows("sweep_emoji")
    cell = {"cfg": 6, "steps": 25, "way": "sequential"}
    at = {
        name: f"{_one(sweep, setting=name, **cell)['modes']:.1f}"
        for name in ("unguided", "CFG left on", "interval alone", "default")
    }
    yield (
        "choosing.md",
        (
            f"{at['unguided']} modes unguided, {at['CFG left on']} with the push alone, "
            f"{at['interval alone']} with the interval alone, {at['default']} with both"
        ),
    )

    few = _rows("few_steps")
    here = _one(few, **{"scale inside": 1.0, "steps": 4})
    bare, few_step = _modes(here["unguided"]), _modes(here["few-step, sequential"])
    default = _modes(here["default, sequential"])
    yield (
        "choosing.md",
        (
            f"from {bare} to {few_step} modes with the names unchanged, where the default "
            f"reaches {default}"
        ),
    )
    three, six = (_one(few, **{"scale inside": s, "steps": 8}) for s in (3.0, 6.0))
    yield (
        "faq.md",
        (
            f"{_modes(three['unguided'])} modes become {_modes(three['few-step, batches'])}; "
            f"with 6 inside, {_modes(six['unguided'])} become {_modes(six['few-step, batches'])}"
        ),
    )
    one = _one(few, **{"scale inside": 1.0, "steps": 8})
    yield "faq.md", f"at a scale of 1 the same model has {_modes(one['unguided'])} modes unguided"

    grid = _one(_rows("grid"), cfg=6.0, steps=25, way="sequential")
    yield (
        "methods/diversity.md",
        (
            f"{grid['modes']:.1f} modes unguided, {grid['modes published']:.1f} as published, "
            f"{grid['modes default']:.1f} with the default"
        ),
    )

    cost = _rows("diffusers_cost", "parts")
    share = {
        model: f"{_one(cost, model=model, rows=10_000)['% of a step']:.2f} %"
        for model in ("sd1.5", "sdxl")
    }
    yield "methods/diversity.md", f"{share['sd1.5']} to a step of SD1.5's UNet and {share['sdxl']}"
    yield "faq.md", f"By {share['sd1.5']} of a step of SD1.5's UNet, and {share['sdxl']} of one"

    step = json.loads((RESULTS / "guidance_step.json").read_text())
    ours_step = _one(step["table"], way="sparke")["against reading once"]
    yield (
        "methods/rke.md",
        f"{ours_step:.2f} times as long as reading them once, {step['ratio']:,.0f} times as fast",
    )
    vendi = _one(_rows("peers", "table"), way="vendi")["against sparke"]
    yield "methods/vendi.md", f"{vendi:.0f} times as long as conditional RKE's"

    eddy = _one(_rows("eddy_marginals"), form="printed sign", batch=2, scale=1.0)
    yield "differences.md", f"heavy mode 0.60 to {eddy['heavy mode']:.2f} in pairs at strength 1"

    imported = _one(_rows("import_time"), **{"import": "sparke"})
    yield "benchmarks.md", f"`import sparke` adds {imported['added, s']:.2f} s"

    census = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
    all_of = re.search(r"has (\d+) pipeline classes", census)
    reached = re.search(r"reached by `sparke.wrap` \| (\d+)", census)
    used = re.search(r"returned latents used \| (\d+)", census)
    assert all_of is not None
    assert reached is not None
    assert used is not None
    yield "seams.md", f"{reached[1]} of the {all_of[1]} pipeline classes"
    yield "seams.md", f"{used[1]} offer a callback whose returned latents are used"


@pytest.mark.parametrize(("page", "text"), list(_stated()), ids=lambda value: value[:40])
def test_figure_is_that_of_the_results(page: str, text: str) -> None:
    assert text in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_default_finds_more_than_published_in_each_cell() -> None:
    rows = [row for row in _rows("grid") if row.get("modes published") is not None]
    assert len(rows) == 9
    assert all(row["modes default"] > row["modes published"] for row in rows)
    assert "in each of the nine cells with memory" in (ROOT / "docs/differences.md").read_text()
