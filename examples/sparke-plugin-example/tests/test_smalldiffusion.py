"""The wrapped sampler in use."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import smalldiffusion
import sparke
import torch
from sparke.errors import ArgumentError, GuidanceWarning, MissingPrompts, ShapeError
from test_conformance import IDEAL, SIGMAS, labelled, last


def test_it_is_found_and_of_the_same_kind() -> None:
    wrapped: Any = sparke.wrap(smalldiffusion.samples, score="neighbours", k=2)
    assert inspect.isgeneratorfunction(wrapped)
    own = list(inspect.signature(smalldiffusion.samples).parameters)
    assert list(inspect.signature(wrapped).parameters) == [*own, "prompt_embeds"]
    assert wrapped.guider.score.k == 2
    with pytest.raises(sparke.SparkeError, match="no backend accepts"):
        sparke.wrap(wrapped)
    with pytest.raises(ArgumentError, match="k must be"):
        sparke.score("neighbours", k=0)


def test_samples_of_a_batch_and_of_later_batches_move_apart() -> None:
    memory = sparke.memory.RingMemory()
    wrapped = sparke.wrap(smalldiffusion.samples, "neighbours", memory=memory, scale=1.0)
    torch.manual_seed(0)
    start = torch.randn(1, 2).repeat(3, 1) * SIGMAS[0] + 0.01 * torch.randn(3, 2)
    bare = last(smalldiffusion.samples(IDEAL, SIGMAS, xt=start))
    assert bare.std(0).norm() < 0.1, "one start, one mode"
    first, second = (last(wrapped(IDEAL, SIGMAS, xt=start)) for _ in range(2))
    assert first.std(0).norm() > 1
    assert not torch.allclose(first, second, atol=1e-2)
    assert len(memory) == 6


def test_latents_come_one_by_one_and_a_run_left_early_is_not_kept() -> None:
    wrapped: Any = sparke.wrap(smalldiffusion.samples, "neighbours")
    items = wrapped(IDEAL, SIGMAS, batchsize=2)
    assert next(items).shape == (2, 2)
    items.close()
    assert len(wrapped.memory) == 0
    assert len(list(wrapped(IDEAL, SIGMAS, batchsize=2))) == len(SIGMAS) - 1
    assert len(wrapped.memory) == 2


def test_labels_are_the_prompts() -> None:
    model, labels = labelled(), torch.tensor([0, 1, 1])
    wrapped: Any = sparke.wrap(smalldiffusion.samples, "cond-rke")
    last(wrapped(model, SIGMAS, batchsize=3, cond=labels))
    kept = wrapped.memory.features.cond
    assert torch.equal(kept, model.cond_embed(labels))
    with pytest.raises(MissingPrompts):
        last(wrapped(IDEAL, SIGMAS, batchsize=3))
    with pytest.raises(ShapeError, match=r"\(3, c\)"):
        last(wrapped(IDEAL, SIGMAS, batchsize=3, prompt_embeds=torch.ones(2, 5)))
    given = sparke.wrap(
        smalldiffusion.samples, "cond-rke", prompt_embeds=lambda a: torch.eye(a["batchsize"])
    )
    assert last(given(IDEAL, SIGMAS, batchsize=3)).shape == (3, 2)


def test_what_it_does_not_reach_it_says() -> None:
    wrapped = sparke.wrap(smalldiffusion.samples, guider=["noise", "neighbours"])
    last(wrapped(IDEAL, SIGMAS, batchsize=3))
    with pytest.warns(GuidanceWarning, match="Noise"):
        last(wrapped(IDEAL, SIGMAS, xt=torch.randn(3, 2) * SIGMAS[0]))
    with pytest.warns(GuidanceWarning, match="CADS"):
        last(sparke.wrap(smalldiffusion.samples, guider="cads")(IDEAL, SIGMAS, batchsize=3))
