"""Runs that start at a learned prior: auxiliary model, flow, distillation and pairs have the same starts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import flowmap
from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data, build_samples
from flowmap.build.prior import build_prior
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import build_teacher
from flowmap.data.pairs import starts_of
from flowmap.flow.prior import for_codes, starts
from flowmap.flow.solver import Heun
from flowmap.plan.plan import plan, resolve
from flowmap.plan.run_folders import dependency_folder
from flowmap.prepare.make_pairs import verify
from flowmap.recipe import read_recipe
from flowmap.train.fit import FitError
from flowmap.train.module import DistillModule
from tests.conftest import no_runs

PRIOR = """\
name: small-prior
data: {kind: digits, batch_size: 32, conditional: false}
student: {kind: conv_prior, size: 3, channels: [8, 16], groups: 4}
objective: {kind: variance_guided}
optimizer: {lr: 1.0e-2}
trainer: {steps: 6, accelerator: cpu}
log: {wandb: false, every_steps: 1, grid_images: 4}
"""
FLOW = """\
name: small-flow
data: {kind: digits, batch_size: 16, conditional: false}
prior: {kind: learned, recipe: FOLDER/small-prior.yaml, scale: 0.8, z: {kind: mixture, components: 3}}
student: {kind: mlp, width: 16, depth: 1}
times: {kind: uniform}
objective: {kind: flow_matching, weight: {kind: inverse_variance}}
optimizer: {lr: 1.0e-2}
sampler: {kind: solver, solver: midpoint, steps: [1, 2]}
trainer: {steps: 4, accelerator: cpu}
metrics: [{kind: frechet, features: pixels, images: 20}, {kind: straightness, images: 8, steps: 2},
  {kind: endpoint_error, images: 8, steps: 3}]
evaluation: {teacher_steps: 2, batch_size: 50}
log: {wandb: false, every_steps: 1, grid_images: 4}
"""
MAP = """\
base: small-flow
name: small-map
teacher: {recipe: FOLDER/small-flow.yaml}
student: {kind: from_teacher}
times: {kind: interval}
objective: {kind: ayf_emd, warmup_steps: 2}
sampler: {kind: deterministic, steps: [1, 2]}
"""
REFLOW = """\
base: small-flow
name: small-reflow
coupling: {kind: pairs, teacher: {recipe: FOLDER/small-flow.yaml}, num: 40, shard_items: 16, solver: {kind: heun,
  steps: 2}}
student: {kind: from_recipe, recipe: FOLDER/small-flow.yaml}
objective: {kind: rectified}
sampler: {kind: anchored, steps: [1, 2]}
"""
CODES = """\
name: small-codes
data: {kind: codes, recipe: FOLDER/small-prior.yaml, batch_size: 32, conditional: false}
student: {kind: mlp, width: 8, depth: 1}
times: {kind: uniform}
objective: {kind: flow_matching}
sampler: {kind: deterministic, steps: [2]}
trainer: {steps: 3, accelerator: cpu}
log: {wandb: false, grid_images: 4}
"""


def write(folder):
    for name, text in (
        ("small-prior", PRIOR),
        ("small-flow", FLOW),
        ("small-map", MAP),
        ("small-reflow", REFLOW),
        ("small-codes", CODES),
    ):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the recipes, with runs of prior, flow and map below runs/."""
    folder = tmp_path_factory.mktemp("lediflow")
    write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWMAP_RUNS", str(folder / "runs"))
        flowmap.fit(read_recipe(folder / "small-map.yaml"), log=lambda message: None)
    return folder


@pytest.fixture
def recipes(trained, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(trained / "runs"))
    return lambda name, *overrides: read_recipe(trained / f"small-{name}.yaml", overrides)


def test_what_a_recipe_needs_comes_first(recipes, tmp_path):
    assert [stage.recipe.name for stage in plan(recipes("map"), tmp_path)] == ["small-prior", "small-flow", "small-map"]
    assert [stage.recipe.name for stage in plan(recipes("codes"), tmp_path)] == ["small-prior", "small-codes"]


