"""metrics.json: every row from the same noise, the exact student at the floor, the teacher's calls counted."""

import json
from dataclasses import replace

import pytest
import torch

import flowmap
from flowmap.base.files import write_json
from flowmap.build.data import build_data
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import build_teacher
from flowmap.data import Dataset
from flowmap.estimate.dry_run import dry_run
from flowmap.evaluation.conditions import classes_by_law
from flowmap.evaluation.measure import evaluate, measure
from flowmap.metrics import Frechet
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from flowmap.student.folder import save_student
from flowmap.student.student import Student

METRICS = "metrics=[{kind: frechet, images: 500}, {kind: endpoint_error, images: 20}, {kind: straightness, images: 20}]"
FEW = ["evaluation.teacher_steps=16", "evaluation.seed=1", METRICS]


class Exact(torch.nn.Module):
    """The exact map in a student's clothes."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.weight = replace(teacher, flow_steps=48), torch.nn.Parameter(torch.zeros(1))

    def mean_velocity(self, x, t, s, cond=None):
        moving = (t - s).clamp_min(1e-6).unsqueeze(1)
        return torch.where(t.unsqueeze(1) > s.unsqueeze(1), (x - self(x, t, s)) / moving, self.teacher.velocity(x, t))

    def velocity(self, x, t, cond=None):
        return self.teacher.velocity(x, t)

    def forward(self, x, t, s, cond=None):
        return self.teacher.flow_map(x, t, s)


@pytest.fixture(scope="module")
def parts():
    recipe = read_recipe("toy/mixture", FEW)
    run = resolve(recipe)
    data, teacher = build_data(run), build_teacher(run)
    return recipe, data, teacher, student_config(run, data, teacher)


def test_the_exact_student_meets_the_floor_and_the_teacher_does_not_at_two_steps(parts):
    recipe, data, teacher, config = parts
    found = measure(recipe, Student(config, Exact(teacher.guided)), teacher, data, steps=[1, 2])
    one, two = found["student"]["1"], found["student"]["2"]
    assert one["frechet_pixels"] < 5 * found["floor"]["frechet_pixels"] + 1e-3
    assert two["frechet_pixels"] == pytest.approx(one["frechet_pixels"], abs=1e-4)  # an exact map composes
    assert one["endpoint_error"] < 1e-3
    assert found["teacher"]["nfe"] == found["teacher"]["steps"] == 16
    assert found["teacher_few"]["2"]["frechet_pixels"] > 20 * one["frechet_pixels"]
    assert set(found) == {"student", "teacher", "teacher_few", "floor", "seconds", "nfe", "stamp"}
    assert found["nfe"] == {"student": {"1": 1, "2": 2}, "teacher": 16}


class OfItsClass(torch.nn.Module):
    """Carries noise to its class's Gaussian, exactly: centre + std x1."""

    def __init__(self, centres, std):
        super().__init__()
        self.centres, self.std, self.weight = centres, std, torch.nn.Parameter(torch.zeros(1))

    def mean_velocity(self, x, t, s, cond=None):
        return x - (self.centres[cond["class"]] + self.std * x)

    def forward(self, x, t, s, cond=None):
        return x - (t - s)[:, None] * self.mean_velocity(x, t, s, cond)


def unbalanced(share=0.05, *, held_out=1000):
    """Two Gaussians 20 apart; the second has that share of the samples."""
    centres, generator = torch.tensor([[0.0, 0.0], [20.0, 0.0]]), torch.Generator().manual_seed(0)

    def samples(num):
        labels = (torch.rand(num, generator=generator) < share).long()
        return centres[labels] + torch.randn(num, 2, generator=generator), labels

    (x, labels), (out, out_labels) = samples(4000), samples(held_out)
    return Dataset("unbalanced", x, out, labels, out_labels, num_classes=2), OfItsClass(centres, 1.0)


@pytest.mark.parametrize("held_out", [1000, 0])
def test_classes_come_as_the_reference_has_them(parts, held_out):
    """Of 95 and 5 in a hundred: an exact student scores like real data; with classes in turn it is 450 times as far."""
    recipe = replace(parts[0], metrics=(Frechet(images=1000),))
    data, exact = unbalanced(held_out=held_out)
    student = Student(replace(parts[3], num_classes=2), exact)
    key = "frechet_pixels" if held_out else "frechet_pixels_train"
    found = measure(recipe, student, None, data, steps=[1])
    assert found["student"]["1"][key] < 2 * found["floor"][key]
    evenly = replace(recipe, evaluation=replace(recipe.evaluation, classes="uniform"))
    assert measure(evenly, student, None, data, steps=[1])["student"]["1"][key] > 100 * found["floor"][key]
    with pytest.raises(ValueError, match="classes: 'all' is not one of data, uniform"):
        replace(recipe.evaluation, classes="all")


def test_no_class_is_a_class_of_the_law():
    data = unbalanced()[0]
    data.held_out_labels[:500] = -1
    drawn = classes_by_law(data)(200)
    assert int((drawn == -1).sum()) == 100 and 0 < int((drawn == 1).sum()) < 10


