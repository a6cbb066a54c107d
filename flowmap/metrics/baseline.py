"""The floor: what real samples score against real samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowmap.metrics.against import TRAIN, Against, HasReferences
from flowmap.metrics.asked_specs import Agreement, Retrieval
from flowmap.metrics.spec import share, some
from flowmap.metrics.specs import Frechet

Classes = Callable[[int], Tensor]  # how many samples -> their classes (num,), by the law of those that are generated
DRAWS = 5


def baselines(
    built: Sequence[tuple[Any, Any]], dataset: HasReferences, classes: Classes | None = None
) -> dict[str, float]:
    """The floors of all metrics that have one. built: each spec with the metric made of it, an Against or Neighbours where it needs samples."""
    found: dict[str, float] = {}
    for spec, metric in built:
        if spec.needs == "samples":
            found |= baseline(metric, dataset, classes) if isinstance(metric, Against) else metric.baseline()
        elif spec.needs == "conditions":
            found |= agreement_floor(spec, metric, dataset)
    return found


def agreement_floor(spec: Agreement | Retrieval, metric: Any, dataset: HasReferences) -> dict[str, float]:
    """What held-out samples score with their own conditions, and, as `..._shuffled`, with those of others: the ceiling and chance.

    At most `spec.images` of them; {} where nothing with a condition is held out.
    """
    held_out, cond = some(dataset.held_out, spec.images), dataset.held_out_samples()[1]
    cond = {key: some(value, spec.images) for key, value in cond.items()}
    if not len(held_out) or not cond:
        return {}
    found: dict[str, float] = {}
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(1))
    for suffix, rows in (("", torch.arange(len(held_out))), ("_shuffled", order)):
        metric.reset()
        metric.update(share(held_out), {key: share(value[rows]) for key, value in cond.items()})
        found |= {f"{key}{suffix}": value for key, value in spec.report(metric).items()}
    return found


def baseline(
    against: Against, dataset: HasReferences, classes: Classes | None = None, *, draws: int = DRAWS
) -> dict[str, float]:
    """What real samples score against real samples, under the keys of `against.report`: means over `draws` draws, and their standard deviations
    under `<key>_std`.

    Training samples stand for generated ones against the held-out reference, held-out samples against the training reference; with nothing
    held out, halves of the training samples against each other. Each draw has as many as are generated, but at most four fifths of what
    there is, so that draws differ, of classes by the law of the generated ones. A Frechet distance of m samples in the place of `images` is
    brought to the sizes of use by its bias law: times (1/n + 1/images) / (1/n + 1/m), n of the reference. Precision and recall have no
    such law and stay as measured; the MMD has no bias. A sampler that repeats the training samples scores below the floor against those.
    """
    found: dict[str, float] = {}
    for suffix, wanted in against.wanted.items():
        if suffix != TRAIN:
            pool, reference = (dataset.reference, dataset.reference_conditions if classes else {}), dataset.held_out
        elif len(dataset.held_out):
            pool, reference = (dataset.held_out, dataset.held_out_samples()[1] if classes else {}), dataset.reference
        else:
            return _halves(against, dataset.reference, draws)
        labels = pool[1].get("class")
        rows = [
            _drawn(len(pool[0]), labels, classes, min(wanted, max(1, len(pool[0]) * 4 // 5)), seed)
            for seed in range(draws)
        ]
        found |= _spread([_scored(against, suffix, pool[0][chosen], len(reference)) for chosen in rows])
    return found


def _drawn(count: int, labels: Tensor | None, classes: Classes | None, num: int, seed: int) -> Tensor:
    """About num of `count` places, by the law of the classes as far as there are enough of each."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if labels is None or classes is None:
        return order[:num]
    mixed, wanted = labels[order], classes(num)
    parts = [order[mixed == k][: int((wanted == k).sum())] for k in wanted.unique().tolist()]
    found = torch.cat(parts)
    return found if len(found) >= num // 2 else order[:num]  # the pool has hardly any of those classes


def _scored(against: Against, suffix: str, samples: Tensor, reference: int) -> dict[str, float]:
    against.reset()
    against.metrics[suffix].update(share(samples), real=False)
    row, spec = against.report(only=suffix), against.spec
    if not isinstance(spec, Frechet):
        return row
    used = min(reference, spec.reference_images or reference)
    factor = (1 / used + 1 / spec.images) / (1 / used + 1 / len(samples))
    return {key: value * factor for key, value in row.items()}


def _halves(against: Against, real: Tensor, draws: int) -> dict[str, float]:
    """Of halves of h samples each; a Frechet distance is brought to the sizes of use by (1/n + 1/images) / (1/h + 1/h)."""
    spec, half, rows = against.spec, len(real) // 2, []
    trained = against.metrics[TRAIN]
    for seed in range(draws):
        mixed = some(real, None, seed=seed)
        metric = spec.build(mixed[:half], like=trained)
        metric.update(share(mixed[half : 2 * half]), real=False)
        rows.append({f"{key}{TRAIN}": value for key, value in spec.report(metric).items()})
    if isinstance(spec, Frechet):
        used, measured = min(len(real), spec.reference_images or len(real)), min(half, spec.reference_images or half)
        factor = (1 / used + 1 / spec.images) / (1 / measured + 1 / half)
        rows = [{key: value * factor for key, value in row.items()} for row in rows]
    return _spread(rows)


def _spread(rows: list[dict[str, float]]) -> dict[str, float]:
    means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
    return means | {f"{key}_std": statistics.stdev(row[key] for row in rows) for key in rows[0]}


def spread_of(baseline: dict) -> dict:
    """Under each metric's name the standard deviation of its floor over draws of real samples, where there is one."""
    return {key.removesuffix("_std"): value for key, value in baseline.items() if key.endswith("_std")}
