"""Contextual repulsion against loops in float64; the hooks are tested with real transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparke import testing
from sparke.errors import (
    ArgumentError,
    GuidanceWarning,
    MissingPrompts,
    ShapeError,
    UnknownName,
)
from sparke.guidance import _blocks, _contextual_push
from sparke.guidance._contextual_span import Span
from sparke.guidance.contextual import Contextual
from sparke.memory import RingMemory
from sparke.metrics import vendi
from sparke.protocols import (
    Evaluation,
    EvaluationHook,
    Features,
    Guider,
    ModelHook,
    Requires,
    Run,
    Selection,
    State,
    Step,
)
from sparke.scores import RKE, CondRKE, Vendi, names
from sparke.scores import score as score_of

F64 = torch.float64
Rows = list[list[float]]
FIRST = Step(0, 10.0, 5.0, 20)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def alike(batch: int, tokens: int, width: int, seed: int = 0, apart: float = 0.2) -> Tensor:
    """Tokens of one prompt, a little different in each sample."""
    return drawn(tokens, width, seed=seed) + apart * drawn(batch, tokens, width, seed=seed + 100)


def begun(guider: Contextual, batch: int, cond: Tensor | None = None) -> Contextual:
    guider.begin(Run(torch.Size((batch, 4, 2, 2)), torch.device("cpu"), torch.float32, cond))
    return guider


def after_a_block(
    guider: Contextual,
    tokens: Tensor,
    *,
    step: Step = FIRST,
    branches: tuple[str, ...] = ("cond",),
    mask: Tensor | None = None,
    block: int = 0,
) -> Tensor | None:
    """What the guider adds to these tokens after a block."""
    batch = len(tokens) // max(len(branches), 1)
    guider.on_evaluation(Evaluation(step, branches, batch))
    return guider.edit(block, tokens, mask)


def change(guider: Contextual, tokens: Tensor, **where: Any) -> Tensor:
    found = after_a_block(guider, tokens, **where)
    assert found is not None
    return found


def close(ours: Tensor, expected: Any, tolerance: float = 1e-7) -> None:
    torch.testing.assert_close(
        ours.double(), torch.as_tensor(expected, dtype=F64), rtol=tolerance, atol=tolerance
    )


# --- the update, written out --------------------------------------------------------------------

Objective = Callable[[Rows, int], float]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def gaussian(a: list[float], b: list[float], h: float) -> float:
    return math.exp(-sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / (2 * h**2))


def entropy(kernel: Rows) -> float:
    values = np.linalg.eigvalsh(np.array(kernel))
    return -sum(float(v) * math.log(v) for v in values if v > 1e-300)


def vendi_entropy(rows: Rows, i: int, k: Callable[[list[float], list[float]], float]) -> float:
    """Of all rows together; the same for every i."""
    return entropy([[k(a, b) / len(rows) for b in rows] for a in rows])


def rke_of_one(rows: Rows, i: int, k: Callable[[list[float], list[float]], float]) -> float:
    others = [row for j, row in enumerate(rows) if j != i]
    return -math.log(sum(k(rows[i], row) ** 2 for row in others) / len(others))


def slope(objective: Objective, rows: Rows, i: int) -> list[float]:
    """Of the objective in row i, by central differences."""
    found = []
    for c in range(len(rows[i])):
        values = []
        for sign in (1, -1):
            moved = [list(row) for row in rows]
            moved[i][c] += sign * 1e-5
            values.append(objective(moved, i))
        found.append((values[0] - values[1]) / 2e-5)
    return found


def repelled(
    rows: Rows,
    objective: Objective,
    eta: float,
    m: int,
    *,
    normalize: bool = True,
    share: Objective = lambda rows, i: 1.0,
) -> Rows:
    for _ in range(m):
        moved = []
        for i, row in enumerate(rows):
            g = slope(objective, rows, i)
            scale = math.sqrt(dot(row, row) / dot(g, g)) if normalize else 1.0
            scale *= eta / m * share(rows, i)
            moved.append([a + scale * b for a, b in zip(row, g, strict=True)])
        rows = moved
    return rows


def expected_change(tokens: Tensor, objective: Objective, *args: Any, **options: Any) -> Tensor:
    rows = tokens.flatten(1)
    moved = torch.tensor(repelled(rows.tolist(), objective, *args, **options), dtype=F64)
    return (moved - rows).view_as(tokens)


def test_the_push_is_the_published_one_in_lengths_of_the_tokens() -> None:
    tokens = alike(3, 2, 3)
    ours = change(begun(Contextual(eta=0.3, iterations=4), 3), tokens)
    expected = expected_change(tokens, lambda r, i: vendi_entropy(r, i, cosine), 0.3, 4)
    assert ours.dtype == F64
    close(ours, expected)
    assert float(ours.norm()) > 0.1 * float(tokens.norm())


def test_the_push_is_the_published_one() -> None:
    tokens = alike(3, 2, 3)
    ours = change(begun(Contextual(eta=7.0, iterations=3, normalize=False), 3), tokens)
    close(
        ours,
        expected_change(tokens, lambda r, i: vendi_entropy(r, i, cosine), 7.0, 3, normalize=False),
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_vendi_of_another_kernel_is_its_logarithm_as_well(normalize: bool) -> None:
    tokens = drawn(3, 2, 2)
    guider = Contextual(
        "vendi", kernel="gaussian", bandwidth=2.0, eta=0.4, iterations=2, normalize=normalize
    )
    close(
        change(begun(guider, 3), tokens),
        expected_change(
            tokens,
            lambda r, i: vendi_entropy(r, i, lambda a, b: gaussian(a, b, 2.0)),
            0.4,
            2,
            normalize=normalize,
        ),
    )


def test_rke_is_an_objective_too_and_compares_cosines_by_default() -> None:
    tokens = alike(4, 2, 3)
    close(
        change(begun(Contextual("rke", eta=0.3, iterations=3), 4), tokens),
        expected_change(tokens, lambda r, i: rke_of_one(r, i, cosine), 0.3, 3),
    )
    close(
        change(begun(Contextual(RKE(bandwidth=2.0), eta=0.3, iterations=3), 4), tokens),
        expected_change(
            tokens, lambda r, i: rke_of_one(r, i, lambda a, b: gaussian(a, b, 2.0)), 0.3, 3
        ),
    )


def prompt_weight(p: list[float], t: list[float], s: float = 0.35) -> float:
    return math.exp(-(2 - 2 * cosine(p, t)) / s**2)


def test_a_score_that_weighs_prompts_leaves_other_prompts_alone() -> None:
    tokens, cond = alike(4, 2, 2), drawn(4, 3, seed=5)
    cond[1] = cond[0] + 0.1 * cond[1]
    cond[3] = -cond[0]
    prompts = cond.tolist()

    def mass(rows: Rows, i: int) -> list[float]:
        return [
            0.0 if j == i else prompt_weight(prompts[i], prompts[j]) * cosine(rows[i], rows[j]) ** 2
            for j in range(len(rows))
        ]

    def objective(rows: Rows, i: int) -> float:
        return -math.log(sum(mass(rows, i)))

    def crowding(rows: Rows, i: int) -> float:
        return 2 * sum(mass(rows, i)) / (1 + 2 * sum(mass(rows, i)))

    ours = change(begun(Contextual("cond-rke", eta=0.3, iterations=3), 4, cond), tokens)
    close(ours, expected_change(tokens, objective, 0.3, 3, share=crowding), 1e-6)
    lengths = ours.flatten(1).norm(dim=1)
    assert float(lengths[3]) < 1e-6 < 0.1 * float(lengths[0])


@dataclass(frozen=True)
class FirstFeature:
    """A score of one's own that looks at one feature, and knows no direction."""

    @property
    def requires(self) -> Requires:
        return Requires()

    def __call__(self, query: Features, bank: Features) -> Tensor:
        return (query.x[:, :1] - bank.x[:, 0]).square().mean(1)


