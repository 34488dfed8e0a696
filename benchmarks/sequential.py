"""A long history: python -m benchmarks.sequential.

1,000 single generations over 50 prompts in random order, each repelled by all before it, against
the same noise unguided; with the prompts (cond-rke) and without (rke), and the published update.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import sparke
from benchmarks import _report
from benchmarks._progress import shown
from benchmarks.emoji_bed import EmojiBed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--cfg", type=float, default=6.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    bed = EmojiBed()
    generator = torch.Generator().manual_seed(args.seed)
    toned = bed.model.toned_prompts
    others = [p for p in bed.model.prompts if p not in toned]
    chosen = toned[: args.prompts // 2] + others[: args.prompts - args.prompts // 2]
    each = args.generations // len(chosen)
    order = torch.randperm(each * len(chosen), generator=generator).tolist()
    prompts = [chosen[i % len(chosen)] for i in order]
    shape = (len(prompts), *bed.model.latent_shape)
    noise = torch.randn(shape, generator=generator) * bed.model.sigma_max

    guiders: dict[str, sparke.Guider | None] = {
        "unguided": None,
        "cond-rke (default)": sparke.DiversityGuider(),
        "rke, prompts unseen": sparke.DiversityGuider("rke"),
        "published, every 5th": sparke.DiversityGuider.published(every=5),
    }
    rows: list[dict[str, Any]] = []
    for name, guider in guiders.items():
        start = time.perf_counter()
        made = [
            bed.run(guider, x[None], [prompt], args.cfg, args.steps)
            for x, prompt in shown(zip(noise, prompts, strict=True), name, len(prompts))
        ]
        figures = bed.judged(torch.cat(made), prompts)
        rows.append(
            {
                "guidance": name,
                "modes per prompt": figures.modes,
                "names": figures.names,
                "names, CNN": figures.names_cnn,
                "ms per sample": (time.perf_counter() - start) / len(prompts) * 1e3,
            }
        )
    title = f"{len(prompts)} generations, {len(chosen)} prompts in random order, CFG {args.cfg:g}"
    _report.show(title, rows)
    _report.write("sequential", {"title": title, "each": each, "rows": rows})


if __name__ == "__main__":
    main()
