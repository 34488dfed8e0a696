"""A sampling loop of one's own, without k-diffusion and without diffusers.

    python examples/my_own_loop.py

Whoever writes the loop themselves needs one thing of it: the shape `(model, x, sigmas, ...) -> x`,
with a model that takes noisy samples and their noise levels and answers with its estimate of the
clean ones. `sparke.wrap` hands back a function of the same shape. Prints, for a few batches of each
loop from the same noise, the effective number of different pictures so far (modes: exp of the
entropy of what was drawn); the wrapped loop remembers its earlier batches.

It draws with the small emoji model that ships with sparke, on the CPU, and downloads nothing.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import torch
from pictures import ends_in_a_line, look
from torch import Tensor

import sparke
from sparke.models import emoji


def sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any]) -> Tensor:
    """Euler's method for the probability flow (arXiv 2206.00364); put your own loop here."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = model(x, sigma.expand(len(x)), **extra_args)
        x = x + (sigma_next - sigma) * (x - denoised) / sigma
    return x


# What is called `model` may be any function. For a network that predicts noise, in units where the
# noisy sample is x = clean + sigma * noise:
#     def model(x, sigma, **conditions):
#         return x - sigma[:, None, None, None] * network(x, sigma, **conditions)


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    model = emoji.load()
    loops = {"without": sample, "with sparke": sparke.wrap(sample)}  # the one line it needs
    prompts = [options.prompt] * options.n
    conditions = {"cond": model.encode(prompts), "cond_scale": options.cfg}

    drawn: dict[str, list[Tensor]] = {name: [] for name in loops}
    print(f"{'pictures':>8}" + "".join(f"{name:>13}" for name in loops) + "   modes")
    for batch in range(options.batches):
        generator = torch.Generator().manual_seed(options.seed + batch)
        noise = torch.randn(options.n, *model.latent_shape, generator=generator)
        line = f"{(batch + 1) * options.n:8}"
        for name, loop in loops.items():
            x = loop(model, noise * model.sigma_max, model.sigmas(options.steps), conditions)
            drawn[name].append(model.decode(x))
            line += f"{look(torch.cat(drawn[name]), [options.prompt]).effective_modes():13.2f}"
        print(line, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("prompt", nargs="?", default="woman health worker")
    parser.add_argument("-n", type=int, default=4, help="pictures in a batch")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=6.0, help="scale of classifier-free guidance")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with ends_in_a_line():
        run(options)


if __name__ == "__main__":
    main()
