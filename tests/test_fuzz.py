"""A short run of `benchmarks.fuzz`: damaged files are refused in a word of ours, or behave."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import _mutations
from benchmarks._loaders import LOADERS, Bench, Loader
from sparke.errors import SparkeError

pytest.importorskip("usearch")

EXAMPLES = 25


@pytest.fixture(scope="module", params=LOADERS, ids=lambda loader: loader.name)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(request.param, tmp_path_factory.mktemp("whole"))


def test_a_whole_file_is_read(bench: Bench) -> None:
    assert bench.tried(bench.data) is None


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rng=st.randoms(use_true_random=False))
def test_a_damaged_file_is_refused_or_behaves(bench: Bench, rng: random.Random) -> None:
    refused = bench.tried(bench.loader.change(rng, bench.data))
    assert refused is None or isinstance(refused, SparkeError), repr(refused)
    assert refused is None or str(refused)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=300))
def test_noise_is_refused_or_behaves(bench: Bench, noise: bytes) -> None:
    refused = bench.tried(noise)
    assert refused is None or isinstance(refused, SparkeError), repr(refused)


def test_a_loader_that_fails_is_noticed(tmp_path: Path) -> None:
    def make(folder: Path) -> Path:
        (folder / "file").write_bytes(b"12")
        return folder / "file"

    def naive(path: Path) -> None:
        int(path.read_bytes())

    def careless(path: Path) -> None:
        path.write_bytes(b"")
        raise SparkeError("refused")

    change = _mutations.of_bytes
    refused = Bench(Loader("naive", make, change, naive, 1), tmp_path).tried(b"x")
    assert isinstance(refused, ValueError)
    with pytest.raises(AssertionError, match="changed"):
        Bench(Loader("careless", make, change, careless, 1), tmp_path).tried(b"x")
