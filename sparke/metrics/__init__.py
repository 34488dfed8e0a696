r"""How varied a finished set is, and how it stands to a reference.

The quantities that the scores are built on, taken of a whole set, each as a number.

Of a set:
[vendi][sparke.metrics.vendi], [rke][sparke.metrics.rke],
[cond_vendi][sparke.metrics.cond_vendi] and [cond_rke][sparke.metrics.cond_rke] are effective
numbers, 1 when all samples are alike and n when all differ, and
[in_batch_similarity][sparke.metrics.in_batch_similarity] is a mean cosine. One signature serves
these five, so they can be called in a loop; what a measure has no use for it ignores, and says so.
[effective_modes][sparke.metrics.effective_modes] counts labels instead of comparing features.

Against a reference:
[ken][sparke.metrics.ken] tells what is new, [relative_rke][sparke.metrics.relative_rke] how far
the two are apart, and [prdc][sparke.metrics.prdc] precision, recall, density and coverage.

Features are tensors or arrays of any real dtype. They are read a block at a time and every sum is
float64; nothing is copied whole, so `np.memmap` serves where memory is short. Measures that add up
also take chunks, a list or an iterator of (rows, d) matrices read once. A matrix that would have no
room is refused before it is made, and the error says what to use instead. What can take seconds
takes `progress`, a function called with the steps done and their total (0 while an iterator has
not said how long it is).

The Gaussian kernel is $k(u, v) = e^{-\|u - v\|^2 / (2 s^2)}$ with `bandwidth` s in the units of the
features, never squared before it is handed on. Without a bandwidth the rule is s = 0.5 times the
median distance between rows, of at most 2048 of them at even strides. It has no randomness, but it
follows the data: a set twice as wide gets a bandwidth twice as wide and the same value. **To
compare two sets, give both the same bandwidth**, that of
[shared_bandwidth][sparke.metrics.shared_bandwidth].

None of the first six measures quality: noise is as varied as can be. Read them beside a measure of
fidelity.
"""

from __future__ import annotations

from sparke.metrics._bandwidth import shared_bandwidth as shared_bandwidth
from sparke.metrics._cond_rke import cond_rke as cond_rke
from sparke.metrics._cond_vendi import cond_vendi as cond_vendi
from sparke.metrics._effective_modes import effective_modes as effective_modes
from sparke.metrics._in_batch_similarity import in_batch_similarity as in_batch_similarity
from sparke.metrics._ken import ken as ken
from sparke.metrics._prdc import PRDC as PRDC
from sparke.metrics._prdc import prdc as prdc
from sparke.metrics._relative_rke import relative_rke as relative_rke
from sparke.metrics._rke import rke as rke
from sparke.metrics._vendi import vendi as vendi

__all__ = [
    "PRDC",
    "cond_rke",
    "cond_vendi",
    "effective_modes",
    "in_batch_similarity",
    "ken",
    "prdc",
    "relative_rke",
    "rke",
    "shared_bandwidth",
    "vendi",
]
