"""The teacher's rows and the floor are taken from metrics.json as long as nothing they depend on has changed."""

from dataclasses import replace

import pytest
import torch

from flowmap.base.files import read_json, write_json
from flowmap.build.data import build_data
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import BuiltTeacher, build_teacher
from flowmap.cli import main
from flowmap.evaluation.known_rows import stamps
from flowmap.evaluation.measure import evaluate, measure
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from flowmap.student.folder import load_student, save_student
from flowmap.student.student import Student

METRICS = "metrics=[{kind: frechet, images: 200}, {kind: endpoint_error, images: 20}]"
SETTINGS = ["evaluation.teacher_steps=16", "data.points=2000", "sampler.steps=[1, 2]", METRICS]


@pytest.fixture
def run(tmp_path):
    """A run folder with a student and its metrics.json."""
    recipe = read_recipe("toy/mixture", SETTINGS)
    run = resolve(recipe)
    data, teacher = build_data(run), build_teacher(run)
    config = student_config(run, data, teacher)
    flow_map = build_student(run, config, teacher)
    save_student(tmp_path / "student", config, flow_map.state_dict(), recipe=recipe.to_yaml(), card="")
    write_json(tmp_path / "metrics.json", measure(recipe, Student(config, flow_map), teacher, data))
    return tmp_path


@pytest.fixture
def solves(monkeypatch):
    """The numbers of steps for which the teacher was sampled."""
    seen, solve = [], BuiltTeacher.solve
    monkeypatch.setattr(
        BuiltTeacher, "solve", lambda self, x1, cond, steps: seen.append(steps) or solve(self, x1, cond, steps)
    )
    return seen


def test_nothing_changed_samples_no_teacher_and_gives_the_runs_figures(run, solves):
    kept, said = read_json(run / "metrics.json"), []
    found = evaluate(run / "student", progress=said.append)
    assert (
        solves == []
        and any("as in metrics.json" in line for line in said)
        and "evaluating: real against real" not in said
    )
    assert all(found[key] == kept[key] for key in ("student", "teacher", "teacher_few", "floor", "nfe", "stamp"))
    assert found["student"]["1"]["endpoint_error_to_teacher"] > 0


def test_anew_samples_the_teacher_again(run, solves):
    kept, found = read_json(run / "metrics.json"), evaluate(run / "student", anew=True)
    assert 16 in solves and found["teacher"] == kept["teacher"] and found["floor"] == kept["floor"]


def test_other_steps_want_the_teachers_end_points_alone(run, solves):
    found = evaluate(run / "student", [3])
    assert set(solves) == {32}  # endpoint_error's own; its rows at 16 steps and few are known
    assert set(found["student"]) == {"3"} and "endpoint_error_to_teacher" in found["student"]["3"]


def test_without_the_teacher_it_has_no_row_and_no_distance_to_it(run, solves, capsys):
    assert main(["evaluate", "--student", str(run), "--no-teacher", "--out", str(run / "m.json")]) == 0
    found = read_json(run / "m.json")
    assert (
        solves == []
        and not {"teacher", "teacher_few"} & set(found)
        and "endpoint_error_to_teacher" not in found["student"]["1"]
    )
    assert found["floor"] == read_json(run / "metrics.json")["floor"] and "teacher" not in found["nfe"]
    assert main(["evaluate", "--student", str(run), "--anew"]) == 0
    assert 16 in solves


@pytest.mark.parametrize(
    ("changed", "teacher", "baseline"),
    [
        ("data.std=0.2", True, True),
        ("evaluation.seed=7", True, True),
        ("evaluation.teacher_steps=8", True, True),
        ("metrics=[{kind: frechet, images: 300}, {kind: endpoint_error, images: 20}]", True, True),
        ("optimizer.lr=0.5", False, False),
    ],
)
def test_what_a_row_depends_on_makes_it_measured_again(run, solves, changed, teacher, baseline):
    recipe = read_recipe("toy/mixture", [*SETTINGS, changed])
    (run / "student" / "recipe.yaml").write_text(recipe.to_yaml())
    said = []
    evaluate(run / "student", progress=said.append)
    assert bool(solves) == teacher and ("evaluating: real against real" in said) == baseline


def test_a_quantised_student_is_measured_against_the_teacher_again(run, monkeypatch):
    monkeypatch.setattr(Student, "quantized", "int8")  # its network is too small; a LoRA student's stamp has no base
    known, found = read_json(run / "metrics.json"), evaluate(run / "student")
    held = sum(p.nbytes for p in load_student(run / "student").parameters())
    assert found["quantized"] == {"format": "int8", "weight_bytes": held} and "quantized" not in known
    assert {key for key in known["stamp"] if known["stamp"][key] != found["stamp"][key]} == {"student"}


def test_a_stamp_changes_with_the_weights_and_with_the_data():
    recipe = read_recipe("toy/mixture", SETTINGS)
    run = resolve(recipe)
    data, exact = build_data(run), build_teacher(run)
    config = student_config(run, data, exact)
    student, other = (
        Student(config, build_student(resolve(replace(recipe, seed=seed)), config, exact)) for seed in (0, 1)
    )
    teacher = BuiltTeacher(exact.guided, None, (build_student(run, config, exact),))
    look = (torch.zeros(3, 2), {"class": torch.arange(3)})
    first = stamps(recipe, student, teacher, data, recipe.metrics, look)
    assert stamps(recipe, student, teacher, data, list(recipe.metrics), look) == first and set(first) == {
        "floor",
        "teacher",
        "student",
    }
    changed = lambda now: {key for key in first if now.get(key) != first[key]}
    assert changed(stamps(recipe, other, teacher, data, recipe.metrics, look)) == {"student"}
    assert changed(stamps(recipe, student, None, data, recipe.metrics, look)) == {"teacher", "student"}
    with torch.no_grad():
        next(teacher.modules[0].parameters()).flatten()[0] += 1e-3
    assert changed(stamps(recipe, student, teacher, data, recipe.metrics, look)) == {"teacher", "student"}
    moved = replace(data, train=data.train + 1e-3)
    assert changed(stamps(recipe, student, teacher, moved, recipe.metrics, look)) == {"floor", "teacher", "student"}
    assert changed(stamps(recipe, student, teacher, data, recipe.metrics, (look[0] + 1, look[1]))) == {
        "teacher",
        "student",
    }
