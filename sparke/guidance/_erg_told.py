"""What a host told of one run, by noise level, and whether that will do."""

from __future__ import annotations

from collections.abc import Sequence

from sparke.errors import ArgumentError

__all__ = ["Told"]


class Told:
    """Scales of classifier-free guidance shown, and branches its network was called for."""

    def __init__(self) -> None:
        self._scales: dict[float, float] = {}
        self._branches: dict[float, set[str]] = {}

    def __bool__(self) -> bool:
        """Whether a call of the network, hooked, was told of at all."""
        return bool(self._branches)

    def show(self, sigma: float, scale: float) -> None:
        """Note the host's guidance scale at this noise level."""
        self._scales[sigma] = scale

    def call(self, sigma: float, branches: Sequence[str]) -> None:
        """Note a call of the network and the prompts its rows are for."""
        self._branches.setdefault(sigma, set()).update(branches)

    def scale(self, sigma: float) -> float | None:
        """The host's guidance scale, None where it does no guidance or does not show it."""
        return self._scales.get(sigma)

    def guided(self, sigma: float) -> bool:
        """Whether the host does classifier-free guidance, be it at a scale of 1."""
        return sigma in self._scales or self._both(sigma)

    def check_null(self, sigma: float, *, wanted: bool) -> None:
        """Raise unless the rows of the null prompt can be told from the others.

        Args:
            sigma: noise level.
            wanted: whether there must be such rows even if no scale was shown.

        Raises:
            ArgumentError: they cannot.
        """
        guided = wanted or self.scale(sigma) not in (None, 1)
        if guided and not self._branches.get(sigma):
            raise ArgumentError(
                "this host does not tell which rows of a call are for the null prompt. Give "
                "branches=('uncond', 'cond'), in the order its network is called with; or "
                "weak='prompt'."
            )

    def check_held(self, sigma: float) -> None:
        """Raise if the host does classifier-free guidance at a scale that nobody can hold at 1.

        Raises:
            ArgumentError: it does.
        """
        if self._both(sigma) and sigma not in self._scales:
            raise ArgumentError(
                "weak='prompt' replaces the host's classifier-free guidance, and this host does "
                "not show its scale: call it with a scale of 1 and give ERG(guidance_scale=...), "
                "or cfg='joins', or weak='null'."
            )

    def _both(self, sigma: float) -> bool:
        return "uncond" in self._branches.get(sigma, ())
