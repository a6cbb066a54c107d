"""The keys of a recipe under which each slot can be set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES


def keys_of_slots() -> dict[type, dict[str, list[str]]]:
    """For each slot its keys in a recipe, "data", "data.images", ..., and the kinds that have each key.

    "" is the kind of a recipe's own slot: one key may have slots of two types. What a slot has within itself is not
    followed further.
    """
    found: dict[type, dict[str, list[str]]] = {}
    _walk(Recipe, "", "", (), found)
    return found


def _walk(cls: type, kind: str, key: str, within: tuple[type, ...], found: dict[type, dict[str, list[str]]]) -> None:
    """Add the slots among the fields of a class, which is that kind of the slot `key`, and all within them."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{key}.{field.name}" if key else field.name
        for hint in _within(hints[field.name]):
            if hint in TABLES:
                found.setdefault(hint, {}).setdefault(name, []).append(kind)
                for below, of in TABLES[hint].items() if hint not in within else ():
                    _walk(of, below, name, (*within, hint), found)
            elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
                _walk(hint, kind, name, within, found)


def _within(hint: Any) -> Iterator[Any]:
    """Yield the hint itself, and the types within a tuple or an option."""
    yield hint
    for part in get_args(hint):
        yield from _within(part)
