"""Generates one self-contained Python file from our modules' source: all definitions that a few roots need.

Definitions keep their names and text, in dependency order. Imports from flowmap are removed, and other imports are
collected at the top.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Root = tuple[str, str]  # module, name
BINDS = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


@dataclass
class _Module:
    """A parsed module: its definitions and imports by name."""

    name: str
    lines: list[str]
    nodes: dict[str, ast.stmt] = field(default_factory=dict)
    ours: dict[str, str] = field(default_factory=dict)  # name imported from flowmap -> its module
    foreign: dict[str, str] = field(default_factory=dict)  # name imported from elsewhere -> its import statement


def amalgamate(roots: Sequence[Root], *, header: str, tail: str = "") -> str:
    """The text of the file. ValueError if a module has other top-level statements, or two modules share a name."""
    modules: dict[str, _Module] = {}
    kept, imports = _reached(roots, modules)
    parts = [f'"""{header}"""', "from __future__ import annotations", _import_lines(imports)]
    owner: dict[str, str] = {}
    for module in _ordered(modules):
        for name in kept.get(module.name, ()):
            if owner.setdefault(name, module.name) != module.name:
                raise ValueError(f"{module.name}: its {name!r} and that of {owner[name]} cannot stand in one file")
        parts += _texts(module, kept.get(module.name, set()))
    return "\n\n\n".join(part for part in [*parts, tail] if part) + "\n"


def _reached(roots: Iterable[Root], modules: dict[str, _Module]) -> tuple[dict[str, set[str]], dict[str, str]]:
    """The names by module that the roots need, and the foreign imports (name -> statement) that these need."""
    kept: dict[str, set[str]] = {}
    imports: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        where, name = waiting.pop()
        if where not in modules:
            modules[where] = _read(where)
        module = modules[where]
        if name in module.ours:
            waiting.append((module.ours[name], name))
        elif name in module.foreign:
            if imports.setdefault(name, module.foreign[name]) != module.foreign[name]:
                raise ValueError(f"{where}: {module.foreign[name]!r} and {imports[name]!r} cannot stand in one file")
        elif name in module.nodes and name not in kept.setdefault(where, set()):
            kept[where].add(name)
            waiting += [(where, used) for used in _used(module.nodes[name])]
            inner_imports = _inner_imports(module.nodes[name])
            waiting += [(inner.module, alias.name) for inner in inner_imports if inner.module for alias in inner.names]
    return kept, imports


def _read(name: str) -> _Module:
    source = inspect.getsource(sys.modules.get(name) or importlib.import_module(name))
    module = _Module(name, source.splitlines())
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            _note_import(module, node)
        elif isinstance(node, BINDS):
            module.nodes |= {bound: node for bound in _bound(node)}
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            allowed = "a module that is exported may only define, assign and import at its top level"
            raise ValueError(f"{name}, line {node.lineno}: {allowed}")
    return module


def _note_import(module: _Module, node: ast.Import | ast.ImportFrom) -> None:
    home = node.module if isinstance(node, ast.ImportFrom) else None
    for alias in node.names:
        if (home or alias.name).split(".")[0] == "flowmap":
            if home is None or alias.asname not in (None, alias.name):
                allowed = "a module that is exported imports from flowmap by `from ... import name`"
                raise ValueError(f"{module.name}, line {node.lineno}: {allowed}")
            module.ours[alias.name] = home
        elif home != "__future__":
            renamed = f" as {alias.asname}" if alias.asname else ""
            line = f"import {alias.name}{renamed}" if home is None else f"from {home} import {alias.name}{renamed}"
            module.foreign[alias.asname or alias.name.split(".")[0]] = line


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    assert isinstance(node, ast.Assign | ast.AnnAssign)
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _used(node: ast.stmt) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _inner_imports(node: ast.stmt) -> list[ast.ImportFrom]:
    """The imports from flowmap inside a function."""
    return [n for n in ast.walk(node) if isinstance(n, ast.ImportFrom) and (n.module or "").split(".")[0] == "flowmap"]


def _ordered(modules: dict[str, _Module]) -> list[_Module]:
    """The modules in dependency order."""
    done: dict[str, _Module] = {}

    def visit(module: _Module) -> None:
        if module.name not in done:
            for needed in dict.fromkeys(module.ours.values()):
                if needed in modules:
                    visit(modules[needed])
            done[module.name] = module

    for module in modules.values():
        visit(module)
    return list(done.values())


def _texts(module: _Module, names: set[str]) -> list[str]:
    """The source of the kept definitions, with the comments above them; adjacent assignments form one block."""
    out: list[str] = []
    before = None
    for node in dict.fromkeys(node for name, node in module.nodes.items() if name in names):
        text, plain = _text(module, node), isinstance(node, ast.Assign | ast.AnnAssign)
        if plain and before:
            out[-1] += "\n" + text
        else:
            out.append(text)
        before = plain
    return out


def _text(module: _Module, node: ast.stmt) -> str:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
    first = min([node.lineno, *(one.lineno for one in decorators)]) - 1
    while first and module.lines[first - 1].startswith("#"):
        first -= 1
    dropped = {line for inner in _inner_imports(node) for line in range(inner.lineno - 1, _end(inner))}
    return "\n".join(module.lines[i] for i in range(first, _end(node)) if i not in dropped)


def _end(node: ast.stmt) -> int:
    """The node's last line number."""
    assert node.end_lineno is not None  # parsed nodes have one
    return node.end_lineno


def _import_lines(imports: dict[str, str]) -> str:
    """The import statements, sorted, with the standard library first."""
    lines = sorted(set(imports.values()), key=lambda line: (line.startswith("from"), line))
    standard = [line for line in lines if line.split()[1].split(".")[0] in sys.stdlib_module_names]
    others = [line for line in lines if line not in standard]
    return "\n\n".join("\n".join(block) for block in (standard, others) if block)
