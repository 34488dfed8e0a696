"""`sparke eval` from its options to its table and files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sparke import metrics
from sparke._cli import sampling
from sparke._cli.evaluation import columns, explain, nearest, outputs, sets, terminal
from sparke._cli.evaluation.asked import Asked
from sparke._cli.evaluation.changes import between
from sparke._cli.evaluation.measures import Measured, Settings, measure, random_features
from sparke._cli.evaluation.sets import Set
from sparke._cli.evaluation.told import Told, heeded, versions
from sparke.errors import ArgumentError, ShapeError
from sparke.features.encoders import ImageEncoder, image_encoder, text_encoder
from sparke.images import image_features


def run(console: Console, asked: Asked) -> None:
    """Measure, show the table, write the files."""
    outputs.check(asked)
    found = sets.found(asked.paths)
    reference = None
    if asked.reference is not None:
        reference = sets.one(asked.reference, sets.printable(asked.reference.name), least=2)
    prompts = _prompts(found, asked)
    labels = columns.labels_of(found, asked.labels) if asked.labels else None
    if asked.per_prompt is not None:
        found, prompts, labels = columns.first_of_each(found, prompts, labels, asked.per_prompt)
    with sampling.progress() as shown:
        told = _measured(found, reference, prompts, labels, asked, terminal.Bars(shown))
    for warning in told.warnings:
        terminal.say(Console(stderr=True), f"sparke: warning: {warning}")
    with sampling.progress() as shown:
        terminal.Bars(shown)("writing the report")
        written = outputs.write(told, asked)
    console.print(terminal.table(told))
    for change in told.changes:
        terminal.say(console, f"{change.base} -> {change.other}: {' '.join(change.words)}")
    for path in written:
        terminal.say(console, str(path))


def _measured(
    found: Sequence[Set],
    reference: Set | None,
    prompts: list[list[str]] | None,
    labels: list[list[str]] | None,
    asked: Asked,
    bars: terminal.Bars,
) -> Told:
    device = _device(asked.device)
    bars("loading the encoder")
    encoder, text = _encoders(found, reference, asked, device)
    measured = [
        Measured(one, _features(one, encoder, asked, bars), None if prompts is None else prompts[i])
        for i, one in enumerate(found)
    ]
    compared = None if reference is None else _features(reference, encoder, asked, bars)
    _check_widths(measured, reference, compared)
    bars("bandwidth")
    told_apart = [one.features for one in measured] + ([] if compared is None else [compared])
    bandwidth = asked.bandwidth or metrics.shared_bandwidth(*told_apart)
    sizes = [len(rows) for rows in told_apart]
    of_prompts = [n for one in prompts or () for n in Counter(one).values()]
    settings = Settings(
        asked.kernel,
        bandwidth,
        asked.nearest,
        random_features(sizes, asked.kernel, asked.random_features),
        random_features(of_prompts, asked.kernel, None),
    )
    for i, one in enumerate(measured):
        embeds = text(one.prompts) if text is not None and one.prompts is not None else None
        measure(
            one,
            settings,
            prompt_embeds=embeds,
            reference=compared,
            labels=None if labels is None else labels[i],
            bar=bars,
        )
    likest: dict[str, Any] = {"kernel": asked.kernel, "bandwidth": bandwidth, "most": asked.pairs}
    pairs = [
        nearest.within(
            one.features, _groups(one), **likest, tell=bars(f"{one.of.label}: nearest pairs")
        )
        for one in measured
    ]
    copies = []
    if compared is not None:
        copies = [
            nearest.across(one.features, compared, **likest, tell=bars("nearest in the reference"))
            for one in measured
        ]
    return Told(
        sets=measured,
        measures=explain.shown(prompts is not None, labels is not None, reference is not None),
        changes=[between(measured[0], other) for other in measured[1:]],
        nearest=pairs,
        reference=reference,
        copies=copies,
        warnings=_warnings(measured, asked, encoder),
        settings=_settings(asked, encoder, settings),
    )


def _prompts(found: Sequence[Set], asked: Asked) -> list[list[str]] | None:
    if asked.prompts and asked.prompts_from_names:
        raise ArgumentError("--prompts and --prompts-from-names are both given; one will do.")
    if asked.prompts_from_names:
        return columns.prompts_from_names(found)
    if asked.prompts:
        return columns.prompts_of(found, asked.prompts)
    if asked.text_encoder is not None:
        raise ArgumentError(
            "--text-encoder compares prompts and none are given; add --prompts FILE or "
            "--prompts-from-names."
        )
    return None


def _encoders(
    found: Sequence[Set], reference: Set | None, asked: Asked, device: str
) -> tuple[ImageEncoder | None, Any]:
    text = None
    if asked.text_encoder is not None:
        text = text_encoder(asked.text_encoder, download=asked.download, device=device)
    everything = [*found, *([] if reference is None else [reference])]
    if all(one.rows is not None for one in everything):
        if asked.encoder is not None:
            raise ArgumentError(
                f"--encoder {asked.encoder} has no picture to encode: the sets are files of "
                "features."
            )
        return None, text
    name = "pixels" if asked.encoder is None else asked.encoder
    options: dict[str, Any] = {"image_size": asked.image_size, "device": device}
    return image_encoder(name, download=asked.download, **options), text


def _features(one: Set, encoder: ImageEncoder | None, asked: Asked, bars: terminal.Bars) -> Tensor:
    if one.rows is not None:
        return one.rows
    assert one.files is not None
    assert encoder is not None
    tell = bars(f"{one.label}: encoding")
    return image_features(one.files, encoder, batch_size=asked.batch, progress=tell)


def _check_widths(measured: Sequence[Measured], reference: Set | None, rows: Tensor | None) -> None:
    widths = {one.of.label: one.features.shape[1] for one in measured}
    if reference is not None and rows is not None:
        widths[f"{reference.label} (reference)"] = rows.shape[1]
    if len(set(widths.values())) > 1:
        told = ", ".join(f"{label} {width}" for label, width in widths.items())
        raise ShapeError(
            f"the sets have features of different widths ({told}); all must come from one encoder."
        )


def _groups(one: Measured) -> list[Tensor]:
    if one.prompts is None:
        return [torch.arange(len(one.of))]
    where: dict[str, list[int]] = {}
    for row, prompt in enumerate(one.prompts):
        where.setdefault(prompt, []).append(row)
    return [torch.tensor(rows) for rows in where.values()]


def _warnings(
    measured: Sequence[Measured], asked: Asked, encoder: ImageEncoder | None
) -> list[str]:
    said = heeded(measured)
    if encoder is not None and asked.encoder is None:
        said.append(
            "no encoder is chosen, so pictures are compared by their pixels: colours at places, "
            "not what is shown. Choose one with --encoder."
        )
    found = [one.of for one in measured]
    if measured[0].prompts is None and columns.look_numbered(found):
        said.append(
            "no prompts are given, so all pictures are compared with all; --prompts-from-names "
            f"would read them from names such as {found[0].names[0]}."
        )
    return said


def _settings(asked: Asked, encoder: ImageEncoder | None, settings: Settings) -> dict[str, str]:
    told = {"command": asked.command}
    told["encoder"] = "none: features from files" if encoder is None else encoder.name
    if encoder is not None:
        told["what it compares"] = encoder.compares
        if encoder.prepare is None and encoder.image_size is not None:
            told["size of pictures"] = "{}x{}, the middle cut out".format(*encoder.image_size)
        told["device"] = encoder.device
    told["kernel"] = asked.kernel
    if asked.kernel == "gaussian":
        how = "as given" if asked.bandwidth else "half the median distance in all sets together"
        told["bandwidth"] = f"{settings.bandwidth:.6g}, shared by all sets ({how})"
    if settings.random_features is not None:
        told["eigenvalues"] = (
            f"approximate, by {settings.random_features} random features (Vendi, KEN, relative RKE)"
        )
    if asked.prompts or asked.prompts_from_names:
        source = ", ".join(map(str, asked.prompts)) or "names of the files"
        same = asked.text_encoder or "equal texts are one prompt, others are never compared"
        told["prompts"] = f"{source}; {same}"
    if asked.per_prompt is not None:
        told["pictures taken"] = f"the first {asked.per_prompt} of each prompt"
    if asked.labels:
        told["labels"] = ", ".join(map(str, asked.labels))
    if asked.reference is not None:
        told["reference"] = f"{asked.reference}; neighbourhoods reach to the {asked.nearest}. row"
    told["versions"] = versions(("torch", "pillow", "numpy", "timm", "transformers"))
    told["measured"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return told


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    # torch raises what it likes: RuntimeError, AssertionError, NotImplementedError.
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise ArgumentError(f"--device {name!r} cannot be used: {said}") from error
    return name
