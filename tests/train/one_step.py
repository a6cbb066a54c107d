"""One training step of a recipe's module without a trainer: the gradients of each network, however the step's batch is
split.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from flowmap.build.data import build_data
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import build_teacher
from flowmap.data import Pairs, StepBatches
from flowmap.data.pairs import noises
from flowmap.plan.plan import resolve
from flowmap.recipe import Recipe
from flowmap.train.module import DistillModule, trained
from flowmap.train.modules import module_of

STEP = 3


def gradients_of_a_step(
    monkeypatch,
    recipe: Recipe,
    *,
    batch: int,
    accumulate: int = 1,
    world: int = 1,
    state: int = 0,
    double: bool = False,
) -> dict[str, list[torch.Tensor]]:
    """The gradient of step 3 for each time that a network steps in it, by the network's name.

    They are means over micro-batches and processes, which run in turn here.

    state: that of torch's own generator before every micro-batch. double: networks and samples are float64.
    """
    recipe = replace(
        recipe, data=replace(recipe.data, batch_size=batch), trainer=replace(recipe.trainer, accumulate=accumulate)
    )
    parts = [_of_a_process(monkeypatch, recipe, rank, world, state, double) for rank in range(world)]
    return {
        name: [sum(grads) / world for grads in zip(*(part[name] for part in parts), strict=True)] for name in parts[0]
    }


class Paired:
    """A data set whose samples are paired with noise of their own, in the place of pairs that a teacher made."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitems__(self, places):
        x0, cond = self.data.__getitems__(places)
        return x0, cond, noises(0, places, x0.shape[1:])


def as_double(batch: tuple) -> tuple:
    """The batch with samples and noise in float64."""
    x0, cond, *paired = batch
    return (x0.double() if x0.is_floating_point() else x0, cond, *(noise.double() for noise in paired))


def built(recipe: Recipe) -> DistillModule:
    """The recipe's module, outside a trainer; it reads pairs made from the data as they are asked for."""
    run = resolve(recipe)
    data = build_data(run)
    teacher = build_teacher(run, data)
    config = student_config(run, data, teacher)
    samples = Paired(data) if isinstance(recipe.coupling, Pairs) else data
    return module_of(run, config, build_student(run, config, teacher), teacher, data, samples)


def _of_a_process(
    monkeypatch, recipe: Recipe, rank: int, world: int, state: int, double: bool
) -> dict[str, list[torch.Tensor]]:
    module = built(recipe)
    teacher = module.teacher
    if double:
        for part in (module, *(() if teacher is None else teacher.modules)):
            part.double()
    found: dict[str, list[torch.Tensor]] = {}

    def stepped(self, optimizer, parameters, name=None):
        found[f"{name or 'student'} {len(found)}"] = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters
        ]
        for p in parameters:
            p.grad = None

    optimizers = module.configure_optimizers()
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    trainer = SimpleNamespace(world_size=world, optimizers=optimizers)
    for name, value in {
        "global_step": STEP,
        "global_rank": rank,
        "trainer": trainer,
        "_must_be_finite": lambda *a: None,
    }.items():
        monkeypatch.setattr(DistillModule, name, value)
    monkeypatch.setattr(type(module), "_step", stepped, raising=False)
    monkeypatch.setattr(type(module), "_mean", lambda self, value: value, raising=False)
    monkeypatch.setattr(type(module), "optimizers", lambda self: [SimpleNamespace(optimizer=one) for one in optimizers])
    split = dict(rank=rank, world=world, accumulate=recipe.trainer.accumulate)
    batches = StepBatches(len(module.samples), recipe.data.batch_size, seed=recipe.seed, **split)
    for micro in range(recipe.trainer.accumulate):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        given = module.samples.__getitems__(batches.indices(STEP, micro))
        loss = module.training_step(as_double(given) if double else given, micro)
        assert torch.equal(torch.get_rng_state(), before), "torch's own generator goes on as if nothing had been drawn"
        if loss is not None:
            (loss / recipe.trainer.accumulate).backward()
    if not found:
        stepped(module, None, trained(module.student))
    return found
