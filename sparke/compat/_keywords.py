"""The published keywords, read into what one call asks for."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sparke import checks
from sparke.compat._history import ALGORITHMS, KERNELS, RKEGuidedSampling
from sparke.errors import ArgumentError, GuidanceWarning

__all__ = ["KEYWORDS", "Asked", "read", "unknown"]

KEYWORDS = frozenset(
    {
        *("criteria", "algorithm", "criteria_guidance_scale", "guidance_freq", "kernel"),
        *("sigma_image", "sigma_text", "use_latents_for_guidance", "clip_for_guidance"),
        *("max_bank_size", "rke_guided_sampler", "regularize", "regularize_weight", "beta"),
        *("F_M", "F_T", "F_M_real", "F_T_real", "return_kernels"),
        *("region", "regions_list", "logger_"),  # in published code too, nothing reads these
    }
)
STRENGTHS = ("criteria_guidance_scale", "guidance_freq", "sigma_image")
CRITERION = "vscore_clip"
SCALE, EVERY, SIGMA_IMAGE, SIGMA_TEXT = 0.03, 10, 0.8, 0.35
TORN = 0.2
"""Published strengths are 0.02 to 0.07; above this, pictures come apart."""


@dataclass(frozen=True)
class Asked:
    """What one guided call asks for.

    Attributes:
        algorithm: name of the score.
        kernel: on samples.
        published: the published update with the strengths below; sparke's default guidance if not.
        scale: share of the latents' norm that they move by at a hit.
        every: steps from hit to hit.
        sigma_image: bandwidth on L2-normalised rows.
        sigma_text: bandwidth on prompt embeddings.
        encoder: image encoder whose space is compared; latents are if None.
    """

    algorithm: str
    kernel: str
    published: bool
    scale: float
    every: int
    sigma_image: float
    sigma_text: float
    encoder: Any = None

    @property
    def rows(self) -> str:
        """What memory holds after such calls."""
        if self.encoder is not None:
            return "features of an image encoder"
        return "L2-normalised latents" if self.published else "latents"


def read(given: Mapping[str, Any], *, exact: bool) -> Asked | None:
    """What a call with these keywords asks for; None for a bare call.

    Raises:
        ArgumentError: a keyword has a value that is forbidden or has no meaning here.
    """
    given = {
        name: value for name, value in given.items() if value is not None or name == "criteria"
    }
    criteria, scale = given.get("criteria", CRITERION), given.get("criteria_guidance_scale")
    if criteria is not None:
        checks.choice("criteria", criteria, (CRITERION,))
    if criteria is None or (scale is not None and checks.positive(*_named(given), zero=True) == 0):
        return None
    _refuse(given)
    if "max_bank_size" in given:
        checks.whole("max_bank_size", given["max_bank_size"])
    sampler = given.get("rke_guided_sampler")
    if sampler is not None and not isinstance(sampler, RKEGuidedSampling):
        raise ArgumentError(
            f"rke_guided_sampler must be a sparke.compat.RKEGuidedSampling, got {sampler!r}."
        )
    if sampler is not None:
        given = {**given, **{k: v for k, v in sampler.settings.items() if v is not None}}
    asked = Asked(
        checks.choice("algorithm", given.get("algorithm", ALGORITHMS[0]), ALGORITHMS),
        checks.choice("kernel", given.get("kernel", KERNELS[0]), KERNELS),
        exact or any(name in given for name in STRENGTHS),
        SCALE if scale is None else float(scale),
        checks.whole("guidance_freq", given.get("guidance_freq", EVERY)),
        checks.positive("sigma_image", given.get("sigma_image", SIGMA_IMAGE)),
        checks.positive("sigma_text", given.get("sigma_text", SIGMA_TEXT)),
        _encoder(given),
    )
    if asked.scale > TORN:
        warnings.warn(
            f"criteria_guidance_scale={asked.scale} moves latents by that share of their norm at "
            f"every hit; published strengths are 0.02 to 0.07, and above {TORN} pictures come "
            "apart.",
            GuidanceWarning,
            stacklevel=4,
        )
    return asked


def unknown(names: Iterable[str], taken: Iterable[str], pipeline: str) -> None:
    """Raise for names that neither the pipeline nor the published keywords have.

    Raises:
        ArgumentError: with near matches.
    """
    known = {*taken, *KEYWORDS}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f" Did you mean {' or '.join(f'{n}=' for n in near)}?" if near else ""
            raise ArgumentError(
                f"{name}= is taken neither by {pipeline} nor by SPARKE's published calls.{hint}"
            )


def _named(given: Mapping[str, Any]) -> tuple[str, Any]:
    return "criteria_guidance_scale", given["criteria_guidance_scale"]


def _encoder(given: Mapping[str, Any]) -> Any:
    if given.get("use_latents_for_guidance", True):
        return None
    if given.get("clip_for_guidance") is None:
        raise ArgumentError(
            "use_latents_for_guidance=False compares what an image encoder sees, and none is "
            "given: clip_for_guidance= takes a CLIP model of transformers or of OpenAI, a function "
            "of pictures, or a sparke.features.ClipFeatures."
        )
    return given["clip_for_guidance"]


def _refuse(given: Mapping[str, Any]) -> None:
    """Raise for keywords whose meaning sparke cannot give."""
    if given.get("beta") and ("F_M_real" in given or "F_T_real" in given):
        raise ArgumentError(
            "beta= with F_M_real= is the contextual term of c-VSG (arXiv 2406.04551), the "
            "guider 'cvsg' of sparke.wrap. Set beta=0 or leave F_M_real out."
        )
    if given.get("regularize"):
        raise ArgumentError(
            "regularize=True adds a penalty on the norm of the latents to their score, which "
            "sparke does not have (and its authors advise against). Set regularize=False."
        )
    for name in ("F_M", "F_T"):
        if name in given:
            raise ArgumentError(
                f"{name}= would go nowhere: the pipeline keeps its history itself. Start from one "
                "with pipe.memory = sparke.memory.RingMemory.load(...)."
            )
    if given.get("return_kernels"):
        raise ArgumentError(
            "return_kernels=True asks for n x n matrices that sparke never makes. The rows are "
            "pipe.memory.features; sparke.kernels.kernel_matrix compares them."
        )
