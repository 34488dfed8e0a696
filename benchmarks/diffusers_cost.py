"""What guidance adds to full-size UNets: python -m benchmarks.diffusers_cost.

The UNets of SD1.5 (860 M parameters) and SDXL (2.6 B), built from their public configurations with
random weights, which take as long as trained ones. There is no text encoder and no VAE, whose time
would only make the share of guidance look smaller. Every memory is full, and every row in it
belongs to a prompt much like the call's: the costliest case, in which no row may be left out.

The bare pipeline and the guided ones take turns in one process. On a shared CPU two long
runs differ by more than guidance costs, so its parts are also timed inside the runs, each without
what it calls: the second table, best taken on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch import Tensor

import sparke
from benchmarks import _clock, _report, full_size
from benchmarks._clock import Clock
from sparke.backends._pipeline_run import PipelineRun
from sparke.protocols import Features, Run, State, Step
from sparke.schedules import RemainingNoise

Table: TypeAlias = list[dict[str, Any]]
TYPICAL_STEPS = 50
PUBLISHED = {"before": (1.620, 3.178), "after": (1.752, 3.230)}
"""Seconds per sample and GB of SD1.5 at 50 steps (arXiv 2506.10173)."""


class TimedGuider:
    """A guider by the clock; evaluations at which it has nothing to do are told apart."""

    def __init__(self, memory: sparke.memory.RingMemory, clock: Clock) -> None:
        # The default schedule at sigma_data 1, given so that it can be asked.
        self.schedule = RemainingNoise(0.3, power=1)
        self.guider = sparke.DiversityGuider("cond-rke", memory, schedule=self.schedule)
        self.memory, self.clock = memory, clock

    def begin(self, run: Run) -> None:
        with self.clock.part("begin"):
            self.guider.begin(run)

    def __call__(self, state: State) -> Tensor:
        repels = len(self.memory) or len(state.x) > 1
        busy = repels and self.schedule(state.step) > 0
        with self.clock.part("guider" if busy else "idle guider"):
            return self.guider(state)

    def finish(self, x: Tensor) -> None:
        with self.clock.part("finish"):
            self.guider.finish(x)

    def on_guidance_scale(self, step: Step, guidance_scale: float) -> float:
        return self.guider.on_guidance_scale(step, guidance_scale)


@dataclass(frozen=True)
class Trial:
    """One call of a pipeline: wall seconds, peak bytes, and the clock with its parts."""

    seconds: float
    peak: int | None
    clock: Clock


class Bench:
    """A pipeline of random weights and the one call that everything is timed on."""

    def __init__(self, model: str, size: int, steps: int, batch: int, device: str, dtype: Any):
        self.model, self.batch, self.device, self.steps = model, batch, device, steps
        self.width, self.size = 4 * (size // 8) ** 2, size
        self.pipe = full_size.pipeline(model, device, dtype)
        g = torch.Generator().manual_seed(1)
        channels = full_size.UNETS[model]["cross_attention_dim"]
        names = ["prompt_embeds", "negative_prompt_embeds"]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (1, 77, channels))
        if model == "sdxl":
            pooled = ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
            shapes |= dict.fromkeys(pooled, (1, 1280))
        embeds = {n: torch.randn(s, generator=g).to(device, dtype) for n, s in shapes.items()}
        self.cond = embeds["prompt_embeds"].float().mean(1)
        self.arguments = {
            **embeds,
            "height": size,
            "width": size,
            "num_images_per_prompt": batch,
            "guidance_scale": 7.5,
            "output_type": "latent",
        }

    def memory(self, rows: int) -> sparke.memory.RingMemory:
        """A ring that is full and has begun to overwrite, as after a long history."""
        memory = sparke.memory.RingMemory(max(rows, 1), device=self.device)
        g = torch.Generator(self.device).manual_seed(2)
        for start in range(0, rows + 1 if rows else 0, 500):
            n = min(500, rows + 1 - start)
            x = torch.randn(n, self.width, generator=g, device=self.device)
            noise = torch.randn(n, self.cond.shape[1], generator=g, device=self.device)
            memory.commit(Features(x, self.cond + 0.1 * self.cond.std() * noise))
        return memory

    def trial(self, rows: int | None, clock: Clock, steps: int | None = None) -> Trial:
        """One call: bare if `rows` is None, else against a memory of so many."""
        pipe = self.pipe
        if rows is not None:
            guider = TimedGuider(self.memory(rows), clock)
            cond = self.cond.expand(self.batch, -1)
            pipe = sparke.wrap(pipe, guider=guider, prompt_embeds=cond)
        noise = torch.Generator(self.device).manual_seed(3)
        _clock.reset_peak(self.device)
        with _watched(self.pipe, clock):
            start = time.perf_counter()
            with clock.part("pipeline"):
                out = pipe(
                    **self.arguments, num_inference_steps=steps or self.steps, generator=noise
                )
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        if not bool(out.images.isfinite().all()):
            raise RuntimeError(f"{self.model} gave latents that are not finite: nothing to time.")
        return Trial(seconds / self.batch, _clock.peak(self.device), clock)


@contextmanager
def _watched(pipe: Any, clock: Clock) -> Iterator[None]:
    guiding = PipelineRun.guiding

    @contextmanager
    def timed_guiding(run: PipelineRun) -> Iterator[None]:
        with clock.part("hooks"), guiding(run), clock.part("pipeline"):
            yield

    seams = [(type(pipe.unet), "forward", "unet"), (type(pipe.scheduler), "step", "scheduler")]
    seams += [(PipelineRun, n, "hooks") for n in vars(PipelineRun) if n.startswith("_on_")]
    with ExitStack() as held:
        for owner, name, part in seams:
            timed = clock.timed(part, getattr(owner, name))
            held.enter_context(mock.patch.object(owner, name, timed))
        held.enter_context(mock.patch.object(PipelineRun, "guiding", timed_guiding))
        yield


def _summary(
    bench: Bench, runs: dict[int | None, list[Trial]], clocks: dict[int | None, list[Clock]]
) -> tuple[Table, Table, float]:
    bare = median(t.seconds for t in runs[None])
    unet = median(s for held in clocks.values() for c in held for s in c.of("unet"))
    cost: Table = []
    parts: Table = []
    for rows in (r for r in runs if r is not None):
        seconds = median(t.seconds for t in runs[rows])
        peaks = [max((t.peak or 0) for t in runs[k]) / 1e9 for k in (None, rows)]
        head = {"model": bench.model, "px": bench.size, "steps": bench.steps, "rows": rows}
        cost.append(
            {
                **head,
                "s/sample without": bare,
                "with": seconds,
                "added %": 100 * (seconds / bare - 1),
                "GB without": peaks[0] or None,
                "GB with": peaks[1] or None,
            }
        )
        held = clocks[rows]
        guider = _median([s for c in held for s in c.of("guider")])
        hooks = median(sum(c.of("hooks")) for c in held) / bench.steps
        once = median(sum(c.of("begin")) + sum(c.of("finish")) for c in held)
        whole = once + TYPICAL_STEPS * (guider + hooks)
        parts.append(
            {
                "model": bench.model,
                "px": bench.size,
                "rows": rows,
                "UNet s/step": unet,
                "guider ms/step": 1e3 * guider,
                "hooks ms/step": 1e3 * hooks,
                "% of a step": 100 * (guider + hooks) / unet,
                "once ms": 1e3 * once,
                f"% of {TYPICAL_STEPS} steps": 100 * whole / (TYPICAL_STEPS * unet),
            }
        )
    spread = [t.seconds for t in runs[None]]
    noise = 100 * (max(spread) - min(spread)) / bare
    return cost, parts, noise


def _median(values: Sequence[float]) -> float:
    return median(values) if values else 0.0


def measure(bench: Bench, memories: Sequence[int], repeats: int) -> tuple[Table, Table, float]:
    bench.trial(None, Clock(bench.device), steps=1)
    variants = [None, *memories]
    runs: dict[int | None, list[Trial]] = {v: [] for v in variants}
    clocks: dict[int | None, list[Clock]] = {v: [] for v in variants}
    for _ in range(repeats):
        # Bare runs come first and last: what differs between them is no cost of guidance.
        for rows in [*variants, None]:
            # Waiting for a GPU at each part costs time, so its parts have a run of their own.
            if bench.device.startswith("cuda"):
                runs[rows].append(bench.trial(rows, Clock(bench.device, on=False)))
                clocks[rows].append(bench.trial(rows, Clock(bench.device)).clock)
            else:
                runs[rows].append(bench.trial(rows, Clock(bench.device)))
                clocks[rows].append(runs[rows][-1].clock)
    return _summary(bench, runs, clocks)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=(*full_size.UNETS, "both"), default="both")
    parser.add_argument("--size", type=int, help="pixels; CPU 256, CUDA 512 and 1024")
    parser.add_argument("--steps", type=int, help="CPU 2, CUDA 20")
    parser.add_argument("--dtype", help="CPU float32, CUDA float16")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--memory", type=int, nargs="+", default=[0, 1000, 10000])
    parser.add_argument("--in-batch", type=int, default=1, help="samples made together")
    parser.add_argument("--repeats", type=int, help="CPU 1, CUDA 5")
    parser.add_argument("--out", default="diffusers_cost", help="name of the file in results/")
    args = parser.parse_args()
    cuda = args.device.startswith("cuda")
    steps, repeats = args.steps or (20 if cuda else 2), args.repeats or (5 if cuda else 1)
    dtype = args.dtype or ("float16" if cuda else "float32")

    cost: Table = []
    parts: Table = []
    noise: dict[str, float] = {}
    for model in full_size.UNETS if args.model == "both" else (args.model,):
        size = args.size or (8 * full_size.UNETS[model]["sample_size"] if cuda else 256)
        bench = Bench(model, size, steps, args.in_batch, args.device, getattr(torch, dtype))
        found = measure(bench, args.memory, repeats)
        _report.show(f"cost of a sample, {args.device}, {dtype}, {args.in_batch} at once", found[0])
        _report.show("inside the guided runs, times as Clock tells them", found[1])
        print(f"bare runs apart by {found[2]:.1f} % of their median", flush=True)
        cost, parts, noise[model] = cost + found[0], parts + found[1], found[2]
        del bench
        _clock.reset_peak(args.device)
    print("\npublished, SD1.5, 50 steps:", PUBLISHED)
    content = {"device": args.device, "dtype": dtype, "batch": args.in_batch, "repeats": repeats}
    content |= {"cost": cost, "parts": parts, "bare_runs_apart_percent": noise}
    _report.write(args.out, {**content, "published": PUBLISHED})


if __name__ == "__main__":
    main()
