"""The floors of the house: imports only go down, folders of floor 1 do not know one another, lightning stays in train/, files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "flowmap"
FILES = sorted(ROOT.rglob("*.py"))
FLOOR_ONE = {"objectives", "samplers", "nets", "teachers", "data", "metrics"}
ONLY_IN = {
    "lightning": lambda part: part[0] == "train",
    "pytorch_lightning": lambda part: part[0] == "train",
    "omegaconf": lambda part: part in (("recipe",), ("teachers", "card"), ("base", "outside")),
    "diffusers": lambda part: part[0] in ("teachers", "nets", "export"),
}


def floor(top):
    if top in ("base", "flow"):
        return ("base", "flow").index(top) - 1
    return 1 if top in FLOOR_ONE else 3 if top == "train" else 4 if top in ("cli", "__main__", "__init__") else 2


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            yield from ([node.module] if node.module != "flowmap" else [f"flowmap.{alias.name}" for alias in node.names])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    part = path.relative_to(ROOT).with_suffix("").parts
    for name in imports(path):
        head, *rest = name.split(".")
        if head in ONLY_IN:
            assert ONLY_IN[head](part), f"{head} may not be imported here"
        if head == "flowmap" and rest and rest[0] != part[0]:
            mine, theirs = floor(part[0]), floor(rest[0])
            assert theirs <= mine and not (theirs == mine == 1), f"{'.'.join(part)} (floor {mine}) imports {name} (floor {theirs})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    lines = path.read_text().count("\n")
    assert lines <= 380, f"{lines} lines; about 350 is the limit, split it"


def test_floor_zero_is_torch_only():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "flow":
            heads = {name.split(".")[0] for name in imports(path)}
            assert heads <= {"torch", "flowmap", "__future__"} | set(__import__("sys").stdlib_module_names), path
