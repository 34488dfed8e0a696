"""From a gradient in features to a gradient in latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparke.protocols import Features, Score, Selection


def working(x: Tensor) -> Tensor:
    """x in float32 or better; half precision is for storage."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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


def gradient(score: Score, query: Features, bank: Selection) -> Tensor:
    """(b, d) gradient of each query's own score, by autograd; the bank stands still."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = query.x.detach().clone().requires_grad_()
        value = score(Features(leaf, query.cond), bank)
        (found,) = torch.autograd.grad(value.sum(), leaf)
    return found
