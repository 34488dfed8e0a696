"""Batches of latents as vectors: lengths, and gradients brought back from features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparke.protocols import Closed, Features, Score, Selection, State


def working(x: Tensor) -> Tensor:
    """X in float32 or better; half precision is for storage."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rowwise(values: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b, 1, ...) to multiply rows of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def norm(x: Tensor) -> Tensor:
    """(b, ...) -> (b, 1, ...) length of each sample."""
    return rowwise(x.flatten(1).norm(dim=1), x)


def unit(x: Tensor) -> Tensor:
    """(b, ...) each sample at length 1; zeros stay zeros."""
    return x / norm(x).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)


def kept_residual(x: Tensor, denoised: Tensor, delta: Tensor) -> Tensor:
    """The displacement after which ``x - denoised`` has the length it had before."""
    residual = working(x) - working(denoised)
    moved = residual - delta
    return residual - moved * (norm(residual) / norm(moved).clamp_min(1e-12))


def through(
    base: Tensor,
    host: Callable[[Tensor], Tensor] | None,
    rows: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``rows(host(base))``, detached, and its vector-Jacobian product: (b, d) -> like base.

    Samplers run under ``no_grad`` and some hosts under inference mode; neither matters here.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = base.detach().clone().requires_grad_()
        out = rows(working(leaf if host is None else host(leaf)))

    def pull(gradient: Tensor) -> Tensor:
        with torch.inference_mode(False):
            (pulled,) = torch.autograd.grad(out, leaf, gradient.clone(), retain_graph=True)
        return working(pulled)

    return out.detach(), pull


def length(state: State, strength: float, displaces: str) -> Tensor | float:
    """Of a displacement of `denoised`: `strength`, or a share of x's norm as latents move by it."""
    return strength if displaces == "denoised" else strength * next_latents(state)


def next_latents(state: State) -> Tensor:
    """(b, 1, ...) lengths of displacements of `denoised` that move Euler's next x by its length."""
    step = state.step
    # An Euler step to sigma_next takes (1 - sigma_next/sigma) of a displacement of denoised.
    return step.sigma / (step.sigma - step.sigma_next) * norm(working(state.x))


def ascent(score: Score, query: Features, bank: Selection) -> Tensor:
    """(b, d) gradient of each query's own score: in closed form where the score has one."""
    if isinstance(score, Closed):
        return score.direction(query, bank)
    return gradient(score, query, bank)


def gradient(score: Score, query: Features, bank: Selection) -> Tensor:
    """(b, d) gradient of each query's own score, by autograd; the bank stands still."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = query.x.detach().clone().requires_grad_()
        rows = Selection(
            bank.x.detach().clone(),
            None if bank.cond is None else bank.cond.clone(),
            None if bank.log_weight is None else bank.log_weight.clone(),
            bank.mates,
        )
        cond = None if query.cond is None else query.cond.clone()
        (found,) = torch.autograd.grad(score(Features(leaf, cond), rows).sum(), leaf)
    return found
