"""Small real images: scikit-learn's digits (nothing to download) and Fashion-MNIST (`make data` brings it)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flowmap.base.images import from_bytes
from flowmap.base.ranges import CountFromZero, Seed, Side
from flowmap.data.dataset import Dataset, Source
from flowmap.data.images import idx

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class Digits(Source):
    """The 1,797 digits of 8x8 pixels that scikit-learn ships, grey levels 0 .. 16 scaled to [-1, 1]; 10 classes.

    `held_out` of them, drawn by `seed`, are never trained on; the file is not in random order.
    """

    held_out: CountFromZero = 297
    seed: Seed = 0

    def build(self) -> Dataset:
        from sklearn.datasets import load_digits

        source = load_digits()
        images = torch.as_tensor(source.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        labels = torch.as_tensor(source.target, dtype=torch.int64)
        if not 2 <= self.held_out < len(images):
            raise ValueError(f"data.held_out is {self.held_out}; the {len(images)} digits allow 2 .. {len(images) - 1}")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        out, kept = order[: self.held_out], order[self.held_out :]
        names = tuple(map(str, range(10)))
        return Dataset(
            "digits", images[kept], images[out], labels[kept], labels[out], num_classes=10, class_names=names
        )


@dataclass(frozen=True)
class Fashion(Source):
    """Fashion-MNIST: 60,000 training and 10,000 held-out images of clothes, 28x28 grey levels scaled to [-1, 1]; 10
    classes.

    size 14 is the mean over 2x2 pixels. The four IDX files are read from `root`, or from where Debian's package
    installs them. Source: Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747 (MIT).
    """

    root: str = ".data/fashion"
    size: Side = 28

    def outline(self) -> tuple[tuple[int, ...], int | None]:
        return (1, self.size, self.size), 10

    def build(self) -> Dataset:
        if self.size not in (28, 14):
            raise ValueError(f"data.size is {self.size}; fashion allows 28 or 14")
        folder = self._folder()
        train, labels = self._read(folder, "train")
        held_out, held_out_labels = self._read(folder, "t10k")
        return Dataset(
            f"fashion{self.size}", train, held_out, labels, held_out_labels, num_classes=10, class_names=FASHION_CLASSES
        )

    def _folder(self) -> Path:
        for folder in (Path(self.root), idx.SYSTEM_FOLDER):
            if all((folder / name).is_file() for name in idx.FASHION_FILES):
                return folder
        raise ValueError(f"data.root is {self.root!r}, where the Fashion-MNIST files are not: run `make data`")

    def _read(self, folder: Path, part: str) -> tuple[Tensor, Tensor]:
        images = from_bytes(idx.read(folder, f"{part}-images-idx3-ubyte.gz").unsqueeze(1))
        labels = idx.read(folder, f"{part}-labels-idx1-ubyte.gz").long()
        return F.avg_pool2d(images, 28 // self.size), labels
