"""The first words on two sets: as much as their numbers bear out, and what speaks against them."""

from __future__ import annotations

from collections.abc import Mapping

MARGINS = {"cond_vendi": 0.05, "cond_rke": 0.05, "in_batch_similarity": 0.005}
"""Measures within prompts; two values that are no further apart are called the same."""
OF_ALL = {"vendi": 0.05, "rke": 0.05, "in_batch_similarity": 0.005}
"""The same for sets without prompts."""
NAMES = {"cond_vendi": "Vendi", "cond_rke": "RKE", "vendi": "Vendi", "rke": "RKE"}
RARE = 0.1
"""A split that chance makes more often supports nothing."""

Values = Mapping[str, float | None]


def directions(before: Values, after: Values, margins: Mapping[str, float]) -> dict[str, int]:
    """Of each measure that both have: 1 if the second is more varied, -1 if less, 0 if the same."""
    found = {}
    for name, margin in margins.items():
        a, b = before.get(name), after.get(name)
        if a is not None and b is not None:
            # Alike pictures have a high cosine.
            gain = a - b if name == "in_batch_similarity" else b - a
            found[name] = (gain > margin) - (gain < -margin)
    return found


def of_prompts(
    a: str, b: str, found: Mapping[str, int], n: int, gained: int, lost: int, chance: float | None
) -> str:
    """The verdict on sets with prompts.

    "More varied" needs that Vendi, RKE and mean cosine agree, and that so uneven a split between
    gained and lost prompts is rare by chance.

    Args:
        a: label of the first.
        b: label of the second.
        found: `directions` within prompts.
        n: prompts in both.
        gained: those of them that gained.
        lost: those that lost.
        chance: of the sign test; None where too few prompts changed for it.
    """
    if chance is None:
        few = f"{n} prompt{'s are' if n != 1 else ' is'}"
        if n >= 5:
            few = f"Only {gained + lost} of {n} prompts changed,"
        return f"{few} too few to tell a trend from chance; in these pictures, {said(a, b, found)}"
    way = (gained > lost) - (gained < lost)
    agree = len(found) == len(MARGINS) and set(found.values()) in ({1}, {-1})
    if agree and chance <= RARE and way in found.values():
        verb = "more" if way > 0 else "less"
        return f"{b} is {verb} varied than {a} by {_listed(list(found))}"
    doubt = ""
    if agree:
        chancy = "the gains and losses of prompts may be chance"
        doubt = f", but {chancy if chance > RARE else 'most prompts went the other way'}"
    return f"No clear difference between {a} and {b}: {said(a, b, found)}{doubt}"


def said(a: str, b: str, found: Mapping[str, int]) -> str:
    """What each measure says, such as "B is more varied than A by Vendi, less by RKE"."""
    verbs = {1: "more varied than", -1: "less varied than", 0: "as varied as"}
    parts: list[str] = []
    for way, verb in verbs.items():
        names = [name for name, found_way in found.items() if found_way == way]
        if names:
            short = {1: "more", -1: "less", 0: "the same"}[way]
            start = short if parts else f"{b} is {verb} {a}"
            parts.append(f"{start} by {_listed(names)}")
    return ", ".join(parts) or f"no measure tells {a} from {b}"


def _listed(names: list[str]) -> str:
    words = [NAMES.get(name, "mean cosine") for name in names]
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
