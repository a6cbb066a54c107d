"""`flowmap reference`: the mean and covariance of all training pictures in a feature space, for Frechet distances."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowmap.cli.arguments import device_of, part_of, recipe_arguments, shard_arguments
from flowmap.cli.terminal import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "For metrics with `reference: auto`, which find the result by themselves, or `reference: FILE.npz`. "
        "Work that was cut off goes on where it stopped."
    )
    recipe_arguments(parser)
    parser.add_argument("--features", help="feature space (default: that of the recipe's metric, else inception)")
    parser.add_argument("--weights", metavar="PATH|HUB-ID", help="the weights of the features' network")
    shard_arguments(parser, batch=64, out="only runs/reference-<hash>/statistics.npz", what="a copy of the result")


def run(a: argparse.Namespace) -> int:
    from flowmap.base.files import check_writable
    from flowmap.plan.references import ReferenceStatistics, references_of
    from flowmap.prepare.reference import make_reference
    from flowmap.recipe import read_recipe

    recipe = read_recipe(a.recipe, a.overrides)
    asked = references_of(recipe)
    if a.features is None and len(asked) > 1:
        raise ValueError(f"--features: the recipe asks for {', '.join(one.features for one in asked)}; choose one")
    if a.features is None and asked:
        stage = ReferenceStatistics(recipe, asked[0].features, a.weights or asked[0].weights)
    else:
        stage = ReferenceStatistics(recipe, a.features or "inception", a.weights)
    if a.out is not None:
        check_writable(Path(a.out).parent, "--out")
    check_writable(stage.folder, "--recipe")
    found = make_reference(stage, shard=part_of(a.shard), device=device_of(a.device), batch_size=a.batch, log=log)
    if found is None:
        print(f"{stage.folder}: this part is done; the statistics are complete when all parts are")
        return 0
    if a.out is not None:
        found.write(Path(a.out))
    print(f"{a.out or stage.file}: {found.count} pictures, {found.width} features of {found.features}")
    return 0
