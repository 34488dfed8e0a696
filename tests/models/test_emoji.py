"""The emoji model and its judge, as they ship."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparke.errors import ArgumentError, ShapeError, SparkeError
from sparke.models import emoji
from sparke.models.emoji._file import read
from sparke.models.emoji.denoiser import Arch, Denoiser, PromptEncoder

FOLDER = Path(emoji.__file__).parent
PER_PROMPT = 24


@pytest.fixture(scope="module")
def model() -> emoji.EmojiModel:
    return emoji.load()


@pytest.fixture(scope="module")
def judge() -> emoji.Judge:
    return emoji.load_judge()


@torch.no_grad()
def sample(model: emoji.EmojiModel, prompts: Sequence[str], scale: float, seed: int = 0) -> Tensor:
    """Euler's method, written here so that the model is tested apart from any host."""
    generator = torch.Generator().manual_seed(seed)
    sigmas, embeds = model.sigmas(30), model.encode(prompts)
    x = torch.randn(len(prompts), *model.latent_shape, generator=generator) * sigmas[0]
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma.expand(len(x)), cond=embeds, cond_scale=scale)
        x = denoised + following / sigma * (x - denoised)
    return model.decode(x)


@pytest.fixture(scope="module")
def judged(
    model: emoji.EmojiModel, judge: emoji.Judge
) -> tuple[Tensor, dict[float, emoji.Verdict]]:
    prompts = [prompt for prompt in emoji.EVALUATION_PROMPTS for _ in range(PER_PROMPT)]
    verdicts = {scale: judge(sample(model, prompts, scale)) for scale in (1.0, 3.0, 6.0)}
    return judge.ids(prompts), verdicts


def noisy(model: emoji.EmojiModel, b: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b)
    sigma = torch.logspace(-1, 2, b)
    return torch.randn(b, 320, generator=generator) * (sigma[:, None] + 1), sigma


def test_what_a_loaded_model_offers(model: emoji.EmojiModel) -> None:
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(model.prompts) == len(set(model.prompts)) >= 140
    assert set(emoji.EVALUATION_PROMPTS) <= set(model.prompts)
    assert len(emoji.EVALUATION_PROMPTS) == 16
    assert sum(prompt in model.toned_prompts for prompt in emoji.EVALUATION_PROMPTS) == 8
    assert model.latent_shape == (320,)
    assert (model.sigma_min, model.sigma_max) == (0.1, 100.0)
    assert model.sigma_data == pytest.approx(float(model.latent_std.square().mean().sqrt()))
    assert len(model.styles) == 5
    assert len(model.tones) == 6


def test_files_fit_in_the_wheel_and_hold_no_pickle() -> None:
    weights, judge = FOLDER / "weights.safetensors", FOLDER / "judge.safetensors"
    assert weights.stat().st_size <= 6_000_000
    assert weights.stat().st_size + judge.stat().st_size <= 7_400_000
    assert not [path for path in FOLDER.iterdir() if path.suffix in {".pt", ".pth", ".pkl", ".npz"}]


def test_the_artwork_is_attributed(model: emoji.EmojiModel) -> None:
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    for style in model.styles:
        assert f"style:{style}" in notice
    for licence in ("Apache License, Version 2.0", "MIT", "CC BY 4.0"):
        assert licence in notice


def test_weights_are_stored_small(model: emoji.EmojiModel) -> None:
    about, tensors = read("weights.safetensors")
    assert about["prompts"] == model.prompts
    assert tensors["latent.components"].dtype == torch.int8
    learned = [tensors[key] for key in tensors if not key.startswith("latent.")]
    assert {tensor.dtype for tensor in learned} == {torch.float16}
    assert sum(tensor.numel() for tensor in learned) < 2_300_000
    identity = model.basis.T @ model.basis
    assert (identity - torch.eye(320)).abs().max() < 5e-3


def test_prompt_embeddings(model: emoji.EmojiModel) -> None:
    embeds = model.encode(["dog face", "princess tone:dark", "Face dog", "princess style:noto"])
    assert embeds.shape == (4, model.null_embeds(1).shape[1])
    assert torch.equal(embeds[0], embeds[2])
    assert not torch.allclose(embeds[1], embeds[3])
    assert torch.equal(model.null_embeds(3), model.encode(["", "", ""]))
    assert model.encode([]).shape == (0, embeds.shape[1])


