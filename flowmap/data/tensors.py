"""Samples that someone has already made into tensors: latents of an autoencoder, or pictures, as safetensors shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from flowmap.base.ranges import Classes, CountFromZero, Seed
from flowmap.data.dataset import Dataset, Source, held_out_count
from flowmap.data.images.listing import is_hidden


@dataclass(frozen=True)
class Tensors(Source):
    """All shards `*.safetensors` of a folder, each with "x0" (N, C, H, W) and, where there are classes, "class" (N,).

    Values are used as they are. held_out samples (null: a tenth, at most 1,000), drawn by `seed`, are never trained on.
    All samples are loaded into memory.
    """

    root: str = "???"
    num_classes: Classes | None = None
    held_out: CountFromZero | None = None
    seed: Seed = 0

    def build(self) -> Dataset:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        shards = sorted(path for path in Path(self.root).glob("*.safetensors") if not is_hidden(path.name))
        if not shards:
            raise ValueError(f"data.root: {self.root}: has no *.safetensors shards with x0 (and class)")
        try:
            parts = [load_file(shard) for shard in shards]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"data.root: {self.root}: a shard cannot be read: {error}") from error
        if any("x0" not in part or (self.num_classes and "class" not in part) for part in parts):
            classes = " and class (N,)" if self.num_classes else ""
            raise ValueError(f"data.root: {self.root}: every shard needs x0 (N, C, H, W){classes}")
        x0 = torch.cat([part["x0"].float() for part in parts])
        labels = torch.cat([part["class"].long() for part in parts]) if self.num_classes else None
        held_out = held_out_count(self.held_out, len(x0))
        if held_out >= len(x0):
            raise ValueError(f"data.held_out: {held_out} leaves nothing of {len(x0)} samples")
        order = torch.randperm(len(x0), generator=torch.Generator().manual_seed(self.seed))
        out, kept = order[:held_out], order[held_out:].sort().values
        of = lambda rows: None if labels is None else labels[rows]
        return Dataset(Path(self.root).name, x0[kept], x0[out], of(kept), of(out), num_classes=self.num_classes)


@dataclass(frozen=True)
class Pictures(Tensors):
    """The same for pictures in [-1, 1]."""


@dataclass(frozen=True)
class Latents(Tensors):
    """The same for latents of an autoencoder, normalised as their teacher wants them."""

    in_pixels: ClassVar[bool] = False