def test_every_row_is_compared_with_held_out_and_with_training_samples(parts):
    recipe, data, teacher, config = parts
    found = measure(recipe, Student(config, Exact(teacher.guided)), teacher, data, steps=[1])
    for row in (found["student"]["1"], found["teacher"], found["teacher_few"]["2"], found["floor"]):
        assert {"frechet_pixels", "frechet_pixels_train"} <= set(row)
        assert row["frechet_pixels"] != row["frechet_pixels_train"]
    assert {"frechet_pixels_std", "frechet_pixels_train_std"} <= set(found["floor"])


def test_without_held_out_samples_it_is_said_and_only_training_ones_are_compared_with(parts):
    recipe, data, teacher, config = parts
    alone, said = replace(data, held_out=data.held_out[:0], held_out_labels=data.held_out_labels[:0]), []
    found = measure(recipe, Student(config, Exact(teacher.guided)), None, alone, steps=[1], progress=said.append)
    assert any(line.startswith("nothing is held out") for line in said)
    assert "frechet_pixels" not in found["student"]["1"] and found["student"]["1"]["frechet_pixels_train"] < 0.02


NOISY = [
    "sampler={kind: gamma, gamma: 1.0}",
    "evaluation.seed=1",
    "data.points=500",
    "metrics=[{kind: frechet, images: 100}]",
]


def test_a_sampler_with_noise_measures_alike_in_one_batch_in_many_and_in_two_processes(monkeypatch):
    """Each batch, and each process, drew the same noise: 0.0028 in one batch of 10,000 was 0.081 in batches of 40."""
    found, samples = [], []
    for batch_size in (100, 7):
        recipe = read_recipe("toy/mixture", [*NOISY, f"evaluation.batch_size={batch_size}"])
        run = resolve(recipe)
        data, teacher = build_data(run), build_teacher(run)
        config = student_config(run, data, teacher)
        student = Student(config, build_student(run, config, teacher).eval())
        student.pictures = lambda x0, kept=samples: kept.append(x0) or x0
        found.append(measure(recipe, student, None, data, steps=[4])["student"]["4"]["frechet_pixels"])
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    torch.testing.assert_close(samples[1], samples[0])
    student.pictures, parts = lambda x0: parts.append(x0) or x0, []
    monkeypatch.setattr("flowmap.evaluation.starts.world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("flowmap.evaluation.starts.rank", lambda mine=rank: mine)
        measure(recipe, student, None, data, steps=[4])
    torch.testing.assert_close(torch.stack(parts, 1).flatten(0, 1), samples[0])
    drawn = Student(student.config, student.flow_map).sample(
        100, steps=4, seed=1
    )  # evaluation's samples are those of its seed
    torch.testing.assert_close(drawn, samples[0])


def test_evaluate_reads_the_recipe_beside_the_weights(parts, tmp_path):
    recipe, data, teacher, config = parts
    flow_map = build_student(resolve(recipe), config, teacher)
    save_student(tmp_path / "student", config, flow_map.state_dict(), recipe=recipe.to_yaml(), card="")
    found = evaluate(tmp_path / "student", [1], metrics=["frechet"], out=tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == found
    assert set(found["student"]["1"]) == {"frechet_pixels", "frechet_pixels_train"}
    with pytest.raises(ValueError, match="metrics: 'fid' is not one of frechet"):
        evaluate(tmp_path / "student", [1], metrics=["fid"])
    with pytest.raises(ValueError, match="steps: 0 must be 1 or more"):
        evaluate(tmp_path / "student", [0])


def test_a_student_from_a_teacher_is_the_teacher_at_step_zero(tmp_path, monkeypatch):
    """digits: F(x, t, s) = v(x, t) to the bit, whatever s and the guidance scale are."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    recipe = read_recipe("digits")
    from flowmap.plan.plan import plan

    stage = plan(recipe, tmp_path / "digits")[0]
    data = build_data(stage)
    config = student_config(stage, data, None)
    trained = build_student(stage, config, None)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_(std=0.2)
    save_student(stage.folder / "student", config, trained.state_dict(), recipe=stage.recipe.to_yaml(), card="")
    write_json(stage.folder / "metrics.json", {})
    from flowmap.student.snapshots import save_snapshot

    save_snapshot(stage.folder, 100, 0.05, trained.state_dict())
    run = resolve(recipe)
    teacher = build_teacher(run)
    config = student_config(run, data, teacher)
    student = build_student(run, config, teacher)
    x, t = torch.randn(5, 1, 8, 8), torch.rand(5)
    cond = {"class": torch.tensor([0, 3, 9, 1, -1]), "guidance": torch.tensor([1.0, 1.5, 2.0, 3.0, 1.2])}
    v = teacher.network.flow_map.mean_velocity(x, t, t, {"class": cond["class"]})
    torch.testing.assert_close(student.mean_velocity(x, t, t * torch.rand(5), cond), v, rtol=0, atol=0)
    assert teacher.calls_per_step == 2


def test_a_dry_run_says_what_it_would_do(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    lines = dry_run(read_recipe("digits"), None)
    assert lines[0].startswith("[1/2] digits-teacher: ") and "M parameters" in lines[1]
    assert lines[-1] == "nothing is missing on this machine"
    lines = dry_run(read_recipe("lediflow/lhq"), None)
    assert lines[-1].startswith("missing on this machine: data.")
    assert not any(tmp_path.iterdir())


def test_public_names_are_there():
    assert all(getattr(flowmap, name) for name in flowmap.__all__)
