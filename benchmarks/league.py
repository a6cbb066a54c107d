"""Which objective is best at 1, 2 and 4 steps for the same work?  digits, every objective at 1, 2, 4, 8 steps.

Quality is also measured in a second feature space, which no loss uses: the last hidden layer of a network that tells
the classes of the real pictures (_labels.py; --metrics-of-recipe leaves it out).

Five seeds; all objectives of a seed share one teacher (--one-teacher: so do all seeds).  By `flowmap compare`: equal
seconds of training, or with --calls equal network evaluations.  Quality, cost, memory and diverged runs are reported.
Machines are shared, so the seconds are CPU seconds of the process (--wall: wall-clock seconds).  Teachers that other
benchmarks have trained are reused.  Finished runs are kept in runs/league-SET, and the same command continues an
interrupted benchmark.
`--set fashion14`: the recipes digits-X, `base: [data/digits, method/X]`, with data/fashion14 instead.
`python benchmarks/league.py [--set digits|fashion14] [--seeds 5] [--budget 240 | --calls 1.4e6] [--wall]
    [--recipes digits digits-scm] [--out DIR] [--suffix _new] [--one-teacher] [--metrics-of-recipe]`
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import _labels
from lib.report import environment, table, write
from omegaconf import OmegaConf
from tables.league import tables

from flowmap.base.schema import to_plain
from flowmap.base.trust import allow_import
from flowmap.build.data import build_data
from flowmap.compare import compare
from flowmap.compare.entrants import at_seed, read_entrants
from flowmap.plan.dependencies import teacher_recipes
from flowmap.plan.plan import resolve
from flowmap.plan.run_folders import dependency_folder, is_complete, matches, runs_root
from flowmap.recipe import read_recipe
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.recipe import find_recipe, read_plain

DEFAULT = "digits"  # the recipe that must be the best, or within noise of it, at 2 and 4 steps
RECIPES = (
    DEFAULT,
    *(
        f"digits-{name}"
        for name in ("ayf-emd", "ayf-lmd", "warm", "cmt", "meanflow", "imeanflow", "scm", "consistency")
    ),
    *(
        f"digits-{name}"
        for name in (
            "esd",
            "lsd",
            "psd",
            "shortcut",
            "freeflow",
            "dmd",
            "alpha-flow",
            "facm",
            "tvm",
            "rcgm",
            "pmf",
            "pi-flow",
            "twin-flow",
        )
    ),
    "rfpp/digits",
)
TEACHERS = (
    "runs/bench/{set}/seed-{seed}",
    "runs/bench/rectified/{set}/seed-{seed}",
)  # where other benchmarks keep theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=["digits", "fashion14"], default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    terms = parser.add_mutually_exclusive_group()
    terms.add_argument("--budget", type=float, help="seconds of training for each recipe and seed (default: 240)")
    terms.add_argument("--calls", type=float, help="network evaluations instead")
    parser.add_argument(
        "--wall", action="store_true", help="seconds as the wall clock shows them: on a GPU, or a machine of one's own"
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--out", type=Path, help="default: runs/league-SET")
    parser.add_argument("--suffix", default="", help="of the result's name, for other rows than the league's")
    parser.add_argument("--one-teacher", action="store_true", help="seed 0's for all seeds; the students' seeds differ")
    parser.add_argument("--metrics-of-recipe", action="store_true", help="no second feature space")
    a = parser.parse_args()
    budget = 240.0 if a.budget is None and a.calls is None else a.budget
    out = a.out or runs_root() / f"league-{a.set}"
    recipes = [over(a.set, name, out.with_name(f"{out.name}-recipes")) for name in a.recipes]
    for seed in range(a.seeds):
        take_over(recipes, a.set, seed)
    found = compare(
        recipes,
        budget=budget,
        calls=a.calls,
        seeds=a.seeds,
        out=out,
        overrides=[
            *([] if a.metrics_of_recipe else [f"metrics={json.dumps(with_classes(recipes[0]))}"]),
            *(["teacher.overrides=[seed=0]"] if a.one_teacher else []),
        ],
        now=time.perf_counter if a.wall else time.process_time,
    )
    made = tables(found, a.set)
    for name, one in made.items():
        print(f"\n{name}\n{table(one['rows'], one['columns'])}")
    settings = {"set": a.set, "seeds": list(range(a.seeds)), "budget": budget or a.calls, "of": _unit(a)}
    settings["one teacher"] = a.one_teacher
    write(
        f"league_{a.set}{a.suffix}",
        {
            "question": __doc__.splitlines()[0],
            "environment": environment(),
            "settings": settings,
            "tables": made,
            **found,
        },
    )


def _unit(a: argparse.Namespace) -> str:
    return "network evaluations" if a.calls else "wall seconds" if a.wall else "CPU seconds"


def with_classes(recipe: str) -> list[dict]:
    """The recipe's metrics of samples, and the distance of the first in the features of _labels.py, which it fits."""
    known = read_recipe(recipe)
    _labels.fit(build_data(resolve(known)))
    allow_import("_labels")
    of_samples = [
        plain for plain in to_plain(known.metrics, TABLES) if plain["kind"] in ("frechet", "precision_recall")
    ]
    return [*of_samples, {**of_samples[0], "features": "_labels:labels"}]


def over(name: str, recipe: str, folder: Path) -> str:
    """Write the recipe digits-X as NAME-X, with that data instead of digits, into the folder.

    digits itself, X/digits and recipes that have that data are used as they are.
    """
    if name == DEFAULT:
        return recipe
    if recipe == DEFAULT or recipe.endswith(f"/{DEFAULT}"):
        return recipe.replace(DEFAULT, name)
    plain = read_plain(find_recipe(recipe))
    data, *method = plain.pop("base", ["?"])
    if data == f"data/{name}":
        return recipe
    if data != f"data/{DEFAULT}":
        raise SystemExit(f"{recipe}: is not over data/{DEFAULT}, so it cannot be put over data/{name}")
    if "recipe" in plain.get("student", {}):
        plain["student"] |= {"recipe": over(name, plain["student"]["recipe"], folder)}
    settings = {"base": [f"data/{name}", *method], "name": recipe.replace(DEFAULT, name), **plain}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{settings['name']}.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(settings)), encoding="utf-8")
    return str(path.resolve())


def take_over(recipes: Sequence[str], name: str, seed: int) -> None:
    """Copies the teachers of that seed that other benchmarks trained to where the recipes look for them."""
    for recipe in read_entrants(recipes):
        for teacher in teacher_recipes(at_seed(recipe, seed)):
            target = dependency_folder(teacher)
            for place in TEACHERS if not is_complete(target, teacher) else ():
                for folder in Path(place.format(set=name, seed=seed)).glob(f"{teacher.name}*"):
                    if matches(folder, teacher):
                        shutil.copytree(folder, target, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
