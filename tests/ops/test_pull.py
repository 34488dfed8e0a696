"""The kernel-weighted pull against float64 loops, in every implementation a CPU runs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparke import ops
from sparke.errors import ArgumentError, ShapeError
from sparke.ops import _rows, _single, _tiles

ON_CPU = ("reference", "cpu")
each = pytest.mark.parametrize("implementation", ON_CPU)
HIDDEN = -math.inf


def oracle(
    query: Tensor, rows: Tensor, log_weight: Tensor | None, width: float | Tensor
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The definition, one query and one row at a time, in float64."""
    q, x = query.double().numpy(), rows.double().numpy()
    s = np.broadcast_to(np.asarray(width, dtype=np.float64), (len(q), 1))[:, 0]
    w = np.zeros((len(q), len(x))) if log_weight is None else log_weight.double().numpy()
    sums, means = np.full(len(q), HIDDEN), q.copy()
    for i in range(len(q)):
        terms = [w[i, j] - ((q[i] - x[j]) ** 2).sum() / s[i] ** 2 for j in range(len(x))]
        top = max(terms, default=HIDDEN)
        if top == HIDDEN:
            continue
        p = [math.exp(term - top) for term in terms]
        sums[i] = top + math.log(math.fsum(p))
        means[i] = sum(p[j] * x[j] for j in range(len(x))) / math.fsum(p)
    return sums, means


def agree(
    found: tuple[Tensor, Tensor],
    query: Tensor,
    rows: Tensor,
    log_weight: Tensor | None,
    width: float | Tensor,
) -> None:
    """To 1e-5 of the largest exponent and of the largest number, which float32 can keep.

    Means follow the scores: an error e of the exponents moves a mean by e times the rows' spread.
    """
    sums, means = oracle(query, rows, log_weight, width)
    lse, mean = (part.double().numpy() for part in found)
    assert lse.shape == sums.shape
    assert mean.shape == means.shape
    if not len(rows):
        assert (lse == HIDDEN).all()
        assert (mean == means).all()
        return
    gaps = torch.cdist(query.double(), rows.double()).square().numpy()
    exponent = 1 + (gaps / np.asarray(width, dtype=np.float64) ** 2).max()
    size = max(float(rows.abs().max()), float(query.abs().max()), 1.0)
    spread = float((rows.double() - rows.double().mean(0)).abs().max())
    seen = sums > HIDDEN
    assert ((lse == HIDDEN) == ~seen).all()
    assert np.abs(lse[seen] - sums[seen]).max(initial=0) <= 1e-5 * exponent
    assert np.abs(mean - means).max(initial=0) <= 1e-5 * (size + exponent * spread)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    b, n, d = draw(st.integers(1, 5)), draw(st.integers(0, 60)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    rows = torch.randn(n, d, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    rows = rows.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))
    near = rows[:1].float() if n else torch.zeros(1, d)
    query = near + torch.randn(b, d, generator=generator)
    weight = None
    if draw(st.booleans()):
        weight = -3 * torch.rand(b, n, generator=generator)
        hide = draw(st.sampled_from([0.0, 0.3, 0.9]))
        weight[torch.rand(b, n, generator=generator) < hide] = HIDDEN
        if draw(st.booleans()):
            weight[0] = HIDDEN
    width: float | Tensor = draw(st.sampled_from([0.5, 3.0, 100.0]))
    if draw(st.booleans()):
        width = width * (0.5 + torch.rand(b, 1, generator=generator))
    return {"query": query, "rows": rows, "log_weight": weight, "width": width}


@pytest.mark.parametrize("known", [False, True])
@each
@given(given=problems(), tile=st.sampled_from([2**6, 2**9, 2**21]))
@settings(max_examples=60)
def test_it_is_the_definition(
    given: dict[str, Any], tile: int, implementation: str, known: bool
) -> None:
    extra = dict(zip(("norms", "center"), ops.squared_norms(given["rows"]), strict=True))
    before = _rows.TILE_BYTES
    _rows.TILE_BYTES = tile
    try:
        found = ops.pull(**given, **(extra if known else {}), implementation=implementation)
        alone = ops.log_sum(**given, **(extra if known else {}), implementation=implementation)
    finally:
        _rows.TILE_BYTES = before
    agree(found, **given)
    torch.testing.assert_close(alone, found[0], rtol=1e-6, atol=1e-6)


def case(
    b: int = 3, n: int = 50, d: int = 64, *, offset: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator) + offset
    query = rows[torch.arange(b) % n] + 0.5 * torch.randn(b, d, generator=generator)
    weight = -2 * torch.rand(b, n, generator=generator)
    return {"query": query, "rows": rows, "log_weight": weight, "width": d**0.5}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 300, 4096), (16, 300, 4096), (64, 130, 2048), (70, 3, 2), (2, 6, 262_144)]
)
@each
def test_large_shapes(shape: tuple[int, int, int], known: bool, implementation: str) -> None:
    given = case(*shape)
    extra: dict[str, Any] = {}
    if known:
        extra["norms"], extra["center"] = ops.squared_norms(given["rows"])
    agree(ops.pull(**given, **extra, implementation=implementation), **given)


