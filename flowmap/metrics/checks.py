"""What a metric asks of data and of this machine, found out before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flowmap.metrics.asked_specs import Agreement, Retrieval
from flowmap.metrics.spec import WithTexts


def check_metrics(specs: Sequence[Any], dataset: Any, *, conditional: bool, paired: bool) -> None:
    """ValueError where the data set (data/dataset.py) has no classes, captions or held-out samples and one of the metrics needs them.

    conditional: its conditions are given to the network. paired: the coupling makes pairs of its own, so that nothing need be held out.
    """
    for spec in specs:
        if spec.needs == "texts" and not isinstance(dataset, WithTexts):
            raise ValueError(f"metrics: {type(spec).__name__} looks at sentences: data of kind text")
        if isinstance(spec, Agreement) and (dataset.num_classes is None or not conditional):
            raise ValueError(
                "metrics: agreement needs data with classes that are given to the network; for captions there is retrieval"
            )
        if isinstance(spec, Retrieval) and not (
            conditional and {"pooled", "text"} & set(dataset.conditions_at(torch.zeros(1, dtype=torch.int64)))
        ):
            raise ValueError(
                "metrics: retrieval needs data with captions that are given to the network; for classes there is agreement"
            )
        if (spec.needs == "inversion" or spec.needs == "loss" and not paired) and not dataset.num_held_out:
            raise ValueError("metrics: inversion and loss_by_time look at held-out samples, and data.held_out is 0")
        spec.fits(dataset)


def lacking(specs: Sequence[Any]) -> list[str]:
    """What the metrics need that is not on this machine (packages, weights, functions of the user's), a line each; no network is loaded."""
    found = []
    for spec in specs:
        try:
            spec.check()
        except ValueError as error:
            found.append(f"metrics: {str(error).removeprefix('metrics: ').removeprefix('metrics.')}")
    return list(dict.fromkeys(found))
