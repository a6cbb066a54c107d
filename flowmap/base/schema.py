"""Builds frozen dataclasses from plain mappings and back. Errors give the full key and a suggestion.

A field whose type is one of `tables` (a protocol such as TimeSampler) is a slot: its mapping has a `kind`, which
selects a class from that slot's table. If the type is itself in the table, it is the kind of mappings without one.
OmegaConf (recipe/) reads, merges and overrides; it cannot select classes.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

MISSING = "???"
OWN_KINDS = "; --import FILE adds kinds of your own"
MAX_NAME = 100  # characters; a name followed by a hash is also used as a folder name


class RecipeError(ValueError):
    """A mistake in a recipe. The message is one line that names file, key, value and the allowed values."""


def construct(cls: type, node: Any, tables: Mapping[type, Mapping[str, type]], *, file: str, key: str = "") -> Any:
    """Build the dataclass `cls` from the mapping `node`. RecipeError for an invalid key, type or value."""
    if not isinstance(node, Mapping):
        raise RecipeError(f"{file}: {key or 'recipe'}: {node!r} is not a mapping with {_listed(_names(cls))}")
    hints = _hints(cls)
    node = _renamed(cls, node, file, key)
    for name in node:
        if name not in (allowed := _names(cls)):
            what = f"no such setting{suggest(str(name), allowed)}; allowed: {_listed(allowed)}"
            raise RecipeError(f"{file}: {_join(key, name)}: {what}")
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in node:
            values[field.name] = _convert(node[field.name], hints[field.name], tables, file, _join(key, field.name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{file}: {_join(key, field.name)}: is required and is not given")
    try:
        return cls(**values)
    except RecipeError:
        raise
    except ValueError as error:  # from __post_init__, whose messages start with the field's name
        raise RecipeError(f"{file}: {_join(key, str(error))}") from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def renamed(old: str) -> Mapping[str, str]:
    """Field metadata that accepts an old name of the field in existing files."""
    return {_OLD_NAME: old}


def added(default: Any, *, hashed: bool = True) -> Any:
    """A dataclass field that a later version added; at its default it is in no hash and in no identity.

    So existing run folders, encoded data and pairs remain those of their recipes. hashed=False: also with other values,
    for a setting that changes no result.
    """
    return dataclasses.field(default=default, metadata={_ADDED: True, _HASHED: hashed})


_OLD_NAME = "old name"
_ADDED = "added"
_HASHED = "hashed"


def _renamed(cls: type, node: Mapping[str, Any], file: str, key: str) -> Mapping[str, Any]:
    """The mapping with old field names replaced by current ones."""
    new = {field.metadata[_OLD_NAME]: field.name for field in dataclasses.fields(cls) if _OLD_NAME in field.metadata}
    twice = next((old for old in new if old in node and new[old] in node), None)
    if twice is not None:
        raise RecipeError(f"{file}: {_join(key, new[twice])}: is given twice, also by its old name {twice!r}")
    return {new.get(name, name): value for name, value in node.items()}


def to_plain(value: Any, tables: Mapping[type, Mapping[str, type]], *, hashed: bool = False) -> Any:
    """The mapping from which `construct` rebuilds `value`, with every default written out.

    hashed: leave out `added` fields at their defaults, and those that change no result, as hashes and identities want.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {
            f.name: to_plain(getattr(value, f.name), tables, hashed=hashed)
            for f in dataclasses.fields(value)
            if not (hashed and _left_out(f, getattr(value, f.name)))
        }
        kind = kind_of(value, tables)
        return plain if kind is None else {"kind": kind, **plain}
    if isinstance(value, tuple):
        return [to_plain(v, tables, hashed=hashed) for v in value]
    return value


def _left_out(field: dataclasses.Field, value: Any) -> bool:
    """Whether hashes leave out the field with that value."""
    return bool(field.metadata.get(_ADDED)) and (value == field.default or not field.metadata[_HASHED])


def kind_of(value: Any, tables: Mapping[type, Mapping[str, type]]) -> str | None:
    """The kind of the value's class in its slot's table; None if it is in no table, or is the slot's type itself."""
    for slot, table in tables.items():
        for kind, cls in table.items():
            if type(value) is cls:
                return None if cls is slot else kind
    return None


def short_hash(value: Any) -> str:
    """Eight hexadecimal digits of a hash of the value's repr."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def check_name(name: str, key: str) -> None:
    """Raise a ValueError that names `key` unless `name` is a valid folder name; run folders are named after recipes."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError(
            f"{key}: {name!r} must be a plain name: not empty, '.' or '..', without slashes and control characters"
        )
    if len(name) > MAX_NAME or len(name.encode()) > 2 * MAX_NAME:
        raise ValueError(f"{key}: {name[:20]!r}... has {len(name)} characters; at most {MAX_NAME} are allowed")


def suggest(name: str, allowed) -> str:
    """The text ", did you mean 'digits'?" if an allowed name is close to this one; otherwise an empty text."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _convert(value: Any, hint: Any, tables, file: str, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        hints = [a for a in args if a is not type(None)]
        fits = next((a for a in hints if (a is bool) == isinstance(value, bool)), hints[0])  # of bool | str, say
        return _convert(value, fits, tables, file, key)
    if hint in tables:
        return _slot(value, tables[hint], tables, file, key, hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return construct(hint, value, tables, file=file, key=key)
    if origin is tuple:
        return _tuple(value, args, tables, file, key)
    return _scalar(value, hint, file, key)


def _slot(value: Any, table: Mapping[str, type], tables, file: str, key: str, hint: type) -> Any:
    if not isinstance(value, Mapping):
        form = f"{{kind: {next(iter(table))}, ...}}"
        raise RecipeError(f"{file}: {key}: {value!r} is not a mapping; write {form}, kinds: {_listed(table)}")
    own = next((kind for kind, cls in table.items() if cls is hint or len(table) == 1), None)
    kind = value.get("kind", own)
    if not isinstance(kind, str) or kind not in table:
        if kind is None:
            raise RecipeError(f"{file}: {key}.kind: is required; allowed: {_listed(table)}")
        close = suggest(str(kind), table)
        raise RecipeError(
            f"{file}: {key}.kind: no {kind!r}{close}; allowed: {_listed(table)}{'' if close else OWN_KINDS}"
        )
    return construct(table[kind], {k: v for k, v in value.items() if k != "kind"}, tables, file=file, key=key)


def _tuple(value: Any, args, tables, file: str, key: str) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"{file}: {key}: {value!r} is not a list")
    if args[-1:] == (Ellipsis,):
        return tuple(_convert(v, args[0], tables, file, f"{key}[{i}]") for i, v in enumerate(value))
    if len(value) != len(args):
        raise RecipeError(f"{file}: {key}: {value!r} has {len(value)} entries, wants {len(args)}")
    return tuple(_convert(v, a, tables, file, f"{key}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))


def _scalar(value: Any, hint: type, file: str, key: str) -> Any:
    if value == MISSING and hint is str:
        return value
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # YAML reads `precision: 32` as a number
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 1e-4 as a string
        except (ValueError, OverflowError):
            pass
    if (
        isinstance(value, hint)
        and not (hint is int and isinstance(value, bool))
        and not (isinstance(value, float) and not math.isfinite(value))
    ):
        return value
    raise RecipeError(f"{file}: {key}: {value!r} is not {_TYPES.get(hint, hint.__name__)}")


_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _listed(names) -> str:
    return ", ".join(names)
