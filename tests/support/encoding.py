"""Stand-ins for the encoding tests.

Pictures made of numbers, an autoencoder that averages, a text encoder that counts letters.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from flowmap.data import Encoded
from flowmap.data.sources import Item, SquareImages


@dataclass(frozen=True)
class Numbers(SquareImages):
    """`count` pictures computed from their index; every 7th is broken, every 5th has no caption, every 6th is grey."""

    size: int = 8
    count: int = 23
    stream: bool = False
    seconds: float = 0.0
    bad_label: int = -1
    kind = "numbers"

    def items(self, start=0, stop=None):
        for i in range(start, self.count if stop is None else min(stop, self.count)):
            time.sleep(self.seconds)
            image = torch.randint(
                0,
                256,
                (self.channels, self.size, self.size),
                generator=torch.Generator().manual_seed(i),
                dtype=torch.uint8,
            )
            caption, label = None if i % 5 == 0 else f"picture {i}", 99 if i == self.bad_label else i % 3
            broken = i % 7 == 3
            yield Item(
                None if broken else image,
                label,
                caption,
                f"number {i}",
                "is broken" if broken else None,
                grey=i % 6 == 1,
            )

    def length(self):
        return None if self.stream else self.count

    def num_classes(self):
        return 3

    def class_names(self):
        return ["a", "b", "c"]

    def fingerprint(self):
        return str(self.count)

    @property
    def usable(self):
        return [i for i in range(self.count) if i % 7 != 3 and i != self.bad_label]


@dataclass(frozen=True)
class Averages:
    """Latents are means over 2x2 pixels."""

    revision: str = "1"
    poison: float = 2.0  # latents above it become NaN

    def load(self):
        return self

    def encode(self, x):
        z = F.avg_pool2d(x, 2)
        return torch.where(z.amax((1, 2, 3), keepdim=True) > self.poison, torch.nan, z)

    def identity(self):
        return {"id": "averages", "revision": self.revision}


@dataclass(frozen=True)
class Letters:
    """The first five letters as numbers, and how many there are."""

    ragged: bool = False

    def load(self):
        def call(captions):
            length = max(1, *map(len, captions)) if self.ragged else 5
            codes = torch.tensor([[ord(c) for c in caption[:length].ljust(length)] for caption in captions]).float()
            mask = torch.tensor([[i < len(caption) for i in range(length)] for caption in captions])
            return {
                "text": codes[..., None].expand(-1, -1, 2) / 64,
                "text_mask": mask,
                "pooled": torch.tensor([[float(len(c))] for c in captions]),
            }

        return call

    def identity(self):
        return {"id": "letters"}


def spec(root="", **more):
    settings = dict(
        images=Numbers(),
        autoencoder=Averages(),
        text=Letters(),
        held_out=2,
        reference_images=6,
        shard_items=5,
        batch_size=4,
    )
    return Encoded(root=str(root), **(settings | more))


def files(folder):
    """Every file of an encoding with its bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
