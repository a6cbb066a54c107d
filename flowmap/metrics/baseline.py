"""The real-vs-real baseline of metrics, the `floor` of metrics.json: figures of real samples against real samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowmap.metrics.against import TRAIN, Against, HasReferences, count_real
from flowmap.metrics.real import Real, some
from flowmap.metrics.spec import Classes, Spec

DRAWS = 5


def baselines(built: Sequence[tuple[Spec, Any]], dataset: Any, classes: Classes | None = None) -> dict[str, float]:
    """The baselines of all metrics that have one. built: each spec with the metric that its `build_on` returned."""
    found: dict[str, float] = {}
    for spec, metric in built:
        found |= spec.baseline(metric, dataset, classes)
    return found


def baseline(
    against: Against, dataset: HasReferences, classes: Classes | None = None, *, draws: int = DRAWS
) -> dict[str, float]:
    """The figures of real samples against real samples, under the keys of `against.report`: means over `draws` draws,
    and their standard deviations under `<key>_std`.

    Training samples take the place of generated ones against the held-out reference, held-out samples against the
    training reference; with nothing held out, halves of the training samples are compared with each other. A draw has
    as many samples as are generated, but at most four fifths of what there is, so that draws differ; their classes have
    the proportions of the generated ones. The metric's `bias` brings a figure of fewer samples to the sizes of use.
    Precision and recall have no such law and stay as measured; the MMD has no bias. A sampler that repeats the training
    samples scores below the baseline against those.
    """
    real = against.real
    found: dict[str, float] = {}
    for suffix, wanted in against.wanted.items():
        if suffix == TRAIN and "" not in real:
            found |= _halves(against, real[TRAIN], draws)
            continue
        pool = real[""] if suffix == TRAIN else real[TRAIN]
        labels = None
        if classes is not None:
            labels = dataset.held_out_labels if suffix == TRAIN else dataset.reference_labels
        size = min(wanted, max(1, len(pool) * 4 // 5))
        rows = [_drawn(len(pool), labels, classes, size, seed) for seed in range(draws)]
        found |= _spread([_scored(against, suffix, pool, chosen) for chosen in rows])
    return found


def _drawn(count: int, labels: Tensor | None, classes: Classes | None, num: int, seed: int) -> Tensor:
    """About num of `count` places, with the proportions of the classes as far as there are enough of each."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if labels is None or classes is None:
        return order[:num]
    mixed, wanted = labels[order], classes(num)
    parts = [order[mixed == k][: int((wanted == k).sum())] for k in wanted.unique().tolist()]
    found = torch.cat(parts)
    return found if len(found) >= num // 2 else order[:num]  # the pool has hardly any of those classes


def _scored(against: Against, suffix: str, pool: Real, chosen: Tensor) -> dict[str, float]:
    against.reset()
    spec, reference = against.spec, against.sizes[suffix]
    count_real(spec, against.metrics[suffix], pool, chosen, real=False)
    factor = spec.bias(reference, spec.images) / spec.bias(reference, len(chosen))
    return {key: value * factor for key, value in against.report(only=suffix).items()}


def _halves(against: Against, real: Real, draws: int) -> dict[str, float]:
    """The figures of halves against each other, brought to the sizes of use."""
    spec, half, rows = against.spec, len(real) // 2, []
    factor = spec.bias(against.sizes[TRAIN], spec.images) / spec.bias(half, half)
    for seed in range(draws):
        mixed = some(len(real), None, seed=seed)
        metric = spec.build_from(real, like=against.metrics[TRAIN], places=mixed[:half])
        count_real(spec, metric, real, mixed[half : 2 * half], real=False)
        rows.append({f"{key}{TRAIN}": value * factor for key, value in spec.report(metric).items()})
    return _spread(rows)


def _spread(rows: list[dict[str, float]]) -> dict[str, float]:
    means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
    return means | {f"{key}_std": statistics.stdev(row[key] for row in rows) for key in rows[0]}


def spread_of(baseline: dict) -> dict:
    """The standard deviation of each metric's baseline over draws of real samples, under the metric's name."""
    return {key.removesuffix("_std"): value for key, value in baseline.items() if key.endswith("_std")}
