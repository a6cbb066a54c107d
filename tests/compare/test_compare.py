"""Recipes on equal terms: equal seconds by a clock of our own, equal evaluations; finished runs are kept; a divergence
is a row.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from conftest import TINY, bytes_of

from flowmap.base.files import read_tensors, write_tensors
from flowmap.base.ranges import CountFromZero
from flowmap.compare import compare, dry_compare
from flowmap.compare.entrants import LENGTHS, at_seed, of_length, read_entrants, start_of
from flowmap.compare.terms import evaluations_of
from flowmap.estimate.calls import calls_of
from flowmap.objectives import OBJECTIVES
from flowmap.recipe import read_recipe
from flowmap.recipe.optimizer import AdamW
from tests.support.slow_clock import HANDS, Slow


@dataclass(frozen=True)
class Starting(Slow):
    """A `Slow` objective with a term from the step `start` on."""

    start: CountFromZero = 0


@pytest.fixture
def three(tiny, monkeypatch):
    """The paths of recipes whose steps take 1, 2 and 4 seconds by the hands."""
    monkeypatch.setitem(OBJECTIVES, "slow", Slow)
    HANDS.at = 0.0
    paths = [tiny.with_name(f"{name}.yaml") for name in ("one", "two", "four")]
    for path, cost in zip(paths, (1.0, 2.0, 4.0), strict=True):
        text = TINY.replace("name: tiny", f"name: {path.stem}").replace(
            "{kind: ayf_emd, warmup_steps: 12}", f"{{kind: slow, cost: {cost}}}"
        )
        path.write_text(text)
    return [str(path) for path in paths]


def run(recipes, folder, **options):
    said = []
    options = {"budget": 40.0, "seeds": 2, "steps": (1, 2), **options}
    return compare(recipes, out=folder, log=said.append, now=HANDS, **options), said


def test_equal_seconds_are_equal_and_lengths_are_known_beforehand(three, tmp_path):
    found, _ = run(three, tmp_path / "out", seeds=1)
    for name, steps in (("one", 40), ("two", 20), ("four", 10)):
        for result in (r for r in found["results"] if r["recipe"] == name):
            assert (result["train_seconds"], result["steps"], result["planned_steps"], result["ended"]) == (
                40.0,
                steps,
                steps,
                "whole",
            )
            trained = read_recipe(tmp_path / "out" / f"seed-{result['seed']}" / name / "recipe.yaml")
            assert (trained.trainer.steps, trained.seed) == (steps, result["seed"])
    assert {key: one["cost"]["train_seconds"]["median"] for key, one in found["recipes"].items()} == {
        "one": 40,
        "two": 40,
        "four": 40,
    }
    assert set(found["beside"]) == {
        "teacher, 1 Euler steps",
        "teacher, 2 Euler steps",
        "teacher, 4 Euler steps",
        "real against real",
    }


def test_a_step_that_becomes_dearer_than_the_trial_is_cut_by_the_clock(three, tmp_path, monkeypatch):
    call = Slow.__call__
    monkeypatch.setattr(
        Slow,
        "__call__",
        lambda self, a, b, c, step: setattr(HANDS, "at", HANDS.at + (step >= 10)) or call(self, a, b, c, step),
    )
    found, _ = run(three[:1], tmp_path / "out", seeds=1)
    result = found["results"][0]
    assert (result["ended"], result["planned_steps"], result["steps"], result["train_seconds"]) == ("cut", 40, 25, 40.0)
    assert found["recipes"]["one"]["share_done"]["least"] == 25 / 40


def test_steps_before_and_after_the_start_of_a_term_are_tried(three, tmp_path, monkeypatch):
    call = Starting.__call__
    later = lambda self, a, b, c, step: (
        setattr(HANDS, "at", HANDS.at + 2 * (step >= self.start)) or call(self, a, b, c, step)
    )
    monkeypatch.setattr(Starting, "__call__", later)
    monkeypatch.setitem(OBJECTIVES, "starting", Starting)
    path = Path(three[0])
    path.write_text(path.read_text().replace("{kind: slow, cost: 1.0}", "{kind: starting, cost: 1.0, start: 10}"))
    assert (read_recipe(path).trainer.steps, start_of(read_recipe(path).objective)) == (20, 10)
    found, _ = run([str(path)], tmp_path / "out", seeds=1)
    result = found["results"][0]
    assert (result["ended"], result["steps"], result["train_seconds"]) == ("whole", 20, 40.0)


@pytest.mark.slow
def test_equal_evaluations_are_equal_whatever_the_time(three, tmp_path):
    recipes = [three[0], str(tmp_path / "tiny.yaml")]
    found, _ = run(recipes, tmp_path / "out", budget=None, calls=2400.0, seeds=1)
    by_name = {r["recipe"]: r for r in found["results"]}
    assert by_name["one"]["steps"] == 2400 // (16 * (1 + 2 + 1)) == 37 and by_name["one"]["train_seconds"] == 37
    asked = evaluations_of(read_recipe(tmp_path / "tiny.yaml"))
    calls = calls_of(read_recipe(tmp_path / "tiny.yaml"), conditional=False)
    assert asked == 16 * (calls.forward + 2 * calls.backward + calls.strong) and calls.forward == pytest.approx(1.75)
    assert by_name["tiny"]["steps"] == int(2400 / asked) and by_name["tiny"]["evaluations"] <= 2400


@pytest.mark.slow
def test_what_is_finished_is_kept_and_what_was_cut_off_is_gone_on_with(three, tmp_path, monkeypatch):
    from flowmap.compare.entry import Entry

    real = Entry.figures

    def stop(self, steps):
        if self.recipe.name == "two" and self.recipe.seed == 1:
            raise KeyboardInterrupt
        return real(self, steps)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Entry, "figures", stop)
        run(three[:2], tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [(r["recipe"], r["seed"]) for r in kept["results"]] == [("one", 0), ("one", 1), ("two", 0)]
    before = bytes_of(tmp_path / "out" / "seed-0")
    steps_made = HANDS.at
    found, _ = run(three[:2], tmp_path / "out")
    assert (
        HANDS.at == steps_made + 2
    )  # the fourth was trained, and only to be measured; its calls are counted in a step of two seconds
    assert [(r["train_seconds"], r["steps"]) for r in found["results"]] == [
        (40.0, 40),
        (40.0, 40),
        (40.0, 20),
        (40.0, 20),
    ]
    assert bytes_of(tmp_path / "out" / "seed-0") == before
    found, _ = run(three, tmp_path / "out", steps=(1, 2, 3))  # another recipe, another number of steps
    assert len(found["results"]) == 6 and all(set(r["figures"]) == {"1", "2", "3"} for r in found["results"])
    assert {k: found["results"][0]["figures"][k] for k in ("1", "2")} == kept["results"][0]["figures"]
    with pytest.raises(ValueError, match="holds 'one' with other settings or on other terms; choose another --out"):
        run(three[:1], tmp_path / "out", budget=41.0)
    with pytest.raises(ValueError, match="choose another --out"):
        run(three[:1], tmp_path / "out", overrides=["optimizer.lr=0.1"])


def test_training_and_measuring_log_their_progress_under_the_recipes_name(three, tmp_path, monkeypatch):
    monkeypatch.setattr("flowmap.compare.entry.paced", lambda log: log)  # every line, not one in 10 seconds
    _, said = run(three[:1], tmp_path / "out", seeds=1)
    assert any(line.startswith("seed 0, one: step 40/40  loss ") for line in said)
    assert "seed 0, one: evaluating: student 2 steps" in said


@pytest.mark.slow
def test_a_run_that_diverges_is_a_row(three, tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(path.read_text().replace("cost: 2.0", "cost: 2.0, breaks_at: 13"))
    found, said = run(three[:2], tmp_path / "out", seeds=1)
    result = next(r for r in found["results"] if r["recipe"] == "two")
    assert result["ended"] == "diverged" and "the loss is nan at step 13" in result["why"] and result["figures"] == {}
    assert (
        found["recipes"]["two"]["diverged"],
        found["recipes"]["two"]["figures"]["1"],
        found["recipes"]["one"]["diverged"],
    ) == (1, {}, 0)
    assert any("diverged: the loss is nan" in line for line in said)
    row = next(line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("| two "))
    assert row.split("|")[2:4] == ["  ", "  "] and row.split("|")[-3:-1] == [" 1 ", " 1 "]
    assert run(three[:2], tmp_path / "out", seeds=1)[0] == found  # it is kept too


@pytest.mark.slow
def test_a_student_whose_samples_are_not_finite_is_a_row_too(three, tmp_path):
    first, _ = run(three[:2], tmp_path / "out", seeds=1)
    folder = tmp_path / "out" / "seed-0" / "two"
    weights = folder / "student" / "model.safetensors"
    write_tensors(weights, {name: value * 1e30 for name, value in read_tensors(weights).items()})
    found, said = run(three[:2], tmp_path / "out", seeds=1, steps=(1, 2, 3))  # looked at once more
    (folder / "result.json").unlink()
    again, _ = run(three[:2], tmp_path / "out", seeds=1, steps=(1, 2, 3))  # or for the first time
    for one in (found, again):
        result = next(r for r in one["results"] if r["recipe"] == "two")
        assert (result["ended"], result["why"], result["figures"]) == ("diverged", "its samples are not finite", {})
        assert (result["steps"], one["recipes"]["two"]["diverged"], set(one["recipes"]["one"]["figures"])) == (
            20,
            1,
            {"1", "2", "3"},
        )
    assert any("two: diverged: its samples are not finite" in line for line in said)


def test_other_terms_are_refused_before_anything_is_trained(three, tmp_path):
    run(three[:2], tmp_path / "out", seeds=1)
    before, made = bytes_of(tmp_path / "out"), HANDS.at
    with pytest.raises(ValueError, match="holds 'two' with other settings or on other terms"):
        run(three[::-1], tmp_path / "out", seeds=1, budget=20.0)
    assert HANDS.at == made and bytes_of(tmp_path / "out") == before


@pytest.mark.slow
def test_figures_of_another_look_are_not_mixed_with_those_of_this_one(three, tmp_path, monkeypatch):
    from flowmap.compare.entry import Entry

    run(three[:2], tmp_path / "out", seeds=1)
    metrics = "metrics: [{kind: frechet, features: pixels, images: 90, reference_images: 90}]"
    (tmp_path / "first.yaml").write_text(
        f"base: {three[0]}\nname: first\n{metrics}\n"
    )  # all are looked at as the first is
    recipes, real = [str(tmp_path / "first.yaml"), three[1]], Entry.figures

    def stop(self, steps):
        if self.recipe.name == "two":
            raise KeyboardInterrupt
        return real(self, steps)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Entry, "figures", stop)
        run(recipes, tmp_path / "out", seeds=1)
    assert [r["recipe"] for r in json.loads((tmp_path / "out" / "compare.json").read_text())["results"]] == ["first"]
    assert len(run(recipes, tmp_path / "out", seeds=1)[0]["results"]) == 2


def test_what_fit_would_refuse_is_refused_before_anybody_is_trained(three, tmp_path):
    (tmp_path / "none.yaml").write_text(
        f"base: {three[0]}\nname: none\nteacher: null\nstudent: {{kind: from_teacher}}\n"
    )
    recipes = [three[0], str(tmp_path / "none.yaml")]
    for call in (
        lambda: run(recipes, tmp_path / "out"),
        lambda: dry_compare(recipes, budget=40.0, out=tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="none: student.kind: from_teacher needs a teacher"):
            call()
    assert not (tmp_path / "out").exists()


def test_what_a_recipe_needs_for_itself_is_paid_for_by_it(three, tmp_path, monkeypatch):
    from flowmap.compare import entry

    monkeypatch.setattr(
        entry.Entry, "_prepared", lambda self, log: {"one": 0.0, "two": 16.0, "four": 40.0}[self.recipe.name]
    )
    found, _ = run(three, tmp_path / "out", seeds=1)
    one, two, four = found["results"]
    assert (one["train_seconds"], two["train_seconds"], two["own_seconds"], two["steps"]) == (40.0, 24.0, 16.0, 12)
    assert (
        four["ended"] == "no time"
        and found["recipes"]["four"]["no_time"] == 1
        and "takes 40 of 40 seconds" in four["why"]
    )


@pytest.mark.slow
def test_pairs_and_a_run_to_start_from_are_priced_in_evaluations(three, tmp_path):
    base = f"base: {tmp_path / 'tiny.yaml'}\n"
    made = "coupling: {kind: pairs, teacher: {card: exact}, num: 64, solver: {kind: heun, steps: 4}}\n"
    made += "objective: {kind: rectified}\n"
    (tmp_path / "paired.yaml").write_text(f"{base}name: paired\n{made}")
    (tmp_path / "later.yaml").write_text(
        f"base: {three[1]}\nname: later\nstudent: {{kind: from_recipe, recipe: {three[0]}}}\n"
    )
    found, _ = run(
        [str(tmp_path / "paired.yaml"), str(tmp_path / "later.yaml")],
        tmp_path / "out",
        budget=None,
        calls=1600.0,
        seeds=1,
    )
    paired, later = found["results"]
    assert (paired["own_evaluations"], paired["steps"]) == (64 * 8, (1600 - 512) // (16 * 3))
    assert (later["own_evaluations"], later["steps"]) == (20 * 16 * 4, (1600 - 1280) // (16 * 4))
    found, _ = run([str(tmp_path / "later.yaml")], tmp_path / "again", seeds=1, budget=30.0)
    assert found["results"][0]["own_seconds"] == 20.0  # by the clock of the start's own run


def test_medians_and_spreads_are_those_of_the_seeds(three, tmp_path):
    found, _ = run(three[:1], tmp_path / "out", seeds=3, budget=12.0)
    for k in ("1", "2"):
        values = [r["figures"][k]["frechet_pixels"] for r in found["results"]]
        spread = found["recipes"]["one"]["figures"][k]["frechet_pixels"]
        assert spread == {"median": statistics.median(values), "least": min(values), "most": max(values), "count": 3}
        assert len(set(values)) == 3
    line = next(line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("| one "))
    assert f"{spread['median']:.3g} ({spread['least']:.3g} to {spread['most']:.3g})" in line
    assert (tmp_path / "out" / "quality.png").read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------- lengths and seeds


def test_what_a_recipe_counts_in_steps_is_stretched_with_its_length():
    recipe = of_length(read_recipe("digits"), 380)
    assert (recipe.trainer.steps, recipe.objective.warmup_steps, recipe.optimizer.warmup_steps) == (380, 40, 10)
    assert (
        recipe.optimizer.lr_at(379, 380) < 1e-7 < recipe.optimizer.lr_at(190, 380)
        and recipe.ema == read_recipe("digits").ema
    )
    assert of_length(read_recipe("digits"), 3).objective.warmup_steps == 1
    assert of_length(read_recipe("digits-adversarial"), 200).objective.start == 25
    assert of_length(read_recipe("digits-lsd"), 3).objective == read_recipe("digits-lsd").objective


def test_every_setting_of_objectives_and_optimizer_that_counts_from_step_0_is_stretched():
    for kind in [*OBJECTIVES.values(), AdamW]:
        hints = get_type_hints(kind, include_extras=True)
        counted = {field.name for field in fields(kind) if hints[field.name] == CountFromZero}
        assert counted <= set(LENGTHS), f"{kind.__name__}: {counted - set(LENGTHS)}"
    curriculum = of_length(read_recipe("digits-alpha-flow"), 380).objective
    assert (curriculum.begin_steps, curriculum.end_steps) == (0, 80)


def test_a_seed_reaches_the_teacher_and_what_makes_pairs():
    assert at_seed(read_recipe("digits"), 3).teacher.overrides == ("seed=3",)
    one_teacher = read_recipe("digits", ["teacher.overrides=[seed=0]"])
    assert at_seed(one_teacher, 3).teacher.overrides == ("seed=0",) and at_seed(one_teacher, 3).seed == 3
    given = read_entrants(["digits", "rfpp/digits"], ["teacher.overrides=[seed=0]"])
    assert at_seed(given[1], 3).coupling.teacher.overrides == ("seed=0",), "its pairs come from the same teacher"
    paired = at_seed(read_recipe("rfpp/digits"), 3)
    assert paired.coupling.teacher.overrides == paired.teacher.overrides == ("seed=3",) and paired.seed == 3
    assert at_seed(read_recipe("toy/mixture"), 3).teacher.overrides == ()  # nothing is trained there
    start = at_seed(
        read_recipe("digits", ["student={kind: from_recipe, recipe: digits-scm, overrides: ['trainer.steps=9']}"]), 3
    ).student
    assert start.overrides == ("trainer.steps=9", "seed=3", "teacher.overrides=['seed=3']")
    assert read_recipe(start.recipe, start.overrides) == at_seed(read_recipe("digits-scm", ["trainer.steps=9"]), 3)


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("names", "overrides", "says"),
    [
        (["digits", "digitz"], [], "no file and no shipped recipe 'digitz', did you mean 'digits'?"),
        (["digits", "fashion14"], [], "'digits' and 'fashion14' are not of the same data: kind 'digits' and 'fashion'"),
        (["digits", "digits"], [], "'digits' twice"),
        (["digits", "imagenet512"], ["+digits.yaml"], "data.images.path: must be given"),
        (["digits"], ["trainer.devices=2"], "trainer.devices: 2; compare trains on one device"),
    ],
)
def test_recipes_that_cannot_be_compared_are_named(names, overrides, says):
    if "imagenet512" in names:
        names, overrides = ["imagenet512"], []
    with pytest.raises(ValueError) as caught:
        read_entrants(names, overrides)
    assert says.split("?")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_other_teachers_or_guidance_are_refused_and_no_teacher_is_not(tmp_path):
    other = tmp_path / "other.yaml"
    for change, says in (
        ("{guidance: {default: 2.0}}", "guidance 1.5 and 2.0"),
        ("{overrides: ['seed=1']}", "overrides [] and ['seed=1']"),
    ):
        other.write_text(f"name: other\nbase: digits\nteacher: {change}\n")
        with pytest.raises(ValueError, match="not of the same teacher") as caught:
            read_entrants(["digits", str(other)])
        assert says in str(caught.value)
    other.write_text(
        "name: other\nbase: digits\nteacher: null\n"
        "student: {kind: dit, preset: tiny, patch: 2}\nobjective: {kind: meanflow}\n"
    )
    assert len(read_entrants(["digits", str(other), "rfpp/digits", "digits-scm"])) == 4
    other.write_text("name: other\nbase: digits\nteacher: {card: null, recipe: digits-teacher}\n")
    assert len(read_entrants(["digits", str(other)])) == 2  # the same teacher by another name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", 0], "budget: 0 must be above 0"),
        (["--budget", -3], "budget: -3 must be above 0"),
        (["--budget", "nan"], "budget: nan must be above 0"),
        (["--calls", 0], "calls: 0 must be above 0"),
        (["--budget", 9, "--seeds", 0], "seeds: 0 must be 1 or more"),
        (["--budget", 9, "--steps", 2, 0], "steps: [2, 0] must be different whole numbers from 1"),
        (["--budget", 9, "--steps", 2, 2], "steps: [2, 2] must be different"),
        (["--budget", 9, "metrics=[]"], "metrics: has none of samples"),
        (["--budget", 9, "objektive=3"], "objektive: no such setting"),
        (["--budget", 9, "seed=3"], "seed: compare trains at the seeds 0 to N - 1 of --seeds N"),
    ],
)
def test_a_mistake_is_one_line(command, tiny, tmp_path, arguments, says):
    code, out, err = command("compare", "--recipes", tiny, "--out", tmp_path / "out", *arguments)
    assert (code, out) == (2, "") and says in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table_and_a_dry_run_writes_nothing(command, tiny, tmp_path):
    options = (
        "compare",
        "--recipes",
        tiny,
        "optimizer.lr=0.02",
        "--calls",
        900,
        "--seeds",
        1,
        "--steps",
        1,
        "--out",
        tmp_path / "out",
    )
    before = bytes_of(tmp_path)
    code, out, err = command(*options, "--dry-run")
    assert (
        code == 0
        and "network evaluations a step, 11 steps; 0 of 1 seeds finished" in out
        and "nothing is missing" in out
    ), (out, err)
    assert bytes_of(tmp_path) == before
    code, out, err = command(*options)
    assert code == 0 and "| tiny |" in out and "| real against real |" in out and "quality.png" in out, err
    assert "1 of 1 seeds finished" in command(*options, "--dry-run")[1]


def test_a_start_has_the_teacher_that_the_comparisons_overrides_say():
    changed = "teacher.overrides=[trainer.steps=9]"
    entrant = at_seed(read_entrants(["digits", "digits-warm"], [changed])[1], 3)
    start = read_recipe(entrant.student.recipe, entrant.student.overrides)
    assert (
        list(start.teacher.overrides) == list(entrant.teacher.overrides) == ["trainer.steps=9", "seed=3"]
        and start.seed == 3
    )


def test_memory_is_counted_anew(three):
    from flowmap.compare.entry import forget_peak
    from flowmap.train.callbacks import peak_gib

    many = torch.ones(2**26)  # 256 MiB
    high = peak_gib(torch.device("cpu"))
    del many
    forget_peak()
    assert peak_gib(torch.device("cpu")) < high - 0.15 or not Path("/proc/self/clear_refs").exists()
