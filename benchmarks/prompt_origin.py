"""What one prompt bandwidth means for different encoders: python -m benchmarks.prompt_origin DIR.

DIR holds the package wordllama, whose wheel brings 256 trained numbers for each of 32,000 words:
pip install --no-deps --target DIR wordllama. A prompt is the mean of its words, as pipelines pool
T5's and language models' tokens; these have a part in common that says nothing of the prompt, and
it is added here in several sizes. Compared are the squared prompt kernel of paraphrases and of
unrelated prompts, seen from zero and seen from the mean of sparke's reference prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import _report
from sparke.backends._encodings import REFERENCE
from sparke.kernels import prompt_log_weight

BANDWIDTH = 0.35
PARAPHRASES = (
    ("a photo of a dog on the beach", "a picture of a dog at the beach"),
    ("portrait of a smiling woman", "a portrait photo of a woman smiling"),
    ("a castle on a hill at sunset", "castle on the hill, sunset light"),
    ("a plate of sushi", "sushi on a plate"),
    ("red sports car on a road", "a sports car, red, driving on the road"),
    ("an owl in a tree at night", "owl sitting in a tree, night"),
    ("city street in the rain", "rainy street in a city"),
    ("a bouquet of roses in a vase", "vase with a bouquet of roses"),
)


class WordMeans:
    """Prompts as the mean of trained word vectors.

    Args:
        folder: where wordllama was installed to.
    """

    def __init__(self, folder: Path) -> None:
        (weights,) = folder.glob("wordllama/weights/*_256.safetensors")
        (words,) = folder.glob("wordllama/tokenizers/l2_supercat*.json")
        self.vectors = next(iter(load_file(weights).values())).float()
        self.tokenizer = Tokenizer.from_file(str(words))
        self.tokenizer.no_padding()

    def __call__(self, prompts: list[str]) -> Tensor:
        found = [self.tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
        return torch.stack([self.vectors[torch.tensor(ids)].mean(0) for ids in found])


def row(name: str, seen_from: str, first: Tensor, second: Tensor) -> dict[str, Any]:
    """Kernels between the paraphrases (row i with row i) and between the rest."""
    kernel = prompt_log_weight(first, second, BANDWIDTH).exp()
    others = ~torch.eye(len(first), dtype=torch.bool)
    return {
        "embeddings": name,
        "seen from": seen_from,
        "paraphrases, median": float(kernel.diag().median()),
        "unrelated, median": float(kernel[others].median()),
        "unrelated, most": float(kernel[others].max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    encode = WordMeans(parser.parse_args().folder)

    first, second = (encode([pair[i] for pair in PARAPHRASES]) for i in (0, 1))
    reference = encode(list(REFERENCE))
    generator = torch.Generator().manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(first.shape[1], generator=generator), dim=0)
    rows = []
    for size in (0, 1, 3, 10):
        part = size * first.norm(dim=1).mean() * common
        name = f"with {size} times their length in common" if size else "as trained"
        rows.append(row(name, "zero", first + part, second + part))
        origin = (reference + part).mean(0)
        rows.append(row(name, "the mean", first + part - origin, second + part - origin))
    _report.show(f"squared prompt kernel, bandwidth {BANDWIDTH}", rows)
    _report.write("prompt_origin", {"bandwidth": BANDWIDTH, "rows": rows})


if __name__ == "__main__":
    main()
