"""Pictures of the user's: a folder of image files, its subfolders the classes."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowmap.data.dataset import Dataset, Source

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_PIXELS = 64 * 10**6


@dataclass(frozen=True)
class Folder(Source):
    """Every image below `root`, cut to the largest centred square and scaled to size x size pixels in [-1, 1]; all held in memory.

    With subfolders each of them is a class, in the order of their names. channels 3 is RGB, 1 grey levels; transparency lies on white.
    Files that cannot be read, or have more than 64 million pixels, are left out, counted and named on stderr; grey files among coloured
    ones are counted. held_out images, drawn by `seed`, are never trained on.
    """

    root: str = "???"
    size: int = 64
    channels: int = 3
    held_out: int = 0
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.size < 1 or self.channels not in (1, 3) or self.held_out < 0:
            raise ValueError(f"size: {self.size}, channels: {self.channels} and held_out: {self.held_out}; allowed: from 1; 1 or 3; from 0")

    def build(self) -> Dataset:
        root = Path(self.root)
        if not root.is_dir():
            raise ValueError(f"data.root: {self.root}: there is no such folder")
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        classes = sorted({p.relative_to(root).parts[0] for p in files if len(p.relative_to(root).parts) > 1})
        place, images, labels, left_out, grey = {name: i for i, name in enumerate(classes)}, [], [], [], 0
        for path in files:
            first = path.relative_to(root).parts[0]
            if classes and first not in place:
                left_out.append((path, "lies beside the class folders, not in one"))
                continue
            try:
                image, was_grey = self._read(path)
            except ValueError as error:
                left_out.append((path, str(error)))
                continue
            grey += was_grey and self.channels == 3
            images.append(image)
            labels.append(place.get(first, 0))
        _say(root, len(images), left_out, grey)
        if self.held_out >= len(images):
            raise ValueError(f"data.root: {self.root}: holds {len(images)} readable images, data.held_out: {self.held_out}")
        return self._dataset(root.name, torch.stack(images), torch.tensor(labels) if len(classes) > 1 else None, len(classes))

    def _dataset(self, name: str, images: Tensor, labels: Tensor | None, num_classes: int) -> Dataset:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        out, kept = order[: self.held_out], order[self.held_out :].sort().values
        if labels is None:
            return Dataset(name, images[kept], images[out])
        return Dataset(name, images[kept], images[out], labels[kept], labels[out], num_classes=num_classes)

    def _read(self, path: Path) -> tuple[Tensor, bool]:
        """(channels, size, size) and whether the file has grey levels alone; ValueError says why it cannot be used."""
        import numpy
        from PIL import Image

        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"has {image.width} x {image.height} pixels")
                was_grey = image.mode in ("1", "L", "LA", "I", "I;16", "F")
                if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                elif image.mode in ("I", "I;16", "F"):
                    raise ValueError(f"has pixels of mode {image.mode}, deeper than 8 bits")
                image = image.convert("RGB" if self.channels == 3 else "L")
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                box = (left, top, left + side, top + side)
                image = image.resize((self.size, self.size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
                pixels = torch.from_numpy(numpy.array(image)).float() / 127.5 - 1
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's words for a broken file
            raise ValueError(f"cannot be read: {' '.join(str(error).replace(str(path), 'the file').split())}") from error
        return (pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]).contiguous(), was_grey


def _say(root: Path, count: int, left_out: list[tuple[Path, str]], grey: int) -> None:
    if left_out:
        shown = "; ".join(f"{os.path.relpath(path, root)} {why}" for path, why in left_out[:3])
        more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        print(f"{root}: {count} images, {len(left_out)} left out: {shown}{more}", file=sys.stderr)
    if grey:
        print(f"{root}: {grey} of {count} images have grey levels alone", file=sys.stderr)