def test_a_score_of_ones_own_sees_the_tokens_themselves() -> None:
    tokens = alike(3, 2, 2)
    ours = change(begun(Contextual(FirstFeature(), eta=0.3, iterations=2), 3), tokens)
    expected = expected_change(
        tokens, lambda r, i: sum((r[i][0] - row[0]) ** 2 for row in r) / 3, 0.3, 2
    )
    close(ours, expected)
    assert not ours.flatten(1)[:, 1:].any()


@pytest.mark.parametrize("name", names())
def test_few_coordinates_serve_every_score_of_ours(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = score_of(name, **{"spell": {"radius": 40.0}}.get(name, {}))
    tokens, cond = alike(4, 6, 10), drawn(1, 5).expand(4, 5)
    guider = begun(Contextual(score, eta=0.2, iterations=3), 4, cond)
    few = change(guider, tokens)
    monkeypatch.setattr(_contextual_push, "OURS", "nobody's")
    close(few, change(guider, tokens), 1e-6)
    assert few.any()


def test_coordinates_keep_inner_products_and_lead_back() -> None:
    for rows in (drawn(5, 40), 100 + 0.01 * drawn(5, 40), drawn(5, 3)):
        span = Span(rows)
        close(span.coordinates @ span.coordinates.mT, rows @ rows.mT, 1e-9)
        change = drawn(5, 5) @ (rows - rows.mean(0)) + drawn(5, 1, seed=1) * rows.mean(0)
        coefficients = torch.linalg.lstsq(rows.mT, change.mT).solution.mT
        close(span.back(coefficients @ span.coordinates), change, 1e-6)


# --- what the batch may look like ---------------------------------------------------------------


def test_tokens_end_up_further_apart() -> None:
    tokens = alike(4, 8, 16)
    numbers = [
        vendi((tokens + change(begun(Contextual(eta=eta), 4), tokens)).flatten(1), kernel="cosine")
        for eta in (0.01, 0.1, 1.0)
    ]
    before = vendi(tokens.flatten(1), kernel="cosine")
    assert before < numbers[0] < numbers[1] < numbers[2] < 4.0001
    assert numbers[2] > 3.9 > 2 > before


def test_the_branches_of_guidance_repel_among_themselves() -> None:
    uncond, cond = alike(3, 4, 6, seed=1), alike(3, 4, 6, seed=2)
    guider = begun(Contextual(eta=0.2), 3)
    both = change(guider, torch.cat([uncond, cond]), branches=("uncond", "cond"))
    alone = [change(guider, part) for part in (uncond, cond)]
    assert torch.equal(both, torch.cat(alone))
    guider.on_evaluation(Evaluation(FIRST, (), 3))  # a host that does not tell
    untold = guider.edit(0, torch.cat([uncond, cond]), None)
    assert untold is not None
    assert torch.equal(untold, both)


def test_rows_of_another_number_are_left_alone() -> None:
    guider = begun(Contextual(), 3)
    guider.on_evaluation(Evaluation(FIRST, ("cond",), 3))
    assert guider.edit(0, alike(4, 4, 6), None) is None
    assert after_a_block(guider, alike(2, 4, 6)) is None  # a batch the run was not begun with


def test_padding_neither_moves_nor_counts() -> None:
    tokens = alike(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    guider = begun(Contextual(eta=0.2), 3)
    ours = change(guider, tokens, mask=mask)
    assert not ours[mask == 0].any()
    assert ours[mask == 1].all()
    louder = torch.where(mask[:, :, None] == 1, tokens, 50.0)
    assert torch.equal(change(guider, louder, mask=mask), ours)
    even = torch.tensor([1, 1, 0, 1, 0]).expand(3, 5)
    short = change(guider, tokens[:, even[0] == 1])
    close(change(guider, tokens, mask=even)[:, even[0] == 1], short, 1e-9)
    assert torch.equal(change(guider, tokens, mask=even[:, :2]), change(guider, tokens))


def test_uneven_padding_is_held_in_every_move() -> None:
    tokens, mask = alike(3, 2, 3), torch.tensor([[1, 0], [1, 1], [1, 1]])
    ours = change(begun(Contextual(eta=0.3, iterations=3), 3), tokens, mask=mask)
    rows = (tokens * mask[:, :, None]).flatten(1).tolist()
    held = mask[:, :, None].expand(3, 2, 3).flatten(1).tolist()
    for _ in range(3):
        moved = []
        for i, row in enumerate(rows):
            g = slope(lambda r, i: vendi_entropy(r, i, cosine), rows, i)
            g = [a * h for a, h in zip(g, held[i], strict=True)]
            scale = 0.1 * math.sqrt(dot(row, row) / dot(g, g))
            moved.append([a + scale * b for a, b in zip(row, g, strict=True)])
        rows = moved
    whole = torch.tensor(rows, dtype=F64).view_as(tokens)
    close(ours, (whole - tokens) * mask[:, :, None])


@pytest.mark.parametrize("score", ["vendi", "rke", RKE(), Vendi()])
def test_equal_samples_stay_equal(score: Any) -> None:
    same = alike(1, 4, 6).expand(3, 4, 6)
    guider = begun(Contextual(score, eta=0.2), 3)
    assert not change(guider, same).any()
    assert not change(guider, same.float() * (1 + 1e-7 * drawn(3, 1, 1).float())).any()
    assert not change(guider, torch.zeros(3, 4, 6)).any()
    twins = torch.cat([same[:2], alike(1, 4, 6, seed=3)])
    moved = change(guider, twins)
    assert moved.isfinite().all()
    assert moved[2].any()


def test_orthogonal_samples_are_at_the_maximum_and_stay() -> None:
    assert not change(begun(Contextual(eta=0.2), 3), torch.eye(3)[:, None]).any()


def test_a_broken_sample_does_not_break_its_mates() -> None:
    tokens = alike(4, 4, 6)
    whole = change(begun(Contextual(eta=0.2), 3), tokens[:3])
    tokens[3, 1, 2] = math.nan
    ours = change(begun(Contextual(eta=0.2), 4), tokens)
    close(ours[:3], whole, 1e-12)
    assert not ours[3].any()


def test_a_push_without_bounds_is_left_out_and_said() -> None:
    tokens = alike(3, 4, 6).float()
    with pytest.warns(GuidanceWarning, match=r"not finite for 3 of 3 samples.*smaller eta"):
        assert not change(begun(Contextual(eta=1e99, normalize=False), 3), tokens).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_computes_in_float32(dtype: torch.dtype) -> None:
    tokens = (300 * alike(3, 20, 30)).to(dtype)
    guider = begun(Contextual(eta=0.2, iterations=5), 3)
    ours = change(guider, tokens)
    assert ours.dtype == torch.float32
    close(ours, change(guider, tokens.double()), 1e-3)


def test_it_works_where_gradients_are_off_and_leaves_the_tokens_alone() -> None:
    tokens = alike(3, 4, 6)
    for score in ("vendi", "cond-vendi", FirstFeature()):
        guider = begun(Contextual(score, eta=0.2, iterations=2), 3, drawn(1, 4).expand(3, 4))
        before = tokens.clone()
        expected = change(guider, tokens)
        with torch.inference_mode():
            assert torch.equal(change(guider, tokens), expected)
        assert torch.equal(tokens, before)
        leaf = tokens.clone().requires_grad_()
        assert torch.equal(change(guider, leaf), expected)
        assert not expected.requires_grad


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "total", "count"),
    [(1, 20, 1), (4, 28, 4), (4, None, 4), (0.15, 28, 4), (0.15, 4, 1), (0.05, 20, 1), (0.5, 9, 5)],
)
def test_the_first_steps_push(steps: float, total: int | None, count: int) -> None:
    guider, tokens = begun(Contextual(steps=steps), 3), alike(3, 4, 6)
    pushed = [
        after_a_block(guider, tokens, step=Step(i, 10.0 - i, 9.0 - i, total)) is not None
        for i in range(9)
    ]
    assert pushed == [i < count for i in range(9)]


