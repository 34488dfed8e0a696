"""Entropies of kernel matrices: values, and gradients where eigenvalues are repeated or zero."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparke.entropy import check_order, entropy
from sparke.errors import ArgumentError
from tests import oracles

ORDERS = [0.5, 1.0, 2.0, 5.0, math.inf]
order = pytest.mark.parametrize("order", ORDERS)


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(x: Tensor) -> Tensor:
    return torch.exp((x[:, None] - x[None]).square().sum(-1) / -2) / len(x)


def slope(f: Callable[[Tensor], Tensor], x: Tensor, along: Tensor, step: float) -> float:
    """Central difference of f at x."""
    return float(f(x + step * along) - f(x - step * along)) / (2 * step)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(f(leaf), leaf)
    return found


@order
def test_the_value_is_the_definition(order: float) -> None:
    k = gram(rows(7, 3))
    expected = oracles.entropy(oracles.eigenvalues(oracles.lists(k * 7)), order)
    assert float(entropy(k, order)) == pytest.approx(expected, rel=1e-10)


@order
def test_matrices_come_in_stacks(order: float) -> None:
    k = torch.stack([gram(rows(5, 3, seed)) for seed in range(4)]).reshape(2, 2, 5, 5)
    expected = torch.stack([entropy(m, order) for m in k.flatten(0, 1)]).reshape(2, 2)
    torch.testing.assert_close(entropy(k, order), expected)


@order
def test_all_alike_is_one_and_all_different_is_n(order: float) -> None:
    alike, different = torch.full((6, 6), 1 / 6).double(), torch.eye(6).double() / 6
    assert float(entropy(alike, order).exp()) == pytest.approx(1, abs=1e-6)
    assert float(entropy(different, order).exp()) == pytest.approx(6, rel=1e-9)


def test_it_falls_with_the_order() -> None:
    values = [float(entropy(gram(rows(7, 3)), q)) for q in ORDERS]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1] + 0.1


@order
def test_gradcheck(order: float) -> None:
    x = rows(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entropy(gram(x), order), (x,))


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 5.0])
def test_repeated_eigenvalues_have_the_right_gradient(order: float) -> None:
    # Corners of a regular simplex: all eigenvalues but the largest are equal.
    x, along = torch.eye(5).double(), rows(5, 5)

    def value(x: Tensor) -> Tensor:
        return entropy(gram(x), order)

    values = torch.linalg.eigvalsh(gram(x))
    assert float(values[3] - values[0]) < 1e-12
    expected = slope(value, x, along, 1e-5)
    assert float((gradient(value, x) * along).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert abs(expected) > 1e-3


def test_tied_leaders_share_the_gradient() -> None:
    # Two clusters of two, far apart: the largest eigenvalue is double, and the entropy has a kink.
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1e3, 0.0], [1e3 + 1, 0.0]]).double()

    def value(x: Tensor) -> Tensor:
        return entropy(gram(x), math.inf)

    found = gradient(value, x)
    swapped = gradient(value, x[[2, 3, 0, 1]])[[2, 3, 0, 1]]
    torch.testing.assert_close(found, swapped, rtol=1e-9, atol=1e-12)
    # Widening both at once raises it along the path, kink or not.
    along = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]).double()
    expected = slope(value, x, along, 1e-5)
    assert float((found * along).sum()) == pytest.approx(expected, rel=1e-6)


def test_leaders_tied_up_to_rounding_share_the_gradient() -> None:
    basis = torch.linalg.qr(rows(5, 5))[0]
    k = (basis * torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1]).double()) @ basis.mT
    found = gradient(lambda k: entropy(k, math.inf), k)
    expected = -(basis[:, :2] @ basis[:, :2].mT) / 0.6
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@order
def test_moving_a_duplicate_has_the_right_gradient(order: float) -> None:
    # An eigenvalue is zero here and grows with the square of the way: PSD on both sides.
    x, along = rows(5, 3), torch.zeros(5, 3).double()
    x[1] = x[0]
    along[1] = rows(1, 3, 7)

    def value(x: Tensor) -> Tensor:
        return entropy(gram(x), order)

    assert float(torch.linalg.eigvalsh(gram(x))[0]) < 1e-15
    found = gradient(value, x)
    assert bool(found.isfinite().all())
    expected = slope(value, x, along, 1e-4)
    assert float((found * along).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@order
def test_moving_one_of_many_duplicates_away_has_the_right_gradient(order: float) -> None:
    # Three groups of duplicates: zero is a repeated eigenvalue, and the rest are not alike.
    x = rows(3, 3)[[0, 0, 0, 0, 1, 1, 2]]
    along = torch.zeros(7, 3).double()
    along[6] = rows(1, 3, 5)

    def value(x: Tensor) -> Tensor:
        return entropy(gram(x), order)

    expected = slope(value, x, along, 1e-5)
    assert abs(expected) > 1e-3
    assert float((gradient(value, x) * along).sum()) == pytest.approx(expected, rel=1e-4)


@order
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_duplicates_have_a_finite_gradient(order: float, dtype: torch.dtype) -> None:
    x = rows(1, 3).to(dtype).repeat(6, 1)
    found = gradient(lambda x: entropy(gram(x), order), x)
    # At the minimum there is no way up to first order.
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-3)


@pytest.mark.parametrize("order", [0, -1, math.nan, -math.inf, "two", None])
def test_a_forbidden_order_is_refused(order: float) -> None:
    with pytest.raises(ArgumentError, match="order must be above 0"):
        check_order(order)


def test_orders_may_be_infinite_or_whole() -> None:
    assert check_order(math.inf) == math.inf
    assert isinstance(check_order(2), float)
