"""What calls remember, and the object that holds it in published scripts."""

from __future__ import annotations

from typing import Any

from sparke import checks
from sparke.errors import ArgumentError
from sparke.memory import RingMemory

__all__ = ["ALGORITHMS", "CAPACITY", "History", "RKEGuidedSampling"]

ALGORITHMS = ("cond-rke", "rke", "cond-vendi", "vendi")
KERNELS = ("gaussian", "cosine")
CAPACITY = 10000


class History:
    """A memory, and what kind of rows it holds.

    Args:
        max_bank_size: rows kept, the newest.
    """

    def __init__(self, max_bank_size: int = CAPACITY) -> None:
        self.memory = RingMemory(max_bank_size)
        self._rows: str | None = None

    def reset(self) -> None:
        """Forget every sample."""
        self.memory.clear()

    def resize(self, max_bank_size: int) -> None:
        """Keep this many rows from now on, the newest."""
        if max_bank_size != self.memory.capacity:
            kept, old = RingMemory(max_bank_size, self.memory.dtype), self.memory
            if len(old):
                kept.commit(old.features)
            self.memory = kept

    def claim(self, rows: str) -> None:
        """Note what rows the next call compares.

        Raises:
            ArgumentError: memory holds rows of another kind.
        """
        if not len(self.memory):
            self._rows = rows
        elif self._rows not in (None, rows):
            raise ArgumentError(
                f"this call compares {rows} and memory holds {self._rows} from calls with other "
                "keywords; the two cannot be compared. Call reset() first, or use one pipeline "
                "(or one RKEGuidedSampling) for each."
            )

    def give(self, memory: RingMemory) -> None:
        """Go on with another memory, whatever its rows are."""
        self.memory, self._rows = memory, None


class RKEGuidedSampling(History):
    """Settings and history of published scripts, for ``rke_guided_sampler=`` of a call.

    As there, they win over the call's own `algorithm`, `kernel`, `sigma_image`, `sigma_text`,
    `use_latents_for_guidance` and `max_bank_size`. Unlike there, several pipelines of one kind may
    share one, and the history keeps finished samples.

    Args:
        algorithm: ``"cond-rke"``, ``"rke"``, ``"cond-vendi"`` or ``"vendi"``.
        kernel: ``"gaussian"`` or ``"cosine"``.
        sigma_image: bandwidth on L2-normalised rows.
        sigma_text: bandwidth on L2-normalised prompt embeddings; 0.35 if None.
        use_latents_for_guidance: False compares what an image encoder sees; the call then gives
            ``clip_for_guidance=``.
        max_bank_size: rows kept, as many as theirs by default.
        model_name: taken for their sake; nothing depends on it.
        model: as `model_name`.

    Raises:
        ArgumentError: a setting has a forbidden value.
    """

    def __init__(
        self,
        algorithm: str = "cond-rke",
        kernel: str = "gaussian",
        sigma_image: float = 0.8,
        sigma_text: float | None = None,
        use_latents_for_guidance: bool = True,
        max_bank_size: int = CAPACITY,
        model_name: str | None = None,
        model: Any = None,
    ) -> None:
        super().__init__(max_bank_size)
        self.algorithm = checks.choice("algorithm", algorithm, ALGORITHMS)
        self.kernel = checks.choice("kernel", kernel, KERNELS)
        self.sigma_image = checks.positive("sigma_image", sigma_image)
        self.sigma_text = None if sigma_text is None else checks.positive("sigma_text", sigma_text)
        self.use_latents_for_guidance = bool(use_latents_for_guidance)

    def __repr__(self) -> str:
        return (
            f"RKEGuidedSampling({self.algorithm!r}, {self.kernel!r}, "
            f"sigma_image={self.sigma_image}, sigma_text={self.sigma_text}, {self.memory!r})"
        )

    @property
    def settings(self) -> dict[str, Any]:
        """As keywords of a call."""
        names = ("algorithm", "kernel", "sigma_image", "sigma_text", "use_latents_for_guidance")
        return {name: getattr(self, name) for name in names}
