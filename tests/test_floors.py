"""The floors of the package: imports only go down, folders of floor 1 do not import one another.

lightning is imported in train/ only, and files stay small.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "flowmap"
FILES = sorted(ROOT.rglob("*.py"))
PARTS = {"objectives", "samplers", "nets", "teachers", "data", "metrics"}
ORDER = (  # from the ground up, as docs/guide/extending.md draws it
    {"base"},
    {"flow"},
    PARTS,
    {"recipe"},
    {"student"},
    {"plan"},
    {"build"},
    {"estimate"},
    {"evaluation", "export", "convert", "prepare"},
    {"train"},
    {"compare"},
    {"cli", "__main__", "__init__"},
)
FLOOR = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
TEXT_AUTOENCODER = ("data", "nets")  # data/text/autoencoder.py holds a network
ONLY_IN = {
    "lightning": lambda part: part[0] == "train",
    "pytorch_lightning": lambda part: part[0] == "train",
    "omegaconf": lambda part: part[0] == "recipe" or part in (("teachers", "card"), ("base", "outside")),
    "gradio": lambda part: part == ("evaluation", "demo_page"),
    "diffusers": lambda part: part[0] in ("teachers", "nets", "export"),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            yield from (
                [node.module] if node.module != "flowmap" else [f"flowmap.{alias.name}" for alias in node.names]
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    part = path.relative_to(ROOT).with_suffix("").parts
    for name in imports(path):
        head, *rest = name.split(".")
        if head in ONLY_IN:
            assert ONLY_IN[head](part), f"{head} may not be imported here"
        if head == "flowmap" and rest and rest[0] != part[0] and rest[0] in FLOOR:
            mine, theirs = FLOOR[part[0]], FLOOR[rest[0]]
            assert theirs <= mine, f"{'.'.join(part)} (floor {mine}) imports {name} (floor {theirs})"
            sideways = {part[0], rest[0]} <= PARTS and (part[0], rest[0]) != TEXT_AUTOENCODER
            assert not sideways, f"{'.'.join(part)} imports {name}: parts do not import one another"


def test_every_room_has_a_floor():
    rooms = {path.relative_to(ROOT).with_suffix("").parts[0] for path in FILES}
    assert rooms == set(FLOOR)


def test_rooms_of_one_floor_import_one_another_in_one_direction():
    between = {
        (path.relative_to(ROOT).parts[0], name.split(".")[1])
        for path in FILES
        for name in imports(path)
        if name.startswith("flowmap.")
    }
    assert [pair for pair in between if pair[0] < pair[1] and pair[::-1] in between] == []


def test_no_module_imports_itself_in_a_circle():
    """Imports inside functions and for type checking count."""
    module_of = {
        ".".join(("flowmap", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in FILES
    }
    below = {name: set(imported_modules(path, module_of)) - {name} for name, path in module_of.items()}
    while below:
        free = {name for name, needed in below.items() if not needed & below.keys()}
        assert free, f"a circle among {sorted(below)}"
        below = {name: needed for name, needed in below.items() if name not in free}


def imported_modules(path, module_of):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in module_of)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in module_of else node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path):
    lines = path.read_text().count("\n")
    assert lines <= 380, f"{lines} lines; about 350 is the limit, split it"


def test_floor_zero_is_torch_only():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "flow":
            heads = {name.split(".")[0] for name in imports(path)}
            heads -= {"triton"} if path.name == "attention_triton.py" else set()  # torch for CUDA brings it
            assert heads <= {"torch", "flowmap", "__future__"} | set(__import__("sys").stdlib_module_names), path
