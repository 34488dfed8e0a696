"""What the tests of the command line share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SMALL = ("-n", "4", "--steps", "6", "--seed", "7")

Done = tuple[int, str, str]
Run = Callable[..., Done]


def process(*argv: str, start: tuple[str, ...] = ("-m", "sparke"), **options: Any) -> Done:
    """A command in a process of its own; its exit code, stdout and stderr."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= options.pop("env", {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    done = subprocess.run(
        [sys.executable, *start, *argv], env=env, text=True, check=False, **options
    )
    return done.returncode, done.stdout or "", done.stderr or ""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(done: tuple[int, str, str], *said: str, code: int | None = None) -> None:
    """One readable line on stderr, a bad exit code, nothing else."""
    status, out, err = done
    assert status != 0 if code is None else status == code
    assert out == ""
    assert err.startswith("sparke: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert len(err) < 500
    assert err[:-1].isprintable()
    assert "Traceback" not in err
    assert "SPARKE_TRACEBACK" not in err
    for words in said:
        assert words in err
