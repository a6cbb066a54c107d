"""`flowmap pairs`: joins noise to data by a teacher's ODE, for recipes with coupling pairs or data of a teacher."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowmap.cli.arguments import device_of, part_of, recipe_arguments, shard_arguments
from flowmap.cli.terminal import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "`coupling: {kind: pairs}` or `data: {kind: teacher_samples}`"
    parser.epilog = f"For recipes with {kinds}. Work that was cut off goes on where it stopped."
    recipe_arguments(parser)
    shard_arguments(parser, batch=256, out="the recipe's coupling.root")
    parser.add_argument(
        "--verify",
        type=int,
        metavar="N",
        help="check all checksums, make N of the pairs again and report the largest difference",
    )


def run(a: argparse.Namespace) -> int:
    from flowmap.base.files import check_writable
    from flowmap.data import Pairs, TeacherSamples
    from flowmap.plan.plan import resolve
    from flowmap.prepare.make_pairs import make_pairs, verify
    from flowmap.recipe import read_recipe

    recipe = read_recipe(a.recipe, a.overrides)
    asked, what = resolve(recipe), "pairs"
    if isinstance(recipe.data, TeacherSamples) and not isinstance(recipe.coupling, Pairs):
        asked, what = asked.sampled, "samples of the teacher"
    elif not isinstance(recipe.coupling, Pairs):
        raise ValueError(f"--recipe: {a.recipe}: its coupling is not of kind pairs: there are none to make")
    folder = Path(a.out or asked.pairs.root)
    if a.verify is not None:
        gap, pair = verify(asked, folder, num=a.verify, device=device_of(a.device), batch_size=a.batch)
        print(f"{folder}: {a.verify} pairs made again differ by at most {gap:.3g} (pair {pair})")
        return 0
    check_writable(folder, "--out")
    index = make_pairs(asked, folder, shard=part_of(a.shard), device=device_of(a.device), batch_size=a.batch, log=log)
    if index is None:
        print(f"{folder}: this part is done; the pairs are complete when all parts are")
        return 0
    shape = tuple(index["contents"]["shape"])
    calls = f"{index['nfe']} network calls each, {asked.pairs.num_inverted} inverted"
    print(f"{folder}: {index['rows']} {what} of shape {shape}, {calls}")
    return 0