def test_a_share_of_an_unknown_number_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"steps=0\.15 .*Give a whole number"):
        after_a_block(begun(Contextual(), 3), alike(3, 4, 6), step=Step(0, 10.0, 5.0))


def test_the_same_evaluation_gives_the_same_push_whatever_came_between() -> None:
    memory = RingMemory()
    memory.commit(Features(drawn(5, 6).float()))
    guider = begun(
        Contextual(eta=0.2, memory=memory, memory_score="rke", memory_tokens=1, steps=3), 3
    )
    guider._hooked = 1
    tokens, second = alike(3, 4, 6), Step(1, 5.0, 4.0, 20)
    first = change(guider, tokens)
    later = change(guider, tokens, step=second)
    assert not torch.equal(first, later)
    after_a_block(guider, 2 * tokens, block=0)
    assert torch.equal(change(guider, tokens, step=second), later)
    assert torch.equal(change(guider, tokens), first)
    begun(guider, 3)
    assert torch.equal(change(guider, tokens), first)


# --- memory -------------------------------------------------------------------------------------

H = 1.5


def remembering(rows: Tensor, cond: Tensor | None = None) -> RingMemory:
    memory = RingMemory()
    memory.commit(Features(rows.float(), None if cond is None else cond.float()))
    return memory


def means_of(flat: list[float], width: int, groups: int) -> list[float]:
    """Of `groups` equal runs of tokens, one after the other."""
    size = len(flat) // width // groups
    means = []
    for g in range(groups):
        for c in range(width):
            run = [flat[(g * size + t) * width + c] for t in range(size)]
            means.append(sum(run) / size)
    return means


