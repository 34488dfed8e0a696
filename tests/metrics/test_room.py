"""A matrix that would have no room is refused before it is made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparke import metrics
from sparke.errors import ArgumentError
from sparke.metrics import _room

CPU = torch.device("cpu")
N = 50_000


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gibibyte, and whatever would fill a matrix fails the test."""
    monkeypatch.setattr(_room, "available", lambda _: 1 << 30)

    def fill(*_: object) -> None:
        raise AssertionError("the matrix was made")

    for module in (metrics._vendi, metrics._cond_vendi, metrics._ken, metrics._relative_rke):
        monkeypatch.setattr(module, "fill", fill)


def ones() -> torch.Tensor:
    """50,000 rows of which one is in memory."""
    return torch.ones(1, 2, dtype=torch.float16).expand(N, 2)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("measure", "needed", "cure"),
    [
        (lambda x: metrics.vendi(x, bandwidth=1), 16 * N**2, "random_features=1024"),
        (lambda x: metrics.cond_vendi(x, x, bandwidth=1), 16 * N**2, "cond_rke"),
        (lambda x: metrics.ken(x, x, bandwidth=1), 32 * (2 * N) ** 2, 'kernel="cosine"'),
        (lambda x: metrics.relative_rke(x, x, bandwidth=1), 16 * N**2, "random_features=1024"),
    ],
)
def test_a_matrix_of_pairs_without_room_is_refused(
    measure: Callable[[Any], float], needed: int, cure: str
) -> None:
    with pytest.raises(ArgumentError) as raised:
        measure(ones())
    assert f"{needed:,} bytes" in str(raised.value)
    assert "1 GiB are free" in str(raised.value)
    assert cure in str(raised.value)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    "measure",
    [
        lambda x: metrics.vendi(x, kernel="cosine"),
        lambda x: metrics.vendi(x, bandwidth=1, random_features=4),
        lambda x: metrics.rke(x, kernel="cosine"),
    ],
)
def test_the_cures_work(measure: Callable[[Any], float]) -> None:
    assert measure(ones()) == pytest.approx(1)


@pytest.mark.usefixtures("little_memory")
def test_a_covariance_without_room_is_refused() -> None:
    with pytest.raises(ArgumentError, match="fewer random_features"):
        metrics.vendi(torch.ones(9, 2), bandwidth=1, random_features=9000)


def test_what_is_free_is_told_or_not_known() -> None:
    free = _room.available(CPU)
    assert free is None or free > 1 << 20


@pytest.mark.parametrize(
    ("limit", "expected"), [("1000000", 1_000_000 - 600_000 + 50_000), ("max", None)]
)
def test_the_limit_of_a_container_counts(
    limit: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_room, "CGROUP", tmp_path)
    unlimited = _room.available(CPU)
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 550000\ninactive_file 50000\n")
    assert _room._left_to_container() == expected
    if expected is not None:
        assert _room.available(CPU) == expected
    else:
        assert (_room.available(CPU) is None) == (unlimited is None)


def test_where_nothing_tells_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_room, "available", lambda _: None)
    _room.reserve("m", (10**9, 10**9), 4, CPU, "")
