"""The verbs that fill folders of shards: encode and pairs."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import torch

from flowmap.base.files import check_writable
from flowmap.data import Encoded, Pairs
from flowmap.data.encoded import MADE, read_index
from flowmap.data.shards import check_sums
from flowmap.planning.plan import autoencoder_recipes, data_of, pairs_of, trained_run
from flowmap.recipe import read_recipe
from flowmap.shards.encode import encode


def encode_verb(a: Namespace, device: torch.device) -> int:
    recipe = read_recipe(a.recipe, a.overrides)
    if not isinstance(recipe.data, Encoded):
        raise ValueError(f"--recipe: {a.recipe}: its data is not of kind encoded: there is nothing to encode")
    for trained in autoencoder_recipes(recipe):
        trained_run(trained, recipe, "data.autoencoder.recipe")
    spec = data_of(recipe)
    folder = Path(a.out or spec.root)
    if a.verify:
        found = check_sums(folder, read_index(folder), MADE, again=True)
        print(f"{folder}: {found} files are as they were written" if found else f"{folder}: was made by flowmap 0.1, which kept no checksums")
        return 0
    check_writable(folder, "--out")
    index = encode(spec, folder, shard=_part(a.shard), device=device, batch_size=a.batch, say=_say)
    if index is None:
        print(f"{folder}: this part is done; the encoding is complete when all parts are")
        return 0
    counts = f"{index['grey']} grey, {index['missing_captions']} without a caption"
    print(f"{folder}: {index['rows']} samples of shape {tuple(index['shape'])}, {len(index['left_out'])} pictures left out, {counts}")
    return 0


def pairs_verb(a: Namespace, device: torch.device) -> int:
    from flowmap.shards.make_pairs import make_pairs, verify

    recipe = read_recipe(a.recipe, a.overrides)
    if not isinstance(recipe.coupling, Pairs):
        raise ValueError(f"--recipe: {a.recipe}: its coupling is not of kind pairs: there are none to make")
    folder = Path(a.out or pairs_of(recipe).root)
    if a.verify is not None:
        gap, pair = verify(recipe, folder, num=a.verify, device=device, batch_size=a.batch)
        print(f"{folder}: {a.verify} pairs made anew differ by at most {gap:.3g} (pair {pair})")
        return 0
    check_writable(folder, "--out")
    index = make_pairs(recipe, folder, shard=_part(a.shard), device=device, batch_size=a.batch, say=_say)
    if index is None:
        print(f"{folder}: this part is done; the pairs are complete when all parts are")
        return 0
    shape = tuple(index["contents"]["shape"])
    print(f"{folder}: {index['rows']} pairs of shape {shape}, {index['nfe']} network calls each, {recipe.coupling.num_inverted} inverted")
    return 0


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _part(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard: {text!r} is not of the form I/N, such as 0/4")
    return int(first), int(count)
