"""Conformance checks for one's own Score, Memory, Guider and Backend: a line each in one's tests.

    def test_my_score_conforms():
        sparke.testing.check_score(MyScore())

Each check raises AssertionError and says what was expected and what came. They cover what sparke
relies on and cannot see: shapes, gradients, purity, what is left behind. They do not tell whether
an object does anything useful. Random numbers are their own; nobody else's generator is moved.
"""

from __future__ import annotations

from sparke.testing._backends import check_backend as check_backend
from sparke.testing._guiders import check_guider as check_guider
from sparke.testing._memories import check_memory as check_memory
from sparke.testing._packages import check_package as check_package
from sparke.testing._scores import check_score as check_score

__all__ = ["check_backend", "check_guider", "check_memory", "check_package", "check_score"]
