"""`flowmap list`: the shipped recipes and teachers, and the kinds of every slot of a recipe."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flowmap.cli.arguments import import_argument


@dataclass(frozen=True)
class Found:
    """What can be listed: recipes with their first line, parts of recipes, teachers, kinds under their slot's keys."""

    recipes: Mapping[str, str]
    parts: Sequence[str]
    teachers: Sequence[str]
    kinds: Mapping[str, Iterable[str]]
    plugins: Sequence[str] = ()  # kinds of installed packages, a line each

    def words(self) -> set[str]:
        """All names, from which a mistyped word is corrected."""
        keys = {key for title in self.kinds for key in _keys(title).split(", ")}
        return {
            *self.recipes,
            *self.parts,
            *self.teachers,
            *keys,
            *(kind for kinds in self.kinds.values() for kind in kinds),
        }

    def matching(self, word: str) -> Found:
        """What contains that word, in any case; a recipe also in its first line.

        If a slot's key contains it, all kinds of the slot are listed.
        """
        contains = lambda text: word.lower() in text.lower()
        recipes = {name: first for name, first in self.recipes.items() if contains(name) or contains(first)}
        of_slot = lambda title, those: [kind for kind in those if contains(_keys(title)) or contains(kind)]
        kinds = {title: found for title, those in self.kinds.items() if (found := of_slot(title, those))}
        parts, teachers = ([*filter(contains, names)] for names in (self.parts, self.teachers))
        return Found(recipes, parts, teachers, kinds, [line for line in self.plugins if contains(line)])

    def lines(self) -> Iterator[str]:
        if self.recipes:
            width = max(map(len, self.recipes))
            yield "recipes"
            yield from (f"  {name:{width}s} {first}" for name, first in self.recipes.items())
        if self.parts:
            yield "parts of recipes, for base: [data/digits, method/meanflow] or, over a recipe, +method/meanflow"
            yield "  " + ", ".join(self.parts)
        if self.teachers:
            yield "teachers"
            yield "  " + ", ".join(self.teachers)
        for title, kinds in self.kinds.items():
            yield f"{title} kinds"
            yield "  " + ", ".join(kinds)
        if self.plugins:
            yield "kinds of installed packages"
            yield from (f"  {line}" for line in self.plugins)


def _keys(title: str) -> str:
    """The keys in a title, without the kinds in brackets that have them."""
    return re.sub(r" \([^)]*\)", "", title)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "word",
        nargs="?",
        metavar="WORD",
        help="only what has this word in its name, recipes also in their first line",
    )
    import_argument(parser)


def run(a: argparse.Namespace) -> int:
    from flowmap.base.schema import suggest

    found = everything()
    matching = found if a.word is None else found.matching(a.word)
    lines = [*matching.lines()]
    if not lines:
        raise ValueError(f"list: nothing matches {a.word!r}{suggest(a.word, sorted(found.words()))}")
    print("\n".join(lines))
    return 0


def everything() -> Found:
    from flowmap.cli.slots import keys_of_slots
    from flowmap.plan.cards import list_cards
    from flowmap.recipe.composing import find_recipe, header, list_parts, list_recipes
    from flowmap.recipe.kinds import TABLES
    from flowmap.recipe.plugins import plugins

    foreign = [one.line() for one in plugins()]
    slots = keys_of_slots()
    twice = [key for keys in slots.values() for key in keys]
    named = lambda key, of: f"{key} ({', '.join(of)})" if twice.count(key) > 1 else key
    title = lambda keys: ", ".join(named(key, of) for key, of in keys.items())
    kinds = {title(keys): [*TABLES[slot]] for slot, keys in slots.items()}
    recipes = {name: header(find_recipe(name))[0] for name in list_recipes()}
    return Found(recipes, list_parts(), list_cards(), kinds, foreign)
