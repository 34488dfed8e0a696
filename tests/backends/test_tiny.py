"""The tiny pipelines run, repeat, and listen to their seed, their prompts and their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.tiny import ALL, latents, shared, with_scheduler

PROMPTS = ("a cat", "a red car")
every = pytest.mark.parametrize("name", ALL)


def call(
    name: str, prompts: Sequence[str] = PROMPTS, *, pipe: Any = None, **changes: Any
) -> Tensor:
    tiny = ALL[name]
    return latents((pipe or shared(name))(**tiny.arguments(prompts, **changes)))


@every
def test_runs_and_repeats(name: str) -> None:
    before = torch.get_rng_state()
    first = call(name)
    assert len(first) == len(PROMPTS)
    assert first.isfinite().all()
    assert first.std() > 0.1
    assert torch.equal(call(name), first)
    assert torch.equal(call(name, pipe=ALL[name].make()), first)
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_listens(name: str) -> None:
    first = call(name)
    for other in (call(name, seed=1), call(name, ("blue sky", "a dog"))):
        gap = (other - first).flatten(1).std(1) / first.flatten(1).std(1)
        assert (gap > 0.02).all()


@every
def test_makes_pictures(name: str) -> None:
    pictures = call(name, output_type="np")
    assert pictures.shape[-1] == 3
    assert pictures.isfinite().all()
    assert 0.0 <= pictures.min() < pictures.max() <= 1.0


@every
def test_prompts_of_a_batch_are_apart(name: str) -> None:
    # Kandinsky 3 pools over the padding too, whose length is that of the longest prompt.
    other = "a big dog" if name == "kandinsky3" else "an old town by the sea"
    first, second = call(name), call(name, (PROMPTS[0], other))
    torch.testing.assert_close(second[0], first[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(second[1], first[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["sd-img2img", "sd-controlnet", "sdxl-controlnet"])
def test_listens_to_its_picture(name: str) -> None:
    first = call(name)
    other = call(name, image=torch.zeros(2, 3, 16, 16))
    assert (other - first).std() > 0.02 * first.std()


@pytest.mark.parametrize("name", ["sd3", "zimage", "wan", "pixart-sigma", "dit", "sd", "sdxl"])
def test_guidance_is_on(name: str) -> None:
    weak = call(name, guidance_scale=1.0)
    assert not torch.allclose(weak, call(name), rtol=1e-2, atol=1e-2)


def test_true_guidance_is_on() -> None:
    weak = call("qwen", true_cfg_scale=1.0 + 1e-6)
    assert not torch.allclose(weak, call("qwen"), rtol=1e-2, atol=1e-2)


def test_modular_agrees() -> None:
    # It runs the two halves of guidance one after the other.
    torch.testing.assert_close(call("sdxl-modular"), call("sdxl"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd", "EulerAncestralDiscreteScheduler"),
        ("sd-v", "DPMSolverMultistepScheduler"),
        ("sdxl", "UniPCMultistepScheduler"),
        ("sdxl-modular", "DDIMScheduler"),
        ("sd3", "FlowMatchHeunDiscreteScheduler"),
        ("wan", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_takes_another_scheduler(name: str, scheduler: str) -> None:
    pipe = with_scheduler(ALL[name].make(), scheduler)
    assert type(pipe.scheduler).__name__ == scheduler
    other = call(name, pipe=pipe)
    assert other.isfinite().all()
    assert torch.equal(call(name, pipe=pipe), other)
    assert not torch.allclose(other, call(name), rtol=1e-2, atol=1e-2)


def test_keeps_the_prediction_type() -> None:
    pipe = with_scheduler(ALL["sd-v"].make(), "EulerDiscreteScheduler", timestep_spacing="trailing")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.timestep_spacing == "trailing"