def away_from_memory(
    flat: list[float],
    bank: Rows,
    width: int,
    groups: int,
    eta: float,
    m: int,
    *,
    normalize: bool = True,
) -> list[float]:
    """One sample's tokens, moved along the gradient of a score of their means."""

    def mass(rows: Rows, i: int) -> float:
        means = means_of(rows[i], width, groups)
        return sum(gaussian(means, row, H) ** 2 for row in bank)

    def score(rows: Rows, i: int) -> float:
        return -math.log(mass(rows, i) / len(bank))

    def crowding(rows: Rows, i: int) -> float:
        return 2 * mass(rows, i) / (1 + 2 * mass(rows, i))

    return repelled([flat], score, eta, m, normalize=normalize, share=crowding)[0]


class Crowding(RKE):
    """RKE that is scaled by its crowding, as scores that weigh prompts are."""

    def log_weight(self, query_cond: Tensor, bank_cond: Tensor) -> Tensor:
        return query_cond.new_zeros(len(query_cond), len(bank_cond))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_push_from_memory_is_the_formula(groups: int, normalize: bool) -> None:
    tokens = 0.5 * alike(1, 4, 3)
    bank = (drawn(5, 3 * groups, seed=8) * 0.5).float().double()
    guider = Contextual(
        memory=remembering(bank, drawn(5, 2)),
        memory_score=Crowding(bandwidth=H),
        memory_tokens=groups,
        eta=0.2,
        iterations=4,
        normalize=normalize,
    )
    guider._hooked = 1  # of blocks, as on_model counts them
    ours = change(begun(guider, 1, drawn(1, 2)), tokens)
    expected = away_from_memory(
        tokens.flatten().tolist(), bank.tolist(), 3, groups, 0.2, 4, normalize=normalize
    )
    # The bound is the length of the tokens at the start, and a push makes them longer.
    whole = torch.tensor(expected, dtype=F64).view_as(tokens) - tokens
    longest = 0.2 * float(tokens.norm())
    close(ours, whole * min(1.0, longest / float(whole.norm())) if normalize else whole)
    assert float(ours.norm()) > 0.01


