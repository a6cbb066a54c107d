"""Check of a module's stated prediction, clock and range: how well it restores the data from as much noise.

Where noise has the data's spread, the best linear estimate has an error of half the data's variance, and a trained
model of pictures far less. One whose prediction is named wrongly has more, while another name has not: the check tries
the others too, at three calls of the network for 32 samples each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from flowmap.base.progress import LogFunction
from flowmap.base.schema import RecipeError
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset
from flowmap.flow.seeds import seeded
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.module import PREDICTIONS, ModuleNet, ModuleSettings
from flowmap.nets.module_clock import DDPM, Flow, Reversed, Sigma
from flowmap.recipe import Recipe
from flowmap.recipe.module_teacher import ModuleTeacher

SAMPLES = 32
LEVELS = (0.25, 1.0, 4.0)  # of the noise's spread, relative to the data's
LEVELS_SHOWN = "with 1/4, 1 and 4 times as much noise as signal"
Errors = tuple[float, ...]
MOST_OF_OWN = (1.0, 1.0, 2.0)  # of a trained model's errors on its own samples; the mean's are 1
GOOD, TIMES_BETTER = 0.55, 2.0  # of an alternative: the largest error, and how much smaller than the stated one's


@torch.no_grad()
def check_prediction(
    recipe: Recipe,
    teacher: BuiltTeacher | None,
    data: Dataset,
    *,
    device: torch.device | str,
    log: LogFunction | None = None,
) -> None:
    """Log the errors of a teacher of kind module, relative to the data's variance; nothing for another teacher.

    Raises RecipeError if another prediction, clock or range halves one of them and raises none.
    """
    if teacher is None or not isinstance(recipe.teacher, ModuleTeacher):
        return
    net, points = _net(teacher, device), _points(recipe, data, device)
    stated = _error(net, net.spec, *points)
    if log is not None:
        log(f"teacher: {LEVELS_SHOWN} its error is {_shown(stated)} of the variance")
    others = [(_error(net, spec, *points), words) for spec, words in _others(net.spec)]
    better = [one for one in others if _is_better(one[0], stated)]
    if better:
        least = min(sum(errors) for errors, _ in better)
        errors, words = min((one for one in better if sum(one[0]) <= 1.5 * least), key=lambda one: len(one[1]))
        what = f"is named wrongly: {LEVELS_SHOWN} its error is {_shown(stated)}"
        rest = f"{what} of the data's variance; with {words} it is {_shown(errors)}"
        raise RecipeError(f"{recipe.name}: teacher {recipe.teacher.name!r}: {rest}")
    if stated[1] > 1 and log is not None:
        what = "it restores less of the data than the mean would"
        log(f"warning: teacher {recipe.teacher.name!r}: {what}: check prediction, clock, range, and its weights")


@torch.no_grad()
def check_own_samples(
    recipe: Recipe, teacher: BuiltTeacher, samples: Dataset, *, device: torch.device | str, log: LogFunction | None
) -> None:
    """Raise RecipeError if a teacher of kind module does not restore its own samples, where there is no data.

    A wrong prediction is found so; a wrong clock or range may not be.
    """
    if not isinstance(recipe.teacher, ModuleTeacher):
        return
    net = _net(teacher, device)
    errors = _error(net, net.spec, *_points(recipe, samples, device))
    found = f"{LEVELS_SHOWN} its error on its own samples is {_shown(errors)} of their variance"
    if any(error > most for error, most in zip(errors, MOST_OF_OWN, strict=True)):
        what = f"is named wrongly, or not trained: {found}; check prediction, clock, range, and its weights"
        raise RecipeError(f"{recipe.name}: teacher {recipe.teacher.name!r}: {what}")
    if log is not None:
        log(f"teacher: {found}")


def _net(teacher: BuiltTeacher, device: torch.device | str) -> ModuleNet:
    net: Any = teacher.to(device).modules[0]
    assert isinstance(net, FlowMapNet) and isinstance(net.net, ModuleNet)
    return net.net


def _shown(errors: Errors) -> str:
    return ", ".join(f"{one:.3g}" for one in errors)


def _points(recipe: Recipe, data: Dataset, device: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Training samples, as much noise, and the samples' conditions."""
    num = min(SAMPLES, len(data))
    x0, cond = data.__getitems__([i * len(data) // num for i in range(num)])
    x0 = x0.to(device)
    noise = torch.randn(x0.shape, generator=seeded(f"module-check/{recipe.seed}", x0.device), device=x0.device)
    return x0, noise, {key: value.to(device) for key, value in cond.items()} if recipe.data.conditional else {}


def _error(net: ModuleNet, spec: ModuleSettings, x0: Tensor, noise: Tensor, cond: dict[str, Tensor]) -> Errors:
    """The mean square error of the data that the module restores at each level, in variances of the data."""
    named = copy.copy(net)  # the same module, under other settings
    named.spec, named.clock = spec, spec.clock.build()
    variance = float((x0 - x0.mean(0)).square().mean().clamp_min(1e-12))
    errors = []
    for level in LEVELS:
        at = level * variance**0.5 / (1 + level * variance**0.5)
        x, t = (1 - at) * x0 + at * noise, torch.full((len(x0),), at, device=x0.device)
        errors.append(float((x - at * named(x, t, t, cond) - x0).square().mean()) / variance)
    return tuple(errors)


def _is_better(errors: Errors, stated: Errors) -> bool:
    """Whether errors are far below the stated ones at a level, above them at none, and those of a trained model."""
    pairs = list(zip(errors, stated, strict=True))
    nowhere_worse = all(one <= 1.2 * other for one, other in pairs)
    return errors[1] < GOOD and nowhere_worse and any(TIMES_BETTER * one < other for one, other in pairs)


def _others(spec: ModuleSettings) -> Iterator[tuple[ModuleSettings, str]]:
    """Other settings, and what is other in them: prediction, direction of the clock, or range."""
    kinds: list[Any] = [Flow(), Flow(1000.0), Reversed(), Reversed(1000.0), DDPM(), Sigma()]
    clocks: list[Any] = [spec.clock, *(clock for clock in kinds if clock != spec.clock)]
    ranges = list(dict.fromkeys((spec.range, (-1.0, 1.0), (0.0, 1.0))))
    for clock, prediction, (low, high) in product(clocks, PREDICTIONS, ranges):
        if (prediction == "velocity" and not clock.flows) or (prediction == "edm" and not isinstance(clock, Sigma)):
            continue
        words = [f"prediction: {prediction}"] if prediction != spec.prediction else []
        if clock != spec.clock:
            words.append(f"clock: {type(clock).__name__.lower()}" + (f" of unit {clock.unit:g}" if clock.flows else ""))
        words += [f"range: [{low:g}, {high:g}]"] if (low, high) != spec.range else []
        if words:
            yield replace(spec, prediction=prediction, clock=clock, range=(low, high)), ", ".join(words)
