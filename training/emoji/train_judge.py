"""Train the judge's convolutional network and write ``judge.safetensors``.

    python training/emoji/train_judge.py --data data --out sparke/models/emoji/judge.safetensors

The file also holds the reference images, pooled to 16x16. With ``--holdout 0.15`` that share of
the images is kept from training and the accuracy on it is printed (nothing is written): the
figure that says how far the network can be trusted on pictures it never saw.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from emoji_data import EmojiData, load_dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sparke.models.emoji.classifier import Classifier

RATE, BATCH, SMOOTHING, DECAY = 2e-3, 128, 0.05, 1e-2
STYLE_WEIGHT, TONE_WEIGHT = 0.5, 0.5


def distort(images: Tensor) -> Tensor:
    """Turn, scale, shift, fade, tint, blur and add noise, each by a random amount.

    Samples differ from real pictures by blur, speckle and tint, hence these; the changes of
    geometry keep the network from comparing pixels, which the nearest reference does already.
    """
    b = len(images)
    scale = 1 + 0.15 * (2 * torch.rand(b) - 1)
    angle = 0.2 * (2 * torch.rand(b) - 1)
    affine = torch.zeros(b, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = scale * angle.cos()
    affine[:, 1, 0] = scale * angle.sin()
    affine[:, 0, 1] = -affine[:, 1, 0]
    affine[:, :, 2] = 0.12 * (2 * torch.rand(b, 2) - 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    # Outside the picture grid_sample sees 0: make that white.
    moved = F.grid_sample(images - 1, grid, align_corners=False)
    fade = 1 + 0.25 * (2 * torch.rand(b, 1, 1, 1) - 1)
    toned = moved * fade + 1 + 0.08 * torch.randn(b, 3, 1, 1)
    blurred = F.avg_pool2d(F.pad(toned, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mixed = torch.where(torch.rand(b, 1, 1, 1) < 0.5, blurred, toned)
    return mixed + 0.15 * torch.rand(b, 1, 1, 1) * torch.randn_like(mixed)


def train(data: EmojiData, rows: Tensor, steps: int) -> Classifier:
    """Train on the images with indices ``rows``.

    Style and tone are learned on the side: they make the embedding tell modes apart. Their two
    layers are not kept.
    """
    net = Classifier(len(data.names))
    features = net.name.in_features
    sides = nn.ModuleList(nn.Linear(features, len(v)) for v in (data.styles, data.tones))
    learned = [*net.parameters(), *sides.parameters()]
    optimiser = torch.optim.AdamW(learned, RATE, weight_decay=DECAY)
    weights, toned = data.draw_weights.float()[rows], data.toned
    net.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / steps) + 1e-5
        drawn = rows[torch.multinomial(weights, BATCH, replacement=True)]
        name, has_tone = data.name[drawn], toned[data.name[drawn]]
        hidden = net.dropout(F.relu(net.features(distort(data.images[drawn]))))
        loss = F.cross_entropy(net.name(hidden), name, label_smoothing=SMOOTHING)
        loss = loss + STYLE_WEIGHT * F.cross_entropy(sides[0](hidden), data.style[drawn])
        tone = F.cross_entropy(sides[1](hidden)[has_tone], data.tone[drawn][has_tone])
        loss = loss + TONE_WEIGHT * tone
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    return net.eval()


@torch.no_grad()
def accuracy(net: Classifier, data: EmojiData, rows: Tensor, images: Tensor) -> float:
    """Share of ``images``, versions of the rows' images, named rightly."""
    return float((net(images).argmax(1) == data.name[rows]).double().mean())


def write(path: Path, data: EmojiData, net: Classifier) -> None:
    """Write references and network in one move, so that a reader never sees half a file."""
    pooled = F.avg_pool2d((data.images + 1) * 127.5, 2).round().to(torch.uint8)
    labels = torch.stack([data.name, data.style, data.tone]).to(torch.uint8)
    tensors = {
        f"classifier.{key}": value.half()
        for key, value in net.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    tensors |= {"reference.images": pooled, "reference.labels": labels}
    about = {
        "prompts": data.names,
        "styles": data.styles,
        "tones": data.tones,
        "artwork": data.artwork,
    }
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"emoji": json.dumps(about)})
    part.chmod(0o644)  # safetensors writes for the owner only, and a wheel keeps the mode
    part.replace(path)
    parameters = sum(value.numel() for value in net.parameters())
    print(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB, {parameters} parameters")


def main() -> None:
    """Parse the command line, train and write or print."""
    parser = argparse.ArgumentParser(description="Train the judge of the emoji model.")
    parser.add_argument("--data", type=Path, required=True, help="folder of build_dataset.py")
    parser.add_argument("--out", type=Path, help="judge.safetensors to write")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--holdout", type=float, default=0.0, help="share kept for testing")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.holdout == 0):
        parser.error("give either --out or --holdout")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    data = load_dataset(arguments.data)
    unseen = torch.rand(len(data.images)) < arguments.holdout
    rows = torch.nonzero(~unseen).flatten()
    net = train(data, rows, arguments.steps)
    print(f"images trained on: {accuracy(net, data, rows, data.images[rows]):.3f} named rightly")
    if arguments.holdout:
        rows = torch.nonzero(unseen).flatten()
        print(f"{len(rows)} unseen images: {accuracy(net, data, rows, data.images[rows]):.3f}")
    else:
        write(arguments.out, data, net)


if __name__ == "__main__":
    main()
