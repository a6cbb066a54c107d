"""What a sample looks like: a grid of pictures, or for points a plot of where they lie. Pillow only."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowmap.base.files import write_beside


def from_bytes(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels of 0 to 255 as values in [-1, 1]."""
    return pixels.to(dtype).div(127.5).sub_(1)


def to_bytes(x: Tensor) -> Tensor:
    """Values in [-1, 1] as the nearest pixels, uint8; what lies outside is cut off."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_picture(x: Tensor) -> Image.Image:
    """One sample (C, H, W) in [-1, 1] as a picture: one channel is grey, two are red and green, of more the first three are red, green, blue."""
    pixels = to_bytes(x.detach().cpu()).numpy()
    if len(pixels) == 2:
        pixels = np.concatenate([pixels, np.full_like(pixels[:1], 128)])
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels[:3], 0, -1))


def to_grid(x: Tensor, *, columns: int = 8, least: int = 32) -> Image.Image:
    """Samples (N, C, H, W) side by side, enlarged to at least `least` pixels each; points (N, D) as a density of the first two coordinates over
    [-2, 2]^2. Samples (N, C, L) are pictures of C rows."""
    if x.ndim == 2:
        return _density(x)
    x = x.unsqueeze(1) if x.ndim == 3 else x
    scale = max(1, -(-least // x.shape[-1]))
    tiles = [to_picture(one) for one in x]
    size = (x.shape[-1] * scale, x.shape[-2] * scale)
    rows = -(-len(tiles) // columns)
    grid = Image.new(
        tiles[0].mode,
        (min(columns, len(tiles)) * (size[0] + 2), rows * (size[1] + 2)),
        255 if tiles[0].mode == "L" else (255,) * 3,
    )
    for i, tile in enumerate(tiles):
        grid.paste(
            tile.resize(size, Image.Resampling.NEAREST), ((i % columns) * (size[0] + 2), (i // columns) * (size[1] + 2))
        )
    return grid


def stack(grids: list[Image.Image], *, gap: int = 8) -> Image.Image:
    """Pictures below one another."""
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
