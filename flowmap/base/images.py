"""Renders samples: image grids, or a density plot of two-dimensional points. Needs only Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowmap.base.files import write_beside


def from_bytes(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale pixels in [0, 255] to values in [-1, 1]."""
    return pixels.to(dtype).div(127.5).sub_(1)


def to_bytes(x: Tensor) -> Tensor:
    """Round values in [-1, 1] to uint8 pixels; values outside are clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_picture(x: Tensor) -> Image.Image:
    """One sample (C, H, W) in [-1, 1] as an image.

    One channel is grey, two are red and green; of three or more the first three are red, green and blue.
    """
    pixels = to_bytes(x.detach().cpu()).numpy()
    if len(pixels) == 2:
        pixels = np.concatenate([pixels, np.full_like(pixels[:1], 128)])
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels[:3], 0, -1))


def to_grid(x: Tensor, *, columns: int = 8, least: int = 32) -> Image.Image:
    """A grid of samples (N, C, H, W), each enlarged to at least `least` pixels.

    Points (N, D) are drawn as a density of their first two coordinates over [-2, 2]^2. Samples (N, C, L) are drawn as
    images with C rows.
    """
    if x.ndim == 2:
        return _density(x)
    x = x.unsqueeze(1) if x.ndim == 3 else x
    scale = max(1, -(-least // x.shape[-1]))
    tiles = [to_picture(one) for one in x]
    size = (x.shape[-1] * scale, x.shape[-2] * scale)
    rows = -(-len(tiles) // columns)
    width, height = size[0] + 2, size[1] + 2  # with a margin
    white = 255 if tiles[0].mode == "L" else (255,) * 3
    grid = Image.new(tiles[0].mode, (min(columns, len(tiles)) * width, rows * height), white)
    for i, tile in enumerate(tiles):
        grid.paste(tile.resize(size, Image.Resampling.NEAREST), ((i % columns) * width, (i // columns) * height))
    return grid


def stack(grids: list[Image.Image], *, gap: int = 8) -> Image.Image:
    """Stack images vertically."""
    size = (max(g.width for g in grids), sum(g.height + gap for g in grids) - gap)
    sheet = Image.new(grids[0].mode, size, 128 if grids[0].mode == "L" else (128,) * 3)
    top = 0
    for grid in grids:
        sheet.paste(grid, (0, top))
        top += grid.height + gap
    return sheet


def save_picture(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_beside(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def _density(x: Tensor, *, size: int = 256, reach: float = 2.0) -> Image.Image:
    points = torch.nn.functional.pad(x.detach().float().cpu()[:, :2], (0, max(0, 2 - x.shape[1]))).numpy()
    counts, _, _ = np.histogram2d(-points[:, 1], points[:, 0], bins=size // 2, range=[[-reach, reach]] * 2)
    shade = 255 - np.minimum(counts * 80, 255).astype(np.uint8)
    return Image.fromarray(shade).resize((size, size), Image.Resampling.NEAREST)
