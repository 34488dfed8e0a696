"""What changed from one set to another, prompt by prompt, and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparke._cli.evaluation import verdict
from sparke._cli.evaluation.measures import Measured, within

SAME = 0.05
"""Effective pictures; less is called no change."""


@dataclass(frozen=True)
class Change:
    """Of one prompt: its effective number of pictures before and after."""

    prompt: str
    before: float
    after: float

    @property
    def by(self) -> float:
        """What it gained."""
        return self.after - self.before


@dataclass(frozen=True)
class Changes:
    """From one set to another.

    Attributes:
        base: label of the first.
        other: label of the second.
        prompts: in both, the one that gained most first.
        only_base: prompts that the second lacks.
        only_other: prompts that the first lacks.
        chance: how often a split between gained and lost at least as uneven happens by chance
            (two-sided sign test); None where fewer than five prompts changed.
        words: what it comes to, in sentences.
    """

    base: str
    other: str
    prompts: tuple[Change, ...]
    only_base: tuple[str, ...]
    only_other: tuple[str, ...]
    chance: float | None
    words: tuple[str, ...]


def between(base: Measured, other: Measured) -> Changes:
    """Compare two sets by the Vendi score of each prompt, or as a whole where they have none."""
    before, after = base.by_prompt, other.by_prompt
    both = [
        Change(prompt, before[prompt].vendi, after[prompt].vendi)
        for prompt in before
        if prompt in after
        and math.isfinite(before[prompt].vendi)
        and math.isfinite(after[prompt].vendi)
    ]
    changes = tuple(sorted(both, key=lambda c: (-c.by, c.prompt)))
    gained, lost = sum(c.by > SAME for c in both), sum(c.by < -SAME for c in both)
    chance = _sign_test(gained, lost)
    words = _of_prompts(base, other, changes, chance) if both else _as_a_whole(base, other)
    return Changes(
        base.of.label,
        other.of.label,
        changes,
        tuple(p for p in before if p not in after),
        tuple(p for p in after if p not in before),
        chance,
        tuple(words),
    )


def _sign_test(gained: int, lost: int) -> float | None:
    n = gained + lost
    if n < 5:
        return None
    tail: float = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)


def _of_prompts(
    base: Measured, other: Measured, changes: tuple[Change, ...], chance: float | None
) -> list[str]:
    a, b, n = base.of.label, other.of.label, len(changes)
    gained, lost = (sum(sign * c.by > SAME for c in changes) for sign in (1, -1))
    both = [change.prompt for change in changes]
    before, after = within(base, both), within(other, both)
    found = verdict.directions(before, after, verdict.MARGINS)
    first = verdict.of_prompts(a, b, found, n, gained, lost, chance)
    worth, were = after["cond_vendi"], before["cond_vendi"]
    if worth is not None and were is not None:
        shared = " in both" if n < max(len(base.by_prompt), len(other.by_prompt)) else ""
        first += (
            f". By Vendi, pictures of one prompt are worth {were:.2f} wholly different ones in {a} "
            f"and {worth:.2f} in {b} (geometric mean over {_count(n, 'prompt')}{shared})"
        )
    words = [
        f"{first}.",
        (
            f"Of {_count(n, 'prompt')}, {gained} gained, {lost} lost and {n - gained - lost} "
            f"stayed within {SAME:g}."
        ),
    ]
    if gained:
        words.append(f"Most gained: {_named(changes[:1])}.")
    if lost:
        words.append(f"Most lost: {_named(changes[-1:])}.")
    if chance is not None:
        often = f"about 1 in {1 / chance:.0f}" if chance < 0.1 else f"{100 * chance:.0f} of 100"
        words.append(
            f"If neither set were more varied, a split as uneven as {gained} to {lost} would "
            f"happen in {often} comparisons (sign test)."
        )
    return words


def _as_a_whole(base: Measured, other: Measured) -> list[str]:
    a, b = base.of.label, other.of.label
    if base.prompts is not None:
        return [f"{a} and {b} have no prompt in common, so nothing is compared prompt by prompt."]
    found = verdict.directions(base.values, other.values, verdict.OF_ALL)
    if not found:
        return ["The two sets cannot be compared: a number is missing."]
    words = [
        (
            "No prompts are given, so all pictures are compared at once and nothing tells a trend "
            f"from chance; in these pictures, {verdict.said(a, b, found)}."
        ),
        "A set over more different prompts is more varied for that alone.",
    ]
    before, after = base.values["vendi"], other.values["vendi"]
    if before is not None and after is not None:
        words.insert(
            1,
            f"By Vendi, the {len(base.of)} pictures of {a} are worth {before:.2f} wholly different "
            f"ones, the {len(other.of)} of {b} {after:.2f}.",
        )
    return words


def _named(changes: tuple[Change, ...]) -> str:
    return ", ".join(f"“{c.prompt}” ({c.before:.2f} to {c.after:.2f})" for c in changes)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
