"""Whole numbers among the options."""

from __future__ import annotations

import operator

from sparke.errors import ArgumentError


def whole(name: str, value: int) -> int:
    """`value` as an int above 0."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ArgumentError(f"{name} must be a whole number above 0, got {value!r}.")
    return number