@pytest.mark.parametrize("known", [False, True])
@each
def test_rows_far_from_the_origin_keep_their_digits(known: bool, implementation: str) -> None:
    given = case(3, 400, 1024, offset=1e4)
    extra: dict[str, Any] = {}
    if known:
        extra["norms"], extra["center"] = ops.squared_norms(given["rows"])
    lse, mean = ops.pull(**given, **extra, implementation=implementation)
    sums, means = oracle(**given)
    # Squared norms are 1e11 here, and float32 of them is good to 1e4; the sums are to 1e-5.
    assert np.abs(lse.double().numpy() - sums).max() < 1e-5 * 2 * 1024 / given["width"] ** 2
    # What is returned is near 1e4, where float32 steps by 1e-3.
    assert np.abs(mean.double().numpy() - means).max() <= 1e-3


def test_float64_keeps_float64() -> None:
    given = {key: v.double() if isinstance(v, Tensor) else v for key, v in case().items()}
    for implementation in ON_CPU:
        lse, mean = ops.pull(**given, implementation=implementation)
        sums, means = oracle(**given)
        np.testing.assert_allclose(lse.numpy(), sums, rtol=1e-12)
        np.testing.assert_allclose(mean.numpy(), means, rtol=1e-10, atol=1e-12)


@each
def test_a_later_row_may_outweigh_all_before(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rows, "TILE_BYTES", 2**8)
    rows = torch.arange(40.0).flip(0)[:, None].repeat(1, 16)  # nearer and nearer
    given: dict[str, Any] = {"query": torch.zeros(2, 16), "rows": rows, "width": 2.0}
    weight = torch.zeros(2, 40)
    weight[1, 20:] = HIDDEN
    agree(ops.pull(**given, log_weight=weight, implementation=implementation), **given,
          log_weight=weight)  # fmt: skip


def test_tiles_that_cannot_matter_are_not_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "TILE_BYTES", 2**8)
    read: list[bool] = []
    admits = _tiles.Online.admits

    def noted(self: _tiles.Online, scores: Tensor) -> bool:
        read.append(admits(self, scores))
        return read[-1]

    monkeypatch.setattr(_tiles.Online, "admits", noted)
    monkeypatch.setattr(_single, "fits", lambda rows: False)
    rows = torch.arange(40.0)[:, None].repeat(1, 16)
    given: dict[str, Any] = {"query": torch.zeros(1, 16), "rows": rows, "width": 2.0}
    norms, center = ops.squared_norms(rows)
    found = ops.pull(**given, log_weight=None, norms=norms, center=center, implementation="cpu")
    agree(found, **given, log_weight=None)
    assert read == [True] + 9 * [False]  # tiles of 4; row 4 weighs exp(-64)
    read.clear()
    ops.pull(
        **{**given, "width": 1e3}, log_weight=None, norms=norms, center=center,
        implementation="cpu",
    )  # fmt: skip
    assert read == 10 * [True]


def test_what_is_left_out_is_bounded() -> None:
    """Half the bank sits just below the bound: it may be missing, and shifts the mean by less."""
    n, d = 4000, 600
    rows = torch.zeros(n, d)
    near = rows[:2000]
    near += 0.01 * torch.randn(2000, d, generator=torch.Generator().manual_seed(0))
    gap = math.log(n / _tiles.NEGLIGIBLE) + 1
    rows[2000:, 0] = 1.0
    query, weight = torch.zeros(1, d), torch.zeros(1, n)
    weight[0, 2000:] = -gap + 1.0
    _, mean = ops.pull(query, rows, weight, 1.0, implementation="cpu")
    _, means = oracle(query, rows, weight, 1.0)
    assert np.abs(mean.double().numpy() - means).max() <= _tiles.NEGLIGIBLE + 1e-7


@each
def test_a_broken_query_breaks_no_other(implementation: str) -> None:
    given = case(4, 200, 2048)
    whole = ops.pull(**given, implementation=implementation)
    given["query"] = given["query"].clone()
    given["query"][1, 3] = math.nan
    given["query"][2, 3] = math.inf
    lse, mean = ops.pull(**given, implementation=implementation)
    for i in (0, 3):
        torch.testing.assert_close(lse[i], whole[0][i])
        torch.testing.assert_close(mean[i], whole[1][i])
    assert not bool(lse[1].isfinite())


@each
def test_nothing_pulls_a_query_without_rows(implementation: str) -> None:
    query = torch.randn(2, 8)
    for rows, weight in (
        (torch.zeros(0, 8), None),
        (torch.zeros(0, 0), None),
        (torch.randn(9, 8), torch.full((2, 9), HIDDEN)),
    ):
        lse, mean = ops.pull(query, rows, weight, 1.0, implementation=implementation)
        assert lse.tolist() == [HIDDEN, HIDDEN]
        assert torch.equal(mean, query)
        assert torch.equal(ops.log_sum(query, rows, weight, 1.0), lse)
    none = ops.pull(query[:0], torch.randn(9, 8), None, 1.0, implementation=implementation)
    assert [part.shape for part in none] == [(0,), (0, 8)]


