"""Compose the settings of a recipe's file with those of the files that its `base:` names. Find the shipped files.

Recipes are shipped under the names that `fit` takes. Parts, in recipes/data/ and recipes/method/, are what recipes are
composed of. Short ones are rows of the table.yaml of their folder: row `a` of recipes/rfpp/table.yaml has the name and
path of recipes/rfpp/a.yaml.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import os.path
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from flowmap.base.outside import read_settings, read_yaml
from flowmap.base.schema import RecipeError

PARTS = ("data", "method")  # folders of the shipped recipes
TABLE = "table.yaml"
MOST_DEEP = 100  # files in a chain of bases, which may come from anyone


def shipped(folder: str) -> Path:
    """The folder of the shipped `recipes` or `teachers`: in the package when installed, next to it in a checkout."""
    inside = Path(__file__).parents[1] / "shipped" / folder
    return inside if inside.is_dir() else Path(__file__).parents[2] / folder


def list_recipes() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(name for name in _names() if name.split("/")[0] not in PARTS)


def list_parts() -> list[str]:
    """The names of the shipped parts, for `base:` and `+NAME`."""
    return sorted(name for name in _names() if name.split("/")[0] in PARTS)


def is_part(path: Path) -> bool:
    """Whether the file is one of the shipped parts."""
    return any(shipped("recipes").joinpath(folder).resolve() in path.resolve().parents for folder in PARTS)


def find_recipe(name: str | Path) -> Path:
    """A path that exists, or that of a shipped recipe or part, named with or without .yaml; a row has the path of its
    file.
    """
    if _is_there(Path(name)):
        return Path(name)
    stem = str(name).removesuffix(".yaml")
    path = shipped("recipes") / f"{stem}.yaml"
    if _is_there(path):
        return path
    close = difflib.get_close_matches(stem, list(_names()), n=1)
    hint = f", did you mean {close[0]!r}?" if close else "."
    raise RecipeError(f"recipe: no file and no shipped recipe {str(name)[:100]!r}{hint} `flowmap list` shows them all")


def composed(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """The settings of the file merged over those of its bases, each composed in the same way: a later base wins, the
    file last.

    The name of a base is not inherited. Raises RecipeError for a base that is missing or named twice, a circle, and a
    chain of more than MOST_DEEP files.
    """
    return _composed(path, list(known), {}, {})


def load(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """The settings in that file or row as written. Keys are `base` and those known. RecipeError names the file."""
    if (row := _row(path)) is not None:
        return copy.deepcopy(row)
    try:
        return read_settings(path, ["base", *known], "recipe")
    except ValueError as error:
        raise RecipeError(str(error)) from error


def header(path: Path) -> list[str]:
    """The comment lines at the top of a file, or right above a row."""
    row = _row(path) is not None
    lines = (path.with_name(TABLE) if row else path).read_text(encoding="utf-8").splitlines()
    if row:
        above = lines[: next(i for i, line in enumerate(lines) if line.startswith(f"{path.stem}:"))]
        lines = list(reversed(list(itertools.takewhile(_is_comment, reversed(above)))))
    return [line.removeprefix("#").strip() for line in itertools.takewhile(_is_comment, lines)]


def merge(base: Any, over: Any) -> Any:
    """`over` merged over `base`, mapping by mapping; a slot with another kind is replaced."""
    if not (isinstance(base, dict) and isinstance(over, dict)) or ("kind" in over and over["kind"] != base.get("kind")):
        return over
    return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}


def _composed(
    path: Path, known: list[str], above: dict[Path, Path], done: dict[Path, dict[str, Any]]
) -> dict[str, Any]:
    """`composed` with its state.

    above: the files that led here, by their real paths. done: the files composed already.
    """
    real, chain = path.resolve(), [*above.values(), path]
    if real in above:
        raise RecipeError(f"{chain[0].name}: base: {' > '.join(map(str, chain))} is a circle")
    if len(chain) > MOST_DEEP:
        raise RecipeError(f"{chain[0].name}: base: has more than {MOST_DEEP} files in a chain")
    if real not in done:
        plain = load(path, known)
        made: dict[str, Any] = {}
        for base in _bases(path, plain.pop("base", ())):
            below = _composed(base, known, {**above, real: path}, done)
            made = merge(made, {key: value for key, value in below.items() if key != "name"})
        done[real] = merge(made, plain)
    return done[real]


def _names() -> Iterator[str]:
    root = shipped("recipes")
    for path in root.rglob("*.yaml"):
        for file in [path] if path.name != TABLE else [path.with_name(f"{row}.yaml") for row in _table(path)]:
            yield str(file.relative_to(root).with_suffix(""))


@cache
def _table(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a shipped table, cached, as it does not change while we run."""
    rows = read_yaml(path)
    assert isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values()), (
        f"{path}: is not a table of recipes"
    )
    return rows


def _row(path: Path) -> dict[str, Any] | None:
    """The settings of the shipped row of that path; None without such a row, or where a file has that path."""
    path = Path(os.path.abspath(path))
    if shipped("recipes") not in path.parents or path.suffix != ".yaml" or os.path.isfile(path):
        return None
    table = path.with_name(TABLE)
    return _table(table).get(path.stem) if os.path.isfile(table) else None


def _is_there(path: Path) -> bool:
    """Whether that is a file or a row; False for a name that no file can have, where Path.is_file raises."""
    return os.path.isfile(path) or _row(path) is not None


def _is_comment(line: str) -> bool:
    return line.startswith("#")


def _bases(path: Path, base: Any) -> list[Path]:
    """The files that a recipe's `base` names: next to it, or found by find_recipe."""
    names = [base] if isinstance(base, str) else list(base) if isinstance(base, (list, tuple)) else [base]
    if not all(isinstance(name, str) for name in names) or base == []:
        raise RecipeError(f"{path.name}: base: {base!r} is not the name or the path of a recipe, and no list of them")
    found: list[Path] = []
    for name in names:
        sibling = path.parent / f"{name.removesuffix('.yaml')}.yaml"
        try:
            file = sibling if _is_there(sibling) else find_recipe(name)
        except RecipeError as error:
            raise RecipeError(f"{path.name}: base: {str(error).removeprefix('recipe: ')}") from None
        if any(file.resolve() == other.resolve() for other in found):
            raise RecipeError(f"{path.name}: base: {name!r} is there twice")
        found.append(file)
    return found
