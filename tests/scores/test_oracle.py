"""Every score by name, against the definition written as loops and the authors' package."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from rke_score import RKE
from torch import Tensor
from vendi_score import vendi as vendi_score

import sparke
from sparke import metrics
from sparke.protocols import Crowded, Features, Selection
from tests import oracles
from tests.float64 import rows

ORDERS = [0.5, 1.0, 2.0, 5.0, math.inf]
S, S_PROMPT = 1.4, 0.8
HIDDEN = -math.inf


@dataclass
class Case:
    """One query against a bank, as lists, with the options of the score."""

    z: list[float]
    rows: list[list[float]]
    p: list[float]
    prompts: list[list[float]]
    kernel: str
    order: float
    s: float = S

    @property
    def prompt_weights(self) -> list[float]:
        return [oracles.prompt_similarity(t, self.p, S_PROMPT) ** 2 for t in self.prompts]


def rke(case: Case) -> float:
    ones = [1.0] * len(case.rows)
    return oracles.log_mean_square(case.z, case.rows, ones, case.kernel, case.s)


def cond_rke(case: Case) -> float:
    weights = case.prompt_weights
    return oracles.log_mean_square(case.z, case.rows, weights, case.kernel, case.s)


def vendi(case: Case) -> float:
    return oracles.vendi([*case.rows, case.z], case.kernel, case.s, case.order)


def cond_vendi(case: Case) -> float:
    rows, prompts = [*case.rows, case.z], [*case.prompts, case.p]
    return oracles.cond_vendi(rows, prompts, case.kernel, case.s, S_PROMPT, case.order)


def particle(case: Case) -> float:
    return -math.fsum(oracles.similarity(case.kernel, x, case.z, case.s) for x in case.rows)


def dpp(case: Case) -> float:
    return oracles.dpp_gain(case.z, case.rows, case.kernel, case.s, 1e-4)


# A new score gets its definition here; the tests below find it by name.
ORACLES: dict[str, Callable[[Case], float]] = {
    "rke": rke,
    "cond-rke": cond_rke,
    "vendi": vendi,
    "cond-vendi": cond_vendi,
    "particle": particle,
    "dpp": dpp,
}
# SPELL knows a radius and no kernel; tests/scores/test_spell.py is about it.
NAMES = [n for n in sparke.scores() if n != "spell"]


def takes(name: str, option: str) -> bool:
    return option in {field.name for field in fields(type(sparke.score(name)))}  # type: ignore[arg-type]


CASES = [
    pytest.param(name, kernel, order, id=f"{name}-{kernel}-{order}")
    for name in NAMES
    for kernel in ("gaussian", "cosine")
    for order in (ORDERS if takes(name, "order") else [1.0])
]
every_score = pytest.mark.parametrize(("name", "kernel", "order"), CASES)


def build(name: str, kernel: str, order: float, bandwidth: Any = S) -> sparke.Score:
    options: dict[str, Any] = {"kernel": kernel, "bandwidth": bandwidth}
    if takes(name, "order"):
        options["order"] = order
    if takes(name, "cond_bandwidth"):
        options["cond_bandwidth"] = S_PROMPT
    return sparke.score(name, **options)


def sides(b: int = 3, n: int = 7) -> tuple[Features, Features]:
    prompts = rows(1, 5, 4) + 0.5 * rows(b + n, 5, 5)
    return Features(rows(b, 4, 0), prompts[:b]), Features(rows(n, 4, 1), prompts[b:])


def cases(query: Features, bank: Features, kernel: str, order: float) -> list[Case]:
    assert query.cond is not None
    assert bank.cond is not None
    x, prompts = oracles.lists(bank.x), oracles.lists(bank.cond)
    return [
        Case(z, x, p, prompts, kernel, order)
        for z, p in zip(oracles.lists(query.x), oracles.lists(query.cond), strict=True)
    ]


def close(ours: Tensor, theirs: list[float], tolerance: float = 1e-9) -> None:
    expected = torch.tensor(theirs, dtype=ours.dtype)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_every_score_has_a_definition_here() -> None:
    assert set(NAMES) == set(ORACLES)


@every_score
def test_the_value_is_the_definition(name: str, kernel: str, order: float) -> None:
    query, bank = sides()
    value = build(name, kernel, order)(query, bank)
    assert value.shape == (3,)
    close(value, [ORACLES[name](case) for case in cases(query, bank, kernel, order)], 1e-7)


@every_score
@pytest.mark.parametrize("n", [1, 2])
def test_the_value_for_few_rows(name: str, kernel: str, order: float, n: int) -> None:
    query, bank = sides(2, n)
    value = build(name, kernel, order)(query, bank)
    close(value, [ORACLES[name](case) for case in cases(query, bank, kernel, order)], 1e-7)


@every_score
def test_the_value_is_the_definition_for_a_bandwidth_per_query(
    name: str, kernel: str, order: float
) -> None:
    query, bank = sides()
    widths = [0.5, 1.0, 3.0]
    value = build(name, kernel, order, torch.tensor(widths).double()[:, None])(query, bank)
    expected = cases(query, bank, kernel, order)
    for case, width in zip(expected, widths, strict=True):
        case.s = width
    close(value, [ORACLES[name](case) for case in expected], 1e-7)


@every_score
def test_in_single_precision_it_is_the_definition_still(
    name: str, kernel: str, order: float
) -> None:
    query, bank = sides()
    assert query.cond is not None
    assert bank.cond is not None
    value = build(name, kernel, order)(
        Features(query.x.float(), query.cond.float()), Features(bank.x.float(), bank.cond.float())
    )
    assert value.dtype == torch.float32
    expected = [ORACLES[name](case) for case in cases(query, bank, kernel, order)]
    close(value.double(), expected, 2e-5 if order == 0.5 else 2e-4)


@every_score
def test_hidden_rows_count_as_if_they_were_not_there(name: str, kernel: str, order: float) -> None:
    query, bank = sides()
    assert bank.cond is not None
    score = build(name, kernel, order)
    weight = torch.zeros(3, 7).double()
    weight[0, [1, 4]] = weight[1, 6] = HIDDEN
    value = score(query, Selection(bank.x, bank.cond, weight))
    for i, seen in enumerate(weight.isfinite()):
        alone = Features(query.x[i : i + 1], query.cond[i : i + 1])  # type: ignore[index]
        kept = Selection(bank.x[seen], bank.cond[seen], torch.zeros(1, int(seen.sum())).double())
        torch.testing.assert_close(value[i : i + 1], score(alone, kept), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["rke", "cond-rke"])
@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_weights_of_a_selection_weigh_the_mean(name: str, kernel: str) -> None:
    query, bank = sides()
    weight = torch.log(torch.rand(3, 7, generator=torch.Generator().manual_seed(3)).double())
    value = build(name, kernel, 1.0)(query, Selection(bank.x, bank.cond, weight))
    expected = [
        oracles.log_mean_square(case.z, case.rows, [math.exp(w) for w in line], kernel, S)
        for case, line in zip(cases(query, bank, kernel, 1.0), weight.tolist(), strict=True)
    ]
    close(value, expected)


@every_score
def test_the_crowding_is_the_others_share_of_the_increment(
    name: str, kernel: str, order: float
) -> None:
    query, bank = sides()
    score = build(name, kernel, order)
    assert isinstance(score, Crowded)
    expected = [
        oracles.crowding(
            case.z,
            case.rows,
            case.prompt_weights if score.requires.cond else [1.0] * 7,
            kernel,
            S,
        )
        for case in cases(query, bank, kernel, order)
    ]
    close(score.crowding(query, bank), expected)
    assert len({round(v, 6) for v in expected}) == 3


@every_score
def test_no_rows_give_a_constant_and_no_crowding(name: str, kernel: str, order: float) -> None:
    query, bank = sides(3, 0)
    score = build(name, kernel, order)
    leaf = query.x.clone().requires_grad_()
    value = score(Features(leaf, query.cond), bank)
    close(value, [1.0 if name.endswith("vendi") else 0.0] * 3)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert isinstance(score, Crowded)
    close(score.crowding(query, bank), [0.0] * 3)


# The identities that make the score of one sample a statement about the set.


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_the_score_tells_the_rke_of_the_set_with_the_sample(kernel: str) -> None:
    query, bank = sides()
    n = len(bank)
    value = build("rke", kernel, 1.0)(query, bank)
    norm = n**2 / metrics.rke(bank.x, kernel=kernel, bandwidth=S)
    for z, s in zip(query.x, value.tolist(), strict=True):
        together = torch.cat([bank.x, z[None]])
        expected = (n + 1) ** 2 / (norm + 1 + 2 * n * math.exp(-s))
        found = metrics.rke(together, kernel=kernel, bandwidth=S)
        assert found == pytest.approx(expected, rel=1e-10)


def test_the_score_tells_the_authors_rke_of_the_set_with_the_sample() -> None:
    query, bank = sides()
    n = len(bank)

    def theirs(x: Tensor) -> float:
        """n^2 / |K|_F^2 by the package of the paper."""
        return float(1 / RKE(kernel_bandwidth=[S]).compute_rke_mc_frobenius_norm(x.numpy())[S])

    norm = n**2 / theirs(bank.x)
    for z, s in zip(query.x, build("rke", "gaussian", 1.0)(query, bank).tolist(), strict=True):
        expected = (n + 1) ** 2 / (norm + 1 + 2 * n * math.exp(-s))
        assert theirs(torch.cat([bank.x, z[None]])) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_the_score_tells_the_conditional_rke_of_the_set_with_the_sample(kernel: str) -> None:
    query, bank = sides()
    assert query.cond is not None
    assert bank.cond is not None
    k_t = oracles.matrix(
        oracles.lists(bank.cond), lambda u, v: oracles.prompt_similarity(u, v, S_PROMPT)
    )
    k_x = oracles.matrix(oracles.lists(bank.x), lambda u, v: oracles.similarity(kernel, u, v, S))
    value = build("cond-rke", kernel, 1.0)(query, bank)
    for case, s in zip(cases(query, bank, kernel, 1.0), value.tolist(), strict=True):
        w = math.fsum(case.prompt_weights)
        above = oracles.frobenius2(k_t) + 1 + 2 * w
        below = oracles.frobenius2(oracles.hadamard(k_x, k_t)) + 1 + 2 * w * math.exp(-s)
        found = metrics.cond_rke(
            np.array([*case.rows, case.z]),
            np.array([*case.prompts, case.p]),
            kernel=kernel,
            bandwidth=S,
            cond_bandwidth=S_PROMPT,
        )
        assert found == pytest.approx(above / below, rel=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_vendi_is_the_authors(order: float) -> None:
    query, bank = sides()
    q: Any = "inf" if math.isinf(order) else order
    value = build("vendi", "gaussian", order)(query, bank)
    for z, ours in zip(query.x, value.tolist(), strict=True):
        together = oracles.lists(torch.cat([bank.x, z[None]]))
        k = np.array(oracles.matrix(together, lambda u, v: oracles.gaussian(u, v, S)))
        assert ours == pytest.approx(float(vendi_score.score_K(k, q=q)), rel=1e-7)


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_vendi_of_order_two_is_the_rke_of_the_set(kernel: str) -> None:
    query, bank = sides()
    value = build("vendi", kernel, 2.0)(query, bank)
    close(
        value,
        [metrics.rke(torch.cat([bank.x, z[None]]), kernel=kernel, bandwidth=S) for z in query.x],
    )


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_cond_vendi_is_the_metric_of_the_set(kernel: str) -> None:
    query, bank = sides()
    assert query.cond is not None
    assert bank.cond is not None
    value = build("cond-vendi", kernel, 1.0)(query, bank)
    expected = [
        metrics.cond_vendi(
            torch.cat([bank.x, z[None]]),
            torch.cat([bank.cond, p[None]]),
            kernel=kernel,
            bandwidth=S,
            cond_bandwidth=S_PROMPT,
        )
        for z, p in zip(query.x, query.cond, strict=True)
    ]
    close(value, expected)


@pytest.mark.parametrize(
    ("name", "order", "s"),
    [
        ("vendi", 0.1, 0.2),  # with wider kernels what float64 rounds away tells as well
        ("vendi", 0.5, 1.0),
        ("vendi", 0.9, 1.0),
        ("cond-vendi", 0.5, 1.0),
        ("cond-vendi", 0.9, 1.0),
    ],
)
def test_small_orders_count_small_eigenvalues_in_single_precision_too(
    name: str, order: float, s: float
) -> None:
    # Many rows in a plane: float32 alone would lose percents of the value to its rounding.
    x, prompts = rows(201, 2, 8).float(), (rows(1, 3, 9) + 0.3 * rows(201, 3, 10)).float()
    query, bank = Features(x[:1], prompts[:1]), Features(x[1:], prompts[1:])
    score = build(name, "gaussian", order, s)
    leaf = query.x.clone().requires_grad_()
    value = score(Features(leaf, query.cond), bank)
    assert value.dtype == torch.float32
    (case,) = cases(query, bank, "gaussian", order)
    case.s = s
    close(value.detach().double(), [ORACLES[name](case)], 1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    exact = query.x.double().requires_grad_()
    asked = Features(exact, prompts[:1].double())
    (expected,) = torch.autograd.grad(score(asked, bank).sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)
    assert float(gradient.norm()) > 1e-2
