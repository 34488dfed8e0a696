"""examples/sparke-plugin-example, installed as a user installs it and used without touching sparke.

pip builds and installs it into a folder of its own. The build backend, hatchling, is taken from
this environment where it is installed; else pip fetches it, as it does for everybody.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "sparke-plugin-example"
WRAPPED = """
import inspect, smalldiffusion, sparke, torch
assert not any(name.startswith("sparke_plugin") for name in __import__("sys").modules)
sampler = sparke.wrap(smalldiffusion.samples, score="neighbours", scale=1.0)
assert inspect.isgeneratorfunction(sampler)
model = smalldiffusion.IdealDenoiser(torch.tensor([[2.0, 2.0], [-2.0, 2.0], [0.0, -3.0]]))
sigmas = smalldiffusion.ScheduleLogLinear(100).sample_sigmas(10)
*_, x = sampler(model, sigmas, batchsize=4)
print(tuple(x.shape), len(sampler.memory), type(sampler.guider.score).__name__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed the example into."""
    folder = tmp_path_factory.mktemp("plugin")
    here = importlib.util.find_spec("hatchling") is not None
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    isolation = ["--no-build-isolation"] if here else []
    done = run([*command, str(folder / "site"), *isolation, str(EXAMPLE)], path=ROOT, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(command: list[str], *, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In another process that finds this sparke, and what lies in `path`."""
    environment = {
        # make tells pip to look for a file in the folder that it is run in.
        **{name: value for name, value in os.environ.items() if "CONSTRAINT" not in name},
        "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]),
        "COLUMNS": "150",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_it_installs_as_a_package_of_its_own(installed: Path) -> None:
    (info,) = installed.glob("sparke_plugin_example-*.dist-info")
    assert (info / "entry_points.txt").is_file()
    assert list(info.rglob("LICENSE"))
    names = {path.name for path in (installed / "sparke_plugin_example").iterdir()}
    assert {"__init__.py", "py.typed", "neighbours.py", "smalldiffusion.py"} <= names
    assert not (installed / "sparke").exists()


def test_sparke_scores_lists_it(installed: Path, tmp_path: Path) -> None:
    with_it = run([sys.executable, "-m", "sparke", "scores"], path=installed, cwd=tmp_path)
    without = run([sys.executable, "-m", "sparke", "scores"], path=tmp_path, cwd=tmp_path)
    assert (with_it.returncode, without.returncode) == (0, 0), with_it.stderr + without.stderr
    assert "neighbours" not in without.stdout
    (line,) = (line for line in with_it.stdout.splitlines() if " neighbours " in line)
    for words in ("Distance to the k nearest rows", "2103.04551", "sparke-plugin"):
        assert words in line
    assert "cannot be used" not in with_it.stdout


def test_it_wraps_the_sampler_of_smalldiffusion(installed: Path, tmp_path: Path) -> None:
    done = run([sys.executable, "-c", WRAPPED], path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(4, 2) 4 Neighbours"
    without = run([sys.executable, "-c", WRAPPED], path=tmp_path, cwd=tmp_path)
    assert without.returncode != 0
    assert "no backend accepts it" in without.stderr


def test_its_own_tests_pass(installed: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = run(command, path=installed, cwd=EXAMPLE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_its_example_prints_what_it_measures(installed: Path, tmp_path: Path) -> None:
    script = EXAMPLE / "examples" / "modes.py"
    done = run([sys.executable, str(script), "--batches", "3"], path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0].rstrip(",") for row in rows] == ["bare"] + ["neighbours"] * 2 + ["rke"] * 2
    assert all(1 <= float(row[-2]) <= 8 for row in rows)
