"""The types that users see: mypy over files of examples, its errors and revealed types compared.

mypy runs once, over copies in a folder of their own, with the strictness of this repository. Its
cache is kept with pytest's, so a second run takes seconds.
"""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from mypy import api

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HELD_BACK = "# mypy: ignore-errors\n"
LINE = re.compile(
    r"(?P<file>[\w/\\:.-]+\.py):(?P<line>\d+): (?P<kind>error|note): (?P<said>.*?)"
    r"(?:  \[(?P<code>[\w-]+)\])?$"
)
REVEALED = re.compile(r'Revealed type is "(.*)"')
CONFIG = """\
[mypy]
strict = True
python_version = 3.10
enable_error_code = ignore-without-code, truthy-bool
follow_imports = silent
[mypy-diffusers.*,transformers.*,k_diffusion.*]
ignore_missing_imports = True
follow_imports = skip
"""

Found = dict[int, list[tuple[str, str]]]  # line -> codes or "note", and what was said


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[dict[str, Found]]:
    """What mypy says of each file here, by line."""
    folder = tmp_path_factory.mktemp("typing")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MYPYPATH", str(ROOT))
        (folder / "mypy.ini").write_text(CONFIG)
        cache = getattr(pytestconfig, "cache", None)
        kept = folder / "cache" if cache is None else cache.mkdir("mypy")
        names = []
        for path in sorted(HERE.glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if text.startswith(HELD_BACK):
                names.append(path.name)
                text = text.replace(HELD_BACK, "\n", 1)
                (folder / path.name).write_text(text, encoding="utf-8")
        with FileLock(kept / "lock"):  # processes that share the tests share the cache
            out, err, _ = api.run(
                [
                    "--config-file",
                    "mypy.ini",
                    "--cache-dir",
                    str(kept),
                    "--no-pretty",
                    "--hide-error-context",
                    "--no-color-output",
                    "--no-error-summary",
                    *names,
                ]
            )
    assert not err, err
    said: dict[str, Found] = {name: defaultdict(list) for name in names}
    for text in out.splitlines():
        match = LINE.match(text)
        assert match is not None, text
        assert match["file"] in said, text
        code = match["code"] if match["kind"] == "error" else "note"
        said[match["file"]][int(match["line"])].append((code or "none", match["said"]))
    yield said
    shutil.rmtree(folder)


def marked(name: str, mark: str) -> dict[int, str]:
    """Line -> what stands behind a mark."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    split = ((n, line.partition(f"  # {mark}: ")) for n, line in enumerate(lines, 1))
    return {n: parts[2].strip() for n, parts in split if parts[1]}


def errors(found: Found) -> dict[int, list[str]]:
    codes = {n: sorted({c for c, _ in said if c != "note"}) for n, said in found.items()}
    return {n: kinds for n, kinds in codes.items() if kinds}


def test_what_is_right_is_accepted(found: dict[str, Found]) -> None:
    assert errors(found["accepted.py"]) == {}


def test_what_is_wrong_is_refused_for_the_reason_given(found: dict[str, Found]) -> None:
    expected = {
        n: sorted(code.strip() for code in codes.split(","))
        for n, codes in marked("refused.py", "E").items()
    }
    assert len(expected) > 50
    assert errors(found["refused.py"]) == expected


def revealed(found: dict[str, Found]) -> dict[int, str]:
    notes = {
        n: [match[1] for _, said in all_ if (match := REVEALED.match(said))]
        for n, all_ in found["accepted.py"].items()
    }
    return {n: types[0] for n, types in notes.items() if types}


def test_a_wrapped_target_has_the_targets_own_type(found: dict[str, Found]) -> None:
    types, groups = revealed(found), defaultdict(set)
    for n, group in marked("accepted.py", "R").items():
        groups[group].add(types[n])
    assert all(len(same) == 1 for same in groups.values()), groups
    shown = {group: same.pop() for group, same in groups.items()}
    assert shown.pop("6") == "Any"
    assert len(shown) == len(set(shown.values())) == 5
    assert not any(kind == "Any" for kind in shown.values())
    assert shown["1"].startswith("def (model: Any, x: torch._tensor.Tensor, sigmas:")
    assert shown["3"] == "accepted.StableDiffusionPipeline"


def test_public_names_have_the_types_told(found: dict[str, Found]) -> None:
    types, told = revealed(found), marked("accepted.py", "T")
    bare = {n: re.sub(r"[a-z_]+\.(?=[\w.])|(?<=\w)\?", "", types[n]) for n in told}
    assert bare == {n: re.sub(r"[a-z_]+\.(?=[\w.])", "", kind) for n, kind in told.items()}


def test_every_public_name_is_among_the_examples() -> None:
    import sparke

    text = "".join(
        (HERE / name).read_text(encoding="utf-8") for name in ("accepted.py", "refused.py")
    )
    assert [name for name in sparke.__all__ if f"sparke.{name}" not in text] == []
