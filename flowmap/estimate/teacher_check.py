"""Check of the teacher before training: statistics of a few dozen of its samples, compared with the data's.

A teacher that predicts something else than its card states (noise instead of velocity, another range, latents of
another scale) trains a student without any error. The spread of its samples shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowmap.base.schema import RecipeError
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset
from flowmap.flow.limit import Clip
from flowmap.flow.prior import LearnedPrior, start_of
from flowmap.flow.seeds import seeded
from flowmap.flow.solver import Euler
from flowmap.flow.tangent.compiled import uncompiled
from flowmap.flow.types import Cond
from flowmap.plan.cards import card_of
from flowmap.plan.guidance import guidance_warnings
from flowmap.recipe import Recipe
from flowmap.teachers.limited import Limited

SAMPLES, FEW_SAMPLES, STEPS = 32, 8, 16
LARGE = 200_000_000  # The number of parameters from which fewer samples are drawn.
REAL_SAMPLES = 512
# Ratio of standard deviations, difference of means in standard deviations, difference of shares.
SPREAD, SHIFT, SATURATED = 2.0, 1.0, 0.25
CAUSES = {
    "diffusers": "check prediction_type in its scheduler, scaling_factor and shift_factor of its autoencoder, and the "
    "range of the data: pictures are on [-1, 1]",
    "recipe": "train it longer, and check that it is a teacher of this data",
    "converted": "check that it is a teacher of this data, and the autoencoder's scale",
    "module": "check prediction, clock and range of the teacher",
    "exact": "check the settings of the data",
}


@dataclass(frozen=True)
class Statistics:
    """Statistics of samples (N, C, ...).

    mean, std: of each channel, (C,). saturated: the share of values at or beyond the bound, None without one.
    """

    mean: Tensor
    std: Tensor
    saturated: float | None

    @staticmethod
    def of(x: Tensor, bound: float | None) -> Statistics:
        # Anything but pictures and latents counts as one channel.
        channels = x.transpose(0, 1).flatten(1) if x.ndim == 4 else x.flatten()[None]
        saturated = None if bound is None else float((x.abs() >= 0.999 * bound).float().mean())
        return Statistics(channels.mean(1), channels.std(1), saturated)


@dataclass(frozen=True)
class Checked:
    """The result of the check; data is None if there was none to compare with."""

    num: int
    steps: int
    teacher: Statistics
    data: Statistics | None
    warnings: tuple[str, ...] = ()

    def line(self) -> str:
        """Return the result as one line."""
        of_data = lambda of: f" (data {_numbers(of(self.data))})" if self.data else ""
        parts = [
            f"{name} {_numbers(of(self.teacher))}{of_data(of)}"
            for name, of in (("mean", lambda s: s.mean), ("std", lambda s: s.std))
        ]
        if self.teacher.saturated is not None:
            real = f" (data {100 * self.data.saturated:.0f} %)" if self.data and self.data.saturated is not None else ""
            parts.append(f"{100 * self.teacher.saturated:.0f} % of values at the bound{real}")
        return f"teacher: {self.num} samples at {self.steps} steps: {', '.join(parts)}"

    def logs(self) -> dict[str, float]:
        """Return the figures by their keys in the log, teacher_check/..., with those of each of 2 to 4 channels."""
        logs = {}
        for prefix, found in (("", self.teacher), ("data_", self.data)):
            if found is None:
                continue
            for name, values in (("mean", found.mean), ("std", found.std)):
                logs[f"teacher_check/{prefix}{name}"] = float(values.mean())
                if 2 <= len(values) <= 4:
                    logs |= {f"teacher_check/{prefix}{name}_{i}": float(value) for i, value in enumerate(values)}
            if found.saturated is not None:
                logs[f"teacher_check/{prefix}saturated"] = found.saturated
        return logs


def check_teacher(
    recipe: Recipe,
    teacher: BuiltTeacher | None,
    data: Dataset,
    *,
    device: torch.device | str = "cpu",
    prior: LearnedPrior | None = None,
    log: Callable[[str], None] | None = None,
    compare: bool = True,
) -> dict[str, float]:
    """Log one line that compares the teacher's samples with the data, and one for each warning; return the figures.

    Returns {} without a teacher. It costs 16 steps for 32 samples (8 for a network above 200 M parameters) and draws
    from generators of its own. compare: the data is real. Raises RecipeError if the teacher's velocity is not finite.
    """
    if teacher is None:
        return {}
    found = look(recipe, teacher, data, device=device, prior=prior, compare=compare)
    for line in (found.line(), *(f"warning: {line}" for line in (*found.warnings, *guidance_warnings(recipe)))):
        if log is not None:
            log(line)
    return found.logs()


@torch.no_grad()
def look(
    recipe: Recipe,
    teacher: BuiltTeacher,
    data: Dataset,
    *,
    device: torch.device | str,
    prior: LearnedPrior | None = None,
    compare: bool = True,
) -> Checked:
    """Return statistics of the data and of the teacher's samples, with training conditions and default guidance."""
    large = sum(p.numel() for module in teacher.modules for p in module.parameters()) > LARGE
    num = min(FEW_SAMPLES if large else SAMPLES, len(data))
    steps = min(STEPS, recipe.evaluation.teacher_steps)
    teacher.to(device)
    x1, cond = _start(recipe, data, num, device, prior)
    with uncompiled(), torch.compiler.set_stance("force_eager"):  # otherwise this batch size is compiled
        samples = Euler(steps=steps)(_finite_velocity(recipe, teacher, cond), x1).x.float().cpu()
    bound = _bound(recipe, teacher, samples)
    ours, real = Statistics.of(samples, bound), None
    if compare:
        real = Statistics.of(data.__getitems__(_spread(len(data), REAL_SAMPLES))[0].float(), bound)
    return Checked(num, steps, ours, real, tuple(_warnings(recipe, ours, real)))


