"""The numbers of each set, and of each prompt in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparke import metrics
from sparke._cli.evaluation.sets import Set
from sparke.errors import SparkeError

EXACT = 5000
"""Eigenvalues of an n x n matrix: of more rows they are approximated, by random features."""
RANDOM_FEATURES = 1024

Tell = Callable[[int, int], None]
Bar = Callable[[str], Tell]


@dataclass(frozen=True)
class Settings:
    """What every set is measured with.

    Attributes:
        kernel: its name.
        bandwidth: of the Gaussian.
        nearest: k of precision, recall, density and coverage.
        random_features: of what is measured over all pictures; None: exact.
        of_prompts: of what is measured prompt by prompt.
    """

    kernel: str
    bandwidth: float
    nearest: int
    random_features: int | None
    of_prompts: int | None

    @property
    def of_kernel(self) -> dict[str, Any]:
        """For every measure of a kernel."""
        return {"kernel": self.kernel, "bandwidth": self.bandwidth}

    @property
    def of_spectrum(self) -> dict[str, Any]:
        """For those that take eigenvalues."""
        return {**self.of_kernel, "random_features": self.random_features}


@dataclass(frozen=True)
class OfPrompt:
    """Figures of the pictures of one prompt in one set."""

    n: int
    vendi: float
    rke: float


@dataclass
class Measured:
    """A set, encoded and measured.

    Attributes:
        of: the set.
        features: (n, d).
        prompts: of its pictures; None where there are none.
        values: measures by name; None where one cannot be told.
        reasons: why it cannot, by name.
        by_prompt: figures by prompt, in the order of the alphabet.
    """

    of: Set
    features: Tensor
    prompts: list[str] | None
    values: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    by_prompt: dict[str, OfPrompt] = field(default_factory=dict)

    def take(self, name: str, measure: Callable[[], float]) -> None:
        """Note a value, or why there is none."""
        try:
            value = float(measure())
        except SparkeError as error:
            self.values[name], self.reasons[name] = None, str(error)
            return
        self.values[name] = value if math.isfinite(value) else None
        if self.values[name] is None:
            self.reasons[name] = f"it came out as {value}"


def measure(
    one: Measured,
    settings: Settings,
    *,
    prompt_embeds: Tensor | None,
    reference: Tensor | None,
    labels: Sequence[str] | None,
    bar: Bar,
) -> None:
    """Fill in every number of a set.

    Args:
        one: the set; its values are written to it.
        settings: shared by all sets.
        prompt_embeds: (n, c) of a text encoder; None: equal texts are one prompt.
        reference: (m, d) features to compare with, or None.
        labels: of the pictures, or None.
        bar: starts a progress bar of a name.
    """
    x, label, kernel = one.features, one.of.label, settings.of_kernel
    if one.prompts is not None:
        _each_prompt(one, settings, bar(f"{label}: each prompt"))
    tell = bar(f"{label}: Vendi")
    one.take("vendi", lambda: metrics.vendi(x, **settings.of_spectrum, progress=tell))
    one.take("rke", lambda: metrics.rke(x, **kernel, progress=bar(f"{label}: RKE")))
    if one.prompts is not None and prompt_embeds is None:
        one.take("cond_vendi", lambda: _cond_vendi(one))
        one.take("cond_rke", lambda: _cond_rke(one))
    elif prompt_embeds is not None:
        tell = bar(f"{label}: conditional Vendi")
        one.take(
            "cond_vendi", partial(metrics.cond_vendi, x, prompt_embeds, **kernel, progress=tell)
        )
        tell = bar(f"{label}: conditional RKE")
        one.take("cond_rke", partial(metrics.cond_rke, x, prompt_embeds, **kernel, progress=tell))
    one.take("in_batch_similarity", lambda: _similarity(one))
    if labels is not None:
        one.take("effective_modes", lambda: metrics.effective_modes(labels, one.prompts))
    if reference is not None:
        _against(one, reference, settings, bar)


def random_features(sizes: Iterable[int], kernel: str, asked: int | None) -> int | None:
    """How many random features stand for the kernel: the same for all sets, none if all are small.

    Args:
        sizes: of all sets, the reference included; or of all prompts.
        kernel: the cosine needs none.
        asked: on the command line.
    """
    if kernel == "cosine":
        return None
    return asked or (RANDOM_FEATURES if max(sizes, default=0) > EXACT else None)


def _each_prompt(one: Measured, settings: Settings, tell: Tell) -> None:
    assert one.prompts is not None
    where: dict[str, list[int]] = {}
    for i, prompt in enumerate(one.prompts):
        where.setdefault(prompt, []).append(i)
    for done, prompt in enumerate(sorted(where), 1):
        x = one.features[where[prompt]]
        vendi = metrics.vendi(x, **settings.of_kernel, random_features=settings.of_prompts)
        one.by_prompt[prompt] = OfPrompt(len(x), vendi, metrics.rke(x, **settings.of_kernel))
        tell(done, len(where))


def _cond_vendi(one: Measured) -> float:
    """`sparke.metrics.cond_vendi` where pictures of two prompts are never compared.

    The kernel then falls into blocks, one for each prompt, and the entropies add up.
    """
    return math.exp(sum(p.n * math.log(p.vendi) for p in one.by_prompt.values()) / len(one.of))


def _cond_rke(one: Measured) -> float:
    """`sparke.metrics.cond_rke`, likewise."""
    counts = one.by_prompt.values()
    return sum(p.n**2 for p in counts) / sum(p.n**2 / p.rke for p in counts)


def within(one: Measured, prompts: Collection[str]) -> dict[str, float | None]:
    """The measures within prompts over some of them; over all, those of the table."""
    names = ("cond_vendi", "cond_rke", "in_batch_similarity")
    if set(prompts) == set(one.by_prompt) or one.prompts is None:
        return {name: one.values[name] for name in names}
    rows = [row for row, prompt in enumerate(one.prompts) if prompt in prompts]
    part = Measured(one.of.only(rows), one.features[rows], [one.prompts[row] for row in rows])
    part.by_prompt |= {prompt: one.by_prompt[prompt] for prompt in prompts}
    for name, measure_of in zip(names, (_cond_vendi, _cond_rke, _similarity), strict=True):
        part.take(name, partial(measure_of, part))
    return part.values


def _similarity(one: Measured) -> float:
    if one.prompts is None:
        return metrics.in_batch_similarity(one.features)
    # One number names a prompt as well as a row of numbers does.
    return metrics.in_batch_similarity(one.features, _ids(one.prompts)[:, None].double())


def _ids(words: Sequence[str]) -> Tensor:
    """Equal words have equal numbers."""
    number = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return torch.tensor([number[word] for word in words])


def _against(one: Measured, reference: Tensor, settings: Settings, bar: Bar) -> None:
    x, label, kernel = one.features, one.of.label, settings.of_spectrum
    one.take("ken", lambda: metrics.ken(x, reference, **kernel, progress=bar(f"{label}: KEN")))
    tell = bar(f"{label}: relative RKE")
    one.take("relative_rke", lambda: metrics.relative_rke(x, reference, **kernel, progress=tell))
    names = ("precision", "recall", "density", "coverage")
    try:
        tell = bar(f"{label}: precision, recall, density, coverage")
        found = metrics.prdc(x, reference, nearest=settings.nearest, progress=tell)
    except SparkeError as error:
        for name in names:
            one.values[name], one.reasons[name] = None, str(error)
        return
    for name in names:
        one.take(name, partial(getattr, found, name))
