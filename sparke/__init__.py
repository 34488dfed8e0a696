"""Different pictures from the same prompt, for any diffusion or flow sampler, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparke import _start as _start  # first: it sees to what fails while torch is loaded
from sparke import memory as memory
from sparke import metrics as metrics
from sparke._callback import callback as callback
from sparke._wrap import wrap as wrap
from sparke.errors import SparkeError as SparkeError
from sparke.guidance import DiversityGuider as DiversityGuider
from sparke.protocols import Backend as Backend
from sparke.protocols import Features as Features
from sparke.protocols import Guider as Guider
from sparke.protocols import Memory as Memory
from sparke.protocols import Requires as Requires
from sparke.protocols import Score as Score
from sparke.protocols import Step as Step
from sparke.scores import score as score

if TYPE_CHECKING:

    def scores() -> list[str]:
        """Names of all scores."""
else:
    # The folder sparke.scores is callable and lists its names.
    from sparke import scores as scores

__all__ = [
    "Backend",
    "DiversityGuider",
    "Features",
    "Guider",
    "Memory",
    "Requires",
    "Score",
    "SparkeError",
    "Step",
    "callback",
    "memory",
    "metrics",
    "score",
    "scores",
    "wrap",
]

__version__ = "0.1.0"
