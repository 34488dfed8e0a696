"""Every number in plain words: what it counts, which direction is better, what it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower"]
HIGHER: Better = "higher"
LOWER: Better = "lower"


@dataclass(frozen=True)
class Measure:
    """A row of the table.

    Attributes:
        name: in the JSON file, and of the function in ``sparke.metrics``.
        title: in the table.
        better: direction that is more varied, or nearer to the reference.
        counts: what the number counts.
        is_not: what it must not be taken for.
        digits: after the point.
        needs: what must be given for it.
    """

    name: str
    title: str
    better: Better
    counts: str
    is_not: str
    digits: int = 2
    needs: Literal["", "prompts", "labels", "reference"] = ""


_EFFECTIVE = (
    "1 if all are alike; as many as there are pictures if no two have anything in common. It grows "
    "with the number of pictures, so sets of different sizes are not comparable."
)

MEASURES = (
    Measure(
        "cond_vendi",
        "Vendi within prompts",
        HIGHER,
        f"How many wholly different pictures the pictures of one prompt are worth. {_EFFECTIVE} "
        "The mean over prompts is geometric, each prompt counting by its number of pictures.",
        "It is no measure of quality: noise is as varied as can be. And it sees only what the "
        "encoder sees.",
        needs="prompts",
    ),
    Measure(
        "cond_rke",
        "RKE within prompts",
        HIGHER,
        "The same of order 2: as Vendi, but rare pictures count less and frequent ones more, so it "
        "is never above Vendi for one prompt.",
        "It is no measure of quality, and no count of modes that could be named.",
        needs="prompts",
    ),
    Measure(
        "in_batch_similarity",
        "Mean cosine within prompts",
        LOWER,
        "How alike two pictures of one prompt are on average: the cosine between their features, 1 "
        "if they point the same way. It uses no bandwidth.",
        "Its zero means nothing: with most encoders even unrelated pictures are well above it, and "
        "with pixels nearly all pictures are close to 1. A mean over pairs also misses that most "
        "pictures are copies while a few are far off.",
        digits=3,
    ),
    Measure(
        "vendi",
        "Vendi, all pictures",
        HIGHER,
        f"How many wholly different pictures the whole set is worth (Vendi score). {_EFFECTIVE}",
        "It knows nothing of prompts: a set over more prompts is more varied for that alone. It is "
        "no measure of quality.",
    ),
    Measure(
        "rke",
        "RKE, all pictures",
        HIGHER,
        "The same of order 2 (Rényi kernel entropy): rare pictures count less.",
        "It knows nothing of prompts, and is no measure of quality.",
    ),
    Measure(
        "effective_modes",
        "Effective modes by label",
        HIGHER,
        "How many of your labels the pictures of a prompt use evenly: the exponential of the "
        "labels' entropy, averaged over prompts. 1 if all have one label.",
        "It is only as right as the labels, and knows no difference between pictures of one label.",
        needs="labels",
    ),
    Measure(
        "ken",
        "Novelty against the reference (KEN)",
        HIGHER,
        "How varied the kinds of picture are that are more frequent in the set than in the "
        "reference, and how much of the set they make up (kernel-based entropic novelty, in nats). "
        "0 if every kind is at least as frequent there; at most the logarithm of the number of "
        "pictures.",
        "New need not be good: broken pictures are new too. A set of a single new kind has 0 as "
        "well. And two draws of one model are somewhat new to each other.",
        digits=3,
        needs="reference",
    ),
    Measure(
        "relative_rke",
        "Distance to the reference (relative RKE)",
        LOWER,
        "How far the set and the reference are apart in the kinds they hold and their shares, in "
        "nats: 0 if they are equal, larger the less they overlap.",
        "Nearer is better only if the reference is where you want to be. It tells neither which "
        "kinds are missing nor which are new, and despite its name it is no effective number.",
        digits=3,
        needs="reference",
    ),
    Measure(
        "precision",
        "Precision",
        HIGHER,
        "Share of the pictures that lie among those of the reference: within the distance of some "
        "reference picture to its k-th nearest.",
        "It is not variety: copies of one good picture have precision 1. One outlier in the "
        "reference with far neighbours raises it.",
        digits=3,
        needs="reference",
    ),
    Measure(
        "recall",
        "Recall",
        HIGHER,
        "Share of the reference that lies among the pictures of the set, the other way round.",
        "It is easily raised by far outliers in the set; coverage is not.",
        digits=3,
        needs="reference",
    ),
    Measure(
        "density",
        "Density",
        HIGHER,
        "As precision, but counting in how many reference neighbourhoods each picture lies, over "
        "k. It may be above 1 where pictures lie where the reference is dense.",
        "It is not variety: it is highest if all pictures are the most ordinary one.",
        digits=3,
        needs="reference",
    ),
    Measure(
        "coverage",
        "Coverage",
        HIGHER,
        "Share of the reference pictures that have a picture of the set in their neighbourhood.",
        "It grows with the number of pictures, and says nothing of pictures that are nowhere near "
        "the reference.",
        digits=3,
        needs="reference",
    ),
)


def shown(prompts: bool, labels: bool, reference: bool) -> list[Measure]:
    """The rows of a table, by what is given."""
    given = {"": True, "prompts": prompts, "labels": labels, "reference": reference}
    return [measure for measure in MEASURES if given[measure.needs]]


def title(measure: Measure, prompts: bool) -> str:
    """As it stands in the table."""
    if measure.name == "in_batch_similarity" and not prompts:
        return "Mean cosine, all pictures"
    return measure.title


def number(value: float | None, digits: int) -> str:
    """A value as it is printed; a dash where there is none."""
    # No minus before zero.
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"
