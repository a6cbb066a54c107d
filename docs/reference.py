"""Prints the reference of recipes from the dataclasses themselves; docs/recipes.md holds the text between its two markers.

`python docs/reference.py` prints it, `python docs/reference.py --write` puts it into docs/recipes.md.  A test compares the two.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from pathlib import Path

from flowmap.base.schema import kind_of
from flowmap.cli.slots import keys_of_slots
from flowmap.recipe.kinds import TABLES
from flowmap.recipe import Recipe

KEYS = keys_of_slots()
PAGE = Path(__file__).parent / "recipes.md"
MARKERS = ("<!-- reference -->", "<!-- /reference -->")


def reference() -> str:
    """Markdown: the top level, the plain sections, then every slot with its kinds."""
    parts = ["## The top level", settings(Recipe)]
    for cls, place in sections().items():
        parts += [f"## {place}", says(cls), settings(cls)]
    for slot, table in TABLES.items():
        parts += [f"## {' and '.join(places(slot))}: {len(table)} kind{'s' * (len(table) > 1)}"]
        whole = next((other for other, kinds in TABLES.items() if len(kinds) > len(table) and table.items() <= kinds.items()), None)
        if whole is not None:
            parts += [f"Those of `{places(whole)[0]}`: {', '.join(table)}."]
            continue
        parts += shared(table)
        for kind, cls in table.items():
            parts += [f"### {places(slot)[0]}, kind {kind}", says(cls), settings(cls), *inner(cls)]
    return "\n\n".join(part for part in parts if part)


def sections() -> dict[type, str]:
    """The dataclasses of Recipe that are no slots, by the key under which they stand."""
    found = {}
    for name, hint in typing.get_type_hints(Recipe).items():
        for cls in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(cls):
                found[cls] = name
    return found


def places(slot: type) -> list[str]:
    """The keys that take a value of this slot: "objective", "teacher.guidance", "times.base" ..."""
    return list(KEYS[slot])


def says(cls: type) -> str:
    """The class's docstring, a line of Markdown for each of its paragraphs."""
    return "\n\n".join(" ".join(part.split()).replace("<", "&lt;") for part in inspect.cleandoc(cls.__doc__).split("\n\n"))


def shared(table: dict[str, type]) -> list[str]:
    """What the dataclasses from which kinds inherit fields say of those, as it stands there, each once."""
    kinds: dict[type, list[str]] = {}
    for kind, cls in table.items():
        for base in cls.__mro__[1:]:
            if "__dataclass_fields__" in vars(base) and base.__doc__:
                kinds.setdefault(base, []).append(kind)
    return [f"Kinds {', '.join(of)}:\n\n```text\n{inspect.cleandoc(base.__doc__)}\n```" for base, of in kinds.items()]


def inner(cls: type) -> list[str]:
    """What the fields of a kind that are dataclasses themselves, and no slots, take."""
    parts: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) and part not in TABLES:
                parts += [f"`{name}`: {says(part)}", settings(part)]
    return parts


def settings(cls: type) -> str:
    """A table of the fields: name, type with the range of its numbers, default."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = [f"| `{f.name}` | {in_cell(written_type(hints[f.name]))} | {default(f)} |" for f in dataclasses.fields(cls)]
    return "\n".join(["| setting | type | default |", "| --- | --- | --- |", *rows]) if rows else "No settings."


def written_type(hint) -> str:
    """The type as Python writes it; a number's with what it must be: "int (1 or more, at most 1000)"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return f"{parts[0].__name__} ({str(parts[1]).removeprefix('must be ').removeprefix('must lie ')})"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(written_type, parts))
    if origin is tuple:
        same = len(set(parts)) == 1 and len(parts) > 1
        return f"{len(parts)} x {written_type(parts[0])}" if same else f"tuple[{', '.join(map(written_type, parts))}]"
    return "..." if hint is Ellipsis else "None" if hint is type(None) else hint.__name__


def default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{written(field.default)}`"
    return f"`{written(field.default_factory())}`" if field.default_factory is not dataclasses.MISSING else "required"


def written(value) -> str:
    """The value as a recipe writes it; a slot by its kind, a section as {}."""
    if dataclasses.is_dataclass(value):
        kind = kind_of(value, TABLES)
        own = [f for f in dataclasses.fields(value) if f.default is not dataclasses.MISSING and getattr(value, f.name) != f.default]
        changed = "".join(f", {f.name}: {written(getattr(value, f.name))}" for f in own)
        return "{}" if kind is None else f"{{kind: {kind}{changed}}}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, str):
        return f'"{value}"' if value.isdigit() else value  # a text that YAML would read as a number
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def in_cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        print(reference())
        return
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text.split(MARKERS[0])[0], text.split(MARKERS[1])[1]
    PAGE.write_text(f"{head}{MARKERS[0]}\n{reference()}\n{MARKERS[1]}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
