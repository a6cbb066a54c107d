"""What a stage needs on disk, latents, pairs or reference statistics, is made by all processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from flowmap.base.files import POLL
from flowmap.base.progress import LogFunction
from flowmap.base.schema import RecipeError
from flowmap.base.team import the_team
from flowmap.plan.plan import Encoding, Pairing
from flowmap.plan.references import ReferenceStatistics
from flowmap.prepare.encode import encode
from flowmap.prepare.make_pairs import make_pairs
from flowmap.prepare.reference import make_reference
from flowmap.prepare.write import making
from flowmap.train.stage import device_of


def waiting_for(label: str, folder: Path, log: LogFunction) -> Callable[[], None]:
    """A function that logs that another process is making that folder."""
    return lambda: log(f"{label}: another flowmap process is filling {folder}; waiting for it")


OnDisk = Encoding | Pairing | ReferenceStatistics


def make(stage: OnDisk, log: LogFunction, waiting: Callable[[], None] | None = None) -> None:
    """Make what the stage puts on disk, or the missing part. RecipeError names the recipe."""
    try:
        _make(stage, log, waiting)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{stage.recipe.name}: {error}") from error


def _make(stage: OnDisk, log: LogFunction, waiting: Callable[[], None] | None) -> None:
    team, device = the_team(), device_of(stage.recipe)
    rank, world = team.launch.rank, team.launch.world

    def made(rank: int) -> bool:
        part = (rank, world)
        if isinstance(stage, ReferenceStatistics):
            return make_reference(stage, shard=part, device=device, log=log, waiting=waiting) is not None
        if isinstance(stage, Pairing):
            return make_pairs(stage.run, stage.folder, shard=part, device=device, log=log, waiting=waiting) is not None
        return encode(stage.spec, stage.folder, shard=part, device=device, log=log, waiting=waiting) is not None

    def busy(missing: int) -> None:
        done = len(list(stage.folder.glob("shard-*.json")))
        log(f"{stage.recipe.name}: {missing} of {world} processes still make shards of {stage.folder}; {done} are made")

    # the lock that a command with one process has, so that two commands do not make the same shards twice
    with making(stage.folder, (0, 1), waiting) if world > 1 and team.first else nullcontext():
        if world > 1:
            if team.decide(lambda: stage.complete):  # by the command that this one has waited for
                return
            made(rank)
            team.wait(busy)
        while team.first and not made(0):  # it writes the index, or another command does just now
            time.sleep(POLL)
    team.wait()
