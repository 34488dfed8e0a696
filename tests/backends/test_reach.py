"""The table of hooks in the documentation is what the pipelines do."""

from __future__ import annotations

import pytest

from tests.backends import reach, tiny

LISTED = reach.PAGE.read_text(encoding="utf-8").split(reach.BEGIN)[1].split(reach.END)[0]


@pytest.mark.parametrize("name", reach.NAMES)
def test_the_page_says_what_this_pipeline_does(name: str) -> None:
    (line,) = reach.section([reach.row(name)]).strip().splitlines()[2:]
    assert line in LISTED.splitlines()


def test_the_page_lists_every_tiny_pipeline_once() -> None:
    lines = LISTED.strip().splitlines()[2:]
    names = [line.split("`")[1] for line in lines]
    assert names == [type(tiny.shared(name)).__name__ for name in reach.NAMES]