class Joint(nn.Module):
    """A block whose text hears of the image; not one known to sparke."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(drawn(width, width, seed=seed, dtype=torch.float32) / width**0.5)

    def forward(self, encoder_hidden_states: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        heard = image.mean(1, keepdim=True) @ self.mix
        return encoder_hidden_states + heard, image + 0.1 * encoder_hidden_states.mean(1, True)


class Network(nn.Module):
    def __init__(self, width: int = 6, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joint(width, seed) for seed in range(blocks))
        self.last: Tensor = torch.empty(0)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        for block in self.blocks:
            text, image = block(encoder_hidden_states=text, image=image)
        self.last = text
        return image


def generated(
    guider: Contextual,
    seed: int,
    cond: Tensor,
    *,
    fails: bool = False,
    step: Step = FIRST,
    network: Network | None = None,
) -> Tensor:
    """One run of one evaluation by a small network; returns the text it ended with, pooled."""
    net = network or Network()
    text = cond[:, None, :].expand(len(cond), 4, 6).float()
    image = drawn(len(cond), 5, 6, seed=seed, dtype=torch.float32)
    guider.begin(Run(image.shape, torch.device("cpu"), torch.float32, cond))
    with torch.no_grad(), guider.on_model(net):
        guider.on_evaluation(Evaluation(step, ("cond",), len(cond)))
        out = net(text, image)
    if not fails:
        guider.finish(out)
    return net.last.mean(1)


PROMPT, OTHER = drawn(1, 6, seed=40), -drawn(1, 6, seed=40)


def remembers(**options: Any) -> Contextual:
    settings = {"eta": 0.2, "iterations": 10, "memory_tokens": 1, **options}
    return Contextual(memory=RingMemory(), blocks={"Joint": 0}, **settings)


def test_a_run_commits_one_row_a_sample_when_it_ends() -> None:
    guider = remembers()
    memory = guider.memory
    assert memory is not None
    generated(guider, 1, PROMPT, fails=True)
    assert len(memory) == 0
    generated(guider, 1, PROMPT.expand(2, 6))
    assert len(memory) == 2
    assert memory.select().x.shape == (2, 3 * 6)
    generated(guider, 2, PROMPT, step=Step(1, 5.0, 4.0, 20))  # never saw the first step
    assert len(memory) == 2


def test_what_is_kept_is_the_mean_of_the_text_after_the_push() -> None:
    guider = remembers(score="rke")
    last = generated(guider, 1, PROMPT.expand(3, 6))
    assert guider.memory is not None
    close(guider.memory.select().x[:, -6:], last.double(), 1e-5)


def test_samples_generated_alone_are_repelled_by_earlier_ones_of_their_prompt() -> None:
    guider, fresh = remembers(), remembers()
    for seed in range(4):
        generated(guider, seed, PROMPT)
    assert guider.memory is not None
    earlier = guider.memory.select().x[:, -6:]
    unaware = generated(fresh, 9, PROMPT)
    ours = generated(guider, 9, PROMPT)
    assert torch.cdist(ours, earlier).mean() > 1.1 * torch.cdist(unaware, earlier).mean()
    other = generated(guider, 9, OTHER)
    close(other, generated(remembers(), 9, OTHER), 1e-4)


def test_memory_pushes_in_the_first_step_and_for_the_prompt_only() -> None:
    guider = remembers(steps=3)
    for seed in range(4):
        generated(guider, seed, PROMPT)
    tokens = alike(1, 4, 6).float()
    guider._hooked = 3
    begun(guider, 1, PROMPT)
    assert change(guider, tokens).any()
    assert not change(guider, tokens, branches=("uncond",)).any()
    assert not change(guider, tokens, step=Step(1, 5.0, 4.0, 20)).any()
    both = change(guider, torch.cat([tokens, tokens]), branches=("cond", "uncond"))
    assert both[0].any()
    assert not both[1].any()


def test_mates_and_memory_together_push_no_further_than_eta() -> None:
    guider = remembers(eta=0.3)
    generated(guider, 1, PROMPT)
    tokens = alike(3, 4, 6).float()
    guider._hooked = 3
    ours = change(begun(guider, 3, PROMPT.expand(3, 6)), tokens).flatten(1).norm(dim=1)
    assert (ours <= 0.3001 * tokens.flatten(1).norm(dim=1)).all()
    assert (ours > 0.1 * tokens.flatten(1).norm(dim=1)).all()


def test_padding_is_not_remembered() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    tokens = alike(1, 5, 6).float()
    kept = []
    for given, seen in ((tokens, mask), (tokens[:, :3], None)):
        guider = Contextual(memory=RingMemory(), memory_tokens=2)
        guider._hooked = 1
        change(begun(guider, 1, PROMPT), given, mask=seen)
        guider.finish(torch.zeros(1, 4, 2, 2))
        assert guider.memory is not None
        kept.append(guider.memory.select().x)
    assert torch.equal(*kept)


def test_memory_is_saved_and_loaded_like_any_other(tmp_path: Path) -> None:
    guider = remembers()
    generated(guider, 1, PROMPT.expand(2, 6))
    assert isinstance(guider.memory, RingMemory)
    guider.memory.save(tmp_path / "text.safetensors")
    again = remembers()
    again.memory = RingMemory.load(tmp_path / "text.safetensors")
    assert torch.equal(generated(again, 5, PROMPT), generated(guider, 5, PROMPT))


def test_samples_that_went_wrong_are_not_remembered() -> None:
    guider = remembers()
    guider._hooked = 1
    change(begun(guider, 2, PROMPT.expand(2, 6)), alike(2, 4, 6).float())
    x = torch.zeros(2, 4, 2, 2)
    x[1, 0, 0, 0] = math.inf
    guider.finish(x)
    assert guider.memory is not None
    assert len(guider.memory) == 1


def test_memory_of_something_else_is_an_error() -> None:
    guider = Contextual(memory=remembering(drawn(3, 17), drawn(3, 6)), blocks={"Joint": 0})
    with pytest.raises(ShapeError, match=r"width 17, and 3 blocks with 4 means of 6 channels"):
        generated(guider, 1, PROMPT)
    with pytest.raises(MissingPrompts, match="'rke'"):
        begun(Contextual(memory=RingMemory()), 2)


def test_memory_spread_over_ranks_is_an_error() -> None:
    class OverRanks(Selection):
        def across(self, read: Any, query: Tensor, width: Any) -> tuple[Tensor, Tensor]:
            raise AssertionError("asked")

        def witnesses(self) -> Selection:
            return self

    class Sharded(RingMemory):
        def select(self, cond: Tensor | None = None, weigh: Any = None) -> Selection:
            found = super().select(cond, weigh)
            return OverRanks(found.x, found.cond, found.log_weight)

    memory = Sharded()
    memory.commit(Features(drawn(3, 18).float(), drawn(3, 6).float()))
    with pytest.raises(ArgumentError, match=r"ShardedMemory\(keep='all'\)"):
        begun(Contextual(memory=memory), 2, PROMPT.expand(2, 6))


# --- protocol -----------------------------------------------------------------------------------


def test_it_conforms() -> None:
    guider = Contextual()
    assert isinstance(guider, Guider)
    assert isinstance(guider, ModelHook)
    assert isinstance(guider, EvaluationHook)
    testing.check_guider(guider)
    testing.check_guider(Contextual(memory=RingMemory()))


def test_it_displaces_nothing_and_before_a_run_changes_nothing() -> None:
    guider, tokens = Contextual(), alike(3, 4, 6)
    assert after_a_block(guider, tokens) is None
    x = drawn(3, 4, 2, 2)
    assert not guider(State(x, x, FIRST)).any()
    begun(guider, 3)
    assert guider.edit(0, tokens, None) is None  # of no evaluation
    assert change(guider, tokens).any()
    guider.finish(x)
    assert guider.edit(0, tokens, None) is None
    assert after_a_block(guider, tokens) is None


def test_one_sample_without_memory_is_told_that_nothing_happens() -> None:
    with pytest.warns(GuidanceWarning, match=r"batch of one .*memory=RingMemory\(\)"):
        guider = begun(Contextual(), 1)
    assert not change(guider, alike(1, 4, 6)).any()


def test_at_zero_nothing_is_hooked_checked_or_kept() -> None:
    guider, net = remembers(eta=0), Network()
    assert guider.idle == {"model", "evaluation"}
    assert not remembers().idle
    begun(guider, 1)
    with guider.on_model(net), guider.on_model(nn.Linear(2, 2)):
        assert all("forward" not in vars(block) for block in net.blocks)
        assert after_a_block(guider, alike(1, 4, 6)) is None
    guider.finish(torch.zeros(1, 4, 2, 2))
    assert guider.memory is not None
    assert len(guider.memory) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eta": -1}, "eta must be"),
        ({"eta": math.nan}, "eta must be"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": 1.0}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"iterations": 0}, "iterations must be a whole number"),
        ({"iterations": 2.5}, "iterations must be a whole number"),
        ({"memory_tokens": 0}, "memory_tokens must be a whole number"),
        ({"memory": 3}, "is no Memory"),
        ({"colour": 3}, "colour"),
    ],
)
def test_forbidden_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        Contextual(**options)


def test_an_unknown_score_is_named() -> None:
    with pytest.raises(UnknownName, match="vendy"):
        Contextual("vendy")
    with pytest.raises(
        ArgumentError, match=r"neither Contextual nor .*'vendi' takes step. .*steps, "
    ):
        Contextual(step=3)


def test_a_score_by_name_compares_cosines_unless_told_otherwise() -> None:
    assert Contextual().score == Vendi(kernel="cosine")
    assert Contextual("cond-rke").score == CondRKE(kernel="cosine")
    assert Contextual("rke", kernel="gaussian").score == RKE()
    assert Contextual(RKE()).score == RKE()
    assert "eta=0.5" in repr(Contextual(eta=0.5))


def test_a_score_without_its_prompts_is_an_error() -> None:
    with pytest.raises(MissingPrompts, match="CondRKE"):
        begun(Contextual("cond-rke"), 3)


# --- blocks -------------------------------------------------------------------------------------


def test_blocks_are_named_by_class_or_chosen_by_a_function() -> None:
    net = Network()
    assert _blocks.found(net, {"Joint": 1}) == [(block, 1) for block in net.blocks]
    chosen = _blocks.found(net, lambda name, module: "all" if name == "blocks.1" else None)
    assert chosen == [(net.blocks[1], "all")]


@pytest.mark.parametrize("blocks", [None, {"Other": 0}, lambda name, module: None])
def test_a_model_without_blocks_is_an_error_that_tells_the_cure(blocks: Any) -> None:
    guider = Contextual(blocks=blocks)
    for model in (Network(), lambda x: x):
        with (
            pytest.raises(ArgumentError, match=r"SD3.*Flux.*Qwen-Image.*blocks=\{"),
            guider.on_model(model),
        ):
            raise AssertionError("entered")


@pytest.mark.parametrize("place", [2, True, "text"])
def test_a_place_there_is_not_is_an_error(place: Any) -> None:
    with pytest.raises(ArgumentError, match=r"must be 0, 1, 'all', or None"):
        _blocks.found(Network(), {"Joint": place})


def test_a_block_that_returns_no_pair_is_an_error() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    guider = begun(Contextual(blocks={"Linear": 0}), 2)
    with guider.on_model(net), pytest.raises(ArgumentError, match="no tuple but Tensor"):
        net(drawn(2, 3, 4).float())
