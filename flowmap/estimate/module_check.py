"""Check of a module's stated prediction, clock and range: how well it restores the data from as much noise.

Where noise has the data's spread, the best linear estimate has an error of half the data's variance, and a trained
model of pictures far less. One whose prediction is named wrongly has more, while another name has not: the check tries
the others too, at one call of the network for 64 samples each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowmap.base.schema import RecipeError
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset
from flowmap.flow.seeds import seeded
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.module import ModuleNet, ModuleSettings
from flowmap.nets.module_clock import DDPM, Flow, Reversed, Sigma
from flowmap.recipe import Recipe
from flowmap.recipe.module_teacher import ModuleTeacher

SAMPLES = 64
GOOD, TIMES_BETTER = 0.55, 2.0  # of an alternative: the largest error, and how much smaller than the stated one's


@torch.no_grad()
def check_prediction(
    recipe: Recipe,
    teacher: BuiltTeacher | None,
    data: Dataset,
    *,
    device: torch.device | str,
    log: Callable[[str], None] | None = None,
) -> None:
    """Log the error of a teacher of kind module, relative to the data's variance; nothing for another teacher.

    Raises RecipeError if another prediction, clock or range halves the error, to no more than a linear estimate's.
    """
    if teacher is None or not isinstance(recipe.teacher, ModuleTeacher):
        return
    net: Any = teacher.to(device).modules[0]
    assert isinstance(net, FlowMapNet) and isinstance(net.net, ModuleNet)
    points = _points(recipe, data, device)
    stated = _error(net.net, net.net.spec, *points)
    if log is not None:
        log(f"teacher: from as much noise as signal its error is {stated:.3g} of the data's variance")
    tried = _others(net.net.spec) if stated > 0.02 else ()
    others = [(_error(net.net, spec, *points), words) for spec, words in tried]
    least = min((error for error, _ in others), default=float("inf"))
    words = min((words for error, words in others if error <= 1.5 * least), key=len, default="")
    if least < GOOD and TIMES_BETTER * least < stated:
        what = f"is named wrongly: from as much noise as signal its error is {stated:.3g} of the data's variance"
        raise RecipeError(f"{recipe.name}: teacher {recipe.teacher.name!r}: {what}; with {words} it is {least:.3g}")
    if stated > 1 and log is not None:
        what = "it restores less of the data than the mean would"
        log(f"warning: teacher {recipe.teacher.name!r}: {what}: check prediction, clock, range, and its weights")


def _points(recipe: Recipe, data: Dataset, device: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Training samples, as much noise, and the samples' conditions."""
    num = min(SAMPLES, len(data))
    x0, cond = data.__getitems__([i * len(data) // num for i in range(num)])
    x0 = x0.to(device)
    noise = torch.randn(x0.shape, generator=seeded(f"module-check/{recipe.seed}", x0.device), device=x0.device)
    return x0, noise, {key: value.to(device) for key, value in cond.items()} if recipe.data.conditional else {}


def _error(net: ModuleNet, spec: ModuleSettings, x0: Tensor, noise: Tensor, cond: dict[str, Tensor]) -> float:
    """The mean square error of the data that the module restores, in variances of the data."""
    named = copy.copy(net)  # the same module, under other settings
    named.spec, named.clock = spec, spec.clock.build()
    variance = float((x0 - x0.mean(0)).square().mean().clamp_min(1e-12))
    at = variance**0.5 / (1 + variance**0.5)
    x, t = (1 - at) * x0 + at * noise, torch.full((len(x0),), at, device=x0.device)
    return float((x - at * named(x, t, t, cond) - x0).square().mean()) / variance


def _others(spec: ModuleSettings) -> Iterator[tuple[ModuleSettings, str]]:
    """Other settings, and what is other in them: prediction, direction of the clock, or range."""
    clocks = [spec.clock]
    if isinstance(spec.clock, (Flow, Reversed)):
        other = Reversed if isinstance(spec.clock, Flow) else Flow
        units = [spec.clock.unit, *(unit for unit in (1.0, 1000.0) if unit != spec.clock.unit)]
        clocks = [kind(unit) for kind in (type(spec.clock), other) for unit in units]
        clocks += [DDPM(), Sigma()]
    for clock in clocks:
        for prediction in ("velocity", "x0", "epsilon", "v", "edm"):
            for low, high in dict.fromkeys((spec.range, (-1.0, 1.0), (0.0, 1.0))):
                found = {"prediction": prediction, "clock": clock, "range": (low, high)}
                words = {
                    "prediction": prediction,
                    "clock": f"{type(clock).__name__.lower()}" + (f" of unit {clock.unit:g}" if clock.flows else ""),
                    "range": f"[{low:g}, {high:g}]",
                }
                differ = [f"{key}: {words[key]}" for key, value in found.items() if value != vars(spec)[key]]
                if differ and (prediction != "velocity" or clock.flows) and (prediction != "edm" or clock == Sigma()):
                    yield replace(spec, **found), ", ".join(differ)
