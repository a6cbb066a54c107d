"""A run folder: the files that a run writes, and how a run replaces an earlier one.

Only files of the list WRITTEN are ever moved or removed; everything else in the folder belongs to the user. While a run
replaces another one, the old files stay in their folders under hidden names until the new run has its first checkpoint:

    .replaced.NAME   a file of the old run, renamed within its folder
    .replacing       exists once all of them are renamed: files named in WRITTEN are then the new run's

A process that is killed in between leaves the folder in this state; `recover`, which every `fit` calls first, ends it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from flowmap.base.files import read_json, write_text
from flowmap.base.schema import RecipeError
from flowmap.data.codes import ENCODINGS
from flowmap.data.text.tokens import FILE, SETTINGS
from flowmap.nets.lora_file import SHIPPED
from flowmap.plan.plan import Stage
from flowmap.plan.run_folders import built_on, matches
from flowmap.plan.same_run import BUILT_ON, first_difference, measurement, same_measurement
from flowmap.recipe.recipe import Recipe, read_resolved
from flowmap.student.folder import FILES, FOLDERS
from flowmap.train.sharded_checkpoint import put_back as put_checkpoint_back

LogFunction = Callable[[str], None]

EXTENDED = "extended.json"  # train/extend.py
STEP = "step-" + "[0-9]" * 8
STUDENT = (*FILES, "diffusion_pytorch_model.safetensors", FILE, SETTINGS, ENCODINGS)
WRITTEN = (
    "recipe.yaml",
    BUILT_ON,
    "log.csv",
    "metrics.json",
    EXTENDED,
    "checkpoints/last.ckpt",  # a file, or the folder of a sharded run, as all of these
    "checkpoints/last.ckpt.before",
    "checkpoints/damaged.ckpt",
    f"checkpoints/{STEP}.ckpt",
    f"ema/{STEP}-std-[0-9].[0-9][0-9][0-9].safetensors",
    f"samples/{STEP}.png",
    f"samples/{STEP}.txt",
    *(f"student/{name}" for name in STUDENT),
    *(f"student/{part}/{name}" for part in FOLDERS for name in (*STUDENT, *SHIPPED)),
    "wandb/run-id",
    "wandb/run-[0-9]*_[0-9]*-*",  # W&B's folders, each of one run
    "wandb/offline-run-[0-9]*_[0-9]*-*",
    "wandb/latest-run",
    "wandb/flowmap-tables",  # the pictures of tables; a name that only we write
    "wandb/debug*.log",
)
HEADS = tuple(dict.fromkeys(name.rpartition("/")[0] for name in WRITTEN))
LAST, DAMAGED = "checkpoints/last.ckpt", "checkpoints/damaged.ckpt"
NOT_DRAWN = "not_drawn"  # in metrics.json: why the samples of the last step could not be drawn
ASIDE, REPLACING = ".replaced.", ".replacing"
NOTE = (
    "A run replaces the one whose files are named .replaced.*; if it ends before its first checkpoint, "
    "the next `flowmap fit` puts them back.\n"
)


def written(folder: Path, before: str = "", after: str = "") -> Iterator[Path]:
    """The paths in the folder that match WRITTEN, each with `before` and `after` around its last part."""
    for head in HEADS:
        where = folder / head
        names = [name.rpartition("/")[2] for name in WRITTEN if name.rpartition("/")[0] == head]
        for entry in sorted(os.listdir(where)) if where.is_dir() else ():
            if any(fnmatchcase(entry, before + name + after) for name in names):
                yield where / entry


def sweep(folder: Path) -> None:
    """Remove the temporary files (base/files.py) of a killed run."""
    _remove(folder, written(folder, ".", ".[0-9]*.tmp"))


def move_aside(folder: Path) -> None:
    """Rename the files of the run in the folder, until `drop_old` or `put_back`."""
    for path in list(written(folder)):
        path.rename(path.with_name(ASIDE + path.name))
    write_text(folder / REPLACING, NOTE)


def drop_old(folder: Path) -> None:
    """Remove the files that `move_aside` renamed, if there are any."""
    if (folder / REPLACING).is_file():
        _remove(folder, written(folder, ASIDE))
        (folder / REPLACING).unlink()


def put_back(folder: Path) -> bool:
    """Remove the files of a run that was to replace another, and rename the other's files back.

    Returns False if there are none. It may be interrupted and called again.
    """
    if (folder / REPLACING).is_file():
        _remove(folder, written(folder))
        (folder / REPLACING).unlink()
    waiting = [(path, path.with_name(path.name.removeprefix(ASIDE))) for path in written(folder, ASIDE)]
    moved = [path.rename(back) for path, back in waiting if not os.path.lexists(back)]
    return bool(moved)


def recover(folder: Path, log: LogFunction) -> None:
    """Finish what a killed process has begun: remove the old run if the new one has a checkpoint, else put it back."""
    put_checkpoint_back(folder / LAST)
    if (folder / REPLACING).is_file() and (folder / LAST).exists():
        drop_old(folder)
    elif put_back(folder):
        log(f"{folder}: the run that was to replace this one ended before its first checkpoint; this one is back")


def guard(stage: Stage, *, resume: bool, overwrite: bool) -> None:
    """Raise RecipeError if fit may not touch the folder: it has another or an unfinished run, or is no run folder."""
    folder = stage.folder
    if not (folder / "recipe.yaml").is_file():
        in_the_way = next(
            (name for name in dict.fromkeys(name.split("/")[0] for name in WRITTEN) if os.path.lexists(folder / name)),
            None,
        )
        if overwrite and folder.exists() and any(folder.iterdir()):
            raise RecipeError(f"--overwrite: {folder} is not a run folder (no recipe.yaml), so it is left alone")
        if in_the_way:
            raise RecipeError(
                f"--out: {folder} is not a run folder (no recipe.yaml) and its {in_the_way} would be replaced; "
                "choose another"
            )
        return
    if not _is_a_runs(folder):
        raise RecipeError(f"--out: {folder / 'recipe.yaml'} is of no run and would be replaced; choose another folder")
    if overwrite:
        return
    if not matches(folder, stage.recipe):
        key = _first_difference(folder / "recipe.yaml", stage.recipe)
        raise RecipeError(
            f"--out: {folder} holds a run of another recipe (first difference: {key}); "
            "choose another --out, or --overwrite"
        )
    if stage.complete:
        _guard_measured(stage, resume)
    elif not resume and (folder / "checkpoints").exists():
        raise RecipeError(
            f"--out: {folder} holds an unfinished run of this recipe; --resume goes on with it, --overwrite starts over"
        )


def _guard_measured(stage: Stage, resume: bool) -> None:
    """Raise RecipeError if the finished run was measured with other settings, unless it can be measured again."""
    folder, recipe = stage.folder, stage.recipe
    key = first_difference(measurement(read_resolved(folder / "recipe.yaml")), measurement(recipe))
    if key is not None and not resume:
        what = f"holds this run, measured otherwise (first difference: {key})"
        raise RecipeError(f"--out: {folder} {what}; --resume measures it again, --overwrite trains again")
    if key is not None and not (folder / LAST).exists():
        what = f"{folder / LAST} is not there, and without it the run cannot be measured again"
        raise RecipeError(f"--resume: {what}; `flowmap evaluate --student {folder}` measures its student")


def measures_again(stage: Stage, *, resume: bool, log: bool) -> bool:
    """Whether `fit` measures the finished run again: it is resumed with other settings of its measurement.

    log: also if settings of the log differ, or if its samples could not be drawn.
    """
    folder = stage.folder
    if not (resume and stage.complete and (folder / LAST).exists()):
        return False
    return not same_measurement(folder, stage.recipe, *(["log"] if log else [])) or (
        log and NOT_DRAWN in read_json(folder / "metrics.json")
    )


def check_step(folder: Path, step: int) -> None:
    """Raise RecipeError unless the last checkpoint is of the step that was measured: a run that ran out of time has an
    earlier one."""
    measured = read_json(folder / "metrics.json").get("training", {}).get("steps", step)
    if measured != step:
        what = f"{folder / LAST} is of step {step}, and the student of step {measured}"
        raise RecipeError(f"--resume: {what}; `flowmap evaluate --student {folder}` measures the student")


def _is_a_runs(folder: Path) -> bool:
    """Whether a run wrote recipe.yaml: the folder has other files of a run, or the recipe has every default."""
    path = folder / "recipe.yaml"
    if any(found != path for found in written(folder)):
        return True
    try:
        return read_resolved(path).to_yaml() == path.read_text(encoding="utf-8")
    except ValueError:
        return False


def _first_difference(path: Path, recipe: Recipe) -> str:
    """The first setting of the training that differs from the recipe.yaml, in words."""
    try:
        found = first_difference(read_resolved(path).training(), recipe.training())
    except RecipeError:
        return "recipe.yaml cannot be read by this version"
    return found or f"the runs that it is built on, {BUILT_ON}; today they are {', '.join(built_on(recipe))}"


def _remove(folder: Path, paths: Iterator[Path]) -> None:
    """Remove these paths, then the empty folders of a run."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for head in reversed(HEADS):
        if head:
            with suppress(OSError):
                (folder / head).rmdir()
