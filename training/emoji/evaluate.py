"""Measure the shipped emoji model: fidelity, diversity, obedience to words, memorisation.

    python training/emoji/evaluate.py --data data --json figures.json --sheet sheet.png

Prints the table of README.md. Samples with DPM++ 2M and the model's own noise levels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from emoji_data import EmojiData, load_dataset
from PIL import Image
from torch import Tensor

from sparke.models import emoji

STEPS, CHUNK = 25, 128
SCALES = (1.0, 3.0, 6.0)
STYLE_PROMPTS = ("dog face", "octopus", "pizza", "house", "automobile", "rocket")
TONE_PROMPTS = (
    "woman health worker",
    "man firefighter",
    "princess",
    "thumbs up",
    "man astronaut",
    "santa claus",
)

Figures = dict[str, float]


@torch.no_grad()
def sample(
    model: emoji.EmojiModel, prompts: Sequence[str], scale: float, seed: int, steps: int = STEPS
) -> Tensor:
    """Draw one picture for each prompt by DPM-Solver++ (2M), arXiv 2211.01095.

    Returns:
        (len(prompts), 3, 32, 32) images.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *model.latent_shape, generator=generator)
    images = []
    for first in range(0, len(prompts), CHUNK):
        embeds = model.encode(prompts[first : first + CHUNK])
        sigmas = model.sigmas(steps)
        x = noise[first : first + CHUNK] * sigmas[0]
        earlier: Tensor | None = None
        for i in range(steps):
            denoised = model(x, sigmas[i].expand(len(x)), cond=embeds, cond_scale=scale)
            leap = denoised
            if earlier is not None and sigmas[i + 1] > 0:
                ratio = (sigmas[i - 1] / sigmas[i]).log() / (sigmas[i] / sigmas[i + 1]).log()
                leap = denoised + (denoised - earlier) / (2 * ratio)
            x = leap + sigmas[i + 1] / sigmas[i] * (x - leap)
            earlier = denoised
        images.append(model.decode(x))
    return torch.cat(images)


def entropy(labels: Tensor) -> float:
    """Entropy in nats of the frequencies of (n,) labels."""
    share = labels.bincount().double() / len(labels)
    return float(-torch.xlogy(share, share).sum())


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0 of nothing."""
    return sum(values) / max(len(values), 1)


def describe(
    model: emoji.EmojiModel, judge: emoji.Judge, verdict: emoji.Verdict, ids: Tensor
) -> Figures:
    """Fidelity and diversity of pictures asked for by concept only."""
    styles, tones, top = [], [], []
    for prompt in set(ids.tolist()):
        shown = (ids == prompt) & (verdict.name == prompt)
        if shown.any():
            styles.append(entropy(verdict.style[shown]))
            counts = verdict.mode[shown].bincount()
            top.append(float(counts.max() / counts.sum()))
            if judge.prompts[prompt] in model.toned_prompts:
                tones.append(entropy(verdict.tone[shown]))
    nearest, network = judge.name_accuracy(verdict, ids)
    return {
        "name_nearest": nearest,
        "name_cnn": network,
        "style_entropy": mean(styles),
        "tone_entropy": mean(tones),
        "effective_modes": judge.effective_modes(verdict, ids),
        "top_mode_share": mean(top),
    }


def ceiling(
    model: emoji.EmojiModel, judge: emoji.Judge, data: EmojiData, count: int, repeats: int = 20
) -> Figures:
    """The same figures for real pictures drawn uniformly from each prompt's own."""
    generator = torch.Generator().manual_seed(0)
    found: list[Figures] = []
    for _ in range(repeats):
        rows = []
        for prompt in judge.ids(emoji.EVALUATION_PROMPTS):
            own = torch.nonzero(data.name == prompt).flatten()
            rows.append(own[torch.randint(len(own), (count,), generator=generator)])
        drawn = torch.cat(rows)
        found.append(describe(model, judge, judge(data.images[drawn]), data.name[drawn]))
    return {key: mean([figures[key] for figures in found]) for key in found[0]}


def obedience(
    model: emoji.EmojiModel, judge: emoji.Judge, kind: str, scale: float, count: int = 16
) -> Figures:
    """Shares of pictures that follow a ``style:`` or ``tone:`` word, and that show the name."""
    prompts = STYLE_PROMPTS if kind == "style" else TONE_PROMPTS
    values = model.styles if kind == "style" else model.tones
    asked = [
        (name, value) for name in prompts for value in range(len(values)) for _ in range(count)
    ]
    texts = [f"{name} {kind}:{values[value]}" for name, value in asked]
    verdict = judge(sample(model, texts, scale, seed=11))
    wanted = torch.tensor([value for _, value in asked])
    seen = verdict.style if kind == "style" else verdict.tone
    near = (seen - wanted).abs() <= 1
    nearest, network = judge.name_accuracy(verdict, judge.ids(texts))
    figures = {"obeyed": float((seen == wanted).double().mean())}
    if kind == "tone":
        figures["within_one_tone"] = float(near.double().mean())
    return {**figures, "name_nearest": nearest, "name_cnn": network}


