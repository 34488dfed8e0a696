"""Everything `sparke eval` found, gathered for the table, the report and the JSON file."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import sparke
from sparke._cli.evaluation.changes import Changes
from sparke._cli.evaluation.explain import Measure, title
from sparke._cli.evaluation.measures import Measured
from sparke._cli.evaluation.nearest import Nearest, Pair
from sparke._cli.evaluation.sets import Set


@dataclass(frozen=True)
class Told:
    """The result of one call.

    Attributes:
        sets: measured.
        measures: rows of the table.
        changes: of each further set against the first.
        nearest: pairs within each set.
        reference: that the sets were compared with, or None.
        copies: pairs of each set's pictures and the reference's nearest, or none.
        warnings: what to heed before believing a number.
        settings: by their name, as they are printed.
    """

    sets: Sequence[Measured]
    measures: Sequence[Measure]
    changes: Sequence[Changes]
    nearest: Sequence[Nearest]
    reference: Set | None
    copies: Sequence[tuple[Pair, ...]]
    warnings: Sequence[str]
    settings: Mapping[str, str]

    @property
    def prompts(self) -> list[str]:
        """Of all sets, each once, in the order of the alphabet."""
        return sorted({prompt for one in self.sets for prompt in one.by_prompt})

    def title(self, measure: Measure) -> str:
        """Of a row of the table."""
        return title(measure, bool(self.prompts))

    def json(self) -> dict[str, Any]:
        """For a program to read; every number in full."""
        return {
            "settings": dict(self.settings),
            "warnings": list(self.warnings),
            "sets": [
                {
                    "name": one.of.label,
                    "path": str(one.of.path),
                    "n": len(one.of),
                    "measures": dict(one.values),
                    "not_measured": dict(one.reasons),
                    "prompts": {prompt: _finite(asdict(p)) for prompt, p in one.by_prompt.items()},
                    "nearest": [_pair(pair, one.of, one.of) for pair in found.pairs],
                    "nearest_in_reference": [
                        _pair(pair, one.of, self.reference)
                        for pair in (self.copies[i] if self.copies else ())
                        if self.reference is not None
                    ],
                }
                for i, (one, found) in enumerate(zip(self.sets, self.nearest, strict=True))
            ],
            "changes": [asdict(change) for change in self.changes],
        }


def heeded(sets: Sequence[Measured], least: int = 5) -> list[str]:
    """What makes numbers misleading.

    Args:
        sets: measured.
        least: pictures of a prompt below which an effective number says little.
    """
    said = []
    sizes = {len(one.of) for one in sets}
    shares = [{p: f.n for p, f in one.by_prompt.items()} for one in sets]
    if len(sizes) > 1 or any(
        s.get(p) != n for s in shares[1:] for p, n in shares[0].items() if p in s
    ):
        counts = ", ".join(f"{one.of.label} {len(one.of)}" for one in sets)
        said.append(
            f"the sets are not of the same size ({counts} pictures, or not so for each prompt). "
            "Effective numbers grow with the number of pictures: use --per-prompt N to compare N "
            "of each."
        )
    if any(set(s) != set(shares[0]) for s in shares[1:]):
        said.append(
            "the sets are not of the same prompts. Only prompts in both are compared one by one; "
            "the rows of the table are taken over all of a set's own."
        )
    prompts = {prompt for share in shares for prompt in share}
    few = {prompt for share in shares for prompt, n in share.items() if n < least}
    if few and 2 * len(few) >= len(prompts):
        which = "all prompts" if few == prompts else f"{len(few)} of {len(prompts)} prompts"
        said.append(
            f"{which} have fewer than {least} pictures, of which an effective number can say "
            "little."
        )
    return said


def versions(packages: Sequence[str]) -> str:
    """Of what the numbers depend on."""
    found = [f"sparke {sparke.__version__}", f"Python {platform.python_version()}"]
    return ", ".join([*found, *filter(None, map(_version, packages))])


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _pair(pair: Pair, first: Set, second: Set) -> dict[str, Any]:
    return {
        "first": first.names[pair.first],
        "second": second.names[pair.second],
        "likeness": pair.likeness,
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Without NaN, which JSON has not."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }
