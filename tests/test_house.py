"""benchmarks/house.py counts right, on a small checkout made here."""

from __future__ import annotations

from pathlib import Path

import pytest

FILES = {
    "flowmap/__init__.py": "",
    "flowmap/base/__init__.py": "",
    "flowmap/base/a.py": "def first():\n    from flowmap.base import b\n"
    "    return hasattr(b, 'x'), getattr(b, 'x', None)\n",
    "flowmap/base/b.py": "from flowmap.base.a import first\nfrom flowmap.train import fit\n",
    "flowmap/train/__init__.py": "",
    "flowmap/train/fit.py": "import flowmap.nets.mlp\nif isinstance(1, int):\n    kind = 'ayf_emd'\n",
    "flowmap/nets/__init__.py": "",
    "flowmap/nets/mlp.py": "from flowmap.data import toy\nx = getattr(toy, 'x')\n",
    "flowmap/data/__init__.py": "",
    "flowmap/data/toy.py": "",
    "flowmap/planning/__init__.py": "",
    "flowmap/objectives/__init__.py": "from flowmap.objectives.ayf import AYF\nOBJECTIVES = {'ayf_emd': AYF}\n",
    "flowmap/objectives/ayf.py": "class AYF:\n    def __call__(self):\n        return 1\n",
}


@pytest.fixture
def house(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import house

    return house


@pytest.fixture
def trees(tmp_path, house):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return house.parsed(tmp_path)


def test_circles_and_imports_upwards(house, trees):
    """a and b import each other, one inside a function; base imports train, and nets imports data."""
    graph = house.imports(trees)
    assert house.in_circles(graph) == 2 and house.upward(graph) == 2


def test_calls_that_a_type_would_spare(house, trees):
    assert [house.called(trees, name) for name in ("hasattr", "getattr", "isinstance")] == [1, 2, 1]
    assert house.called(trees, "getattr", 3) == 1


def test_lines_and_statements_of_functions(house, trees):
    assert max(house.functions(trees)) == (3, "flowmap.base.a.first")
    assert max(house.functions(trees, statements=True)) == (3, "flowmap.base.a.first")


def test_modules_that_name_an_objective(house, trees):
    assert house.elsewhere(trees) == (1, 1)


def test_rooms_of_earlier_commits(house):
    rooms = {"flowmap.planning.plan": "plan", "flowmap.planning.costs": "estimate", "flowmap.build_prior": "build"}
    assert {name: house.room(name) for name in rooms} == rooms
