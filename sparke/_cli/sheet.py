"""The contact sheet: a row for each prompt, unguided pictures left, guided ones right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLUMNS = 8
TILE = 80
GAP = 6
PAD = 14
MARGIN = 56
GUTTER = 44
LABEL = 46
BETWEEN = 26
NARROWEST = 480
HEADER = 190
INK, GREY, ACCENT = "#1c2126", "#717a84", "#0f766e"
PANELS = ("#f1f3f5", "#e3f2ef")

UNIT = " effective modes"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Row:
    """A prompt, and for each half its (n, 3, 32, 32) images and its effective modes."""

    prompt: str
    images: tuple[Tensor, Tensor]
    modes: tuple[float, float]


def to_images(images: Tensor, size: int) -> list[Image.Image]:
    """(n, 3, 32, 32) in [-1, 1] as pictures of size x size pixels."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    arrays = rearrange(pixels, "n c h w -> n h w c").cpu().numpy()
    return [Image.fromarray(one).resize((size, size), Image.Resampling.LANCZOS) for one in arrays]


def contact_sheet(
    rows: Sequence[Row], title: str, settings: str, halves: tuple[str, str]
) -> Image.Image:
    """Draw the sheet.

    Args:
        rows: the prompts, with as many pictures each.
        title: in large letters.
        settings: the line below it.
        halves: what the two halves are called.
    """
    n = len(rows[0].images[0])
    columns = min(n, COLUMNS)
    lines = -(-n // COLUMNS)
    panel = (_span(columns) + 2 * PAD, _span(lines) + 2 * PAD)
    panel = (max(panel[0], NARROWEST), panel[1])
    lefts = (MARGIN, MARGIN + panel[0] + GUTTER)
    pitch = LABEL + panel[1] + BETWEEN
    width = 2 * MARGIN + 2 * panel[0] + GUTTER
    sheet = Image.new("RGB", (width, HEADER + len(rows) * pitch + MARGIN - BETWEEN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 48), title, INK, _font(36), anchor="ls")
    pen.text((MARGIN, 86), settings, GREY, _font(19), anchor="ls")
    for left, half, colour in zip(lefts, halves, (GREY, ACCENT), strict=True):
        pen.text((left, 148), half, colour, _font(27), anchor="ls")
        pen.line((left, 164, left + panel[0], 164), colour, 3)
    for i, row in enumerate(rows):
        top = HEADER + i * pitch
        _row(sheet, pen, row, top, lefts, panel)
    return sheet


def _row(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    row: Row,
    top: int,
    lefts: tuple[int, int],
    panel: tuple[int, int],
) -> None:
    base = top + LABEL - 13
    pen.text((lefts[0], base), _cut(row.prompt, panel[0] - 210), INK, _font(23), anchor="ls")
    for side, left in enumerate(lefts):
        right, upper = left + panel[0], top + LABEL
        colour = (GREY, ACCENT)[side]
        width = _font(17).getlength(UNIT)
        pen.text((right, base), UNIT, GREY, _font(17), anchor="rs")
        pen.text((right - width, base), f"{row.modes[side]:.1f}", colour, _font(25), anchor="rs")
        pen.rounded_rectangle((left, upper, right, upper + panel[1]), 12, PANELS[side])
        for k, tile in enumerate(to_images(row.images[side], TILE)):
            x = left + PAD + k % COLUMNS * (TILE + GAP)
            y = upper + PAD + k // COLUMNS * (TILE + GAP)
            sheet.paste(tile, (x, y), _rounded(TILE))


def _span(tiles: int) -> int:
    return tiles * TILE + (tiles - 1) * GAP


def _cut(text: str, width: int) -> str:
    """`text` as far as there is room for it."""
    font, cut = _font(23), text
    while font.getlength(cut) > width:
        cut = cut.removesuffix("...")[:-1].rstrip() + "..."
    return cut


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _rounded(size: int) -> Image.Image:
    """A mask with soft round corners."""
    large = Image.new("L", (4 * size, 4 * size), 0)
    ImageDraw.Draw(large).rounded_rectangle((0, 0, 4 * size - 1, 4 * size - 1), 32, 255)
    return large.resize((size, size), Image.Resampling.LANCZOS)
