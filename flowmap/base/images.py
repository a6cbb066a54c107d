"""Samples as images: grids of pictures with labelled rows, density plots of points. Pillow only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowmap.base.files import write_beside


def from_bytes(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels of 0 to 255 as values in [-1, 1]."""
    return pixels.to(dtype).div(127.5).sub_(1)


def to_bytes(x: Tensor) -> Tensor:
    """Values in [-1, 1] as the nearest pixels, uint8; values outside are clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_picture(x: Tensor) -> Image.Image:
    """One sample (C, H, W) in [-1, 1] as a picture.

    One channel is grey, two are red and green; of three or more, the first three are red, green and blue.
    """
    pixels = to_bytes(x.detach().cpu()).numpy()
    if len(pixels) == 2:
        pixels = np.concatenate([pixels, np.full_like(pixels[:1], 128)])
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels[:3], 0, -1))


def to_grid(x: Tensor, *, columns: int = 8, least: int = 48) -> Image.Image:
    """A grid of the samples (N, C, H, W), each enlarged by a whole factor to at least `least` pixels in width.

    Samples (N, C, L) are pictures of C rows.  Points (N, D) give a density plot of their first two coordinates
    over [-2, 2]^2.
    """
    if x.ndim == 2:
        return _density(x)
    tiles = to_tiles(x, least=least)
    (width, height), mode = tiles[0].size, tiles[0].mode
    rows = -(-len(tiles) // columns)
    grid = Image.new(mode, (min(columns, len(tiles)) * (width + 2), rows * (height + 2)), _shade(mode, 255))
    for i, tile in enumerate(tiles):
        grid.paste(tile, ((i % columns) * (width + 2), (i // columns) * (height + 2)))
    return grid


def to_tiles(x: Tensor, *, least: int = 48) -> list[Image.Image]:
    """Each of the samples (N, C, H, W) or (N, C, L) as a picture, enlarged as in `to_grid`."""
    x = x.unsqueeze(1) if x.ndim == 3 else x
    scale = max(1, -(-least // x.shape[-1]))
    size = (x.shape[-1] * scale, x.shape[-2] * scale)
    return [to_picture(one).resize(size, Image.Resampling.NEAREST) for one in x]


def stack(grids: Sequence[Image.Image], labels: Sequence[str] = (), *, gap: int = 8) -> Image.Image:
    """The grids below one another, each with its label in a column on the left."""
    font = ImageFont.load_default(max(16, min(g.height for g in grids) // 24))
    margin = max((round(font.getlength(label)) + 2 * gap for label in labels), default=0)
    size = (margin + max(g.width for g in grids), sum(g.height + gap for g in grids) - gap)
    sheet = Image.new(grids[0].mode, size, _shade(grids[0].mode, 255 if labels else 128))
    pen, top = ImageDraw.Draw(sheet), 0
    for i, grid in enumerate(grids):
        if labels:
            pen.text((gap, top + grid.height // 2), labels[i], _shade(sheet.mode, 0), font, anchor="lm")
        sheet.paste(grid, (margin, top))
        top += grid.height + gap
    return sheet


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], columns: Sequence[str], *, gap: int = 8
) -> Image.Image:
    """Pictures of one size in rows: a heading above each column, and each row's label, in several lines if need be, on
    its left.
    """
    width, height = rows[0][0].size
    font: Any = ImageFont.load_default(min(24, max(14, height // 12)))
    heads = [_wrapped(text, font, width) for text in columns]
    texts = [_wrapped(text, font, max(160, width)) for text in labels]
    line = sum(font.getmetrics()) + 2
    margin = max(round(font.getlength(one)) for text in texts for one in text) + 2 * gap
    top, least = line * max(map(len, heads)) + gap, [max(height, line * len(text)) for text in texts]
    sheet = Image.new("RGB", (margin + len(columns) * (width + gap), top + sum(least) + gap * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        pen.text((margin + i * (width + gap), 0), "\n".join(head), "black", font, spacing=2)
    for tiles, text, tall in zip(rows, texts, least, strict=True):
        pen.text((gap, top + tall // 2), "\n".join(text), "black", font, anchor="lm", spacing=2)
        for i, tile in enumerate(tiles):
            sheet.paste(tile, (margin + i * (width + gap), top + (tall - height) // 2))
        top += tall + gap
    return sheet


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """The words of a text in lines of at most that many pixels; a longer word has a line of its own."""
    lines: list[str] = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def steps_name(steps: int) -> str:
    """A number of steps in words: "1 step", "4 steps"."""
    return f"{steps} step{'s' * (steps != 1)}"


def steps_label(who: str, steps: int) -> str:
    """The label of a row: "student, 1 step", "teacher, 64 steps"."""
    return f"{who}, {steps_name(steps)}"


def _shade(mode: str, level: int) -> int | tuple[int, ...]:
    return level if mode == "L" else (level,) * 3


def save_picture(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_beside(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def _density(x: Tensor, *, size: int = 256, reach: float = 2.0) -> Image.Image:
    points = torch.nn.functional.pad(x.detach().float().cpu()[:, :2], (0, max(0, 2 - x.shape[1]))).numpy()
    counts, _, _ = np.histogram2d(-points[:, 1], points[:, 0], bins=size // 2, range=[[-reach, reach]] * 2)
    shade = 255 - np.minimum(counts * 80, 255).astype(np.uint8)
    return Image.fromarray(shade).resize((size, size), Image.Resampling.NEAREST)
