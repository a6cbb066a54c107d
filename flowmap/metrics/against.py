"""Generated samples against held-out ones, and against training ones under keys that end in `_train`."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flowmap.flow.types import Cond
from flowmap.metrics.real import Device, Real, Rows, chunk_of, mine

TRAIN = "_train"


class HasReferences(Protocol):
    """What metrics need of a data set: training samples and held-out ones, both with their conditions."""

    @property
    def reference(self) -> Rows: ...

    @property
    def held_out(self) -> Rows: ...

    @property
    def reference_labels(self) -> Tensor | None: ...

    @property
    def held_out_labels(self) -> Tensor | None: ...

    def reference_conditions_at(self, places: Tensor) -> Cond: ...

    def held_out_conditions_at(self, places: Tensor) -> Cond: ...


class Side(NamedTuple):
    """A metric with one reference already counted, and the number of samples in that reference."""

    metric: Any
    size: int


class Against:
    """A metric of samples (`spec`) with each reference of a data set: held-out samples, if any, and training ones.

    One feature space, fitted to the training samples, serves both, and samples pass through it once. `reset` and
    `update` are as in torchmetrics; each process is given its share of `spec.images` samples. Networks and states are
    on `device`. sizes: the number of samples in each reference.
    """

    def __init__(self, spec: Any, dataset: HasReferences, device: Device = "cpu"):
        self.spec, self.device, self.counted = spec, device, 0
        references = {TRAIN: dataset.reference} | ({"": dataset.held_out} if len(dataset.held_out) else {})
        self.real = {suffix: Real(rows, device) for suffix, rows in references.items()}
        sides: dict[str, Side] = spec.sides(self.real)
        self.metrics = {suffix: side.metric for suffix, side in sides.items()}
        self.sizes = {suffix: side.size for suffix, side in sides.items()}
        self.wanted = {suffix: spec.compared(size) for suffix, size in self.sizes.items()}

    def reset(self) -> None:
        self.counted = 0
        for metric in self.metrics.values():
            metric.reset()

    @torch.no_grad()
    def update(self, x: Tensor, *, world: int = 1) -> None:
        """Count this process's next generated samples x (B, ...), up to its share of what is compared.

        world: the number of processes.
        """
        counts = {suffix: wanted // world for suffix, wanted in self.wanted.items()}
        x, features = x[: max(0, max(counts.values()) - self.counted)], self.spec.features_of(self.metrics[TRAIN])
        for part in x.split(chunk_of(x.shape[1:])):
            part = part.to(self.device)
            found = None if features is None else features(part)
            for suffix, metric in self.metrics.items():
                if (rows := counts[suffix] - self.counted) > 0:
                    metric.update(part[:rows], real=False, **({} if found is None else {"found": found[:rows]}))
            self.counted += len(part)

    def report(self, *, only: str | None = None) -> dict[str, float]:
        """The figures under their keys; those against training samples end in `_train`."""
        chosen = {suffix: metric for suffix, metric in self.metrics.items() if only in (None, suffix)}
        return {
            f"{key}{suffix}": value
            for suffix, metric in chosen.items()
            for key, value in self.spec.report(metric).items()
        }


@torch.no_grad()
def count_real(spec: Any, metric: Any, samples: Real, places: Tensor, *, real: bool) -> None:
    """Count the real samples at those places, each in one process. real: as real ones, otherwise as generated ones."""
    features = spec.features_of(metric)
    if features is None:
        for part in samples.values(mine(places)):
            metric.update(part, real=real)
        return
    for found in samples.features(features, mine(places)):
        metric.update(None, real=real, found=found)
