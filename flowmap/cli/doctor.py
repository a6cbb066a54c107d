"""`flowmap doctor`: tries one training step of a recipe on its real network."""

from __future__ import annotations

import argparse

from flowmap.cli.arguments import device_of, recipe_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "It prints which derivative works and what the step costs."
    recipe_arguments(parser)
    parser.add_argument("--batch", type=int, default=2, help="samples in the step")
    parser.add_argument("--device", default="cpu")


def run(a: argparse.Namespace) -> int:
    from flowmap.recipe import read_recipe
    from flowmap.train.doctor import examine

    print("\n".join(examine(read_recipe(a.recipe, a.overrides), batch=a.batch, device=device_of(a.device))))
    return 0