def _start(
    recipe: Recipe, data: Dataset, num: int, device: Any, prior: LearnedPrior | None
) -> tuple[Tensor, Cond | None]:
    """Return the starting points of the samples, and their conditions: those of evenly spread training samples."""
    x0, cond = data.__getitems__(_spread(len(data), num))
    x0, cond = x0.to(device), {key: value.to(device) for key, value in cond.items()} if recipe.data.conditional else {}
    generator = seeded(f"teacher-check/{recipe.seed}", torch.device(device))
    if (paired := data.partners(x0, generator)) is not None:
        return paired, cond
    if prior is not None:
        x0 = x0.to(next(prior.model.parameters()).dtype)  # An exact prior is float64.
    start = start_of(prior.to(device) if prior is not None else recipe.prior, x0, cond, generator)
    guidance = None if recipe.teacher is None else recipe.teacher.guidance
    conditioning = {} if guidance is None else {"guidance": torch.full((num,), float(guidance.default), device=device)}
    return start.x1.float(), {
        **cond,
        **conditioning,
        **{key: value.float() for key, value in start.conditioning.items()},
    } or None


def _spread(length: int, num: int) -> list[int]:
    num = min(num, length)
    return [i * length // num for i in range(num)]


def _finite_velocity(recipe: Recipe, teacher: BuiltTeacher, cond: Cond | None) -> Callable[[Tensor, Tensor], Tensor]:
    name = recipe.teacher.name if recipe.teacher else ""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = teacher.guided.velocity(x, t, cond)
        if not bool(v.isfinite().all()):
            at = float(torch.as_tensor(t).flatten()[0])
            what = "NaN" if bool(v.isnan().any()) else "infinite"
            raise RecipeError(
                f"{recipe.name}: teacher: {name!r}: its velocity is {what} at t = {at:.3g} (0 is data, 1 noise); "
                "nothing was trained; check its weights, and the ends of its schedule"
            )
        return v

    return velocity


def _bound(recipe: Recipe, teacher: BuiltTeacher, samples: Tensor) -> float | None:
    """Return the largest value of samples: the bound of a clipped teacher, 1 for pictures, None for anything else."""
    if isinstance(teacher.guided, Limited):
        return teacher.guided.limit.bound if isinstance(teacher.guided.limit, Clip) else 1.0
    return 1.0 if recipe.data.in_pixels and samples.ndim == 4 else None


def _warnings(recipe: Recipe, ours: Statistics, real: Statistics | None) -> list[str]:
    if real is None:
        return []
    assert recipe.teacher is not None
    scale = real.std.clamp_min(1e-6 * float(real.std.max()) + 1e-12)
    ratio, shift = ours.std / scale, (ours.mean - real.mean).abs() / scale
    found = []
    if bool((ratio > SPREAD).any() | (ratio < 1 / SPREAD).any()):
        worst = int(ratio.log().abs().argmax())
        theirs = f"{float(ours.std[worst]):.3g}{_channel(worst, ratio)}"
        found.append(f"its samples' std is {theirs}, the data's is {float(real.std[worst]):.3g}")
    if bool((shift > SHIFT).any()):
        worst = int(shift.argmax())
        theirs = f"{float(ours.mean[worst]):.3g}{_channel(worst, shift)}"
        found.append(f"its samples' mean is {theirs}, the data's is {float(real.mean[worst]):.3g}")
    if ours.saturated is not None and real.saturated is not None and ours.saturated > real.saturated + SATURATED:
        theirs = f"{100 * ours.saturated:.0f} % of its samples' values are at the bound"
        found.append(f"{theirs}, of the data's {100 * real.saturated:.0f} %")
    return [f"teacher {recipe.teacher.name!r}: {line}: {CAUSES[card_of(recipe.teacher).kind]}" for line in found]


def _channel(place: int, values: Tensor) -> str:
    return f" (channel {place})" if len(values) > 1 else ""


def _numbers(values: Tensor) -> str:
    """Return the values of up to four channels, else the smallest and the largest."""
    if len(values) <= 4:
        return "/".join(f"{float(value):.3g}" for value in values)
    return f"{float(values.min()):.3g}..{float(values.max()):.3g}"
