"""How hard is the code to read and to change?  Counts, of any checkout, so that two commits can be compared.

`python benchmarks/house.py [--at NAME=CHECKOUT ...] [--no-types] [--write]`, by default of this script's checkout.
Another commit: `git worktree add --detach /tmp/before COMMIT`, then `--at before=/tmp/before --at now=.`.
`--write` writes benchmarks/results/house.json.  Most rows are counted on the syntax trees; two run the code: the reads
of `plan`, and the way from the command line to the first loss (`flowmap fit --recipe toy/mixture`, traced in a process
of its own).
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib.report import table, write
from recipe_lines import counts, texts

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"objectives", "samplers", "nets", "teachers", "data", "metrics"}
ORDER = (
    {"base"}, {"flow"}, PARTS, {"recipe"}, {"student"}, {"plan"}, {"build"}, {"estimate"},
    {"evaluation", "export", "convert", "prepare"}, {"train"}, {"compare"}, {"cli", "__main__", "__init__"},
)  # fmt: skip
FLOOR = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
BEFORE_ROOMS = {  # the room of today to which a loose module or a folder of earlier commits corresponds
    "config": "base", "files": "base", "pictures": "base", "processes": "base", "torchvision_shim": "base",
    "trust": "base",
    "kinds": "recipe", "settings": "recipe", "optimizer": "recipe", "papers": "recipe", "composing": "recipe",
    "planning": "plan", "frozen_parts": "plan", "planning.dry_run": "estimate", "planning.costs": "estimate",
    "planning.calls": "estimate", "planning.outlines": "estimate", "teacher_check": "estimate",
    "build_discriminator": "build", "build_fake": "build", "build_prior": "build", "build_text": "build",
    "evaluate": "evaluation", "sample": "evaluation", "unseen": "evaluation", "known_rows": "evaluation",
    "shards": "prepare", "importing": "convert", "terminal": "cli", "list_verb": "cli", "sample_verb": "cli",
}  # fmt: skip
PLANS = ("flowmap.plan.resolve:resolve", "flowmap.plan.plan:plan", "flowmap.planning.plan:plan")
FIRST_LOSS = """
import json, os, sys
root = os.path.join(sys.argv.pop(1), "flowmap") + os.sep
out = sys.argv.pop(1)
lines, deepest = set(), 0
def within(code):
    return code.co_filename.startswith(root) and code.co_name != "<module>"
def local(frame, event, arg):
    if event == "line":
        lines.add((frame.f_code.co_filename, frame.f_lineno))
    objectives = root + "objectives"
    if event == "return" and frame.f_code.co_name == "__call__" and frame.f_code.co_filename.startswith(objectives):
        stack, up = [], frame
        while up is not None:
            stack, up = stack + [up.f_code.co_filename] * within(up.f_code), up.f_back
        rooms = {name[len(root):].split(os.sep)[0] for name in stack}
        # the dry run, which calls an objective before training, is not counted
        if not rooms & {"planning", "estimate"}:
            with open(out, "w") as file:
                json.dump({"files": len({name for name, _ in lines}), "lines": len(lines), "depth": len(stack)}, file)
            os._exit(0)
    return local
def begin(frame, event, arg):
    return local if within(frame.f_code) else None
from flowmap.cli import main
sys.settrace(begin)
main()
"""
READS = """
import importlib, json, sys
from pathlib import Path
out, recipe, plans = sys.argv[1], sys.argv[2], sys.argv[3:]
found = None
for name in plans:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
        break
    except (ImportError, AttributeError):
        pass
from flowmap.recipe import read_recipe
read, calls = read_recipe(recipe), []
def watch(frame, event, arg):
    if event == "call" and frame.f_code.co_name == "read_recipe":
        calls.append(str(frame.f_locals.get("name")))
sys.setprofile(watch)
try:
    found(read, Path("runs/house"))
except TypeError:
    found(read)
