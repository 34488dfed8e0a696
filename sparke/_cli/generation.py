"""`sparke generate`: pictures in files, and a memory that grows from call to call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import sparke
from sparke._cli import files, sampling
from sparke._cli.sampling import Sampler, Settings, Tick
from sparke._cli.sheet import to_images
from sparke.errors import MemoryFileError
from sparke.memory import RingMemory
from sparke.models import emoji

CAPACITY = 4096


@sampling.one_thread()
def run(
    console: Console,
    prompts: Sequence[str],
    *,
    out: Path,
    n: int,
    batch: int,
    size: int,
    settings: Settings,
    seed: int,
    options: dict[str, Any],
    memory_file: Path | None,
    capacity: int | None,
) -> None:
    """Draw n pictures of each prompt, then write all of them and the memory, or nothing.

    Args:
        console: of the summary.
        prompts: what to draw.
        out: folder of the pictures.
        n: pictures to a prompt.
        batch: pictures drawn at once.
        size: side of a written picture.
        settings: of the sampler.
        seed: of the noise.
        options: of `sparke.wrap`.
        memory_file: loaded if it is there, saved in the end.
        capacity: of the memory; as in the file, or 4096, if None.
    """
    model = emoji.load()
    prompts = sampling.checked_prompts(model, prompts)
    memory = _memory(memory_file, capacity)
    loaded = None if memory_file is None else files.stamp(memory_file)
    before = len(memory)
    generator = torch.Generator().manual_seed(seed)
    total = len(prompts) * -(-n // batch) * settings.steps
    with sampling.progress() as shown:
        sampler = sparke.wrap(sampling.bare_sampler(shown), memory=memory, **options)
        files.folder(out)
        task = shown.add_task("drawing", total=total)
        images = {
            prompt: _draw(
                sampler, model, prompt, n, batch, generator, settings, lambda: shown.advance(task)
            )
            for prompt in prompts
        }
        task = shown.add_task("writing", total=n * len(prompts))
        with files.uninterrupted() as let_through, files.all_or_none() as made:

            def tick() -> None:
                shown.advance(task)
                let_through()

            written = {
                prompt: _write(out, files.stem_of(prompt), drawn, size, made, tick)
                for prompt, drawn in images.items()
            }
            if memory_file is not None:
                _save(memory, memory_file, loaded)
    for prompt, paths in written.items():
        last = f" ... {paths[-1].name}" if len(paths) > 1 else ""
        _say(console, f"{prompt}: {files.shown(paths[0])}{last}")
    if memory_file is not None:
        kept = files.shown(memory_file)
        _say(console, f"memory: {before} -> {len(memory)} pictures ({kept})")
    _say(console, f"seed: {seed}")


def _memory(path: Path | None, capacity: int | None) -> RingMemory:
    if path is None:
        return RingMemory(CAPACITY if capacity is None else capacity)
    files.folder(path.parent, make=False)
    if path.is_dir():
        raise MemoryFileError(f"the memory {path} is a folder, a file is needed there.")
    if path.is_symlink() and not path.exists():
        raise MemoryFileError(f"the memory {path} is a symbolic link that leads nowhere.")
    if not path.exists():
        return RingMemory(CAPACITY if capacity is None else capacity)
    return RingMemory.load(path, capacity=capacity)


def _save(memory: RingMemory, path: Path, loaded: files.Stamp | None) -> None:
    """Save unless another process has saved there since the file was loaded.

    Raises:
        OutputError: it has; its pictures would be forgotten.
        MemoryFileError: the file cannot be written.
    """
    if files.stamp(path) != loaded:
        raise files.OutputError(
            f"the memory {path} was changed by another process while these pictures were drawn; "
            "nothing is written. Run the command again."
        )
    memory.save(path)


def _draw(
    sampler: Sampler,
    model: emoji.EmojiModel,
    prompt: str,
    n: int,
    batch: int,
    generator: torch.Generator,
    settings: Settings,
    tick: Tick,
) -> Tensor:
    """(n, 3, 32, 32) images of one prompt."""
    parts = []
    for first in range(0, n, batch):
        x = sampling.noise(model, min(batch, n - first), generator)
        parts.append(model.decode(sampling.draw(sampler, model, prompt, x, settings, tick)))
    return torch.cat(parts)


def _write(
    out: Path, stem: str, images: Tensor, size: int, made: list[Path], tick: Tick
) -> list[Path]:
    paths = []
    for row in images.split(1):
        (picture,) = to_images(row, size)
        paths.append(files.create_next(out, stem, files.png(picture)))
        made.append(paths[-1])
        tick()
    return paths


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)
