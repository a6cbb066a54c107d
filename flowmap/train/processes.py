"""On how many processes a recipe trains, and whether the program that started this command started as many."""

from __future__ import annotations

from flowmap.base.launch import Launch
from flowmap.base.schema import RecipeError
from flowmap.plan.plan import Stage
from flowmap.recipe import Recipe


def processes_of(recipe: Recipe) -> tuple[int, int]:
    """The processes of a recipe's training on each machine, and the number of machines."""
    return recipe.trainer.devices, recipe.trainer.num_nodes


def check_processes(launch: Launch, stages: list[Stage]) -> None:
    """Raise RecipeError unless the processes of the launch can train these stages.

    A launcher must start as many as the largest stage wants. A smaller one trains on the first of them, on one machine.
    """
    if not launch.by or not stages:
        return
    for stage in stages:
        devices, nodes = processes_of(stage.recipe)
        size = devices * nodes
        if size > launch.world or not (size == launch.world or size <= launch.local_world):
            _refuse(launch, stage, size)
    if launch.by != "flowmap" and all(size_of(stage) < launch.world for stage in stages):
        _refuse(launch, stages[-1], size_of(stages[-1]))


def size_of(stage: Stage) -> int:
    devices, nodes = processes_of(stage.recipe)
    return devices * nodes


def _refuse(launch: Launch, stage: Stage, size: int) -> None:
    trainer = stage.recipe.trainer
    wants = f"trainer.devices: {trainer.devices} x trainer.num_nodes: {trainer.num_nodes} is {size} processes"
    raise RecipeError(
        f"{stage.recipe.name}: {wants}, and {launch.by} started {launch.world} ({launch.local_world} on a machine); "
        f"start {size}, or change the settings"
    )
