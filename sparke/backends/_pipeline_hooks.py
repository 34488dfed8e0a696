"""The hooks of a guider during one call of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparke.backends import _noise
from sparke.backends._calls import Call
from sparke.backends._hooked import Hooks, named, warn
from sparke.backends._network import Network, SecondEncoding
from sparke.guidance._hooks import having
from sparke.protocols import GuidanceScaleHook, Guider, Step

__all__ = ["PipelineHooks"]


class PipelineHooks:
    """Calls the hooks of a guider in one call of a pipeline, and says which it cannot.

    Args:
        pipeline: the pipeline called.
        guider: a chain or a single one.

    Attributes:
        hooks: that are in use.
        networks: modules that the pipeline calls as its denoiser.
        network: makes their calls while a run lasts; None where no hook minds them.
        held: what is held until the call ends, None outside of it.
    """

    def __init__(self, pipeline: Any, guider: Guider) -> None:
        self._pipeline, self.hooks = pipeline, Hooks(guider)
        self._scaling = having(guider, GuidanceScaleHook)
        self.networks: list[nn.Module] = []
        self.network: Network | None = None
        self.held: ExitStack | None = None
        self._second: SecondEncoding | None = None
        self._entered = self._prepared = self._encoded = self._checked = self._found = False

    @property
    def name(self) -> str:
        """The pipeline's class."""
        return type(self._pipeline).__name__

    def begun(self, batch: int) -> None:
        """A run of this many samples has begun."""
        if self.held is not None and not self._entered:
            self._entered = True
            networks = {id(module): module for module in self.networks}.values()
            self.held.enter_context(self.hooks.holding(networks))
        self._note()
        self.network = Network(self.hooks, batch, self._second) if self.hooks.inside else None

    def answer(self, call: Call, step: Callable[[], Step]) -> Any:
        """What the network answers to a call."""
        return call.made() if self.network is None else self.network.answer(call, step())

    def refuses_noise(
        self, arguments: Mapping[str, Any], latents: Tensor, ready: bool = True
    ) -> bool:
        """Whether these latents are not to be changed, after a warning that says why.

        Args:
            arguments: that they were prepared with.
            latents: as prepared.
            ready: whether a run can begin with them.
        """
        if not self.hooks.noise:
            return True
        why = _noise.obstacle(arguments, latents)
        if why is None and not ready:
            why = "the pipeline prepares its latents before it encodes its prompts"
        if why is not None and not self._prepared:
            self._left("the initial noise", self.hooks.noise, why)
        self._prepared = True
        return why is not None

    def hear(self, encode: Callable[..., Any], heard: inspect.BoundArguments, result: Any) -> None:
        """Have ``encode_prompt`` encode the call's prompts once more, differently."""
        if not self.hooks.encoders or self._encoded:
            return
        given = heard.arguments.get("prompt_embeds") is not None
        if given or heard.arguments.get("prompt") is None:
            self.encode([], list, "the call brings its prompts as embeddings; call it with strings")
            return
        self.encode(_parts(result), lambda: _parts(encode(*heard.args, **heard.kwargs)))

    def encode(
        self, plain: Sequence[Any], again: Callable[[], Sequence[Any]], why_not: str | None = None
    ) -> None:
        """Encode the prompts a second time, as the guider holds the encoders; never a third.

        Args:
            plain: the parts of the first encoding.
            again: encodes once more.
            why_not: why that cannot be done.
        """
        if not self.hooks.encoders or self._encoded:
            return
        self._encoded = True
        parts = vars(self._pipeline).items()
        encoders = [v for k, v in parts if "text_encoder" in k and isinstance(v, nn.Module)]
        if why_not is None and not encoders:
            why_not = "the pipeline has no text encoder"
        if why_not is not None:
            self._left("a second encoding of the prompts", self.hooks.encoders, why_not)
            return
        context = self.hooks.encoding(encoders)
        if context is None:
            return
        with context, torch.no_grad():
            other = again()
        self._second = SecondEncoding(plain, other)

    def check(self) -> None:
        """Warn of hooks that had no effect on the first evaluation."""
        if self._checked:
            return
        self._checked, hooks = True, self.hooks
        self._note()
        if hooks.noise and not self._prepared:
            why = "the pipeline draws it where nobody can reach it"
            self._left("the initial noise", hooks.noise, why)
        self.encode([], list, "the pipeline encodes no prompts during its call")
        inside = [*hooks.conditions, *hooks.models, *hooks.evaluations]
        if inside and not self.networks:
            why = "the pipeline has no denoiser under a name that is known"
            self._left("the network", inside, why)
        elif hooks.conditions and not self._found:
            why = (
                "the network was called without any that could be told from the null prompt's "
                "(class labels are none)"
            )
            self._left("the prompt embeddings", hooks.conditions, why)

    def leave_scale(self) -> None:
        """Warn, once, that the scale of classifier-free guidance is nobody's to choose."""
        if self._scaling:
            why = "which rows of its network's calls are for which prompt cannot be told"
            self._left("the guidance scale", self._scaling, why)
        self._scaling = []

    def _note(self) -> None:
        """Keep whether embeddings were found, as a run may begin anew after its first call."""
        self._found = self._found or (self.network is not None and self.network.found_embeds)

    def _left(self, what: str, members: Sequence[object], why: str) -> None:
        warn(f"{self.name} goes on without {named(members)} for {what}: {why}.", 4)


def _parts(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]