def test_the_auxiliary_models_run_says_what_became_of_its_posterior(recipes):
    folder = dependency_folder(recipes("prior"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["student"]["1"]) == {"nll", "rmse", "kl_nats", "active_share", "codes_to_normal"}
    assert len(metrics["units"]["kl"]) == 3 and metrics["units"]["active"] == round(
        3 * metrics["student"]["1"]["active_share"]
    )
    assert (folder / "samples" / "step-00000006.png").is_file() and no_runs(folder) == set()


def test_the_students_prior_ships_with_it_and_gives_the_same_starts(recipes, trained, tmp_path):
    assert no_runs(trained / "runs" / "small-map") == no_runs(dependency_folder(recipes("flow"))) == set()
    recipe = recipes("map")
    student, built = flowmap.load_student(trained / "runs" / "small-map"), build_prior(resolve(recipe))
    assert student.config.prior.conditioning and student.config.prior.scale == 0.8
    ours = student.start(5, torch.Generator().manual_seed(3))
    again = starts(built, (1, 8, 8), 5, torch.Generator().manual_seed(3))
    assert torch.equal(ours.x1, again.x1) and torch.equal(ours.conditioning["z"], again.conditioning["z"])
    same = [student.sample(4, steps=2, seed=1) for _ in range(2)]
    assert torch.equal(*same) and not torch.equal(same[0], student.sample(4, steps=2, seed=2))
    z = torch.zeros(4, 3)
    assert not torch.equal(student.sample(4, steps=2, seed=1, cond={"z": z}), same[0])
    with pytest.raises(ValueError, match="z: has shape"):
        student.sample(4, cond={"z": z[:2]})
    with pytest.raises(ValueError, match="gamma"):
        student.sample(4, gamma=0.5)


def test_the_prior_is_held_and_not_trained_and_figures_come_out_again(recipes, trained, command):
    recipe = recipes("map")
    asked = resolve(recipe)
    data = build_data(asked)
    teacher, prior = build_teacher(asked, data), build_prior(asked)
    module = DistillModule(
        asked, build_student(asked, student_config(asked, data, teacher), teacher), teacher, data, prior=prior
    )
    assert not any("prior" in name or "encoder" in name for name in module.state_dict())
    assert not any(p.requires_grad for p in prior.model.parameters())
    run = trained / "runs" / "small-map"
    code, out, err = command("evaluate", "--student", run)
    again, kept = json.loads(out), json.loads((run / "metrics.json").read_text())
    assert code == 0 and again["student"] == kept["student"] and again["teacher"] == kept["teacher"], err
    assert "start at the prior of 'small-prior'" in (run / "student" / "README.md").read_text()
    code, out, err = command("doctor", "--recipe", trained / "small-map.yaml")
    assert code == 0 and "choose objective.derivative=dual" in out, err


def test_a_run_that_was_cut_goes_on_bit_for_bit(recipes, tmp_path, monkeypatch):
    recipe = recipes("flow", "trainer.checkpoint_every_steps=2", "metrics=[]")
    whole = flowmap.fit(recipe, tmp_path / "whole", log=lambda message: None).student
    cut = DistillModule.training_step

    def step(module, batch, i):
        if module.global_step == 3:
            raise FitError("cut")
        return cut(module, batch, i)

    monkeypatch.setattr(DistillModule, "training_step", step)
    with pytest.raises(FitError):
        flowmap.fit(recipe, tmp_path / "cut", log=lambda message: None)
    monkeypatch.setattr(DistillModule, "training_step", cut)
    resumed = flowmap.fit(recipe, tmp_path / "cut", resume=True, log=lambda message: None).student
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert torch.equal(whole.sample(4, steps=2, seed=3), resumed.sample(4, steps=2, seed=3))


def test_solvers_are_counted(recipes):
    metrics = json.loads((dependency_folder(recipes("flow")) / "metrics.json").read_text())
    assert metrics["nfe"]["student"] == {"1": 2, "2": 4}


def test_pairs_start_at_the_learned_prior_bit_for_bit(recipes, tmp_path):
    recipe = recipes("reflow")
    run = flowmap.fit(recipe, tmp_path / "run", log=lambda message: None)
    assert set(run.metrics["student"]) == {"1", "2"}
    pairs = build_samples(resolve(recipe), build_data(resolve(recipe)))
    places = list(range(40))
    x0, cond, x1 = pairs.__getitems__(places)
    assert verify(resolve(recipe), num=12)[0] == 0
    exact = build_prior(resolve(recipe)).exact()
    for part in ([7], [39, 3], places[10:25]):  # however many at once
        start = starts_of(exact, recipe.coupling.seed, part, (1, 8, 8))
        assert torch.equal(start.x1, x1[part]) and torch.equal(start.conditioning["z"], cond["z"][part])
    teacher = flowmap.load_student(dependency_folder(recipes("flow")))
    solved = recipe.coupling.solver(lambda x, t: teacher.velocity(x, t, {"z": cond["z"]}), x1).x
    torch.testing.assert_close(solved.clamp(-1, 1), x0, rtol=0, atol=1 / 127)  # kept as grey levels


def test_a_flow_of_codes(recipes, tmp_path, trained):
    recipe = recipes(
        "flow",
        f"prior.z={{kind: flow, recipe: {trained}/small-codes.yaml, steps: 2}}",
        "name=by-flow",
        "prior.told=false",
    )
    assert [stage.recipe.name for stage in plan(recipe, tmp_path)] == ["small-prior", "small-codes", "by-flow"]
    run = flowmap.fit(recipe, tmp_path / "run", log=lambda message: None)
    student = run.student
    assert student.start(4, torch.Generator().manual_seed(0)).conditioning == {} and student.sample(
        4, steps=1
    ).shape == (
        4,
        1,
        8,
        8,
    )
    noise = torch.randn(4, 4, generator=for_codes(torch.Generator().manual_seed(0)))
    net = flowmap.load_student(dependency_folder(recipes("codes")))
    expected = Heun(steps=2)(lambda z, t: net.velocity(z, t), noise[:, :3]).x
    torch.testing.assert_close(student.prior.codes(noise), expected)


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("flow", "data.conditional=true", "know no conditions"),
        ("flow", "sampler.kind=gamma", "sampler: gamma"),
        ("flow", "prior.scale=0", "prior.scale: 0"),
        ("flow", "prior.kind=gaussian", "objective.weight: needs the variance of a learned prior"),
        ("flow", "objective.weight.kind=inverse_varianc", "did you mean 'inverse_variance'"),
        ("reflow", "coupling.inverted=0.5", "coupling.inverted"),
        ("map", "coupling={kind: styles, source: [a=1], target: [a=2]}", "coupling styles starts at sentences"),
        (
            "prior",
            "student.kind=mlp",
            "variance_guided does not train a student of kind mlp; allowed: conv_prior, transformer_prior",
        ),
        ("prior", "student.size=0", "student.size: 0"),
        ("prior", "student.log_variance=[1,0]", "log_variance"),
    ],
)
def test_what_does_not_fit_is_one_line(recipes, name, change, says):
    with pytest.raises(RecipeError) as caught:
        recipes(name, change)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, changes, says",
    [
        ("map", ["prior.scale=0.5"], "the teacher's paths start at the prior of 'small-prior'"),
        ("map", ["prior.kind=gaussian", "objective.kind=ayf_lmd"], "the recipe's at N(0, I)"),
        ("flow", ["prior.recipe=digits-teacher"], "trains no auxiliary model"),
        ("flow", ["prior.overrides=[trainer.steps=7]"], "is not trained yet"),
        ("flow", ["student={kind: edm_ddpmpp}"], "takes no code z"),
        (
            "flow",
            ["prior.z={kind: flow, recipe: digits-teacher}"],
            "does not match the encoder: it is trained on no codes",
        ),
        ("flow", ["prior.z={kind: mixture, components: 5000}"], "at least twice as many codes"),
    ],
)
def test_what_cannot_be_built_is_one_line(recipes, name, changes, says):
    recipe = recipes(name, *changes)
    with pytest.raises(ValueError) as caught:
        run = resolve(recipe)
        data = build_data(run)
        teacher = build_teacher(run, data)
        student_config(run, data, teacher)
        build_prior(run)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_collapsed_posterior_is_refused_with_its_figure(recipes, trained, tmp_path):
    recipe = recipes("flow")
    recipe = replace(
        recipe, prior=replace(recipe.prior, overrides=("objective.kl=1000", "trainer.steps=30", "name=collapsed"))
    )
    said = []
    with pytest.raises(
        RecipeError, match=r"has a collapsed posterior: 0 of 3 numbers of z are active, KL .* nats in all"
    ):
        flowmap.fit(recipe, tmp_path / "run", log=said.append)
    assert any(line.startswith("collapsed posterior: 0 of 3") for line in said)


def test_codes_of_another_encoder_are_refused(recipes, trained, tmp_path):
    recipe = recipes(
        "flow", f"prior.z={{kind: flow, recipe: {trained}/small-codes.yaml, overrides: ['data.overrides=[seed=5]']}}"
    )
    with pytest.raises(RecipeError, match="does not match the encoder: it is trained on the codes of 'small-prior'"):
        build_prior(resolve(recipe))
