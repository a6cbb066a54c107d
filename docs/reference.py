"""Write docs/reference/ from the code: recipes.md from dataclasses, api.md from signatures and docstrings.

`python docs/reference.py` prints both, `python docs/reference.py --write` puts each between the markers of its page.
A test compares pages and code.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from importlib import import_module
from pathlib import Path

from flowmap.base.schema import kind_of
from flowmap.cli.slots import keys_of_slots
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES

KEYS = keys_of_slots()
FOLDER = Path(__file__).parent / "reference"
MARKERS = ("<!-- reference -->", "<!-- /reference -->")


def reference() -> str:
    """Markdown: the top level, the plain sections, then every slot with its kinds."""
    parts = ["## The top level", settings(Recipe)]
    for cls, place in sections().items():
        parts += [f"## {place}", says(cls), settings(cls)]
    for slot, table in TABLES.items():
        parts += [f"## {' and '.join(places(slot))}: {len(table)} kind{'s' * (len(table) > 1)}"]
        whole = next(
            (other for other, kinds in TABLES.items() if len(kinds) > len(table) and table.items() <= kinds.items()),
            None,
        )
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
    """The class's docstring as paragraphs of Markdown."""
    return "\n\n".join(wrapped(part) for part in inspect.cleandoc(cls.__doc__).split("\n\n"))


def wrapped(paragraph: str) -> str:
    """The paragraph as Markdown, in lines of at most 120 characters, none of which starts like a list or a heading."""
    text = textwrap.fill(
        " ".join(paragraph.split()).replace("<", "&lt;"), 120, break_long_words=False, break_on_hyphens=False
    )
    return re.sub(r"\n(?=[-+*#>|=]|\d+[.)] )", " ", text)


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
        own = [
            f
            for f in dataclasses.fields(value)
            if f.default is not dataclasses.MISSING and getattr(value, f.name) != f.default
        ]
        changed = "".join(f", {f.name}: {written(getattr(value, f.name))}" for f in own)
        return "{}" if kind is None else f"{{kind: {kind}{changed}}}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, str):
        return f'"{value}"' if value.isdigit() else value  # a text that YAML would read as a number
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def in_cell(text: str) -> str:
    return text.replace("|", "\\|")


API = {  # title -> import path -> public names; of a class, the methods after the dot
    "Use a student": {
        "flowmap": ["load_student", "read_recipe", "fit", "sample", "evaluate", "allow_import"],
        "flowmap.student.student": ["Student", "Student.__call__", "Student.mean_velocity", "Student.sample",
            "Student.save_pretrained", "Student.from_pretrained", "Student.push_to_hub"],
        "flowmap.student.edit": ["inpaint", "interpolate"],
        "flowmap.student.snapshots": ["combine"],
        "flowmap.export": ["export"],
        "flowmap.compare": ["compare"],
    },
    "Write a part": {
        "flowmap.flow.types": [
            "Teacher", "FlowMap", "Objective", "Path", "Prior", "TimeSampler", "Sampler", "PathSample", "Loss",
            "broadcast_time",
        ],
        "flowmap.flow.derivative": ["eulerian_derivative", "lagrangian_derivative", "value_and_rate"],
        "flowmap.flow.solver": ["rk4_step"],
        "flowmap.nets.flow_map": ["FlowMapNet", "start_from"],
        "flowmap.data.dataset": ["Dataset", "Source"],
    },
}  # fmt: skip


def api() -> str:
    """Markdown: the signature and the docstring of every public name."""
    parts = []
    for title, modules in API.items():
        parts.append(f"## {title}")
        for module, names in modules.items():
            parts += [described(module, name) for name in names]
    return "\n\n".join(parts)


def described(module: str, name: str) -> str:
    """The name with its module, its signature and its docstring."""
    thing: typing.Any = import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part)
    shown = name.replace(".__call__", "(...)").replace("__call__", "")
    title = f"### {shown}\n\n`from {module} import {name.split('.')[0]}`"
    lines = [title, f"```python\n{signature(name, thing)}\n```", docstring(thing)]
    return "\n\n".join(line for line in lines if line)


def signature(name: str, thing: typing.Any) -> str:
    """The call as Python writes it; of a protocol its methods."""
    if inspect.isclass(thing) and typing.Protocol in thing.__bases__:
        methods = [call(f"def {key}", value) for key, value in vars(thing).items() if inspect.isfunction(value)]
        own = [one for one in methods if not one.startswith(("def __init__", "def __subclasshook__"))]
        return "\n".join([f"class {name}(Protocol):", *(textwrap.indent(one, "    ") for one in own)])
    last = name.rpartition(".")[2]
    return call("student" if last == "__call__" else last, thing)


def call(name: str, function: typing.Any) -> str:
    """name(arguments) -> result, one argument a line where that is longer than 100 characters."""
    made = inspect.signature(function)
    arguments, starred = [], False
    for argument in made.parameters.values():
        if argument.name == "self" and not name.startswith("def "):
            continue
        if argument.kind is argument.KEYWORD_ONLY and not starred:
            arguments, starred = [*arguments, "*"], True
        arguments.append(one_argument(argument))
    given = made.return_annotation is not made.empty and not inspect.isclass(function)
    result = f" -> {plain(made.return_annotation)}" if given else ""
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {one},\n" for one in arguments) + f"){result}"


def one_argument(argument: inspect.Parameter) -> str:
    stars = {argument.VAR_POSITIONAL: "*", argument.VAR_KEYWORD: "**"}.get(argument.kind, "")
    hint = "" if argument.annotation is argument.empty else f": {plain(argument.annotation)}"
    if argument.default is argument.empty:
        return f"{stars}{argument.name}{hint}"
    default = argument.default.__name__ if callable(argument.default) else repr(argument.default)
    return f"{stars}{argument.name}{hint}{' = ' if hint else '='}{default}"


def plain(annotation: typing.Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def docstring(thing: typing.Any) -> str:
    """The docstring: its paragraphs as Markdown, those with indented lines as they are written."""
    text = inspect.getdoc(thing) or ""
    parts = [f"```text\n{part}\n```" if re.search(r"^ ", part, re.M) else wrapped(part) for part in text.split("\n\n")]
    return "\n\n".join(parts)


def main() -> None:
    made = {"recipes.md": reference, "api.md": api}
    for name, text in made.items():
        if sys.argv[1:] != ["--write"]:
            print(text())
            continue
        page = FOLDER / name
        old = page.read_text(encoding="utf-8")
        head, tail = old.split(MARKERS[0])[0], old.split(MARKERS[1])[1]
        page.write_text(f"{head}{MARKERS[0]}\n{text()}\n{MARKERS[1]}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
