"""`flowmap show`: prints a recipe with every default."""

from __future__ import annotations

import argparse

from flowmap.cli.arguments import recipe_arguments as add_arguments

__all__ = ["add_arguments", "run"]


def run(a: argparse.Namespace) -> int:
    from flowmap.recipe import read_recipe

    print(read_recipe(a.recipe, a.overrides).to_yaml(), end="")
    return 0
