"""The checkpoints of a run folder: last.ckpt, and earlier ones under the names of their steps.

    checkpoints/last.ckpt            the newest, from which --resume goes on
    checkpoints/step-00005000.ckpt   kept by trainer.keep_checkpoints or trainer.milestone_every_steps
    checkpoints/damaged.ckpt         what was last.ckpt and could not be read

Each is a file (checkpoint_file.py), or the folder of a sharded checkpoint. Only `repair` reads their contents.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from flowmap.base.progress import LogFunction
from flowmap.recipe.settings import Trainer
from flowmap.train.checkpoint_file import check_file
from flowmap.train.run_folder import DAMAGED, LAST, STEP
from flowmap.train.sharded_checkpoint import REST, check_shards


def is_milestone(settings: Trainer, step: int) -> bool:
    return bool(settings.milestone_every_steps) and step % settings.milestone_every_steps == 0


def named(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}.ckpt"


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def retired(folder: Path) -> list[Path]:
    """The checkpoints before the last one, the newest first."""
    return sorted((folder / "checkpoints").glob(f"{STEP}.ckpt"), reverse=True)


def retire(folder: Path, step: int, settings: Trainer) -> None:
    """Keep last.ckpt, of that step, under its own name too, if a setting keeps it when a newer one is saved."""
    last, kept = folder / LAST, named(folder, step)
    if (settings.keep_checkpoints > 1 or is_milestone(settings, step)) and last.exists() and not kept.exists():
        _give(last, kept)


def drop_retired(folder: Path, settings: Trainer) -> None:
    """Remove the retired checkpoints that no setting keeps."""
    others = [path for path in retired(folder) if not is_milestone(settings, step_of(path))]
    for path in others[settings.keep_checkpoints - 1 :]:
        remove(path)


def repair(folder: Path, log: LogFunction) -> None:
    """Make the newest checkpoint that can be read last.ckpt, if last.ckpt is missing or damaged and another is there.

    Without another one nothing is done: who reads last.ckpt names what is wrong with it.
    """
    last, others = folder / LAST, retired(folder)
    if not others:
        return
    reason = _damage(last)
    good = next((path for path in others if _damage(path) is None), None) if reason else None
    if good is None:
        return
    log(f"{last}: {reason}; going on from {good.name} instead")
    if last.exists():
        remove(folder / DAMAGED)
        last.rename(folder / DAMAGED)
    for path in others[: others.index(good)]:  # they are damaged too
        remove(path)
    _give(good, last)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _damage(path: Path) -> str | None:
    """What is wrong with the checkpoint, None if nothing is. Content is compared with its checksum, not loaded."""
    if not path.exists():
        return "is missing"
    try:
        if path.is_dir():
            check_shards(path)
            check_file(path / REST)
        else:
            check_file(path)
    except (ValueError, OSError) as error:
        return f"is damaged: {error}"
    return None


def _give(path: Path, name: Path) -> None:
    """Give the checkpoint another name: a second one for a file, so that last.ckpt is there at any moment."""
    try:
        os.link(path, name)
    except OSError:  # it is a folder, or the file system has no links
        path.rename(name)
