"""Where a guider that repels leaves the host's classifier-free guidance on."""

from __future__ import annotations

from typing import TypeAlias

from sparke.errors import ArgumentError

__all__ = ["CfgInterval", "checked", "ends"]

CfgInterval: TypeAlias = tuple[float, float] | str | None

HANDOVER = 1.6
"""The host's classifier-free guidance acts below this sigma, in units of `sigma_data`."""
HANDOVER_UNTOLD = 5.42
"""The same where nobody tells `sigma_data`: published for SDXL (arXiv 2404.07724)."""


def checked(value: CfgInterval) -> CfgInterval:
    """`value` if it is ``"auto"``, None or (lo, hi).

    Raises:
        ArgumentError: it is neither.
    """
    if value is None or value == "auto":
        return value
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not 0 <= value[0] <= value[1]:
        raise ArgumentError(
            f"cfg_interval must be 'auto', None or (lo, hi) with 0 <= lo <= hi, got {value!r}."
        )
    return (float(value[0]), float(value[1]))


def ends(interval: tuple[float, float] | str, sigma_data: float | None) -> tuple[float, float]:
    """The sigmas (lo, hi] at which guidance acts.

    Args:
        interval: in numbers, or ``"auto"``.
        sigma_data: standard deviation per dimension of the data, None where nobody tells.
    """
    if not isinstance(interval, str):
        return interval
    return 0.0, HANDOVER * sigma_data if sigma_data else HANDOVER_UNTOLD
