"""What the README and the page on diffusers show runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHODS = sorted(path.name for path in (ROOT / "docs" / "methods").glob("*.md"))
PAGES = ("README.md", "docs/diffusers.md", *(f"docs/methods/{name}" for name in METHODS))
BLOCKS = [
    pytest.param(block, id=f"{page}-{i}")
    for page in PAGES
    for i, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    )
]


def test_there_are_blocks_to_run() -> None:
    assert len(METHODS) >= 11
    assert len(BLOCKS) >= 6 + len(METHODS)


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {})
