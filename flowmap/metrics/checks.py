"""What a metric asks of data and of this machine, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowmap.metrics.spec import Spec


def check_metrics(specs: Sequence[Spec], dataset: Any, *, conditional: bool, paired: bool) -> None:
    """Raise ValueError if the data set (data/dataset.py) lacks what one of the metrics needs: classes, captions,
    held-out samples, or enough of them.

    conditional: the network is given the conditions. paired: the coupling makes pairs of its own, so that nothing need
    be held out.
    """
    for spec in specs:
        spec.fits(dataset, conditional=conditional, paired=paired)


def lacking(specs: Sequence[Spec]) -> list[str]:
    """What the metrics need that is not on this machine (packages, weights, functions of the user's), one line each.

    No network is loaded.
    """
    found = []
    for spec in specs:
        try:
            spec.check()
        except ValueError as error:
            found.append(f"metrics: {str(error).removeprefix('metrics: ').removeprefix('metrics.')}")
    return list(dict.fromkeys(found))
