"""`flowmap list`: the shipped recipes and teachers, and what may stand in every slot of a recipe."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from flowmap.composing import find_recipe, header, list_parts, list_recipes
from flowmap.kinds import TABLES
from flowmap.planning.plan import list_cards
from flowmap.recipe import Recipe


def list_verb(a: argparse.Namespace) -> int:
    print("recipes")
    names = list_recipes()
    width = max(map(len, names))
    for name in names:
        print(f"  {name:{width}s} {header(find_recipe(name))[0]}")
    print("parts of recipes, for base: [data/digits, method/meanflow] or, over a recipe, +method/meanflow\n  " + ", ".join(list_parts()))
    print("teachers\n  " + ", ".join(list_cards()))
    found = keys_of_slots()
    twice = [key for keys in found.values() for key in keys]
    for slot, keys in found.items():
        told = [f"{key} ({', '.join(kinds)})" if twice.count(key) > 1 else key for key, kinds in keys.items()]
        print(f"{', '.join(told)} kinds\n  {', '.join(TABLES[slot])}")
    return 0


def keys_of_slots() -> dict[type, dict[str, list[str]]]:
    """The keys under which each slot stands in a recipe, "data", "data.images", ..., and under each the kinds that have it ("" for a recipe's
    own): there may be slots of two types under one key. What a slot holds within itself is not followed further."""
    found: dict[type, dict[str, list[str]]] = {}
    _walk(Recipe, "", "", (), found)
    return found


def _walk(cls: type, kind: str, key: str, within: tuple[type, ...], found: dict[type, dict[str, list[str]]]) -> None:
    """Adds the slots among the fields of a class, which is that kind of the slot `key`, and all within them."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{key}.{field.name}" if key else field.name
        for hint in _within(hints[field.name]):
            if hint in TABLES:
                found.setdefault(hint, {}).setdefault(name, []).append(kind)
                for below, of in TABLES[hint].items() if hint not in within else ():
                    _walk(of, below, name, (*within, hint), found)
            elif dataclasses.is_dataclass(hint):
                _walk(hint, kind, name, within, found)


def _within(hint: Any) -> Iterator[Any]:
    """The hint itself, or what it is a tuple or an option of."""
    yield hint
    for part in get_args(hint):
        yield from _within(part)
