"""Conformance of the hooks that hold a network: it must come back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sparke.errors import SparkeError
from sparke.protocols import EncoderHook, Evaluation, EvaluationHook, Guider, ModelHook, Run, State
from sparke.testing._common import expect, normal

Hold = Callable[[Any], AbstractContextManager[None]]
ROWS = 2


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = (part(hidden_states)[:, None] for part in (self.to_q, self.to_k, self.to_v))
        out: Tensor = self.to_out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])
        return out


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), _Attention(width)
        self.ff = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm(hidden_states))
        out: Tensor = hidden_states + self.ff(hidden_states)
        return out


class _Network(nn.Module):
    """A transformer of two blocks, its parts named as in diffusers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(_Block(width) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def network() -> nn.Module:
    """A new one, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _Network().eval()


def check(
    guider: Guider,
    run: Run,
    state: State,
    model: nn.Module | None,
    forward: Callable[[nn.Module], Any] | None,
) -> None:
    """Raise unless the hooks that hold a network leave nothing on it, however they are left."""
    expect((model is None) == (forward is None), "model and forward must be given together")

    def tell() -> None:
        if isinstance(guider, EvaluationHook):
            guider.on_evaluation(Evaluation(state.step, ("cond",), run.shape[0]))

    if isinstance(guider, ModelHook):
        rows = normal((run.shape[0], 5, 8), 7)
        call = forward or (lambda net: net(rows))
        guider.begin(run)
        _check_hook("on_model()", guider.on_model, model or network(), call, tell, model is None)
        # Hosts that learn the run late hold the network first.
        held = network() if model is None else model
        before = Trace(held)
        with contextlib.suppress(SparkeError), guider.on_model(held):
            guider.begin(run)
            tell()
            call(held)
        before.check("on_model(), entered before begin(),")
    if isinstance(guider, EncoderHook):
        rows = normal((ROWS, 5, 8), 8)
        _check_hook("on_encoder()", guider.on_encoder, network(), lambda net: net(rows), tell, True)


def _check_hook(
    what: str,
    hold: Hold,
    model: nn.Module,
    forward: Callable[[nn.Module], Any],
    tell: Callable[[], None],
    may_refuse: bool,
) -> None:
    before, plain = Trace(model), _tensors(forward(model))
    try:
        with hold(model):
            tell()
            held = _tensors(forward(model))
    except SparkeError as error:
        before.check(f"{what}, refusing the network,")
        expect(may_refuse, f"{what} must take the network given, it raised {error!r}")
        return
    _check_alike(held, plain, f"inside {what} the network's output")
    before.check(f"{what}, left after a run,")
    for left in (RuntimeError("from a block"), KeyboardInterrupt()):
        name = type(left).__name__
        came = None
        try:
            with hold(model), _failing(model, left):
                tell()
                forward(model)
                raise left
        except BaseException as error:  # noqa: BLE001  KeyboardInterrupt is one of those planted
            came = error
        expect(came is left, f"{what} must let {name} through, {came!r} came instead")
        before.check(f"{what}, left by {name} in a block,")
    with hold(model):
        tell()
        again = _tensors(forward(model))
    _check_alike(again, plain, f"inside {what}, entered once more, the network's output")
    before.check(f"{what}, left after a second run,")
    after = _tensors(forward(model))
    expect(
        all(torch.equal(a, b) for a, b in zip(after, plain, strict=True)),
        f"after {what} the network must compute what it did before",
    )


@contextlib.contextmanager
def _failing(model: nn.Module, error: BaseException) -> Iterator[None]:
    """The model with a module in it, the last one, that raises when it is called."""

    def fail(*_: Any) -> None:
        raise error

    *_, last = model.modules()
    handle = last.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out.detach().clone()]
    inner = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else ()
    return [tensor for value in inner for tensor in _tensors(value)]


def _check_alike(ours: list[Tensor], theirs: list[Tensor], what: str) -> None:
    expect(
        [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in theirs],
        f"{what} must keep its shapes and dtypes",
    )
    expect(all(bool(t.isfinite().all()) for t in ours), f"{what} must be finite")


class Trace:
    """What a network and torch look like now: classes, attributes, hooks, weights, patches."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = self._look()
        self._weights = {name: t.detach().clone() for name, t in model.state_dict().items()}

    def check(self, when: str) -> None:
        """Raise if anything is not as it was."""
        now = self._look()
        for key in [*self._seen, *(key for key in now if key not in self._seen)]:
            expect(
                key in now and key in self._seen and now[key] is self._seen[key],
                f"{when} must leave the network as it was; {' '.join(key)} is another",
            )
        for name, value in self._model.state_dict().items():
            expect(torch.equal(value, self._weights[name]), f"{when} changed the weight {name}")

    def _look(self) -> dict[tuple[str, ...], Any]:
        seen: dict[tuple[str, ...], Any] = {
            ("torch's scaled_dot_product_attention",): nn.functional.scaled_dot_product_attention,
        }
        for name, everywhere in vars(nn.modules.module).items():
            if name.startswith("_global_") and isinstance(everywhere, dict):
                seen |= {(name, str(key)): hook for key, hook in everywhere.items()}
        for name, module in self._model.named_modules():
            seen[name or "network", "class"] = type(module)
            for attribute, value in vars(module).items():
                if isinstance(value, dict):
                    seen |= {(name, attribute, str(key)): v for key, v in value.items()}
                elif not _harmless(module, attribute, value):
                    seen[name, attribute] = value
        return seen


def _harmless(module: nn.Module, attribute: str, value: Any) -> bool:
    """Whether a left attribute changes nothing: diffusers' hook registries leave such ones."""
    if attribute == "forward":
        return getattr(value, "__func__", None) is type(module).forward
    return attribute == "_diffusers_hook" and not getattr(value, "hooks", True)
