"""MNIST's 10,000 test pictures, which neither published model was trained on, as `data: {kind: mnist_test}`.

Files: t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz of Y. LeCun, C. Cortes, C. Burges, for example from
github: lijie2020/vae. The first and the last 5,000 are of different writers, so they are split at random.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from flowmap.base.ranges import CountFromZero, Seed
from flowmap.data import DATA, Dataset
from flowmap.data.dataset import Source
from flowmap.data.images import idx

FILES = {
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


@dataclass(frozen=True)
class MNISTTest(Source):
    """The test pictures in [-1, 1], 28x28, 10 classes; `held_out` of them, drawn by `seed`, are never trained on."""

    root: str = "../shared/published/mnist-test"
    held_out: CountFromZero = 5000
    seed: Seed = 0

    def outline(self) -> tuple[tuple[int, ...], int | None]:
        return (1, 28, 28), 10

    def build(self) -> Dataset:
        root = Path(self.root)
        for name, md5 in FILES.items():
            check(root / name, md5)
        pictures, labels = (idx.read(root, name) for name in FILES)
        if not 2 <= self.held_out < len(pictures):
            raise ValueError(f"data.held_out: {self.held_out}: the {len(pictures)} pictures allow 2 .. 9999")
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(self.seed))
        out, kept = order[: self.held_out], order[self.held_out :]
        x0, classes = pictures[:, None].float() / 127.5 - 1, labels.long()
        names = tuple(map(str, range(10)))
        return Dataset("mnist-test", x0[kept], x0[out], classes[kept], classes[out], num_classes=10, class_names=names)


DATA["mnist_test"] = MNISTTest


def check(path: Path, md5: str) -> None:
    """Raise ValueError if the file is missing or altered."""
    if not path.is_file():
        raise ValueError(f"data.root: {path}: there is no such file")
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"data.root: {path}: is altered: its MD5 is {found}, not {md5}")
