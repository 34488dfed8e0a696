# mypy: ignore-errors
# ruff: noqa: F821, RUF009, T201
# (read by test_typing.py, without the line above; `R: n` marks revealed types that are the same)
"""What people write and the type checker must accept, with the types that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparke
from sparke.backends import k_diffusion
from sparke.protocols import Run, Selection, State, Weigh
from sparke.schedules import RemainingNoise

# Targets: their own type comes back.


def sample_euler(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None
) -> Tensor:
    return x


def samples(model: torch.nn.Module, sigmas: Tensor, gam: float = 1.0) -> Iterator[Tensor]:
    yield sigmas


class StableDiffusionPipeline:
    unet: torch.nn.Module

    def __call__(self, prompt: list[str], *, num_inference_steps: int = 50) -> list[Tensor]:
        return []


class Solver:
    def __call__(self, model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
        return x


pipe = StableDiffusionPipeline()
alias: Callable[..., Tensor] = sample_euler
anything: Any = sample_euler

reveal_type(sample_euler)  # R: 1
reveal_type(sparke.wrap(sample_euler))  # R: 1
reveal_type(sparke.wrap(sample_euler, "rke", scale=0.2, bandwidth=0.8))  # R: 1
reveal_type(samples)  # R: 2
reveal_type(sparke.wrap(samples, guider=["cads", "cond-rke"], memory="ring"))  # R: 2
reveal_type(pipe)  # R: 3
reveal_type(sparke.wrap(pipe, score="cond-rke", prompt_encoder=lambda texts: texts))  # R: 3
reveal_type(alias)  # R: 4
reveal_type(sparke.wrap(alias))  # R: 4
reveal_type(Solver())  # R: 5
reveal_type(sparke.wrap(Solver(), backend="k-diffusion"))  # R: 5
reveal_type(anything)  # R: 6
reveal_type(sparke.wrap(anything))  # R: 6
images: list[Tensor] = sparke.wrap(pipe)(["a cat"], num_inference_steps=20)
latents: Tensor = sparke.wrap(sample_euler)(None, torch.ones(1), torch.ones(2), extra_args={})
unet: torch.nn.Module = sparke.wrap(pipe).unet


# Objects of other people: nothing is inherited.


@dataclass(frozen=True)
class OwnScore:
    requires: sparke.Requires = sparke.Requires()

    def __call__(self, query: sparke.Features, bank: sparke.Features) -> Tensor:
        return query.x.sum(1)


class PropertyScore:
    @property
    def requires(self) -> sparke.Requires:
        return sparke.Requires(cond=True, batch=2)

    def __call__(self, query: sparke.Features, bank: sparke.Features) -> Tensor:
        return query.x.sum(1)


class OwnMemory:
    def __len__(self) -> int:
        return 0

    def commit(self, items: sparke.Features) -> None: ...

    def select(self, cond: Tensor | None = None, weigh: Weigh | None = None) -> Selection:
        return Selection(torch.zeros(0, 4))


class OwnGuider:
    def begin(self, run: Run) -> None: ...

    def __call__(self, state: State) -> Tensor:
        return torch.zeros_like(state.denoised)

    def finish(self, x: Tensor) -> None: ...

    def on_model(self, model: Any) -> AbstractContextManager[None]:
        return nullcontext()


class OwnBackend:
    def accepts(self, target: object) -> bool:
        return callable(target)

    def attach(
        self, target: Any, guider: sparke.Guider, *, prompt_embeds: Any = None, **options: Any
    ) -> Any:
        return target


score: sparke.Score = OwnScore()
other: sparke.Score = PropertyScore()
memory: sparke.Memory = OwnMemory()
guider: sparke.Guider = OwnGuider()
backend: sparke.Backend = OwnBackend()
module: sparke.Backend = k_diffusion

sparke.wrap(sample_euler, OwnScore(), memory=OwnMemory(), backend=OwnBackend())
sparke.wrap(sample_euler, guider=OwnGuider())
sparke.wrap(sample_euler, guider=[OwnGuider(), "cads", sparke.DiversityGuider("rke")])
sparke.wrap(sample_euler, features=lambda x: x.flatten(1), schedule=RemainingNoise(lo=0.1))
sparke.wrap(sample_euler, schedule=lambda step: step.sigma if step.index < 3 else 0.0)
sparke.wrap(sample_euler, schedule="few-step", cfg_interval=(0.3, 5.0), in_batch=False)


# Every public name.

reveal_type(sparke.scores())  # T: list[str]
reveal_type(sparke.score("rke", bandwidth=0.5))  # T: Score
reveal_type(sparke.score(OwnScore()))  # T: Score
reveal_type(sparke.memory.names())  # T: list[str]
reveal_type(sparke.memory.memory("ring", capacity=7))  # T: Memory
reveal_type(sparke.memory.RingMemory(64, torch.float16))  # T: RingMemory
reveal_type(sparke.memory.RingMemory.load("history.safetensors"))  # T: RingMemory
reveal_type(sparke.metrics.vendi(torch.eye(3)))  # T: float
reveal_type(sparke.DiversityGuider("cond-rke", OwnMemory(), scale=0.2))  # T: DiversityGuider
reveal_type(sparke.guidance.guider("cads", s=0.2))  # T: Guider
reveal_type(sparke.guidance.names())  # T: list[str]
reveal_type(sparke.backends.names())  # T: list[str]
reveal_type(sparke.backends.backend("diffusers"))  # T: Backend
reveal_type(sparke.callback("rke").tensor_inputs)  # T: list[str]
reveal_type(sparke.callback(guider=OwnGuider())(pipe, 0, 0, {}))  # T: dict[str, Any]
reveal_type(sparke.Features(torch.eye(3)).cond)  # T: Tensor | None
reveal_type(sparke.Step(0, 1.0, 0.5).total)  # T: int | None
reveal_type(sparke.Requires(cond=True).batch)  # T: int

try:
    sparke.score("no-such-score")
except sparke.SparkeError as error:
    print(error)
