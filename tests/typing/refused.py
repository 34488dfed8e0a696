# mypy: ignore-errors
# ruff: noqa: B018, RUF012
# (read by test_typing.py, without the line above; `E: code` marks the lines mypy must refuse)
"""What the type checker must refuse, each line for the reason given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sparke
from sparke.protocols import Run, Selection, State
from sparke.testing import check_backend, check_guider, check_memory, check_score


def sample_euler(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    return x


class Pipeline:
    def __call__(self, prompt: str) -> list[Tensor]:
        return []


# The wrapped target takes what the target takes, and nothing else.

sparke.wrap(sample_euler)(None, torch.ones(1))  # E: call-arg
sparke.wrap(sample_euler)(None, "noise", torch.ones(2))  # E: arg-type
count: int = sparke.wrap(sample_euler)  # E: assignment
sparke.wrap(Pipeline())(3)  # E: arg-type
sparke.wrap(Pipeline()).unet  # E: attr-defined
sparke.wrap()  # E: call-arg
tensor: Tensor = sparke.wrap(Pipeline())("a cat")  # E: assignment

# Arguments of the wrong kind.

sparke.wrap(sample_euler, 3)  # E: arg-type
sparke.wrap(sample_euler, score=sparke.Requires())  # E: arg-type
sparke.wrap(sample_euler, scale="much")  # E: arg-type
sparke.wrap(sample_euler, memory={})  # E: arg-type
sparke.wrap(sample_euler, memory=sparke.memory.RingMemory)  # E: arg-type
sparke.wrap(sample_euler, guider=3)  # E: arg-type
sparke.wrap(sample_euler, guider=[3])  # E: list-item
sparke.wrap(sample_euler, in_batch="yes")  # E: arg-type
sparke.wrap(sample_euler, features=lambda: None)  # E: arg-type, misc
sparke.wrap(sample_euler, schedule=0.3)  # E: arg-type
sparke.wrap(sample_euler, cfg_interval=(1.0,))  # E: arg-type
sparke.wrap(sample_euler, backend=3)  # E: arg-type
sparke.wrap(sample_euler, "rke", None)  # E: call-arg
sparke.callback(score=3)  # E: arg-type
sparke.callback(guider={"cads"})  # E: arg-type
sparke.score()  # E: call-arg
sparke.score(3)  # E: arg-type
sparke.scores("rke")  # E: call-arg
sparke.no_such_name  # E: attr-defined
sparke.memory.RingMemory("large")  # E: arg-type
sparke.memory.memory(3)  # E: arg-type
sparke.DiversityGuider(memory=3)  # E: arg-type
sparke.metrics.vendi("rows")  # E: arg-type
sparke.Features()  # E: call-arg
sparke.Features(torch.eye(2), "prompts")  # E: arg-type
sparke.Step(0, 1.0)  # E: call-arg
sparke.Requires(cond="yes")  # E: arg-type
sparke.Requires().cond = True  # E: misc
sparke.Score()  # E: misc
sparke.Backend()  # E: misc


# Objects that lack something.


class NoBank:
    requires = sparke.Requires()

    def __call__(self, query: sparke.Features) -> Tensor:
        return query.x.sum(1)


class NoRequires:
    def __call__(self, query: sparke.Features, bank: sparke.Features) -> Tensor:
        return query.x.sum(1)


class WrongValue:
    requires = sparke.Requires()

    def __call__(self, query: sparke.Features, bank: sparke.Features) -> float:
        return 0.0


class WrongRequires:
    requires = {"cond": True}

    def __call__(self, query: sparke.Features, bank: sparke.Features) -> Tensor:
        return query.x.sum(1)


class NoCommit:
    def __len__(self) -> int:
        return 0

    def select(self, cond: Tensor | None = None, weigh: Any = None) -> Selection:
        return Selection(torch.zeros(0, 4))


class NeedsPrompts:
    def __len__(self) -> int:
        return 0

    def commit(self, items: sparke.Features) -> None: ...

    def select(self, cond: Tensor, weigh: Any = None) -> Selection:
        return Selection(cond)


class NoFinish:
    def begin(self, run: Run) -> None: ...

    def __call__(self, state: State) -> Tensor:
        return state.x


class WrongState:
    def begin(self, run: Run) -> None: ...

    def __call__(self, state: Tensor) -> Tensor:
        return state

    def finish(self, x: Tensor) -> None: ...


class NoAccepts:
    def attach(self, target: Any, guider: sparke.Guider, **options: Any) -> Any:
        return target


class NoOptions:
    def accepts(self, target: object) -> bool:
        return True

    def attach(self, target: Any, guider: sparke.Guider) -> Any:
        return target


a: sparke.Score = NoBank()  # E: assignment
b: sparke.Score = NoRequires()  # E: assignment
c: sparke.Score = WrongValue()  # E: assignment
d: sparke.Score = WrongRequires()  # E: assignment
e: sparke.Memory = NoCommit()  # E: assignment
f: sparke.Memory = NeedsPrompts()  # E: assignment
g: sparke.Guider = NoFinish()  # E: assignment
h: sparke.Guider = WrongState()  # E: assignment
i: sparke.Backend = NoAccepts()  # E: assignment
j: sparke.Backend = NoOptions()  # E: assignment
k: sparke.Backend = torch  # E: assignment
sparke.wrap(sample_euler, NoBank())  # E: arg-type
sparke.wrap(sample_euler, memory=NoCommit())  # E: arg-type
sparke.wrap(sample_euler, guider=NoFinish())  # E: arg-type
sparke.wrap(sample_euler, guider=["cads", NoFinish()])  # E: list-item
sparke.wrap(sample_euler, backend=NoAccepts())  # E: arg-type
check_score(NoRequires())  # E: arg-type
check_memory(NoCommit())  # E: arg-type
check_memory(NoCommit)  # E: arg-type
check_guider(WrongState())  # E: arg-type
check_backend(NoAccepts(), sample_euler, lambda sampler: torch.ones(1))  # E: arg-type
check_backend(NoOptions(), sample_euler)  # E: call-arg, arg-type
