"""Methods that are a guider as published and a score of ours, by one name."""

from typing import Any

import pytest
import torch
from k_diffusion import sampling

import sparke
from sparke.guidance.dpp import DPP
from sparke.guidance.particle import Particle
from sparke.guidance.spell import SPELL
from tests.samplers import PROMPTS, run


@pytest.mark.parametrize(("name", "kind"), [("dpp", DPP), ("particle", Particle), ("spell", SPELL)])
def test_it_goes_by_name_as_a_guider_and_as_a_score(name: str, kind: type) -> None:
    prompts = PROMPTS[:1] * 4
    bare = run(sampling.sample_euler, prompts=prompts)
    guided: Any = sparke.wrap(sampling.sample_euler, guider=name)
    scored: Any = sparke.wrap(sampling.sample_euler, score=name)
    assert isinstance(guided.guider, kind)
    assert type(scored.guider.score).__module__ == f"sparke.scores.{name}"
    for wrapped in (guided, scored):
        ours = run(wrapped, prompts=prompts)
        assert bool(ours.isfinite().all())
        assert not torch.allclose(ours, bare, atol=1e-4)