sys.setprofile(None)
json.dump({"plan": name, "reads": len(calls)}, open(out, "w"))
"""


def parsed(checkout: Path) -> dict[str, ast.Module]:
    """The syntax tree of every module of flowmap, by its dotted name."""
    trees = {}
    for path in sorted((checkout / "flowmap").rglob("*.py")):
        name = ".".join(path.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """The modules of flowmap that each imports, also inside functions."""
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        found[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                wholes = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {whole if whole in trees else node.module for whole in wholes}
        found[name] = (found[name] & trees.keys()) - {name}
    return found


def room(name: str) -> str:
    """The room of today that a module is in, or corresponds to."""
    parts = name.split(".")[1:] or ["__init__"]
    return BEFORE_ROOMS.get(".".join(parts[:2])) or BEFORE_ROOMS.get(parts[0]) or parts[0]


def upward(graph: dict[str, set[str]]) -> int:
    """Imports of a higher floor, and of one part by another (data/text/autoencoder.py may import nets/)."""
    bad = 0
    for name, targets in graph.items():
        for target in targets:
            mine, theirs = room(name), room(target)
            if target == "flowmap" or mine == theirs:
                continue
            sideways = {mine, theirs} <= PARTS and (mine, theirs) != ("data", "nets")
            bad += FLOOR[theirs] > FLOOR[mine] or sideways
    return bad


def in_circles(graph: dict[str, set[str]]) -> int:
    """How many modules import themselves by way of others."""
    return sum(name in reached(graph, graph[name]) for name in graph)


def reached(graph: dict[str, set[str]], start: set[str]) -> set[str]:
    found, left = set(), set(start)
    while left:
        found |= left
        left = {target for name in left for target in graph[name]} - found
    return found


def functions(trees: dict[str, ast.Module], *, statements: bool = False) -> Iterator[tuple[int, str]]:
    """(lines, name) of every function, or (statements, name), which does not depend on how lines are broken."""
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = node.end_lineno - node.lineno + 1
                if statements:
                    size = sum(isinstance(part, ast.stmt) for part in ast.walk(node))
                yield size, f"{name}.{node.name}"


def called(trees: dict[str, ast.Module], name: str, least: int = 0) -> int:
    """Calls of that builtin with at least so many arguments."""
    nodes = (node for tree in trees.values() for node in ast.walk(tree))
    return sum(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == name
        and len(node.args) >= least
        for node in nodes
    )


def objectives(trees: dict[str, ast.Module]) -> dict[str, str]:
    """The kinds of objectives, and their classes, as objectives/__init__.py lists them."""
    nodes = (node for node in ast.walk(trees["flowmap.objectives"]) if isinstance(node, ast.Dict))
    return {
        key.value: value.id
        for node in nodes
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Name)
    }


def elsewhere(trees: dict[str, ast.Module]) -> tuple[int, int]:
    """(modules outside objectives/ that name a kind of objective or its class, how often in all)."""
    wanted = {word for pair in objectives(trees).items() for word in pair}
    per_module = {}
    for name, tree in trees.items():
        if room(name) != "objectives":
            per_module[name] = sum(map(wanted.__contains__, words(tree)))
    return sum(map(bool, per_module.values())), sum(per_module.values())


def words(tree: ast.Module) -> Iterator[str]:
    """Names that are read, and whole strings that are no docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def run(checkout: Path, code: str, *arguments: str) -> dict:
    """The JSON that the code writes to its first argument that is a path; {} if the code fails.

    The code runs with the checkout's flowmap.
    """
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out.json"
        given = [str(out) if word == "OUT" else word for word in arguments]
        here = {
            "PYTHONPATH": str(checkout),
            "FLOWMAP_RUNS": f"{name}/runs",
            "WANDB_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
        }
        subprocess.run([sys.executable, "-c", code, *given], cwd=name, env=os.environ | here, capture_output=True)
        return json.loads(out.read_text()) if out.is_file() else {}


