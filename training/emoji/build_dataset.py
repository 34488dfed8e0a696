"""Build the emoji data set: 32x32 pictures of named concepts in five drawing styles.

The artwork comes from five npm packages of pinned versions, fetched with ``npm pack`` and checked
against their SHA-256. Every SVG is rasterised at 128 px by resvg, laid on white and averaged over
4x4 blocks, so that a given version of resvg-py always yields the same bytes.

    python training/emoji/build_dataset.py --cache cache --out data

writes ``dataset.safetensors`` (images and labels) and ``dataset.json`` (what the labels mean).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import subprocess
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image
from safetensors.numpy import save_file

RENDER, SIZE = 128, 32
MIN_STYLES = 4
TONES = ("yellow", "light", "medium-light", "medium", "medium-dark", "dark")
TONE_OF_CODE = {"1f3fb": 1, "1f3fc": 2, "1f3fd": 3, "1f3fe": 4, "1f3ff": 5}
VARIATION_SELECTOR = "fe0f"


@dataclass(frozen=True)
class IconSet:
    """One npm package of artwork and the word that names its style in a prompt."""

    style: str
    package: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        """File name that ``npm pack`` gives the package."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


ICON_SETS = (
    IconSet(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    IconSet(
        "blob",
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    IconSet(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    IconSet(
        "fluent",
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    IconSet(
        "flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
)


@dataclass(frozen=True)
class Package:
    """The parts of an unpacked icon set that the data set needs."""

    icons: dict[str, Any]
    aliases: dict[str, Any]
    chars: dict[str, str]
    width: float
    height: float


def fetch(icon_set: IconSet, cache: Path) -> Package:
    """Read an icon set, packing it into ``cache`` first where it is not there yet.

    Raises:
        SystemExit: The archive is not the one the data set was built from.
    """
    path = cache / icon_set.archive
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        wanted = f"{icon_set.package}@{icon_set.version}"
        subprocess.run(["npm", "pack", "--silent", wanted], cwd=cache, check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != icon_set.sha256:
        raise SystemExit(f"{path}: sha256 is {digest}, expected {icon_set.sha256}")
    with tarfile.open(path) as archive:
        icons = _read_json(archive, "package/icons.json")
        chars = _read_json(archive, "package/chars.json")
    return Package(
        icons=icons["icons"],
        aliases=icons.get("aliases", {}),
        chars=chars,
        width=icons["width"],
        height=icons["height"],
    )


def _read_json(archive: tarfile.TarFile, name: str) -> Any:
    member = archive.extractfile(name)
    if member is None:
        raise SystemExit(f"{name} is missing from {archive.name!r}")
    return json.load(member)


def split_code(code: str) -> tuple[str, int] | None:
    """Split a dashed code point sequence into its untoned base and its skin tone.

    Returns None where the picture shows two people of different tones: it has no single tone.
    """
    parts = [part for part in code.lower().split("-") if part != VARIATION_SELECTOR]
    tones = {TONE_OF_CODE[part] for part in parts if part in TONE_OF_CODE}
    if len(tones) > 1:
        return None
    base = "-".join(part for part in parts if part not in TONE_OF_CODE)
    return base, tones.pop() if tones else 0


def name_table(packages: dict[str, Package]) -> dict[str, str]:
    """Map icon names to code points, from the sets that publish both.

    noto-v1 and fluent-emoji publish names only, and share the names of the other three.
    """
    table: dict[str, str] = {}
    for package in packages.values():
        for code, name in package.chars.items():
            table.setdefault(name, code)
    return table


def locate(package: Package, table: dict[str, str]) -> dict[tuple[str, int], str]:
    """Map (untoned code, tone) to the name of the icon that draws it in this set."""
    also_known_as: dict[str, list[str]] = defaultdict(list)
    for alias, target in package.aliases.items():
        also_known_as[target["parent"]].append(alias)
    found: dict[tuple[str, int], str] = {}
    if package.chars:
        pairs = list(package.chars.items())
    else:
        pairs = [
            (table[known], name)
            for name in package.icons
            for known in [name, *also_known_as[name]]
            if known in table
        ]
    for code, name in pairs:
        key = split_code(code)
        if key is not None:
            found.setdefault(key, name)
    return found


def render(package: Package, name: str) -> npt.NDArray[np.uint8]:
    """Draw an icon on white: (32, 32, 3) in 0..255."""
    while name not in package.icons:
        name = package.aliases[name]["parent"]
    icon = package.icons[name]
    width, height = icon.get("width", package.width), icon.get("height", package.height)
    side = max(width, height)
    left = icon.get("left", 0) - (side - width) / 2
    top = icon.get("top", 0) - (side - height) / 2
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{RENDER}" height="{RENDER}" viewBox="{left} {top} {side} {side}">'
        f"{icon['body']}</svg>"
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RENDER, height=RENDER))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    paper = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
    paper.alpha_composite(drawn)
    small = paper.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8)


def read_concepts(path: Path) -> list[str]:
    """Read one concept a line, leaving out comments and blank lines."""
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def refuse_shared(images: list[npt.NDArray[np.uint8]], names: list[str]) -> None:
    """Stop where two concepts share a picture: no judge could tell which of them it shows."""
    owner: dict[bytes, str] = {}
    pairs = {
        (first, name)
        for image, name in zip(images, names, strict=True)
        if (first := owner.setdefault(image.tobytes(), name)) != name
    }
    if pairs:
        raise SystemExit(f"drawn alike, remove one of each: {sorted(pairs)}")


def build(cache: Path, out: Path) -> None:
    """Render every concept in every style and tone there is, and write the data set to ``out``."""
    packages = {icon_set.style: fetch(icon_set, cache) for icon_set in ICON_SETS}
    table = name_table(packages)
    located = {style: locate(package, table) for style, package in packages.items()}
    concepts = read_concepts(Path(__file__).with_name("concepts.txt"))
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[tuple[int, int, int]] = []
    refused: list[str] = []
    for number, concept in enumerate(concepts):
        slug = concept.replace(" ", "-")
        split = split_code(table[slug]) if slug in table else None
        drawn_by = [style for style in packages if split and (split[0], 0) in located[style]]
        if split is None or len(drawn_by) < MIN_STYLES:
            refused.append(f"{concept} ({len(drawn_by)} styles)")
            continue
        for style, icon_set in enumerate(ICON_SETS):
            for tone in range(len(TONES)):
                name = located[icon_set.style].get((split[0], tone))
                if name is not None:
                    images.append(render(packages[icon_set.style], name))
                    labels.append((number, style, tone))
    if refused:
        raise SystemExit("not in the artwork often enough: " + ", ".join(refused))
    refuse_shared(images, [concepts[name] for name, _, _ in labels])
    out.mkdir(parents=True, exist_ok=True)
    columns = np.asarray(labels, dtype=np.int64).T
    arrays = {"images": np.stack(images)}
    arrays |= {
        key: np.ascontiguousarray(columns[i]) for i, key in enumerate(("name", "style", "tone"))
    }
    save_file(arrays, out / "dataset.safetensors")
    digest = hashlib.sha256(arrays["images"].tobytes()).hexdigest()
    about = {
        "names": concepts,
        "styles": [icon_set.style for icon_set in ICON_SETS],
        "tones": list(TONES),
        "artwork": {s.style: f"{s.package}@{s.version}" for s in ICON_SETS},
        "rendered_with": f"resvg_py {importlib.metadata.version('resvg_py')}",
        "images_sha256": digest,
    }
    (out / "dataset.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    per_style = Counter(ICON_SETS[style].style for _, style, _ in labels)
    print(f"{len(concepts)} concepts, {len(images)} images {dict(per_style)}, sha256 {digest[:12]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder for the npm archives")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data set")
    arguments = parser.parse_args()
    build(arguments.cache, arguments.out)
