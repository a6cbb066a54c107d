"""`flowmap list`: the shipped recipes and teachers, and what may stand in every slot of a recipe."""

from __future__ import annotations

import argparse

from flowmap.cli.arguments import import_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    import_argument(parser)


def run(a: argparse.Namespace) -> int:
    from flowmap.cli.slots import keys_of_slots
    from flowmap.kinds import TABLES
    from flowmap.planning.plan import list_cards
    from flowmap.recipe import find_recipe, list_recipes

    print("recipes")
    names = list_recipes()
    width = max(map(len, names))
    for name in names:
        first = find_recipe(name).read_text(encoding="utf-8").splitlines()[0]
        print(f"  {name:{width}s} {first.removeprefix('#').strip()}")
    print("teachers\n  " + ", ".join(list_cards()))
    found = keys_of_slots()
    twice = [key for keys in found.values() for key in keys]
    for slot, keys in found.items():
        told = [f"{key} ({', '.join(kinds)})" if twice.count(key) > 1 else key for key, kinds in keys.items()]
        print(f"{', '.join(told)} kinds\n  {', '.join(TABLES[slot])}")
    return 0
