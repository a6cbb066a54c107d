"""The floor: what real samples score against real samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flowmap.flow.types import Cond
from flowmap.metrics.specs import Agreement, Frechet, PrecisionRecall, Retrieval, share, some


class HasReference(Protocol):
    """What `floor` asks of a data set: real samples that are compared with, and others, never trained on, both with their conditions."""

    reference: Tensor
    held_out: Tensor
    reference_conditions: Cond

    def held_out_samples(self) -> tuple[Tensor, Cond]: ...


def floors(specs: Sequence[Any], dataset: HasReference) -> dict[str, float]:
    """The floors of all metrics that have one."""
    how = {"samples": floor, "conditions": agreement_floor}
    return {key: value for spec in specs if spec.needs in how for key, value in how[spec.needs](spec, dataset).items()}


def agreement_floor(spec: Agreement | Retrieval, dataset: HasReference) -> dict[str, float]:
    """What held-out samples score with their own conditions, and, as `..._shuffled`, with those of others: the ceiling and chance.

    At most `spec.images` of them; {} where nothing with a condition is held out.
    """
    held_out, cond = some(dataset.held_out, spec.images), dataset.held_out_samples()[1]
    cond = {key: some(value, spec.images) for key, value in cond.items()}
    if not len(held_out) or not cond:
        return {}
    metric, found = spec.build(dataset.reference, dataset.reference_conditions), {}
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(1))
    for suffix, rows in (("", torch.arange(len(held_out))), ("_shuffled", order)):
        metric.reset()
        metric.update(share(held_out), {key: share(value[rows]) for key, value in cond.items()})
        found |= {f"{key}{suffix}": value for key, value in spec.report(metric).items()}
    return found


def floor(spec: Frechet | PrecisionRecall, dataset: HasReference, *, splits: int = 5) -> dict[str, float]:
    """What real samples score against real samples, under the names of `spec.report`, at the sizes at which generated ones are measured.

    With as many held-out samples as `spec.images`: that many of them against the reference, as generated ones would be.
    With fewer (digits): all real samples are cut into halves, `splits` times, and the mean is taken. A Frechet distance between halves
    of h is brought to the sizes of use, n of the reference and m generated, by its bias law: times (1/n + 1/m) / (2/h). Precision and
    recall have no such law and stay as measured on halves; the MMD has no bias. A sampler that repeats the reference can score below the floor.
    """
    if len(dataset.held_out) >= spec.images:
        return _between(spec, dataset.reference, some(dataset.held_out, spec.images))
    real = torch.cat([dataset.reference, dataset.held_out])
    half, found = len(real) // 2, []
    for seed in range(splits):
        mixed = some(real, None, seed=seed)
        found.append(_between(spec, mixed[:half], mixed[half : 2 * half]))
    mean = {key: sum(one[key] for one in found) / splits for key in found[0]}
    if not isinstance(spec, Frechet):
        return mean
    used = len(some(dataset.reference, spec.reference_images))
    measured = min(half, spec.reference_images or half)
    factor = (1 / used + 1 / spec.images) / (1 / measured + 1 / half)
    return {key: value * factor for key, value in mean.items()}


def _between(spec: Frechet | PrecisionRecall, reference: Tensor, samples: Tensor) -> dict[str, float]:
    metric = spec.build(reference)
    metric.update(share(samples), real=False)
    return spec.report(metric)
