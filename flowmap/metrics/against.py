"""Generated samples against held-out ones, and against training ones under keys that end in `_train`."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flowmap.flow.types import Cond

TRAIN = "_train"
CHUNK = 256  # samples that pass through the features at once


class HasReferences(Protocol):
    """What metrics need of a data set: training samples and held-out ones, both with their conditions."""

    @property
    def reference(self) -> Tensor: ...

    @property
    def held_out(self) -> Tensor: ...

    @property
    def reference_conditions(self) -> Cond: ...

    def held_out_samples(self) -> tuple[Tensor, Cond]: ...

    @property
    def reference_shape(self) -> tuple[int, ...]: ...


class Side(NamedTuple):
    """A metric with one reference already counted, and the number of samples in that reference."""

    metric: Any
    size: int


class Against:
    """A metric of samples (`spec`) with each reference of a data set: held-out samples, if any, and training ones.

    sizes: the number of samples in each reference. One feature space, fitted to the training samples, serves both, and
    samples pass through it once. `reset` and `update` are as in torchmetrics; each process is given its share of
    `spec.images` samples.
    """

    def __init__(self, spec: Any, dataset: HasReferences):
        sides: dict[str, Side] = spec.sides(dataset)
        self.spec, self.metrics = spec, {suffix: side.metric for suffix, side in sides.items()}
        self.sizes = {suffix: side.size for suffix, side in sides.items()}
        self.wanted = {suffix: spec.compared(size) for suffix, size in self.sizes.items()}

    def reset(self) -> None:
        for metric in self.metrics.values():
            metric.reset()

    @torch.no_grad()
    def update(self, x: Tensor, *, world: int = 1, only: str | None = None) -> None:
        """Count generated samples x (B, ...), all of this process's.

        world: the number of processes. only: update the metric of that suffix alone.
        """
        chosen = {suffix: metric for suffix, metric in self.metrics.items() if only in (None, suffix)}
        counts = {suffix: self.wanted[suffix] // world for suffix in chosen}
        x, features = x[: max(counts.values())], self.spec.features_of(self.metrics[TRAIN])
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK]
            found = None if features is None else features(part)
            for suffix, metric in chosen.items():
                if (rows := counts[suffix] - start) > 0:
                    metric.update(part[:rows], real=False, **({} if found is None else {"found": found[:rows]}))

    def report(self, *, only: str | None = None) -> dict[str, float]:
        """The figures under their keys; those against training samples end in `_train`."""
        chosen = {suffix: metric for suffix, metric in self.metrics.items() if only in (None, suffix)}
        return {
            f"{key}{suffix}": value
            for suffix, metric in chosen.items()
            for key, value in self.spec.report(metric).items()
        }
