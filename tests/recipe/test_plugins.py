"""Installed packages add kinds by entry points; one that fails is a warning, and everything else works."""

from __future__ import annotations

import pytest

import flowmap
from flowmap.cli import main
from flowmap.nets.module_builders import BUILDERS
from flowmap.objectives import OBJECTIVES
from flowmap.recipe.plugins import plugins

LAB = """
from dataclasses import dataclass
from torch import nn
from flowmap.flow.types import Loss

@dataclass(frozen=True)
class Nothing:
    weight: float = 1.0
    diagonal = True

    def __call__(self, student, teacher, sample, step):
        return Loss(self.weight * student.velocity(sample.xt, sample.t).square().mean(), {})

class Wide(nn.Linear): ...
"""
POINTS = """
[flowmap.kinds]
objective.nothing = my_lab:Nothing
module.wide = my_lab:Wide
objective.broken = my_lab_that_is_not_there:Broken
objective.meanflow = my_lab:Nothing
kitchen.sink = my_lab:Nothing
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A package as pip installs it, without pip: a module, and its metadata with entry points."""
    (tmp_path / "my_lab.py").write_text(LAB)
    info = tmp_path / "my_lab-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-lab\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    kept = [(table, dict(table)) for table in (OBJECTIVES, BUILDERS)]
    plugins.cache_clear()
    yield
    for table, kinds in kept:
        table.clear()
        table.update(kinds)
    plugins.cache_clear()


def test_a_recipe_names_kinds_of_an_installed_package(lab, capsys):
    recipe = flowmap.read_recipe("toy/mixture", ["objective={kind: nothing, weight: 2.0}"])
    assert recipe.objective.weight == 2.0 and BUILDERS["wide"].__name__ == "Wide"
    err = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:3] for line in err] == [
        ["warning", "kitchen sink, of my-lab 1.2", "not registered"],
        ["warning", "objective broken, of my-lab 1.2", "not registered"],
        ["warning", "objective meanflow, of my-lab 1.2", "not registered"],
    ]
    assert OBJECTIVES["meanflow"].__module__.startswith("flowmap.")


def test_list_says_whose_kinds_they_are(lab, capsys):
    assert main(["list", "my-lab"]) == 0
    out = capsys.readouterr().out
    assert "  objective nothing, of my-lab 1.2\n" in out and "  module wide, of my-lab 1.2\n" in out
    assert "objective broken, of my-lab 1.2: not registered: ModuleNotFoundError" in out


def test_without_plugins_nothing_is_said(capsys):
    plugins.cache_clear()
    assert plugins() == () and capsys.readouterr().err == ""
