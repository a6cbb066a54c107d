"""Data that Python gives: tensors, or a torch.utils.data.Dataset, read into memory and named by their fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from flowmap.base.ranges import Classes, CountFromZero, Seed
from flowmap.data.dataset import Dataset, Source, held_out_count

places = range  # `range` is also an argument
_GIVEN: dict[str, tuple[Tensor, Tensor | None]] = {}


@dataclass(frozen=True)
class Given(Source):
    """Samples that `flowmap.as_data` or `fit(..., data=)` was given; digest is their fingerprint.

    shape: of a sample. pictures: samples of three dimensions are pictures in [-1, 1]. held_out samples (null: a tenth,
    at most 1,000), drawn by `seed`, are never trained on.
    """

    digest: str = "???"
    shape: tuple[Classes, ...] = ()
    num_classes: Classes | None = None
    pictures: bool = True
    held_out: CountFromZero | None = None
    seed: Seed = 0

    @property
    def in_pixels(self) -> bool:  # type: ignore[override]
        return self.pictures

    def outline(self) -> tuple[tuple[int, ...], int | None] | None:
        return (tuple(self.shape), self.num_classes) if self.shape else None

    def build(self) -> Dataset:
        if self.digest not in _GIVEN:
            what = f"{self.digest[:12]} was given in Python and is not in this process"
            raise ValueError(f"data.digest: {what}; give it to flowmap.fit(..., data=) or flowmap.as_data again")
        x0, labels = _GIVEN[self.digest]
        held_out = held_out_count(self.held_out, len(x0))
        if held_out >= len(x0):
            raise ValueError(f"data.held_out: {held_out} leaves nothing of {len(x0)} samples")
        order = torch.randperm(len(x0), generator=torch.Generator().manual_seed(self.seed))
        out, kept = order[:held_out], order[held_out:].sort().values
        of = lambda rows: None if labels is None else labels[rows]
        return Dataset("given", x0[kept], x0[out], of(kept), of(out), num_classes=self.num_classes)


def as_data(
    samples: Any,
    *,
    range: tuple[float, float] | None = None,
    pictures: bool = True,
    num_classes: int | None = None,
    held_out: int | None = None,
    seed: int = 0,
) -> Given:
    """Data for a recipe from a tensor (N, ...), a pair (x, labels), or a Dataset with items x or (x, label).

    All samples are read into memory, as float32. range: the values that become -1 and 1, such as (0, 1) or (0, 255);
    None if pictures are in [-1, 1] already. num_classes: None for the largest label and one. Raises ValueError for
    samples of several shapes, of whole numbers without a range, or outside of it, and for labels that are no classes.
    """
    x0, labels = _read(samples)
    if not x0.is_floating_point() and range is None:
        what = f"samples are {_typed(x0)}, with values from {int(x0.min())} to {int(x0.max())}"
        raise ValueError(f"data: {what}; state their range, such as flowmap.as_data(x, range=(0, 255))")
    x0 = x0.float().contiguous()
    if not bool(x0.isfinite().all()):
        raise ValueError("data: samples have values that are not finite")
    if pictures and x0.ndim == 4:
        x0 = _in_range(x0, range)
    elif range is not None:
        x0 = 2 * (x0 - range[0]) / (range[1] - range[0]) - 1
    if labels is not None:
        least, most = int(labels.min()), int(labels.max())
        if least < -1 or (num_classes is not None and most >= num_classes):
            raise ValueError(f"data: labels are {least}..{most}, not 0..{(num_classes or most + 1) - 1} (-1: no class)")
        num_classes = max(most + 1, 1) if num_classes is None else num_classes
    else:
        num_classes = None
    digest = _fingerprint(x0, labels)
    _GIVEN[digest] = (x0, labels)
    return Given(
        digest=digest,
        shape=tuple(x0.shape[1:]),
        num_classes=num_classes,
        pictures=pictures,
        held_out=held_out,
        seed=seed,
        conditional=labels is not None,
    )


def _read(samples: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(samples, Tensor):
        return _checked(samples), None
    if isinstance(samples, (tuple, list)) and len(samples) == 2 and all(isinstance(one, Tensor) for one in samples):
        x0, labels = samples
        return _checked(x0), _labels(labels, len(x0))
    if isinstance(samples, TorchDataset):
        return _items(samples)
    raise ValueError(f"data: {type(samples).__name__} is no tensor, pair (x, labels) or torch.utils.data.Dataset")


def _items(dataset: Any) -> tuple[Tensor, Tensor | None]:
    """All items of a dataset, of which the first says what the others are."""
    found: list[Tensor] = []
    labels: list[int] = []
    for i, item in enumerate(map(dataset.__getitem__, places(len(dataset)))):
        x, label = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        if not isinstance(x, Tensor):
            raise ValueError(f"data: item {i} is {type(x).__name__}, not a tensor; give the dataset a transform")
        if found and (x.shape, x.dtype) != (found[0].shape, found[0].dtype):
            first = f"{(*found[0].shape,)} {_typed(found[0])}"
            raise ValueError(f"data: item {i} is {(*x.shape,)} {_typed(x)}, the first {first}")
        if i and (label is None) == bool(labels):
            raise ValueError(f"data: item {i} has {'no' if label is None else 'a'} label, unlike the first")
        found.append(x)
        labels += [] if label is None else [int(label)]
    if not found:
        raise ValueError("data: the dataset has no items")
    x0 = _checked(torch.stack(found))
    return x0, torch.tensor(labels) if labels else None


def _checked(x0: Tensor) -> Tensor:
    if x0.ndim < 2 or not len(x0):
        raise ValueError(f"data: samples of shape {(*x0.shape,)} are no (N, ...) with N from 1")
    if x0.is_complex() or x0.dtype == torch.bool:
        raise ValueError(f"data: samples are {_typed(x0)}, not numbers")
    return x0.detach().cpu()


def _labels(labels: Tensor, rows: int) -> Tensor:
    if labels.shape != (rows,) or labels.is_floating_point() or labels.is_complex():
        what = f"of shape {(*labels.shape,)} and {_typed(labels)}"
        raise ValueError(f"data: labels {what} are not ({rows},) whole numbers")
    return labels.detach().cpu().long()


def _in_range(x0: Tensor, range: tuple[float, float] | None) -> Tensor:
    """Pictures in [-1, 1]. ValueError if they are not in the range, or if it seems to be another one."""
    low, high = (-1.0, 1.0) if range is None else range
    least, most = float(x0.min()), float(x0.max())
    slack = 1e-3 * (high - low)
    if least < low - slack or most > high + slack or (range is None and least >= 0):
        what = f"values lie in {least:.4g}..{most:.4g}, pictures in {low:g}..{high:g}"
        raise ValueError(f"data: {what}; state their range, such as flowmap.as_data(x, range=(0, 1))")
    return x0 if range is None else (2 * (x0 - low) / (high - low) - 1).clamp(-1, 1)


def _typed(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _fingerprint(x0: Tensor, labels: Tensor | None) -> str:
    digest = hashlib.sha256(f"{(*x0.shape,)} ".encode())
    digest.update(x0.numpy().data)
    if labels is not None:
        digest.update(labels.numpy().data)
    return digest.hexdigest()