def memorisation(model: emoji.EmojiModel, data: EmojiData, images: Tensor) -> Figures:
    """How near samples come to training pictures, and what the components alone lose."""
    pixels = data.images.flatten(1)
    nearest = torch.cdist(images.flatten(1), pixels).amin(1) / pixels.shape[1] ** 0.5
    rebuilt = model.decode(model.encode_images(data.images)).flatten(1)
    floor = (rebuilt - pixels).square().mean(1).sqrt()
    apart = torch.cdist(pixels, pixels) / pixels.shape[1] ** 0.5
    apart.fill_diagonal_(torch.inf)
    return {
        "sample_to_nearest_median": float(nearest.median()),
        "sample_to_nearest_p90": float(nearest.quantile(0.9)),
        "components_floor_median": float(floor.median()),
        "real_to_nearest_other_median": float(apart.amin(1).median()),
    }


def judge_checks(model: emoji.EmojiModel, judge: emoji.Judge, data: EmojiData) -> Figures:
    """What the judge makes of real pictures that went through the components and some noise."""
    generator = torch.Generator().manual_seed(0)
    latents = model.encode_images(data.images)
    latents = latents + 0.1 * torch.randn(latents.shape, generator=generator)
    verdict = judge(model.decode(latents))
    toned = data.toned[data.name]
    return {
        "name_nearest": float((verdict.name == data.name).double().mean()),
        "name_cnn": float((verdict.name_cnn == data.name).double().mean()),
        "style": float((verdict.style == data.style).double().mean()),
        "tone": float((verdict.tone == data.tone)[toned].double().mean()),
    }


def sheet(path: Path, images: Tensor, columns: int, zoom: int = 2) -> None:
    """Save a contact sheet with this many pictures to a row."""
    tiles = rearrange(images, "(r k) c h w -> (r h) (k w) c", k=columns)
    pixels = ((tiles + 1) * 127.5).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    size = (picture.width * zoom, picture.height * zoom)
    picture.resize(size, Image.Resampling.NEAREST).save(path)


def evaluate(
    model: emoji.EmojiModel, judge: emoji.Judge, data: EmojiData, count: int, show: Path | None
) -> dict[str, Figures]:
    """Compute every figure, print it, and save a contact sheet for each scale where asked."""
    found: dict[str, Figures] = {}

    def report(title: str, figures: Figures) -> None:
        found[title] = figures
        print(title, " ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)

    report("real", ceiling(model, judge, data, count))
    prompts = [prompt for prompt in emoji.EVALUATION_PROMPTS for _ in range(count)]
    everything = [name for name in model.prompts for _ in range(4)]
    for scale in SCALES:
        images = sample(model, prompts, scale, seed=0)
        report(f"cfg {scale:g}", describe(model, judge, judge(images), judge.ids(prompts)))
        report(f"memorisation, cfg {scale:g}", memorisation(model, data, images))
        if show is not None:
            rows = rearrange(images, "(p n) c h w -> p n c h w", n=count)[:, :16]
            name = f"{show.stem}_cfg{scale:g}{show.suffix}"
            sheet(show.with_name(name), rows.flatten(0, 1), min(16, count))
    for scale in SCALES[:2]:
        verdict = judge(sample(model, everything, scale, seed=5))
        nearest, network = judge.name_accuracy(verdict, judge.ids(everything))
        figures = {"name_nearest": nearest, "name_cnn": network}
        report(f"all {len(model.prompts)} prompts x 4, cfg {scale:g}", figures)
        for kind in ("style", "tone"):
            report(f"{kind} words, cfg {scale:g}", obedience(model, judge, kind, scale))
    report("judge on real pictures, distorted", judge_checks(model, judge, data))
    return found


def main() -> None:
    """Parse the command line, measure and write."""
    parser = argparse.ArgumentParser(description="Measure the emoji model.")
    parser.add_argument("--data", type=Path, required=True, help="folder of build_dataset.py")
    parser.add_argument("--weights", type=Path, help="weights other than the packaged ones")
    parser.add_argument("--judge", type=Path, help="judge other than the packaged one")
    parser.add_argument("--count", type=int, default=48, help="pictures to a prompt")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--sheet", type=Path, help="contact sheets, one for each guidance scale")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = emoji.load(weights=arguments.weights)
    judge = emoji.load_judge(weights=arguments.judge)
    found = evaluate(model, judge, load_dataset(arguments.data), arguments.count, arguments.sheet)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
