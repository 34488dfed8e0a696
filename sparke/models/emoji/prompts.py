"""From the text of a prompt to the indices of its words, style and tone."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparke.errors import ArgumentError, SparkeError

__all__ = ["UnknownWords", "Vocabulary"]


_SHOWN = 5
"""At most this many unknown words are looked up and named."""


class UnknownWords(SparkeError, ValueError):
    """A prompt has words the model never saw; it would have to ignore them, so it refuses.

    Args:
        prompt: the prompt.
        words: the words of it that are unknown.
        known: all words there are; near matches are offered in the message.
    """

    def __init__(self, prompt: str, words: Sequence[str], known: Sequence[str]) -> None:
        parts = []
        for word in words[:_SHOWN]:
            near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
            hint = f" (near: {', '.join(near)})" if near else ""
            parts.append(f"{word!r}{hint}")
        if len(words) > _SHOWN:
            parts.append(f"and {len(words) - _SHOWN} more")
        super().__init__(
            f"prompt {prompt!r}: unknown {'word' if len(parts) == 1 else 'words'} "
            f"{', '.join(parts)}. The emoji model knows {len(known)} words. `sparke prompts` lists "
            "them and its prompts, in Python model.prompts."
        )
        self.prompt, self.words = prompt, tuple(words)


@dataclass(frozen=True)
class Vocabulary:
    """The words a prompt is made of.

    Args:
        words: words of the concepts' names.
        styles: drawing styles, said as ``style:noto``.
        tones: skin tones, said as ``tone:dark``.
    """

    words: tuple[str, ...]
    styles: tuple[str, ...]
    tones: tuple[str, ...]

    @property
    def known(self) -> list[str]:
        """Every word that may occur in a prompt."""
        styles = [f"style:{style}" for style in self.styles]
        return [*self.words, *styles, *(f"tone:{tone}" for tone in self.tones)]

    def indices(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Look up prompts; index 0 means "not said" in all three results.

        Args:
            prompts: b prompts. Case and the order of the words do not matter.

        Returns:
            (b, n) words padded with 0, (b,) styles, (b,) tones.

        Raises:
            UnknownWords: A word is not in the vocabulary.
            ArgumentError: A prompt says two styles or two tones, or ``prompts`` is one string.
        """
        if isinstance(prompts, str):
            raise ArgumentError(f"prompts must be a list of strings, not a string: [{prompts!r}]?")
        index = {word: i + 1 for i, word in enumerate(self.words)}
        rows: list[list[int]] = []
        styles: list[int] = []
        tones: list[int] = []
        for prompt in prompts:
            said = prompt.lower().split()
            known = set(self.known)
            unknown = [word for word in said if word not in known]
            if unknown:
                raise UnknownWords(prompt, unknown, self.known)
            styles.append(_attribute(prompt, said, "style:", self.styles))
            tones.append(_attribute(prompt, said, "tone:", self.tones))
            # A repeated word would make a sum that training never produced.
            rows.append([index[word] for word in dict.fromkeys(said) if word in index])
        longest = max((len(row) for row in rows), default=0) or 1
        padded = [row + [0] * (longest - len(row)) for row in rows]
        words = torch.tensor(padded, dtype=torch.long).reshape(len(rows), longest)
        return words, torch.tensor(styles, dtype=torch.long), torch.tensor(tones, dtype=torch.long)


def _attribute(prompt: str, said: list[str], prefix: str, values: tuple[str, ...]) -> int:
    found = {word.removeprefix(prefix) for word in said if word.startswith(prefix)}
    if len(found) > 1:
        raise ArgumentError(
            f"prompt {prompt!r} must have at most one {prefix} word, it has {len(found)}; "
            "make one prompt for each"
        )
    return values.index(found.pop()) + 1 if found else 0
