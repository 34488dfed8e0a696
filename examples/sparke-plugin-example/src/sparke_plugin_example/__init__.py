"""What a package adds to sparke: a score, and a backend for the samplers of smalldiffusion.

Both are found by name as soon as the package is installed; nothing needs to be imported::

    sampler = sparke.wrap(smalldiffusion.samples, score="neighbours")
"""

from __future__ import annotations

from sparke_plugin_example.neighbours import Neighbours

__all__ = ["Neighbours"]
