"""One line for each thing this package adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import smalldiffusion
import sparke
import torch
from sparke.testing import check_backend, check_package, check_score
from torch import Tensor

from sparke_plugin_example import Neighbours
from sparke_plugin_example import smalldiffusion as backend

POINTS = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [0.0, -3.0]])
IDEAL = smalldiffusion.IdealDenoiser(POINTS)
SIGMAS = smalldiffusion.ScheduleLogLinear(100, sigma_max=10).sample_sigmas(8)


def labelled(kind: Any = smalldiffusion.ConditionalMLP) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kind(hidden_dims=(16, 16), num_classes=4)


def last(items: Iterator[Tensor]) -> Tensor:
    *_, x = items
    return x


def test_the_package() -> None:
    assert check_package("sparke-plugin-example") == {
        "sparke.scores": ["neighbours"],
        "sparke.backends": ["smalldiffusion"],
    }


@pytest.mark.parametrize("k", [1, 3, 50])
def test_the_score(k: int) -> None:
    check_score(sparke.score("neighbours", k=k))
    check_score(Neighbours(k), width=40)


@pytest.mark.parametrize(("gam", "mu"), [(1.0, 0.0), (1.0, 0.5), (2.0, 0.0)])
def test_the_backend(gam: float, mu: float) -> None:
    check_backend(
        backend,
        smalldiffusion.samples,
        lambda samples: last(samples(IDEAL, SIGMAS, gam, mu, batchsize=3)),
        watch=[IDEAL],
        refuses=[list, smalldiffusion.training_loop],
        hooks=["noise", "model", "evaluation"],
    )


def flow() -> Any:
    return labelled(smalldiffusion.PredFlow(smalldiffusion.ConditionalMLP))


@pytest.mark.parametrize("make", [labelled, flow])
@pytest.mark.parametrize("cfg_scale", [0.0, 2.0])
def test_the_backend_with_labels(make: Callable[[], Any], cfg_scale: float) -> None:
    model = make()
    labels = torch.tensor([0, 1, 1])
    is_flow = make is flow
    sigmas = smalldiffusion.ScheduleFlow().sample_sigmas(5) if is_flow else SIGMAS
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))

    def call(samples: Any) -> Tensor:
        x = samples(model, sigmas, cfg_scale=cfg_scale, xt=start * sigmas[0], cond=labels)
        return last(x)

    check_backend(
        backend,
        smalldiffusion.samples,
        call,
        watch=[model],
        hooks=["model", "evaluation", "guidance_scale"],
    )
