"""Conformance of memories."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparke.protocols import Features, Memory, Selection
from sparke.testing._common import (
    COND_WIDTH,
    QUERIES,
    WIDTH,
    alike,
    close,
    contains,
    copied,
    expect,
    features,
    of,
    picked,
)


def check_memory(factory: Callable[[], Memory], *, width: int = WIDTH) -> None:
    """Raise unless what `factory` makes behaves as a [Memory][sparke.protocols.Memory].

    Rows come back in float32, detached, with their own prompts and weights; nothing is shared with
    who commits; a selection handed out is not changed by later commits; rows of another width, not
    finite or without the prompts the others have are refused and leave it as it was.

    Args:
        factory: makes a new, empty memory with room for at least 8 rows.
        width: of the rows it is given.

    Raises:
        AssertionError: it does not; the message says how.
    """
    memory = factory()
    expect(
        isinstance(memory, Memory),
        f"{memory!r} is no Memory: it needs __len__, commit(items) and select(cond, weigh)",
    )
    expect(len(memory) == 0, f"a new memory must be empty, len() is {len(memory)}")
    prompts = features(QUERIES, width, COND_WIDTH, 3).cond
    for cond in (None, prompts):
        expect(len(memory.select(cond)) == 0, "an empty memory must select no rows")
    given = features(4, width, COND_WIDTH, 0)
    x, cond = given.x.clone().requires_grad_(), of(given).clone().requires_grad_()
    memory.commit(Features(x, cond))
    expect(len(memory) == 4, f"4 rows were committed, len() is {len(memory)}")
    with torch.no_grad():
        x.zero_()
        cond.zero_()
    _check_selection(memory, given)
    memory.commit(Features(given.x[:0], picked(given.cond, slice(0))))
    expect(len(memory) == 4, f"no rows were committed, len() went to {len(memory)}")

    selection = memory.select(prompts)
    before = copied(selection)
    later = features(4, width, COND_WIDTH, 1)
    memory.commit(later)
    expect(len(memory) == 8, f"8 rows were committed, len() is {len(memory)}")
    expect(alike(selection, before), "a later commit changed a selection handed out before")
    _check_selection(
        memory, Features(torch.cat([given.x, later.x]), torch.cat([of(given), of(later)]))
    )
    _check_refusals(memory, later)

    bare = factory()
    bare.commit(Features(given.x))
    found = bare.select()
    expect(found.cond is None, "rows committed without prompts must come back without")
    expect(contains(given.x, found.x), "rows committed without prompts came back changed")


def _check_selection(memory: Memory, given: Features) -> None:
    """All that is selected was given, row with prompt, and weighed as asked."""
    prompts = of(features(QUERIES, 1, COND_WIDTH, 3))

    def weigh(query: Tensor, rows: Tensor) -> Tensor:
        return -(query[:, None] - rows[None]).square().sum(-1)

    for cond, kernel in ((None, None), (prompts, None), (prompts, weigh)):
        found = memory.select(cond, kernel)
        expect(isinstance(found, Selection), f"select() must return a Selection, got {found!r}")
        expect(len(found) > 0, "select() found no rows where there are some")
        expect(found.x.dtype == torch.float32, f"rows must be float32, are {found.x.dtype}")
        parts = [t for t in (found.x, found.cond, found.log_weight) if t is not None]
        expect(not any(t.requires_grad for t in parts), "a selection must be detached")
        expect(found.cond is not None, "rows committed with prompts came back without")
        both = torch.cat([found.x, of(found).float()], 1)
        expect(
            contains(torch.cat([given.x, of(given)], 1), both),
            "select() returned rows, or prompts with them, that nobody committed",
        )
        if cond is None:
            continue
        weight = found.log_weight
        expect(weight is not None, "select(cond) must weigh the rows by prompt")
        if weight is None:
            continue
        expect(
            tuple(weight.shape) == (len(cond), len(found)),
            f"log weights must be {(len(cond), len(found))}, are {tuple(weight.shape)}",
        )
        expect(
            not bool(weight.isnan().any()) and bool((weight <= 1e-5).all()),
            f"log weights must be at most 0 and no NaN, got {weight.tolist()}",
        )
        if kernel is not None:
            expected = kernel(cond, of(found).float())
            close(weight, expected, "the log weights must be those of `weigh`, row for row")


def _check_refusals(memory: Memory, good: Features) -> None:
    cond = of(good)
    bad = {
        "rows of another width": Features(torch.cat([good.x, good.x], 1), cond),
        "prompts of another width": Features(good.x, torch.cat([cond, cond], 1)),
        "fewer prompts than rows": Features(good.x, cond[1:]),
        "no prompts where the others have some": Features(good.x),
        "NaN": Features(good.x * math.nan, cond),
        "infinity": Features(good.x / 0, cond),
    }
    for what, items in bad.items():
        before, size = copied(memory.select()), len(memory)
        try:
            memory.commit(items)
        except Exception:  # noqa: BLE001  whatever the memory finds right
            refused = True
        else:
            refused = False
        expect(refused, f"commit() must refuse {what}")
        expect(
            len(memory) == size and alike(memory.select(), before),
            f"commit() refused {what} and changed the memory all the same",
        )
