"""Samples of a teacher as data: those of its exact flow, whoever makes them; a student trains on them and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import flowmap
from flowmap.base.schema import RecipeError
from flowmap.build.data import build_data
from flowmap.compare.finished import markdown, read_runs, tabulated
from flowmap.data.pairs import noise_of
from flowmap.estimate.dry_run import dry_run
from flowmap.nets import module_builders
from flowmap.plan.plan import Sampling, resolve
from flowmap.prepare.make_pairs import make_pairs

pytest.importorskip("datasets")

MEAN, STD = (0.3, -0.5, 0.1), 0.4
BLANK = "data={kind: teacher_samples, shape: [6], num: 30, held_out: 9, shard_items: 8, dtype: float32, batch_size: 8}"
SETTINGS = ["name=blind", BLANK, "student={kind: from_teacher}", "trainer.steps=2", "trainer.accelerator=cpu"]
SETTINGS += ["metrics=[{kind: frechet, features: pixels, images: 8, reference_images: 8}]", "log.wandb=false"]
SETTINGS += ["sampler.steps=[1, 2]", "evaluation.teacher_steps=4", "data.steps=200"]


class Exact(nn.Module):
    """The velocity of data of N(MEAN of its class, STD^2), the same in all coordinates; its embedding of time changes
    nothing.
    """

    def __init__(self):
        super().__init__()
        self.time, self.scale = nn.Linear(1, 4), nn.Parameter(torch.ones(()))
        self.mean = nn.Embedding.from_pretrained(torch.tensor([*MEAN, sum(MEAN) / 3])[:, None], freeze=False)

    def forward(self, x, t, label):
        mean, t = self.mean(label), t[:, None]
        level = x.mean(1, keepdim=True) - (1 - t) * mean
        x0 = mean + (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2 / 6) * level
        return self.scale * (x - x0) / t.clamp_min(1e-6) + 0 * self.time(t).sum(1, keepdim=True)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    for table in ("BUILDERS", "_GIVEN", "_WEIGHTS"):
        monkeypatch.setattr(module_builders, table, {})
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    return tmp_path


def recipe_of(*overrides, prediction="velocity", clock="flow"):
    """A recipe with the module as its teacher, as fit makes it, and the settings of its data."""
    from flowmap.build.given import with_given

    return with_given(flowmap.read_recipe("toy/mixture", [*SETTINGS, *overrides]), wrapped(prediction, clock))


def wrapped(prediction="velocity", clock="flow"):
    torch.manual_seed(0)
    named = {"classes": 3, "null_class": 3, "time_embedding": "time", "name": "exact"}
    return flowmap.wrap(Exact(), prediction=prediction, clock=clock, **named)


def jump(i: int) -> torch.Tensor:
    """Where the exact flow of mean 0 takes the noise of sample i."""
    return (STD * 6**0.5 * noise_of(1, i, (6,)).mean()).expand(6)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_they_are_those_of_the_exact_flow(place):
    run = resolve(recipe_of())
    index = make_pairs(run.sampled)
    data = build_data(run)
    assert len(data) == 30 and data.num_held_out == 9 and index["rows"] == 39 and index["nfe"] == 200
    x0, cond = data.__getitems__(range(30))
    assert cond["class"].tolist() == [i % 3 for i in range(30)]
    exact = torch.stack([MEAN[i % 3] + jump(i) for i in range(39)])
    torch.testing.assert_close(x0, exact[:30], rtol=0, atol=0.02)  # Euler's error at 200 steps
    held_out, cond = data.held_out_samples()
    torch.testing.assert_close(held_out, exact[30:], rtol=0, atol=0.02)
    assert cond["class"].tolist() == [i % 3 for i in range(30, 39)] == data.held_out_labels.tolist()
    assert torch.equal(data.reference[3:5], x0[3:5]) and data.reference_labels.tolist() == [i % 3 for i in range(30)]
    places = torch.tensor([8, 0])
    assert torch.equal(data.held_out_conditions_at(places)["class"], data.held_out_labels[places])


def test_any_part_of_any_process_at_any_time_gives_the_same_files(place):
    run = resolve(recipe_of())
    make_pairs(run.sampled)
    whole = files(Sampling(run.sampled).folder)
    assert Sampling(run.sampled).complete
    other = place / "other"
    for part in ((1, 3), (2, 3)):
        assert make_pairs(run.sampled, other, shard=part, batch_size=256) is None
    (other / "shard-00001.arrow").write_bytes(b"torn")
    (other / "shard-00002.json").unlink()
    with pytest.raises(ValueError, match="data.root: .*is not complete"):
        build_data(resolve(recipe_of(f"data.root={other}")))
    for part in ((1, 3), (2, 3), (0, 3)):
        made = make_pairs(run.sampled, other, shard=part, batch_size=256)
    assert made is not None and files(other) == whole


def test_without_classes_and_with_a_solver(place):
    run = resolve(recipe_of("data.conditional=false", "data.steps=null", "data.solver={kind: heun, steps: 160}"))
    assert make_pairs(run.sampled)["nfe"] == 320
    data = build_data(run)
    assert data.num_classes is None and data.labels is None and data.conditions_at(torch.arange(3)) == {}
    exact = torch.stack([sum(MEAN) / 3 + jump(i) for i in range(30)])
    torch.testing.assert_close(data.__getitems__(range(30))[0], exact, rtol=0, atol=0.01)


def test_a_student_trains_on_them_and_its_figures_say_so(place):
    lines = []
    recipe = flowmap.read_recipe("toy/mixture", SETTINGS)
    run = flowmap.fit(recipe, place / "run", teacher=wrapped(), log=lines.append)
    note = "all data are samples of the teacher 'exact': figures compare with further samples of it, not with real data"
    assert run.metrics["data"] == note and f"note: {note}" in lines
    assert f"Note: {note}." in (place / "run" / "student" / "README.md").read_text()
    assert any("39 samples of the teacher ->" in line for line in lines)
    assert run.student.config.num_classes == 3 and run.student.config.baked_guidance is None
    from flowmap.cli.terminal import summary

    assert summary(run.metrics).endswith(f"note: {note}")
    runs = read_runs([place / "run"])
    assert tabulated(runs)["data"] == note and f"Note: {note}." in markdown(tabulated(runs), runs)
    again = []
    flowmap.fit(recipe, place / "run", teacher=wrapped(), log=again.append, resume=True)
    assert sum("complete in" in line for line in again) == 2, again


def test_a_teacher_that_a_recipe_trains(place, capsys, command):
    teacher = (
        "name: taught\ndata: {kind: toy, points: 200, batch_size: 16}\nstudent: {kind: mlp, width: 16, depth: 1}\n"
    )
    rest = "objective: {kind: flow_matching}\ntrainer: {steps: 2, accelerator: cpu}\nlog: {wandb: false}\n"
    (place / "taught.yaml").write_text(teacher + rest)
    data = "data={kind: teacher_samples, num: 20, held_out: 10, steps: 4, batch_size: 8}"
    given = [f"teacher={{recipe: {place / 'taught.yaml'}}}", data, "metrics=[]", *SETTINGS[2:5], "log.wandb=false"]
    code, out, err = command("fit", "--recipe", "toy/mixture", "name=blind", *given, "--dry-run")
    assert code == 0 and "[2/3] blind: 30 samples of the teacher" in out and "samples of shape (2,)" in out, err
    code, out, err = command("fit", "--recipe", "toy/mixture", "name=blind", *given, "evaluation.teacher_steps=2")
    assert code == 0 and "note: all data are samples of the teacher" in out, err
    code, out, err = command("pairs", "--recipe", "toy/mixture", "name=blind", *given, "--verify", "3")
    assert code == 0 and "differ by at most 0 " in out, err
    code, out, err = command("pairs", "--recipe", "toy/mixture", "name=blind", *given)
    assert code == 0 and "30 samples of the teacher of shape (2,), 4 network calls each" in out, err


def test_the_dry_run_prices_them():
    given = [
        "data={kind: teacher_samples, num: 100000, steps: 50, conditional: false}",
        "teacher={card: edm-cifar10-uncond}",
    ]
    given += [
        "teacher.guidance=null",
        "student={kind: from_teacher}",
        "trainer.accelerator=gpu",
        "trainer.steps=100000",
        "metrics=[]",
    ]
    lines = dry_run(
        flowmap.read_recipe("rfpp/cifar10", [*given, "coupling={kind: independent}", "objective={kind: ayf_emd}"]), None
    )
    line = next(line for line in lines if "samples of the teacher:" in line)
    assert "101,000 samples of the teacher: " in line and "GPU-hours, 0.2" in line and "GiB on disk" in line


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["teacher=null"], "data: teacher_samples are those of the recipe's teacher, and it has none"),
        (["data.solver={kind: heun}"], "data.steps: give steps (of Euler) or a solver"),
        (["data.guidance=2.0"], "data.guidance: 2.0 wants teacher.guidance"),
        (["data.num=0"], "data.num: 0 must be 1 or more"),
        (["data.dtype=int8"], "data.dtype: 'int8' is not one of"),
    ],
)
def test_wrong_settings_are_one_line(place, overrides, says):
    with pytest.raises(RecipeError) as caught:
        flowmap.read_recipe("toy/mixture", [*SETTINGS, *overrides])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_does_not_fit_is_found_before_anything_is_made(place):
    with pytest.raises(RecipeError, match="data.shape: nothing states the shape"):
        assert resolve(flowmap.read_recipe("toy/mixture", [*SETTINGS, "data.shape=[]"])).stages
    with pytest.raises(RecipeError, match="coupling.seed: 1 is that of data.seed"):
        recipe_of("coupling={kind: pairs, seed: 1, teacher: {card: exact}}", "objective={kind: rectified}")
    with pytest.raises(RecipeError, match=r"data.shape: .*give"):
        flowmap.fit(flowmap.read_recipe("toy/mixture", [*SETTINGS, "data.shape=[]"]), teacher=wrapped())
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("base", "overrides", "says"),
    [
        ("sd15", [], "data: the teacher 'sd15' reads text, and teacher_samples have no captions"),
        ("emoji32", [], "data: the teacher 'emoji32' reads text, and teacher_samples have no captions"),
        ("imagenet512", ["metrics=[]"], "data.pictures: the teacher's samples [4, 64, 64] are no pictures in [-1, 1]"),
        (
            "imagenet512",
            ["data.pictures=false"],
            "reference: auto is of real pictures, and the data are samples of the",
        ),
    ],
)
def test_teachers_of_text_and_latents_called_pictures_are_refused(base, overrides, says):
    with pytest.raises(RecipeError) as caught:
        dry_run(flowmap.read_recipe(base, ["data={kind: teacher_samples, num: 100}", *overrides]), None)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_prediction_named_wrongly_is_found_before_the_samples_are_made(place):
    with pytest.raises(
        RecipeError, match="teacher 'exact': is named wrongly, or not trained: .* on its own samples is"
    ):
        make_pairs(resolve(recipe_of(prediction="x0")).sampled)
    assert not list(place.rglob("shard-*"))


def test_samples_of_another_teacher_or_solver_are_refused(place):
    make_pairs(resolve(recipe_of()).sampled, place / "made")
    at = f"data.root={place / 'made'}"
    build_data(resolve(recipe_of(at)))
    with pytest.raises(RecipeError, match="data.root: .*samples of another teacher or another solver: solver.steps"):
        build_data(resolve(recipe_of(at, "data.steps=100")))
    with pytest.raises(RecipeError, match="data.root: .*: holds 39 samples, not 29 and 9 held out"):
        build_data(resolve(recipe_of(at, "data.num=29")))
    index = json.loads((place / "made" / "index.json").read_text())
    (place / "made" / index["shards"][0]["file"]).write_bytes(b"torn")
    with pytest.raises(RecipeError, match="shard-00000.arrow"):
        build_data(resolve(recipe_of(at)))
