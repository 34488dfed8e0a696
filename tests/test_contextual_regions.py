"""The example with four regions runs as it stands and shows what its page says it does."""

from __future__ import annotations

import pytest

from tests.example_scripts import example

contextual_regions = example("contextual_regions")

METHODS = (
    "unguided",
    "Vendi score guidance (beta 0)",
    "c-VSG as published",
    "c-VSG, scale 0.1",
    "c-VSG, gentle",
    "the same, of cond-rke",
)


@pytest.mark.slow
def test_exemplars_bring_about_the_region_that_the_prompt_does_not_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    contextual_regions.main(["--rounds", "2"])
    unnamed, named = capsys.readouterr().out.split("The prompt names the region")
    shares = []
    for table in (unnamed, named):
        lines = {
            method: line for line in table.splitlines() for method in METHODS if method in line
        }
        assert set(lines) == set(METHODS)
        cells = {method: line.removeprefix(method).split() for method, line in lines.items()}
        shares.append({method: float(found[0]) for method, found in cells.items()})
        assert min(float(found[4]) for found in cells.values()) >= 0.9
    without, within = shares
    # Measured, 6 rounds: .25 and .24 without, .43 to .69 with the contextual term.
    assert without["c-VSG as published"] > without["unguided"]
    assert without["c-VSG, scale 0.1"] >= without["unguided"] + 0.25
    assert without["the same, of cond-rke"] >= without["unguided"] + 0.25
    assert without["Vendi score guidance (beta 0)"] <= without["unguided"] + 0.1
    assert min(within.values()) >= 0.85