def type_errors(checkout: Path) -> int | str:
    """Errors of mypy with the settings of the checkout that this script is in; "?" where mypy is not there."""
    words = ["-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", os.devnull, "flowmap"]
    done = subprocess.run([sys.executable, *words], cwd=checkout, capture_output=True, text=True)
    found = re.search(r"Found (\d+) error", done.stdout)
    return int(found[1]) if found else 0 if "Success" in done.stdout else "?"


def measured(checkout: Path, *, types: bool) -> dict[str, object]:
    """Every row of the table for one checkout."""
    trees = parsed(checkout)
    graph = imports(trees)
    sizes = {name: len(ast.unparse(tree).splitlines()) for name, tree in trees.items()}
    lines = {
        str(path.relative_to(checkout)): path.read_text(encoding="utf-8").count("\n")
        for path in (checkout / "flowmap").rglob("*.py")
    }
    below = reached(graph, {"flowmap.objectives.ayf"}) - {"flowmap"}
    longest, where = max(functions(trees))
    most, of = max(functions(trees, statements=True))
    largest = max(lines, key=lines.__getitem__)
    loose = [path for path in (checkout / "flowmap").glob("*.py") if not path.stem.startswith("__")]
    files, settings, distinct, shared, _ = counts(texts(str(checkout / "recipes")))
    first = run(
        checkout, FIRST_LOSS, str(checkout), "OUT", "fit", "--recipe", "toy/mixture", "trainer.steps=2", "--out", "run"
    )
    reads = run(checkout, READS, "OUT", "instaflow/emoji", *PLANS)
    outside, mentions = elsewhere(trees)
    return {
        "files of flowmap/": len(trees),
        "loose modules in flowmap/": len(loose),
        "from the command line to the first loss: files": first.get("files", "?"),
        "from the command line to the first loss: distinct lines that run": first.get("lines", "?"),
        "from the command line to the first loss: depth of calls": first.get("depth", "?"),
        "recipes read by plan, instaflow/emoji": reads.get("reads", "?"),
        "modules in circles": in_circles(graph),
        "imports against the floors": upward(graph),
        "hasattr": called(trees, "hasattr"),
        "getattr with a default": called(trees, "getattr", 3),
        "isinstance": called(trees, "isinstance"),
        "errors of mypy": type_errors(checkout) if types else "?",
        "longest file, lines": f"{lines[largest]} ({largest})",
        "longest function, lines": f"{longest} ({where.removeprefix('flowmap.')})",
        "functions over 40 lines": sum(size > 40 for size, _ in functions(trees)),
        "most statements in a function": f"{most} ({of.removeprefix('flowmap.')})",
        "recipe files": files,
        "lines of settings": settings,
        "distinct lines of settings": distinct,
        "lines of settings in two files or more": shared,
        "to change a loss (ayf): modules below it": len(below),
        "to change a loss (ayf): statements' lines in them": sum(sizes[name] for name in below),
        "modules outside objectives/ that name an objective": outside,
        "names of objectives there": mentions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", action="append", metavar="NAME=CHECKOUT", help="a checkout and the name of its column")
    parser.add_argument("--no-types", action="store_true", help="leave mypy out")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/house.json")
    given = parser.parse_args()
    pairs = [word.partition("=")[::2] for word in given.at or [f"now={ROOT}"]]
    found = {name: measured(Path(place).resolve(), types=not given.no_types) for name, place in pairs}
    rows = [[row, *(column[row] for column in found.values())] for row in next(iter(found.values()))]
    columns = ["", *found]
    print(table(rows, columns))
    if given.write:
        commits = {name: commit(Path(place)) for name, place in pairs}
        write("house", {"question": __doc__.splitlines()[0], "settings": commits, "columns": columns, "rows": rows})


def commit(checkout: Path) -> str:
    words = ["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
