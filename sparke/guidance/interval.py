"""Classifier-free guidance inside an interval of noise levels alone (arXiv 2404.07724)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparke import checks
from sparke.errors import ArgumentError
from sparke.protocols import Run, State, Step

__all__ = ["Interval"]


class Interval:
    r"""Holds the host's guidance scale w at 1 outside an interval of noise levels.

    $$D_w(x; \sigma) = D_\text{uncond} + w(\sigma) (D_\text{cond} - D_\text{uncond}), \qquad
      w(\sigma) = \begin{cases} w & lo < \sigma \le hi \\ 1 & \text{else} \end{cases}$$

    as in arXiv 2404.07724: guidance is harmful at high noise, where it sends all samples of a
    prompt to one layout, and hardly needed at low noise. Published intervals are (0.28, 5.42] for
    SDXL, the default here, and (0.28, 2.9] for EDM2. Sigma is noise over signal; a flow model's
    time t is sigma/(1 + sigma), so that 5.42 is t = 0.84. Where the scale is 1 the unconditional
    prediction is not needed, and hosts that make it by a call of its own save that call.

    It displaces nothing, draws no random numbers and keeps nothing of a run. It reaches hosts that
    show their guidance scale; a model with guidance distilled into it (an embedded scale) has none
    to hold. Samples still do not know of each other: combine it with a
    [DiversityGuider][sparke.guidance.diversity.DiversityGuider], whose own interval then rests.

    Args:
        lo: guidance is off at this sigma and below.
        hi: guidance is off above this sigma; may be infinite.
        relative: `lo` and `hi` are multiples of `sigma_data`. ``Interval(0, 1.6, relative=True)``
            is the interval a DiversityGuider chooses.
        sigma_data: standard deviation per dimension of the data in the host's units; the host's own
            figure if None. Read only where `relative`.

    Raises:
        ArgumentError: not 0 <= lo <= hi; `relative` and nobody tells `sigma_data`.
    """

    def __init__(
        self,
        lo: float = 0.28,
        hi: float = 5.42,
        *,
        relative: bool = False,
        sigma_data: float | None = None,
    ) -> None:
        self.lo, self.hi, self.relative = _sigma("lo", lo), _sigma("hi", hi), relative
        if self.lo > self.hi:
            raise ArgumentError(
                f"an interval of sigma needs 0 <= lo <= hi, got lo={lo} and hi={hi}."
            )
        if sigma_data is not None and not relative:
            raise ArgumentError(
                f"sigma_data={sigma_data} would go unread: lo and hi are sigmas as they are. Add "
                "relative=True to give them as multiples of it."
            )
        self.sigma_data = None if sigma_data is None else checks.positive("sigma_data", sigma_data)
        self._unit: float | None = None

    def __repr__(self) -> str:
        options = f", relative=True, sigma_data={self.sigma_data}" if self.relative else ""
        return f"Interval({self.lo}, {self.hi}{options})"

    @property
    def exclusive(self) -> frozenset[str]:
        """The guidance scale, unless the interval is everything."""
        return frozenset({"guidance_scale"}) - self.idle

    @property
    def idle(self) -> frozenset[str]:
        """The guidance scale, where the interval is everything."""
        everything = self.lo == 0 and math.isinf(self.hi)
        return frozenset({"guidance_scale"} if everything else ())

    def begin(self, run: Run) -> None:
        """Find the unit of the interval.

        Raises:
            ArgumentError: it is relative, and neither `sigma_data` nor the host tells to what.
        """
        self._unit = None
        unit = (self.sigma_data or run.sigma_data) if self.relative else 1.0
        if unit is None:
            raise ArgumentError(
                "relative=True needs sigma_data, the standard deviation per dimension of the data, "
                "and this host tells none. Give Interval(..., sigma_data=...), or lo and hi as "
                "sigmas."
            )
        self._unit = unit

    def __call__(self, state: State) -> Tensor:
        """Zeros: the interval acts on the guidance scale alone."""
        return torch.zeros_like(state.denoised)

    def finish(self, x: Tensor) -> None:
        """Keep nothing."""
        self._unit = None

    def on_guidance_scale(self, step: Step, guidance_scale: float) -> float:
        """The scale given inside the interval, 1 outside."""
        if self._unit is None:
            return guidance_scale
        inside = self.lo * self._unit < step.sigma <= self.hi * self._unit
        return guidance_scale if inside else 1.0


def _sigma(name: str, value: float) -> float:
    """`value` as a noise level, which may be infinite."""
    endless = checks.number(value) == math.inf
    return math.inf if endless else checks.positive(name, value, zero=True)


build = Interval
