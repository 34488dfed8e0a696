"""A pipeline's network as the hooks of a guider want it called, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sparke.backends import _encodings
from sparke.backends._calls import Call, Texts, padded
from sparke.backends._denoisers import head_of
from sparke.backends._hooked import Hooks
from sparke.backends._predictions import Predictions, in_form, same
from sparke.protocols import Step

__all__ = ["Network", "SecondEncoding"]


class SecondEncoding:
    """What prompts are encoded to otherwise, found by what they are encoded to.

    Args:
        plain: what an encoder returned, part by part.
        other: what it returned the second time.
    """

    def __init__(self, plain: Sequence[Any], other: Sequence[Any]) -> None:
        self._pairs = list(zip(plain, other, strict=True))
        self._known: dict[str, int | None] = {}

    @property
    def missing(self) -> bool:
        """Whether the network was asked, and handed nothing that the encoder returned."""
        return bool(self._known) and all(at is None for at in self._known.values())

    def instead(self, name: str, embeds: Tensor) -> Tensor:
        """(b, ...) the other embeddings for an argument; `embeds` where they are none of these."""
        if name not in self._known:  # prompts stay what they are, and comparing makes devices wait
            self._known[name] = next(
                (at for at, (part, _) in enumerate(self._pairs) if _is(part, embeds)), None
            )
        at = self._known[name]
        found = None if at is None else _rows(self._pairs[at][1], len(embeds))
        if found is None or found.shape != embeds.shape:
            return embeds
        return found.to(embeds)


class Network:
    """Makes the calls of a run.

    Args:
        hooks: of the guider; they are called on the way.
        batch: samples in the run.
        second: the other encoding of its prompts, if there is one.
    """

    def __init__(self, hooks: Hooks, batch: int, second: SecondEncoding | None) -> None:
        self._hooks, self._batch, self.second = hooks, batch, second
        self._texts = Texts(batch)
        self._asked: tuple[Call, Step] | None = None
        self._sign: float | None = None

    @property
    def found_embeds(self) -> bool:
        """Whether a call was given embeddings of the prompt."""
        return bool(self._texts.seen)

    def answer(self, call: Call, step: Step) -> Any:
        """What the network answers to this call, with the embeddings that the guider wants."""
        if self._asked is None and "cond" in call.branches:
            self._asked = (call, step)
        self._hooks.evaluating(step, call.branches, self._batch)
        return self._conditioned(call, step).made()

    def again(self, predictions: Predictions, output: Tensor) -> Callable[[], Tensor] | None:
        """Makes the prompt's call of this step once more and gives its answer in `output`'s form.

        Args:
            predictions: of this step.
            output: what the scheduler was given, in float32 or better.

        Returns:
            None where it is not certain what the pipeline makes of an answer.
        """
        if self._asked is None:
            return None
        if self._sign is None:
            self._sign = predictions.sign(output)
        sign, (call, step) = self._sign, self._asked
        if sign is None or call.branches.count("cond") > 1:  # perturbed attention counts the rows
            return None

        def look() -> Tensor:
            alone = call.alone(self._batch)
            if (second := self.second) is not None:
                alone = self._texts.changed(alone, lambda name, own, _: second.instead(name, own))
            self._hooks.evaluating(step, ("cond",), self._batch)
            out = self._conditioned(alone, step).made(cached_as="again")
            found = in_form(head_of(out), output)
            assert found is not None, "the network answered in another form the second time"
            return sign * found

        return look

    def next_step(self) -> None:
        """Forget the calls; a new step begins."""
        self._asked = None

    def _conditioned(self, call: Call, step: Step) -> Call:
        if not self._hooks.conditions:
            return call
        return self._texts.changed(
            call, lambda _, embeds, mask: self._hooks.condition(embeds, step, mask)
        )


def _is(part: Any, embeds: Tensor) -> bool:
    rows = _rows(part, len(embeds))
    return rows is not None and same(embeds, rows)


def _rows(part: Any, batch: int) -> Tensor | None:
    """A part of an encoding with one row for each sample, None if it is no such thing."""
    if isinstance(part, list) and part and all(isinstance(p, Tensor) for p in part):
        if any(p.ndim != 2 for p in part):
            return None
    elif not isinstance(part, Tensor) or part.ndim < 2 or not len(part):
        return None
    part = _encodings.conditional(part, batch)
    if batch % len(part):
        return None
    part = _encodings.repeated(part, batch)
    return padded(part)[0] if isinstance(part, list) else part
