"""Samples that a student was not trained on: held-out samples, and draws of the recipe's own coupling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowmap.base.distributed import rank, world_size
from flowmap.build.data import build_data
from flowmap.data import Dataset, Pairs
from flowmap.flow.draws import RowGenerator
from flowmap.flow.prior import conditioning_rows, start_of
from flowmap.flow.solver import invert
from flowmap.flow.types import Cond
from flowmap.metrics import LossByTime
from flowmap.metrics.flow_specs import NOTHING_HELD_OUT
from flowmap.plan.plan import resolve
from flowmap.prepare.make_pairs import Maker
from flowmap.recipe import Recipe
from flowmap.student.student import Student

Velocity = Callable[[Tensor, Tensor, Cond | None], Tensor]


@dataclass(frozen=True)
class Draws:
    """x0 and x1 (B, *shape) and the conditions that a student takes, on its device."""

    x0: Tensor
    x1: Tensor
    cond: Cond

    def batches(self, size: int) -> Iterator[Draws]:
        for i in range(0, len(self.x0), size):
            rows = slice(i, i + size)
            yield Draws(self.x0[rows], self.x1[rows], {key: value[rows] for key, value in self.cond.items()})


def held_out_samples(recipe: Recipe, student: Student, data: Dataset, num: int, guidance: float | None = None) -> Draws:
    """At most `num` held-out samples, each with noise of the recipe's prior, as a function of evaluation.seed.

    All processes call it, and each has its share. Raises ValueError if nothing is held out, or if the student needs
    classes and the data has none.
    """
    x0, cond = data.held_out_samples(num)
    if not len(x0):
        raise ValueError(NOTHING_HELD_OUT)
    prior = student.prior and student.prior.to(student.device)
    x0 = x0.to(student.device) if prior else x0
    start = start_of(
        prior or recipe.prior, x0, cond, RowGenerator(f"held-out/{recipe.evaluation.seed}", torch.arange(len(x0)))
    )
    mine = _mine(len(x0))
    cond = _taken(student, {key: value[mine] for key, value in cond.items()}, len(mine), guidance)
    conditioning = {key: value[mine.to(value.device)] for key, value in start.conditioning.items()}
    mine = mine.to(x0.device)
    return Draws(x0[mine].to(student.device), start.x1[mine].to(student.device), {**cond, **conditioning})


def coupled_draws(recipe: Recipe, student: Student, data: Dataset, num: int, guidance: float | None = None) -> Draws:
    """`num` draws of the recipe's coupling that were not trained on: held-out samples with new noise, or new pairs.

    Pairs have other noise than those on disk; their share of inverted ones starts from held-out samples. Their teacher
    must be on this machine.
    """
    if not isinstance(recipe.coupling, Pairs):
        return held_out_samples(recipe, student, data, num, guidance)
    settings = recipe.coupling
    fresh = replace(settings, seed=settings.seed + 1 + abs(recipe.evaluation.seed), num=num, inverted=0.0)
    maker = Maker.of(resolve(recipe.changed(coupling=fresh)), student.device)
    num_inverted = round(num * settings.inverted)
    parts = [_generated(maker, student, _mine(num - num_inverted).tolist(), recipe.evaluation.batch_size, guidance)]
    if num_inverted:
        real = held_out_samples(recipe, student, data, num_inverted, guidance)
        parts += [_inverted(maker, part) for part in real.batches(recipe.evaluation.batch_size)]
    return _joined(parts)


def loss_by_time(
    recipe: Recipe,
    student: Student,
    data: Dataset | None = None,
    *,
    times: Sequence[float] = LossByTime.times,
    images: int = 1000,
    guidance: float | None = None,
) -> dict[float, float]:
    """The mean squared error per value of the student's velocity at each time, over draws of its own coupling."""
    spec = LossByTime(images, tuple(times))
    draws = coupled_draws(recipe, student, build_data(resolve(recipe)) if data is None else data, images, guidance)
    metric = spec.build()
    for place, predicted, vt in velocities(recipe, student.flow_map.velocity, draws, spec.times):
        metric.update(place, predicted, vt)
    return dict(zip(spec.times, metric.losses(), strict=True))


@torch.no_grad()
def velocities(
    recipe: Recipe, velocity: Velocity, draws: Draws, times: Sequence[float]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(index of the time, velocity, conditional velocity) at each time on the recipe's path, batch by batch."""
    for part in draws.batches(recipe.evaluation.batch_size):
        for place, time in enumerate(times):
            t = torch.full((len(part.x0),), time, device=part.x0.device)
            sample = recipe.path.sample(part.x0, part.x1, t, t, part.cond or None)
            yield place, velocity(sample.xt, t, sample.cond), sample.vt


def _generated(maker: Maker, student: Student, pairs: list[int], batch_size: int, guidance: float | None) -> Draws:
    parts = [_pairs(maker, student, pairs[i : i + batch_size], guidance) for i in range(0, len(pairs), batch_size)]
    none = torch.zeros(0, *maker.data.shape, device=student.device)
    return _joined(parts) if parts else Draws(none, none, {})


def _pairs(maker: Maker, student: Student, pairs: list[int], guidance: float | None) -> Draws:
    x0, cond = maker.samples(pairs)
    start = maker.starts(pairs)
    cond = {**_taken(student, cond, len(pairs), guidance), **conditioning_rows(start, slice(None), student.device)}
    return Draws(x0.to(student.device), start.x1.to(student.device), cond)


def _inverted(maker: Maker, draws: Draws) -> Draws:
    velocity = maker.velocity({key: value for key, value in draws.cond.items() if key != "guidance"}, len(draws.x0))
    return replace(draws, x1=invert(velocity, draws.x0, maker.spec.solver).x)


def _joined(parts: list[Draws]) -> Draws:
    parts = [part for part in parts if len(part.x0)]
    cond = {key: torch.cat([part.cond[key] for part in parts]) for key in parts[0].cond}
    return Draws(torch.cat([part.x0 for part in parts]), torch.cat([part.x1 for part in parts]), cond)


def _taken(student: Student, cond: Cond, num: int, guidance: float | None) -> Cond:
    """The conditions that the student takes; raises ValueError if it needs classes and there are none."""
    if student.config.num_classes and "class" not in cond:
        raise ValueError(
            "metrics: inversion and loss_by_time want the classes of held-out samples, and the data has none"
        )
    return student.taken(num, cond, guidance)


def _mine(num: int) -> Tensor:
    """The places of this process among `num`, as many as of any other process."""
    world, mine = world_size(), rank()
    return torch.arange(num // world * world)[mine::world]
