"""`flowmap encode`: turns a recipe's pictures into latents and text embeddings on disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowmap.cli.arguments import device_of, part_of, recipe_arguments, shard_arguments
from flowmap.cli.terminal import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "It encodes text too, where the recipe reads any. An encoding that was cut off goes on."
    recipe_arguments(parser)
    shard_arguments(parser, batch=32, out="the recipe's data.root")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every file of the finished encoding and compare its checksum; encodes nothing",
    )


def run(a: argparse.Namespace) -> int:
    from flowmap.base.files import check_writable
    from flowmap.data import Encoded
    from flowmap.data.encoded import MADE, read_index
    from flowmap.data.shards import check_sums
    from flowmap.plan.plan import resolve
    from flowmap.prepare.encode import encode
    from flowmap.recipe import read_recipe

    recipe = read_recipe(a.recipe, a.overrides)
    if not isinstance(recipe.data, Encoded):
        raise ValueError(f"--recipe: {a.recipe}: its data is not of kind encoded: there is nothing to encode")
    asked = resolve(recipe)
    for trained in asked.autoencoders:
        asked.finished(trained, "data.autoencoder.recipe")
    spec = asked.data
    folder = Path(a.out or spec.root)
    if a.verify:
        found = check_sums(folder, read_index(folder), MADE, again=True)
        kept = f"{found} files are as they were written" if found else "made by flowmap 0.1, which kept no checksums"
        print(f"{folder}: {kept}")
        return 0
    check_writable(folder, "--out")
    index = encode(spec, folder, shard=part_of(a.shard), device=device_of(a.device), batch_size=a.batch, log=log)
    if index is None:
        print(f"{folder}: this part is done; the encoding is complete when all parts are")
        return 0
    counts = f"{index['grey']} grey, {index['missing_captions']} without a caption"
    left_out = f"{len(index['left_out'])} pictures left out"
    print(f"{folder}: {index['rows']} samples of shape {tuple(index['shape'])}, {left_out}, {counts}")
    return 0
