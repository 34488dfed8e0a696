"""What a pipeline's denoiser answered, told apart by prompt.

Classifier-free guidance is done by pipelines themselves, after the denoiser has answered: from one
call with the rows of both prompts, or from two. Where both answers pass through here, the scale is
changed by changing the unconditional one: with u + a (c - u) in its place the pipeline, at its own
scale w, arrives at scale a + w (1 - a), so a = 1 gives the conditional prediction, bit for bit.

A third branch may stand beside them. InstructPix2Pix, [prompt; null with picture; null], has two
null prompts and a scale for each: both are moved, so that both scales come to a + w (1 - a).
Perturbed attention guidance, [null; prompt; prompt perturbed], or without the null prompt where
classifier-free guidance is off, goes on around whatever the first two make.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparke.backends._denoisers import Rows, first_input, head_of, is_rows, replaced

__all__ = ["Predictions", "in_form", "same"]

EMBEDS = ("encoder_hidden_states", "class_labels", "cap_feats", "prompt_embeds", "clip_text_pooled")
"""Keywords under which they hand it the prompts, most telling first."""

CERTAIN = 0.02
"""How far off their plane, relatively, the output of half precision arithmetic may lie."""


class Predictions:
    """What the denoiser answered during one step, told apart by prompt.

    Args:
        batch: number of samples.
        known: the conditional prompts as the pipeline encoded them, or None.
        perturbed: whether the last branch of a call is the prompt's with perturbed attention.
    """

    def __init__(self, batch: int, known: Rows | None, *, perturbed: bool = False) -> None:
        self.batch, self.known, self.perturbed = batch, known, perturbed
        self.conditional: Any = None
        self.unconditional: Any = None
        self._further: Any = None
        self._calls = 0
        self._kinds: dict[tuple[int, int], str] = {}

    def next_step(self) -> None:
        """Forget the answers; a new step begins."""
        self.conditional = self.unconditional = self._further = None
        self._calls = 0

    def kind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """``cond``, ``uncond``, ``uncond+cond``, ``cond+uncond`` or ``other``.

        With a third branch, ``cond+uncond+uncond`` or ``uncond+cond+cond``; ``cond+cond`` where
        only perturbed attention makes a second. Prompts are compared once for each place a call has
        in a step; that costs a device a wait.
        """
        rows = first_input(args, kwargs)
        key = (self._calls, 0 if rows is None else len(rows))
        self._calls += 1
        if key not in self._kinds:
            self._kinds[key] = self._told_apart(key[1], args, kwargs)
        return self._kinds[key]

    def answered(self, kind: str, out: Any, share: float) -> Any:
        """Note a call's answer and return it, the unconditional part moved by `share` to the other.

        Args:
            kind: as told by `kind`.
            out: what the denoiser returned.
            share: a above; 0 leaves everything alone.
        """
        head = head_of(out)
        if kind == "cond":
            # A second look at the same prompt (perturbed attention and the like) is another thing.
            self.conditional = head if self.conditional is None else self.conditional
        elif kind == "uncond" and self.conditional is not None:
            self.unconditional = head
            if share:
                return replaced(out, _mixed(head, self.conditional, share))
        elif "+" in kind:
            names = kind.split("+")
            parts = _parts(head, len(names))
            first = names.index("cond")
            self.conditional, *rest = parts[first], *parts[:first], *parts[first + 1 :]
            self.unconditional, self._further = rest[0], rest[1] if len(rest) > 1 else None
            if share and "uncond" in names:
                moved = [
                    _mixed(part, self.conditional, share) if name == "uncond" else part
                    for name, part in zip(names, parts, strict=True)
                ]
                return replaced(out, _joined(moved))
        return out

    def as_output(self, output: Tensor) -> Tensor | None:
        """The conditional prediction in the form of a scheduler's model output, if that is certain.

        Pipelines turn the answers about before the scheduler sees them (signs, variances cut off);
        what they did is known when the output is s c + t (c - u) for numbers s and t of each
        sample, or of each token: s is then 1 or -1, times what it was rescaled by. A third branch v
        adds a multiple of c - v.

        Args:
            output: what the scheduler was given, in float32 or better.
        """
        sign = None if self.unconditional is None else self.sign(output)
        found = None if sign is None else in_form(self.conditional, output)
        return None if sign is None or found is None else sign * found

    def sign(self, output: Tensor) -> float | None:
        """What the conditional answer has to be multiplied by in a scheduler's model output.

        Without an unconditional answer, the output is the conditional one, or its negative.

        Returns:
            1 or -1; None if `output` is not made so.
        """
        told = [p for p in (self.unconditional, self._further) if p is not None]
        c, *others = (in_form(p, output) for p in (self.conditional, *told))
        away = [u for u in others if u is not None]
        if c is None or len(away) < len(told):
            return None
        if not away:
            off = {sign: float((output - sign * c).norm()) for sign in (1.0, -1.0)}
            near = [s for s, distance in off.items() if distance <= CERTAIN * float(output.norm())]
            return near[0] if len(near) == 1 else None
        sign = _sign(c, away, output, 1)
        if sign is None and output.ndim == 3:  # rescaled token by token
            sign = _sign(c, away, output, 2)
        return sign

    def _told_apart(self, rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        given = _prompts(args, kwargs)
        if self.known is None:
            # A network that is given no prompt at all has rows of one kind.
            return "cond" if rows == self.batch and not given else "other"
        if rows == self.batch:
            first = any(same(g, self.known) for g in given)
            comparable = any(_alike(g, self.known) for g in given)
            if first:
                return "cond"
            return "uncond" if comparable and self.conditional is not None else "other"
        for rows_of in given:
            if rows in (2 * self.batch, 3 * self.batch) and len(rows_of) == rows:
                parts = _parts(rows_of, rows // self.batch)
                kind = self._side_by_side([same(part, self.known) for part in parts])
                if kind is not None:
                    return kind
        return "other"

    def _side_by_side(self, prompted: list[bool]) -> str | None:
        """The kind of a call by which of its branches have the prompt's embeddings.

        A null prompt may have them too, of prompts that say nothing, so the place of a branch tells
        what its prompt cannot.
        """
        if self.perturbed:
            kind = "uncond+cond+cond" if len(prompted) == 3 else "cond+cond"
            return kind if all(prompted[-2:]) else None
        if len(prompted) == 2:
            return "uncond+cond" if prompted[1] else "cond+uncond" if prompted[0] else None
        return "cond+uncond+uncond" if prompted == [True, False, False] else None


def _prompts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    named = [kwargs[name] for name in EMBEDS if is_rows(kwargs.get(name))]
    return named + [value for value in args[1:] if is_rows(value)]


def _alike(given: Any, known: Any) -> bool:
    """Whether two sets of prompts could be compared at all."""
    if isinstance(given, Tensor) != isinstance(known, Tensor):
        return False
    if isinstance(given, Tensor):
        return bool(given.ndim == known.ndim and given.shape[0] == known.shape[0])
    return len(given) == len(known)


def same(given: Any, known: Any) -> bool:
    if not _alike(given, known):
        return False
    if isinstance(given, Tensor):
        return given is known or (
            given.shape == known.shape and torch.equal(given, known.to(given))
        )
    return all(same(g, k) for g, k in zip(given, known, strict=True))


def _parts(head: Any, count: int) -> list[Any]:
    size = len(head) // count
    return [head[at * size : (at + 1) * size] for at in range(count)]


def _mixed(away: Any, toward: Any, share: float) -> Any:
    if not isinstance(away, Tensor):
        return [_mixed(a, t, share) for a, t in zip(away, toward, strict=True)]
    return toward if share == 1 else away + share * (toward - away)


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [row for part in parts for row in part]


def in_form(prediction: Any, like: Tensor) -> Tensor | None:
    """An answer in the shape of the scheduler's model output, None if it has another."""
    if isinstance(prediction, (list, tuple)):
        prediction = torch.stack(list(prediction)) if prediction else None
    if not isinstance(prediction, Tensor):
        return None
    if prediction.ndim == like.ndim and prediction.shape[1] > like.shape[1]:
        prediction = prediction[:, : like.shape[1]]
    if prediction.numel() != like.numel():
        return None
    found: Tensor = prediction.detach().to(like).reshape(like.shape)
    return found


def _sign(c: Tensor, others: list[Tensor], output: Tensor, dims: int) -> float | None:
    """The sign of c in an output that is combined of c and the others, None if it is not.

    Args:
        c: conditional answer.
        others: unconditional answer, and that of a third branch.
        output: to be combined of them.
        dims: leading dimensions that have factors of their own.
    """
    answers, wanted = [c, *(c - u for u in others)], output.double().flatten(dims)
    rows = torch.stack([answer.double().flatten(dims) for answer in answers], -2)
    gram = rows @ rows.mT
    ridge = 1e-9 * gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True).clamp_min(1e-30)
    gram = gram + torch.diag_embed(ridge.expand(*gram.shape[:-1]))
    factors = torch.linalg.solve(gram, (rows @ wanted[..., None]))
    left = wanted - (rows.mT @ factors).squeeze(-1)
    if left.norm() > CERTAIN * wanted.norm():
        return None
    signs = factors[..., 0, 0]
    if bool((signs > 0).all()):
        return 1.0
    return -1.0 if bool((signs < 0).all()) else None
