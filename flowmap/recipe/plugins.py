"""Kinds of installed packages: those of the entry-point group `flowmap.kinds`, named `<slot>.<kind>`.

    [project.entry-points."flowmap.kinds"]
    "objective.solver_points" = "my_lab.objectives:SolverPoints"

Installed is chosen: who installs a package lets it run, so its kinds need no --import. A recipe or a student's folder
only names a kind. A package whose entry point fails is named in a warning, and everything else works without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from flowmap.base.distributed import is_child
from flowmap.data import DATA, IMAGE_SOURCES, TEXT_SOURCES
from flowmap.flow.distance import DISTANCES
from flowmap.flow.path import PATHS
from flowmap.flow.solver import SOLVERS
from flowmap.flow.times import TIMES
from flowmap.metrics import METRICS
from flowmap.metrics.rewards import REWARDS
from flowmap.nets import NETS
from flowmap.nets.module_builders import BUILDERS
from flowmap.objectives import OBJECTIVES
from flowmap.samplers import SAMPLERS

GROUP = "flowmap.kinds"
SLOTS: dict[str, MutableMapping[str, Any]] = {
    "data": DATA,
    "image_source": IMAGE_SOURCES,
    "text_source": TEXT_SOURCES,
    "objective": OBJECTIVES,
    "metric": METRICS,
    "reward": REWARDS,
    "net": NETS,
    "sampler": SAMPLERS,
    "times": TIMES,
    "path": PATHS,
    "distance": DISTANCES,
    "solver": SOLVERS,
    "module": BUILDERS,
}


@dataclass(frozen=True)
class Plugin:
    """One kind of an installed package; problem: why it is not registered, None if it is."""

    slot: str
    kind: str
    package: str
    problem: str | None = None

    def line(self) -> str:
        named = f"{self.slot} {self.kind}, of {self.package}"
        return named if self.problem is None else f"{named}: not registered: {self.problem}"


@cache
def plugins() -> tuple[Plugin, ...]:
    """Register the kinds of installed packages, once a process, and warn of each that fails in one line."""
    found = tuple(_registered(one) for one in sorted(entry_points(group=GROUP), key=lambda one: one.name))
    for one in found:
        if one.problem is not None and not is_child():
            print(f"warning: {one.line()}", file=sys.stderr)
    return found


def _registered(one: EntryPoint) -> Plugin:
    slot, _, kind = one.name.partition(".")
    package = f"{one.dist.name} {one.dist.version}" if one.dist is not None else "an unknown package"
    try:
        table = _table(slot, kind)
        table[kind] = cast(Callable[..., Any], one.load())
    except (Exception, SystemExit) as error:  # of the package's own code
        first = " ".join(str(error).split()) or "failed"
        return Plugin(slot, kind, package, f"{type(error).__name__}: {first}")
    return Plugin(slot, kind, package)


def _table(slot: str, kind: str) -> MutableMapping[str, Any]:
    if slot not in SLOTS or not kind:
        raise ValueError(f"its entry point is not <slot>.<kind> with a slot of {', '.join(SLOTS)}")
    if kind in SLOTS[slot]:
        raise ValueError(f"there is a {slot} of that name already")
    return SLOTS[slot]