@each
def test_strides_do_not_matter(implementation: str) -> None:
    given = case(3, 120, 1024)
    expected = ops.pull(**given, implementation=implementation)
    wide = torch.zeros(240, 2048)
    wide[::2, :1024] = given["rows"]
    for rows in (wide[::2, :1024], given["rows"].T.contiguous().T):
        assert not rows.is_contiguous()
        query = given["query"].T.contiguous().T
        found = ops.pull(**{**given, "rows": rows, "query": query}, implementation=implementation)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each
def test_the_same_arguments_give_the_same_bits_and_stay(implementation: str) -> None:
    given = case(5, 200, 1024)
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}
    first = ops.pull(**given, implementation=implementation)
    second = ops.pull(**given, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for name in ("query", "rows", "log_weight"):
        assert torch.equal(given[name], copies[name])


@each
def test_a_batch_is_its_queries_one_by_one(implementation: str) -> None:
    given = case(6, 200, 1024)
    lse, mean = ops.pull(**given, implementation=implementation)
    for i in range(6):
        own = {**given, "query": given["query"][i : i + 1],
               "log_weight": given["log_weight"][i : i + 1]}  # fmt: skip
        alone = ops.pull(**own, implementation=implementation)
        torch.testing.assert_close(lse[i : i + 1], alone[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mean[i : i + 1], alone[1], rtol=1e-5, atol=1e-6)


def test_half_rows_are_never_converted_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(2, 600, 2048)
    rows = given["rows"].half()
    norms, center = ops.squared_norms(rows)
    taken: list[int] = []
    empty = Tensor.new_empty

    def counted(self: Tensor, *size: int, **options: Any) -> Tensor:
        taken.append(math.prod(size))
        return empty(self, *size, **options)

    monkeypatch.setattr(Tensor, "new_empty", counted)
    ops.pull(**{**given, "rows": rows}, norms=norms, center=center, implementation="cpu")
    assert taken == [_rows.tile_rows(2048, torch.float32, 2) * 2048]


def test_norms_are_about_the_center() -> None:
    rows = torch.randn(500, 2048) + 100
    norms, center = ops.squared_norms(rows)
    expected = (rows.double() - center.double()).square().sum(1)
    torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=0)
    assert float((center - 100).abs().max()) < 1
    own, same = ops.squared_norms(rows.half(), torch.zeros(2048))
    assert torch.equal(same, torch.zeros(2048))
    torch.testing.assert_close(
        own.double(), rows.half().double().square().sum(1), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("size", [(0, 5), (1, 5)])
def test_norms_of_few_rows(size: tuple[int, int]) -> None:
    norms, center = ops.squared_norms(torch.ones(size))
    assert norms.tolist() == [0.0] * size[0]
    assert center.tolist() == [float(size[0])] * 5


def test_inference_mode_and_gradients_are_left_alone() -> None:
    given = case()
    expected = ops.pull(**given)
    given["query"].requires_grad_()
    found = ops.pull(**given)
    assert not any(part.requires_grad for part in found)
    with torch.inference_mode():
        found = ops.pull(**given)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each
@pytest.mark.parametrize("n", [0, 40])
def test_a_compiler_sees_one_call(implementation: str, n: int) -> None:
    given = case(2, 40, 64)
    given["rows"], given["log_weight"] = given["rows"][:n], given["log_weight"][:, :n]

    def direction(query: Tensor) -> Tensor:
        lse, mean = ops.pull(**{**given, "query": query}, implementation=implementation)
        alone = ops.log_sum(**{**given, "query": query}, implementation=implementation)
        return (query * 2 - mean) * lse[:, None].exp() + alone[:, None].exp()

    compiled = torch.compile(direction, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(given["query"]), direction(given["query"]))


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"query": torch.zeros(3, 9)}, ShapeError, "same width"),
        ({"rows": torch.zeros(50)}, ShapeError, "same width"),
        ({"log_weight": torch.zeros(3, 49)}, ShapeError, "log_weight"),
        ({"norms": torch.zeros(50)}, ArgumentError, "center"),
        ({"norms": torch.zeros(49), "center": torch.zeros(64)}, ShapeError, "norms"),
        ({"norms": torch.zeros(50), "center": torch.zeros(9)}, ShapeError, "center"),
        ({"width": 0.0}, ArgumentError, "width"),
        ({"implementation": "cuda"}, ArgumentError, "implementation"),
        ({"implementation": "triton"}, ArgumentError, "CUDA"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        ops.pull(**{**case(), **change})


def test_small_banks_take_the_plain_way() -> None:
    from sparke.ops._pull import pick

    assert pick(torch.zeros(1, 4), torch.zeros(10, 4)) == "reference"
    assert pick(torch.zeros(1, 4096), torch.zeros(100, 4096)) == "cpu"
    assert pick(torch.zeros(1, 4), torch.zeros(10, 4, device="meta")) == "reference"