def test_every_prompt_has_its_own_embedding(model: emoji.EmojiModel) -> None:
    distances = torch.pdist(model.encode(model.prompts))
    assert distances.min() > 1e-2


def test_padding_does_not_matter(model: emoji.EmojiModel) -> None:
    alone = model.encode(["pizza"])
    beside = model.encode(["pizza", "smiling face with heart eyes style:flat"])
    assert torch.allclose(alone[0], beside[0])


def test_unknown_words_are_named_with_near_matches(model: emoji.EmojiModel) -> None:
    with pytest.raises(emoji.UnknownWords, match=r"'ocotpus' \(near: octopus") as caught:
        model.encode(["pizza", "ocotpus in zanzibar"])
    assert caught.value.words == ("ocotpus", "in", "zanzibar")
    assert caught.value.prompt == "ocotpus in zanzibar"
    assert isinstance(caught.value, SparkeError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(emoji.UnknownWords, match="tone:dark"):
        model.encode(["princess tone:drak"])


def test_contradictory_and_misplaced_prompts_are_refused(model: emoji.EmojiModel) -> None:
    with pytest.raises(ArgumentError, match="at most one tone:"):
        model.encode(["princess tone:dark tone:light"])
    with pytest.raises(ArgumentError, match="list of strings"):
        model.encode("pizza")


def test_guidance_scale_one_is_the_conditional_prediction(model: emoji.EmojiModel) -> None:
    x, sigma = noisy(model, 4)
    embeds = model.encode(list(emoji.EVALUATION_PROMPTS[:4]))
    plain = model(x, sigma, cond=embeds)
    assert torch.equal(plain, model(x, sigma, cond=embeds, cond_scale=1.0))
    assert torch.equal(plain, model(x, sigma, cond=embeds, uncond=-embeds, cond_scale=1.0))


@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
def test_guidance_formula(model: emoji.EmojiModel, scale: float) -> None:
    x, sigma = noisy(model, 4)
    embeds = model.encode(list(emoji.EVALUATION_PROMPTS[:4]))
    avoided = model.encode(["pizza"])
    toward, away = model(x, sigma, cond=embeds), model(x, sigma)
    guided = model(x, sigma, cond=embeds, cond_scale=scale)
    assert torch.allclose(guided, away + scale * (toward - away), atol=1e-3)
    away = model(x, sigma, cond=avoided)
    guided = model(x, sigma, cond=embeds, uncond=avoided, cond_scale=scale)
    assert torch.allclose(guided, away + scale * (toward - away), atol=1e-3)


def test_preconditioning(model: emoji.EmojiModel) -> None:
    """Against the EDM equations, with the raw network called by hand."""
    x, sigma = noisy(model, 5)
    embeds = model.encode(list(emoji.EVALUATION_PROMPTS[:5]))
    for row in range(5):
        s, std = sigma[row], model.latent_std
        total = s**2 + std**2
        raw = model.denoiser((x[row] / total.sqrt())[None], s.log()[None], embeds[row][None])[0]
        expected = std**2 / total * x[row] + s * std / total.sqrt() * raw
        assert torch.allclose(model(x, sigma, cond=embeds)[row], expected, atol=1e-3)


def test_little_noise_leaves_little_to_do(model: emoji.EmojiModel) -> None:
    x = torch.randn(8, 320, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((8,), 1e-4)
    assert (model(x, sigma) - x).abs().max() < 1e-2


def test_rows_do_not_depend_on_each_other(model: emoji.EmojiModel) -> None:
    x, sigma = noisy(model, 6)
    embeds = model.encode(list(emoji.EVALUATION_PROMPTS[:6]))
    together = model(x, sigma, cond=embeds, cond_scale=3.0)
    for i in range(6):
        row = slice(i, i + 1)
        alone = model(x[row], sigma[row], cond=embeds[row], cond_scale=3.0)
        assert torch.allclose(together[row], alone, atol=1e-3, rtol=1e-4)
    assert torch.equal(together, model(x, sigma, cond=embeds, cond_scale=3.0))


def test_one_embedding_and_one_level_serve_all_rows(model: emoji.EmojiModel) -> None:
    x, _ = noisy(model, 3)
    embeds = model.encode(["pizza"])
    every = model(x, torch.full((3,), 2.0), cond=embeds.expand(3, -1))
    assert torch.equal(model(x, torch.tensor(2.0), cond=embeds), every)
    assert torch.equal(model(x, torch.tensor([2.0]), cond=embeds), every)


def test_gradients_reach_the_latents(model: emoji.EmojiModel) -> None:
    double = emoji.load(dtype=torch.float64)
    x, sigma = noisy(double, 2)
    x, sigma = x.double().requires_grad_(), sigma.double().clamp(max=3)
    embeds = double.encode(["pizza", "dog face"])
    direction = torch.randn(2, 320, generator=torch.Generator().manual_seed(1)).double()
    (gradient,) = torch.autograd.grad(
        double(x, sigma, cond=embeds, cond_scale=3.0).square().sum(), x
    )
    ahead, behind = (
        double(x.detach() + step * direction, sigma, cond=embeds, cond_scale=3.0).square().sum()
        for step in (1e-5, -1e-5)
    )
    assert float((gradient * direction).sum()) == pytest.approx(float((ahead - behind) / 2e-5))
    assert not model(x.detach().float(), sigma.float()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(model: emoji.EmojiModel, dtype: torch.dtype) -> None:
    other = emoji.load(dtype=dtype)
    x, sigma = noisy(model, 4)
    prompts = list(emoji.EVALUATION_PROMPTS[:4])
    expected = model(x, sigma, cond=model.encode(prompts), cond_scale=3.0)
    found = other(x, sigma, cond=other.encode(prompts), cond_scale=3.0)
    assert found.dtype == x.dtype
    scale = expected.square().mean().sqrt()
    assert (found - expected).square().mean().sqrt() / scale < 0.05
    assert other(x.to(dtype), sigma.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("x", "sigma", "cond"),
    [
        ((2, 3, 32, 32), (2,), None),
        ((2, 319), (2,), None),
        ((2, 320), (3,), None),
        ((2, 320), (2, 1), None),
        ((2, 320), (2,), (3, 128)),
        ((2, 320), (2,), (2, 127)),
    ],
)
def test_wrong_shapes_are_refused(
    model: emoji.EmojiModel,
    x: tuple[int, ...],
    sigma: tuple[int, ...],
    cond: tuple[int, ...] | None,
) -> None:
    embeds = None if cond is None else torch.zeros(cond)
    with pytest.raises(ShapeError, match="must have shape"):
        model(torch.zeros(x), torch.ones(sigma), cond=embeds)


def test_noise_levels(model: emoji.EmojiModel) -> None:
    sigmas = model.sigmas(25)
    assert sigmas.shape == (26,)
    assert (sigmas.diff() < 0).all()
    assert sigmas[0] == pytest.approx(100.0)
    assert sigmas[-2] == pytest.approx(0.1)
    assert sigmas[-1] == 0
    middle = ((100 ** (1 / 7) + 0.1 ** (1 / 7)) / 2) ** 7
    assert float(model.sigmas(3)[1]) == pytest.approx(middle)
    assert model.sigmas(1).tolist() == [100.0, 0.0]
    with pytest.raises(ArgumentError, match="at least 1"):
        model.sigmas(0)


def test_pictures_round_trip(model: emoji.EmojiModel) -> None:
    images = sample(model, list(model.prompts[:32]), 3.0)
    assert images.shape == (32, 3, 32, 32)
    assert images.abs().max() <= 1
    latents = model.encode_images(images)
    assert latents.shape == (32, 320)
    assert (model.decode(latents) - images).square().mean().sqrt() < 0.05
    small = 0.05 * torch.randn(4, 320, generator=torch.Generator().manual_seed(0))
    assert (model.encode_images(model.decode(small)) - small).abs().max() < 0.5
    with pytest.raises(ShapeError, match="images must"):
        model.encode_images(torch.zeros(2, 3, 16, 16))


def test_judge_knows_its_references(judge: emoji.Judge) -> None:
    references = judge.references
    n = len(references.images)
    assert references.images.shape == (n, 3, 16, 16)
    assert len(references.name) == len(references.style) == len(references.tone) == n
    assert set(references.name.tolist()) == set(range(len(judge.prompts)))
    verdict = judge(references.images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(verdict.name, references.name)
    assert torch.equal(verdict.style, references.style)
    assert verdict.distance.max() < 1e-3
    # Some drawings do not change with the tone.
    assert (verdict.tone == references.tone).double().mean() > 0.99
    assert (verdict.name_cnn == references.name).double().mean() > 0.9
    assert all(getattr(verdict, f.name).shape == (n,) for f in dataclasses.fields(verdict))


def test_judge_features(model: emoji.EmojiModel, judge: emoji.Judge) -> None:
    images = sample(model, ["pizza", "pizza", "rocket"], 3.0)
    features = judge.features(images)
    assert features.shape == (3, 128)
    same, other = (features[0] - features[1]).norm(), (features[0] - features[2]).norm()
    assert same < other
    assert torch.allclose(judge.features(images[:1]), features[:1], atol=1e-3)
    with pytest.raises(ShapeError, match="images must"):
        judge(images[:, :, :16])


def test_judge_finds_the_concept_of_a_prompt(judge: emoji.Judge) -> None:
    ids = judge.ids(["pizza style:noto", "FACE dog tone:dark", "dog face"])
    assert [judge.prompts[i] for i in ids] == ["pizza", "dog face", "dog face"]
    with pytest.raises(ArgumentError, match="must name one"):
        judge.ids(["dog"])


def test_effective_modes(judge: emoji.Judge) -> None:
    name = torch.tensor([0, 0, 0, 0, 1, 1, 9, 9])
    mode = torch.tensor([3, 3, 4, 4, 7, 7, 8, 8])
    zero = torch.zeros(8, dtype=torch.long)
    verdict = emoji.Verdict(name, zero, zero, mode, zero.float(), name)
    # Two modes alike, one mode, and none: pictures of another concept do not count.
    wanted = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    assert judge.effective_modes(verdict, wanted) == pytest.approx((2 + 1 + 0) / 3)
    assert judge.name_accuracy(verdict, wanted) == (0.75, 0.75)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_samples_show_their_prompts(
    judge: emoji.Judge, judged: tuple[Tensor, dict[float, emoji.Verdict]], scale: float
) -> None:
    ids, verdicts = judged
    nearest, network = judge.name_accuracy(verdicts[scale], ids)
    assert nearest >= 0.97
    assert network >= 0.97


def test_guidance_costs_modes(
    judge: emoji.Judge, judged: tuple[Tensor, dict[float, emoji.Verdict]]
) -> None:
    ids, verdicts = judged
    free, strong = (judge.effective_modes(verdicts[scale], ids) for scale in (1.0, 6.0))
    assert strong < 0.75 * free


def test_style_and_tone_words_are_obeyed(model: emoji.EmojiModel, judge: emoji.Judge) -> None:
    styled = [f"{p} style:{s}" for p in ("octopus", "house") for s in model.styles for _ in "1234"]
    wanted = torch.arange(5).repeat_interleave(4).repeat(2)
    assert (judge(sample(model, styled, 3.0)).style == wanted).double().mean() >= 0.85
    toned = [f"{p} tone:{t}" for p in ("princess", "thumbs up") for t in model.tones for _ in "123"]
    wanted = torch.arange(6).repeat_interleave(3).repeat(2)
    assert (judge(sample(model, toned, 3.0)).tone == wanted).double().mean() >= 0.7


def test_a_fresh_network_predicts_by_its_skip_connection() -> None:
    """The last layer starts at zero, so that training starts from the linear denoiser."""
    arch = Arch(latent=6, width=8, hidden=8, blocks=2, cond=4, word=4, attribute=2)
    encoder, net = PromptEncoder(3, 2, 2, arch), Denoiser(arch)
    embeds = encoder(torch.tensor([[1, 2], [3, 0]]), torch.tensor([0, 1]), torch.tensor([2, 0]))
    assert embeds.shape == (2, arch.embed)
    assert torch.equal(net(torch.randn(2, 6), torch.zeros(2), embeds), torch.zeros(2, 6))
