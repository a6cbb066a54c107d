"""A run folder: which files a run writes, and how a run takes the place of an earlier one.

Only files of the list WRITTEN are ever moved or removed; everything else in the folder is the user's. While a run replaces another one, the
old files stay in their folders under hidden names, until the new run has its first checkpoint:

    .replaced.NAME   a file of the old run, renamed within its folder
    .replacing       exists once all of them are renamed: files named in WRITTEN are then the new run's

A process that is killed in between leaves this state; `recover`, which every `fit` calls first, ends it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from flowmap.config import RecipeError, to_plain
from flowmap.data.codes import ENCODINGS
from flowmap.data.tokens import FILE, SETTINGS
from flowmap.files import write_text
from flowmap.kinds import TABLES
from flowmap.planning.plan import BUILT_ON, Stage, built_on, holds, is_complete
from flowmap.recipe import Recipe, read_resolved
from flowmap.student.folder import FILES, FOLDERS

Say = Callable[[str], None]

STEP = "step-" + "[0-9]" * 8
STUDENT = (*FILES, "diffusion_pytorch_model.safetensors", FILE, SETTINGS, ENCODINGS)
WRITTEN = (
    "recipe.yaml",
    BUILT_ON,
    "log.csv",
    "metrics.json",
    "checkpoints/last.ckpt",
    f"ema/{STEP}-std-[0-9].[0-9][0-9][0-9].safetensors",
    f"samples/{STEP}.png",
    f"samples/{STEP}.txt",
    *(f"student/{name}" for name in STUDENT),
    *(f"student/{part}/{name}" for part in FOLDERS for name in STUDENT),
    "wandb/run-id",
    "wandb/run-[0-9]*_[0-9]*-*",  # W&B's folders, each of one run
    "wandb/offline-run-[0-9]*_[0-9]*-*",
    "wandb/latest-run",
    "wandb/debug*.log",
)
HEADS = tuple(dict.fromkeys(name.rpartition("/")[0] for name in WRITTEN))
LAST = "checkpoints/last.ckpt"
ASIDE, REPLACING = ".replaced.", ".replacing"
NOTE = "A run replaces the one whose files are named .replaced.*; if it ends before its first checkpoint, the next `flowmap fit` puts them back.\n"


def written(folder: Path, before: str = "", after: str = "") -> Iterator[Path]:
    """What lies in the folder under the names of WRITTEN, each with `before` and `after` around its last part."""
    for head in HEADS:
        where = folder / head
        names = [name.rpartition("/")[2] for name in WRITTEN if name.rpartition("/")[0] == head]
        for entry in sorted(os.listdir(where)) if where.is_dir() else ():
            if any(fnmatchcase(entry, before + name + after) for name in names):
                yield where / entry


def sweep(folder: Path) -> None:
    """Removes the temporary files (files.py) that a killed run left in that folder."""
    _remove(folder, written(folder, ".", ".[0-9]*.tmp"))


def move_aside(folder: Path) -> None:
    """Renames the files of the run that the folder holds, until `drop_old` or `put_back`."""
    for path in list(written(folder)):
        path.rename(path.with_name(ASIDE + path.name))
    write_text(folder / REPLACING, NOTE)


def drop_old(folder: Path) -> None:
    """Removes the files that `move_aside` renamed; nothing where there are none."""
    if (folder / REPLACING).is_file():
        _remove(folder, written(folder, ASIDE))
        (folder / REPLACING).unlink()


def put_back(folder: Path) -> bool:
    """Removes the files of a run that was to replace another and gives the other's their names again; False where there are none.

    It may be interrupted and called again.
    """
    if (folder / REPLACING).is_file():
        _remove(folder, written(folder))
        (folder / REPLACING).unlink()
    waiting = [(path, path.with_name(path.name.removeprefix(ASIDE))) for path in written(folder, ASIDE)]
    moved = [path.rename(back) for path, back in waiting if not os.path.lexists(back)]
    return bool(moved)


def recover(folder: Path, say: Say) -> None:
    """Ends what a killed process has begun: with a checkpoint of the new run the old one is removed, without one it is put back."""
    if (folder / REPLACING).is_file() and (folder / LAST).is_file():
        drop_old(folder)
    elif put_back(folder):
        say(f"{folder}: the run that was to replace this one ended before its first checkpoint; this one is back")


def guard(stage: Stage, *, resume: bool, overwrite: bool) -> None:
    """RecipeError where fit may not touch what the folder holds, unless asked to go on with it or to replace it."""
    folder = stage.folder
    if not (folder / "recipe.yaml").is_file():
        in_the_way = next((name for name in dict.fromkeys(name.split("/")[0] for name in WRITTEN) if os.path.lexists(folder / name)), None)
        if overwrite and folder.exists() and any(folder.iterdir()):
            raise RecipeError(f"--overwrite: {folder} is not a run folder (no recipe.yaml), so it is left alone")
        if in_the_way:
            raise RecipeError(f"--out: {folder} is not a run folder (no recipe.yaml) and its {in_the_way} would be replaced; choose another")
        return
    if not _is_a_runs(folder):
        raise RecipeError(f"--out: {folder / 'recipe.yaml'} is of no run and would be replaced; choose another folder")
    if overwrite or is_complete(folder, stage.recipe):
        return
    if not holds(folder, stage.recipe):
        key = first_difference(stage.recipe, folder / "recipe.yaml")
        raise RecipeError(f"--out: {folder} holds a run of another recipe (first difference: {key}); choose another --out, or --overwrite")
    if not resume and (folder / "checkpoints").exists():
        raise RecipeError(f"--out: {folder} holds an unfinished run of this recipe; --resume goes on with it, --overwrite starts anew")


def _is_a_runs(folder: Path) -> bool:
    """Whether a run wrote the folder's recipe.yaml: other files of a run lie beside it, or it has every default, as a run writes it."""
    path = folder / "recipe.yaml"
    if any(found != path for found in written(folder)):
        return True
    try:
        return read_resolved(path).to_yaml() == path.read_text(encoding="utf-8")
    except ValueError:
        return False


def first_difference(recipe: Recipe, path: Path) -> str:
    """The first setting that differs from that recipe.yaml's, in words."""

    def flat(node, key=""):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
        return {key: node} if items is None else {k: v for name, child in items for k, v in flat(child, f"{key}.{name}".lstrip(".")).items()}

    try:
        old = flat(to_plain(read_resolved(path), TABLES))
    except RecipeError:
        return "recipe.yaml cannot be read by this version"
    new = flat(to_plain(recipe, TABLES))
    key = next((k for k in [*new, *old] if not k.startswith("log.") and old.get(k, "absent") != new.get(k, "absent")), None)
    if key is None:
        return f"the runs that it is built on, {BUILT_ON}; today they are {', '.join(built_on(recipe))}"
    return f"{key}, {old.get(key, 'absent')!r} there and {new.get(key, 'absent')!r} here"


def _remove(folder: Path, paths: Iterator[Path]) -> None:
    """Removes these paths, then the folders of a run that are empty."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for head in reversed(HEADS):
        if head:
            with suppress(OSError):
                (folder / head).rmdir()
