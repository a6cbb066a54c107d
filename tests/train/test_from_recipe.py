"""Runs that start from other runs: a student from another recipe's, a teacher named by the recipe that trains it."""

from __future__ import annotations

import pytest
import torch
from conftest import FLOW

import flowmap
from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data
from flowmap.build.student import _with_dropout, build_student, student_config
from flowmap.build.teacher import build_teacher
from flowmap.nets.dit import DiT
from flowmap.nets.edm import DDPMpp
from flowmap.plan.plan import plan, resolve
from flowmap.plan.run_folders import dependency_folder
from flowmap.recipe import read_recipe

MAP = """\
base: flow
name: map
data: {drop_condition: 0.0}
teacher: {recipe: FOLDER/flow.yaml, guidance: {kind: classifier_free}}
student: {kind: from_recipe, recipe: FOLDER/flow.yaml}
times: {kind: interval}
objective: {kind: ayf_emd, warmup_steps: 2}
sampler: {kind: deterministic, steps: [1, 2]}
evaluation: {teacher_steps: 2, batch_size: 50}
"""
ON = ["name=further", "student.recipe=FOLDER/map.yaml", "objective={kind: ayf_lmd, warmup_steps: 0}"]  # laid over map


def quiet(message):
    pass


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """recipes(name, key=value, ...): the recipe flow, map or further; runs go to runs/ beside them."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    for name, text in (("flow", FLOW), ("map", MAP)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))

    def read(name, *overrides):
        laid = [line.replace("FOLDER", str(tmp_path)) for line in ON] if name == "further" else []
        return read_recipe(tmp_path / f"{'map' if name == 'further' else name}.yaml", [*laid, *overrides])

    return read


def test_what_a_run_starts_from_is_trained_first_and_once(recipes, tmp_path, command):
    recipe = recipes("further")
    assert [stage.recipe.name for stage in plan(recipe, tmp_path / "run")] == ["flow", "map", "further"]
    code, out, err = command("fit", "--recipe", tmp_path / "map.yaml", "--dry-run")
    assert code == 0 and "student: 0.0" in out and "nothing is missing" in out, out + err
    flowmap.fit(recipe, tmp_path / "run", log=quiet)
    assert flowmap.load_student(tmp_path / "run").sample(3, steps=2).shape == (3, 2)
    assert f"teacher: {tmp_path / 'flow.yaml'};" in (tmp_path / "run" / "student" / "README.md").read_text()


COMBINED = [  # all of methods.md's combinations in one recipe, laid over map
    "name=combined",
    "student.recipe=FOLDER/warm.yaml",
    "times={kind: mixture, base: {kind: interval}, one_step: 0.15, diagonal: 0.2, diagonal_at: arrival}",
    "objective={kind: ayf_mixed, warmup_steps: 0, lagrangian: 0.25, own_lagrangian: 1.0, own_eulerian: 0.3}",
]


def test_warm_start_anchor_one_step_pairs_and_both_residuals_on_own_states_go_together(recipes, tmp_path):
    warm = recipes("map", "name=warm", "objective={kind: cmt, solver: {kind: heun, steps: 4}, points: 4}")
    (tmp_path / "warm.yaml").write_text(warm.to_yaml())
    recipe = recipes("map", *(line.replace("FOLDER", str(tmp_path)) for line in COMBINED))
    assert [stage.recipe.name for stage in plan(recipe, tmp_path / "run")] == ["flow", "warm", "combined"]
    run = flowmap.fit(recipe, tmp_path / "run", log=quiet)
    figures = flowmap.load_student(tmp_path / "run").sample(3, steps=2)
    assert figures.isfinite().all() and (tmp_path / "run" / "metrics.json").is_file() and run is not None
    with pytest.raises(RecipeError, match="objective.own_eulerian: 1.5 must lie in"):
        recipes("map", "objective={kind: ayf_mixed, own_eulerian: 1.5}")


def test_step_0_is_the_averaged_student_of_the_other_run(recipes, tmp_path):
    flowmap.fit(recipes("map"), tmp_path / "runs" / "map", log=quiet)
    for name, start in (("map", dependency_folder(recipes("flow"))), ("further", tmp_path / "runs" / "map")):
        recipe, other = recipes(name), flowmap.load_student(start)
        run = resolve(recipe)
        data = build_data(run)
        teacher = build_teacher(run, data)
        student = build_student(run, student_config(run, data, teacher), teacher)
        x, t, s, scale = torch.randn(5, 2), torch.rand(5), torch.zeros(5), {"guidance": torch.ones(5)}
        cond = {"class": torch.zeros(5, dtype=torch.int64)}
        assert torch.equal(student(x, t, s, cond | scale), other(x, t, s, cond if name == "map" else cond | scale))


def test_before_it_is_there_and_what_it_cannot_start_from(recipes, tmp_path):
    recipe = recipes("map")
    with pytest.raises(
        RecipeError,
        match="map: student.recipe: '.*flow' is not trained yet; `flowmap fit --recipe .*map` trains it first$",
    ):
        student_config(resolve(recipe), build_data(resolve(recipe)), None)
    with pytest.raises(RecipeError, match="teacher.*exactly one of card and recipe"):
        recipes("map", "teacher.card=digits")
    flowmap.fit(recipe, tmp_path / "runs" / "map", log=quiet)
    plain = recipes("further", "teacher=null", "objective={kind: flow_matching}")
    with pytest.raises(RecipeError, match="starts from a flow map, and this objective trains only the diagonal"):
        student_config(resolve(plain), build_data(resolve(plain)), None)
    with pytest.raises(RecipeError, match="need each other in a loop"):
        plan(recipes("map", f"teacher.recipe={tmp_path / 'map.yaml'}"), tmp_path / "run")


def test_dropout_is_refused_of_a_network_without_any():
    recipe = read_recipe("digits", ["student={kind: from_teacher, dropout: 0.1}"])
    with pytest.raises(RecipeError, match="student.dropout: a network of kind dit has none"):
        _with_dropout(DiT(), resolve(recipe))
    with pytest.raises(RecipeError, match=r"student.dropout: 2.0 must lie in \[0, 1\)"):
        _with_dropout(DDPMpp(), resolve(read_recipe("digits", ["student={kind: from_teacher, dropout: 2.0}"])))
    assert _with_dropout(DDPMpp(), resolve(recipe)).dropout == 0.1
