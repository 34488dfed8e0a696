"""Every error sparke raises on purpose.

Each one also derives from the built-in exception a caller would expect, so ``except ValueError``
keeps working. A message names the argument, the rule, the value seen and the cure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "GuidanceWarning",
    "MemoryFileError",
    "MissingHost",
    "MissingPrompts",
    "NonFiniteGuidance",
    "ShapeError",
    "SparkeError",
    "UnknownName",
    "UnsupportedTarget",
]


class SparkeError(Exception):
    """Base of all errors raised on purpose by sparke."""


class ArgumentError(SparkeError, ValueError):
    """An argument has a value that its rule forbids."""


class ShapeError(SparkeError, ValueError):
    """A tensor has the wrong number of rows, columns or dimensions."""


class MissingPrompts(SparkeError, ValueError):
    """A score or guider that compares prompts was given none."""


class UnsupportedTarget(SparkeError, TypeError):
    """No backend knows how to wrap the object."""


class MissingHost(SparkeError, ImportError):
    """An optional package is needed and not installed; the message names the extra."""


class MemoryFileError(SparkeError, OSError):
    """A memory file is damaged, of another kind, or does not fit this memory."""


class NonFiniteGuidance(SparkeError, ArithmeticError):
    """The displacement of `denoised` held NaN or infinity and the user chose to stop there."""


class GuidanceWarning(UserWarning):
    """Guidance met numerical trouble at a step; the affected samples went on unguided."""


class UnknownName(SparkeError, LookupError):
    """A name was looked up that nobody has registered.

    Args:
        kind: what was looked up, e.g. ``"score"``.
        name: the name asked for.
        known: all names there are; near matches are offered in the message.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name.lower().replace("_", "-"), names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        super().__init__(
            f"{kind}={name!r} is not a known {kind}. {hint}Known: {', '.join(names) or 'none'}."
        )
        self.kind, self.name, self.known = kind, name, tuple(names)
