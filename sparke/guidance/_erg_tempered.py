"""Attention with scaled logits, for as long as a context lasts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparke.errors import ArgumentError, ShapeError
from sparke.guidance import _attention
from sparke.guidance._attention import Layers, Query

__all__ = ["Temperature", "hooked", "tempered"]


class Temperature:
    """The factor of the logits, for all rows of a batch or for each.

    Compiled code reads it as a tensor, so that it may change from step to step without another
    compilation.
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self.value = self._tensor((1.0,))

    def set(self, *rows: float) -> None:
        """Change the factor of every row, or that of each; their number, too, if it differs."""
        if len(rows) != len(self.value):
            self.value = self._tensor(rows)
        elif len(rows) == 1:
            self.value.fill_(rows[0])
        else:
            self.value.copy_(torch.tensor(rows))

    def to(self, device: torch.device) -> None:
        """Keep them on `device`."""
        if device != self._device:
            self._device = device
            self.value = self._tensor(self.value.tolist())

    def over(self, x: Tensor) -> Tensor:
        """The factors, in the shape and dtype that multiply rows of `x`.

        Raises:
            ShapeError: the network was called with another number of rows.
        """
        tau = self.value.to(x)
        rows = tau.shape[0]
        if rows > 1 and x.shape[0] != rows:
            # Frames and the like are folded into the batch, each sample's next to each other.
            if x.shape[0] % rows:
                raise ShapeError(
                    f"there are temperatures for {rows} rows and the network was called with "
                    f"{x.shape[0]}: one for each row of a call, or for each prompt that branches= "
                    "names and each sample."
                )
            tau = tau.repeat_interleave(x.shape[0] // rows)
        return tau.reshape(-1, *[1] * (x.ndim - 1))

    def _tensor(self, rows: Sequence[float]) -> Tensor:
        # Hosts under inference mode make the first one there; autograd must take it all the same.
        with torch.inference_mode(False):
            return torch.tensor(rows, dtype=torch.float32, device=self._device)


@contextmanager
def tempered(module: nn.Module, tau: float | Tensor, *, layers: Layers = None) -> Iterator[None]:
    r"""Attention with scaled logits, for as long as the context lasts.

    $$\text{softmax}(\tau \beta\, Q K^T)\, V$$

    in place of tau = 1, $\beta$ being the layer's own scale: below 1 attention looks at more tokens
    alike, above 1 at fewer. Tau is an inverse temperature, as in arXiv 2504.13987: the result is
    ``scaled_dot_product_attention(q, k, v, scale=tau * beta)``, and that of temperature T is tau =
    1/T. What is added to the logits (masks, the position bias of T5) is not scaled.

    With a text encoder, it makes that paper's weakened condition (C-ERG), for hosts that are
    called with embeddings:

        with tempered(text_encoder, 0.5):
            weak = text_encoder(ids).last_hidden_state
        sampler(model, x, sigmas, extra_args={"cond": cond, "uncond": weak, "cond_scale": 5.0})

    Modules are hooked by their attribute ``forward``, which compiled networks notice whenever it
    comes and goes; afterwards everything is as before.

    Args:
        module: a network: of diffusers, transformers or k-diffusion, or any whose attention layers
            make their queries by submodules named as theirs are.
        tau: at least 0; or a tensor (b,) of one a row.
        layers: which of its attention layers. None: all. A pattern such as ``"*blocks.1?.attn*"``
            for their names in ``named_modules()``, or several. A pair (from, to) of shares of the
            depth: (0.5, 1.0) is the deeper half. A function of name and module. Or the modules
            themselves; one that is no attention layer is taken as one that makes queries.

    Raises:
        ArgumentError: there is no such layer, or its queries cannot be reached.
        ShapeError: the network is called with other rows than there are temperatures for.
    """
    rows = torch.as_tensor(tau, dtype=torch.float32).reshape(-1).tolist()
    if not rows or not all(math.isfinite(row) and row >= 0 for row in rows):
        raise ArgumentError(f"tau must be finite and at least 0, got {tau!r}.")
    temperature = Temperature()
    temperature.set(*rows)
    with hooked(_attention.queries(module, _attention.checked("layers", layers)), temperature):
        yield


@contextmanager
def hooked(queries: Sequence[Query], temperature: Temperature) -> Iterator[None]:
    """Scale what these modules give by the temperature, whatever that is at the time."""
    with ExitStack() as held:
        for query in queries:
            held.enter_context(_followed(query.module, _scaling(query, temperature)))
        yield


def _scaling(query: Query, temperature: Temperature) -> Callable[[Tensor], Tensor]:
    dim = 1 if isinstance(query.module, nn.modules.conv._ConvNd) else -1

    def scaled(out: Tensor) -> Tensor:
        tau = temperature.over(out)
        if query.power != 1:
            tau = tau**query.power
        if not query.third:
            return out * tau
        width = out.shape[dim] // 3
        rest = out.narrow(dim, width, out.shape[dim] - width)
        return torch.cat([out.narrow(dim, 0, width) * tau, rest], dim)

    return scaled


@contextmanager
def _followed(module: nn.Module, by: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `by` have the last word on what a module gives.

    A torch forward hook would be ignored where compiled code was made before it.
    """
    held = vars(module)
    before = held.get("forward")
    forward = module.forward

    @functools.wraps(forward)
    def followed(*args: Any, **kwargs: Any) -> Any:
        return by(forward(*args, **kwargs))

    try:
        held["forward"] = followed
        yield
    finally:
        if held.get("forward") is followed:  # or else somebody put another one there
            if before is None:
                del held["forward"]
            else:
                held["forward"] = before
