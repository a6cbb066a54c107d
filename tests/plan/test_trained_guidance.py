"""Guidance without effect, or from a velocity that no network learned, is refused in one line before training."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import flowmap
from flowmap.base.files import write_tensors
from flowmap.base.schema import RecipeError
from flowmap.build.teacher import build_teacher
from flowmap.estimate.price import guided_calls
from flowmap.plan.guidance import check_guidance, guidance_warnings
from flowmap.plan.plan import resolve
from flowmap.plan.provenance import pairs_identity
from flowmap.recipe import read_recipe
from flowmap.teachers.guidance import ClassifierFree

FREE = "{kind: classifier_free, scale: [1.0, 2.0], default: 1.5}"
TEACHER = """
name: taught
data: {{kind: toy, points: 200, batch_size: 16, drop_condition: {drop}}}
student: {{kind: mlp, width: 16, depth: 1}}
times: {{kind: uniform}}
objective: {{kind: flow_matching}}
trainer: {{steps: 2, accelerator: cpu}}
log: {{wandb: false}}
"""
STUDENT = """
name: learner
data: {{kind: toy, points: 200, batch_size: 16}}
teacher: {{recipe: {root}/taught.yaml, guidance: {guidance}}}
student: {{kind: from_teacher}}
objective: {{kind: ayf_emd}}
trainer: {{steps: 2, accelerator: cpu}}
log: {{wandb: false}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))

    def write(drop=0.0, guidance=FREE):
        (tmp_path / "taught.yaml").write_text(TEACHER.format(drop=drop))
        (tmp_path / "learner.yaml").write_text(STUDENT.format(root=tmp_path, guidance=guidance))
        return tmp_path / "learner.yaml"

    return write


NEVER = "asks the teacher without a condition, and 'taught' never learned that: its data.drop_condition is 0"


def test_a_teacher_that_never_dropped_its_condition_is_not_asked_without_it(place, tmp_path, command):
    path = place(drop=0.0)
    with pytest.raises(RecipeError, match="teacher.guidance: classifier_free asks.*never learned that"):
        flowmap.fit(read_recipe(path), tmp_path / "run", log=lambda message: None)
    assert not (tmp_path / "runs").exists(), "found before the teacher is trained"
    code, out, err = command("fit", "--recipe", path, "--dry-run")
    assert code == 2 and NEVER in err and len(err.strip().splitlines()) == 1
    check_guidance(resolve(read_recipe(place(drop=0.1))))


def test_a_student_that_drops_conditions_needs_a_teacher_that_did(place):
    path = place(drop=0.0, guidance="null")
    check_guidance(resolve(read_recipe(path)))
    with pytest.raises(RecipeError, match=f"data.drop_condition: above 0 {NEVER}"):
        check_guidance(resolve(read_recipe(path, ["data.drop_condition=0.2"])))


def test_what_a_teacher_starts_from_counts(place, tmp_path):
    """A teacher tuned without dropping, from one that dropped: it still knows the velocity without a condition."""
    path = place(drop=0.1)
    tuned = TEACHER.format(drop=0.0).replace("name: taught", "name: tuned").replace(
        "{kind: mlp, width: 16, depth: 1}", f"{{kind: from_recipe, recipe: {tmp_path / 'taught.yaml'}}}"
    )  # fmt: skip
    (tmp_path / "tuned.yaml").write_text(tuned)
    check_guidance(resolve(read_recipe(path, [f"teacher.recipe={tmp_path / 'tuned.yaml'}"])))


def pictures(folder):
    """Grey pictures in one folder: no classes."""
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for i in range(20):
        image.new("L", (8, 8), 10 * i).save(folder / f"{i}.png")


@pytest.mark.parametrize("dry", [True, False])
def test_guidance_on_data_without_conditions_is_refused(dry, tmp_path, monkeypatch, command):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    write_tensors(tmp_path / "x" / "0.safetensors", {"x0": torch.zeros(20, 1, 8, 8)})
    pictures(tmp_path / "pictures")
    more = ["--dry-run"] if dry else ["--out", tmp_path / "run"]
    for override, says in (
        ("data.conditional=false", "teacher.guidance: classifier_free has no effect: data.conditional is false"),
        (f"data={{kind: latents, root: {tmp_path / 'x'}}}", "the data has neither classes nor text; leave it out"),
        (
            f"data={{kind: folder, size: 8, channels: 1, root: {tmp_path / 'pictures'}}}",
            "the data has neither classes nor text; leave it out",
        ),
    ):
        code, _, err = command("fit", "--recipe", "digits", f"teacher.guidance={FREE}", override, "metrics=[]", *more)
        assert code == 2 and says in err, err


def test_guidance_in_the_target_needs_a_student_that_learns_both(place):
    overrides = ["objective={kind: meanflow, omega: 2.0}", "teacher=null", "student={kind: mlp, width: 16, depth: 1}"]
    with pytest.raises(RecipeError, match="objective.omega: .* data.drop_condition is 0"):
        check_guidance(resolve(read_recipe(place(), overrides)))
    for more in (["data.drop_condition=0.1"], ["objective.omega=0.5", "objective.kappa=0.5"]):
        check_guidance(resolve(read_recipe(place(), [*overrides, *more])))


def test_where_it_cannot_be_known_it_is_a_warning():
    lines = guidance_warnings(read_recipe("digits", ["teacher.card=edm-cifar10", f"teacher.guidance={FREE}"]))
    assert len(lines) == 1 and "classifier_free asks 'edm-cifar10' without a class" in lines[0]
    assert guidance_warnings(read_recipe("digits", [f"teacher.guidance={FREE}"])) == []


def test_a_network_without_a_label_for_none_and_one_that_reads_the_scale_itself(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from tests.support import tiny_nets, tiny_pipelines

    torch.manual_seed(0)
    net = diffusers.UNet2DModel.from_config(tiny_nets.unet().config, num_class_embeds=10)
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "unet")
    tiny_pipelines.save("flux", tmp_path / "flux")
    for name, shape in (("unet", [3, 16, 16]), ("flux", [4, 8, 8])):
        (tmp_path / f"{name}.yaml").write_text(
            f"kind: diffusers\nsource: {tmp_path / name}\nshape: {shape}\nnum_classes: 10\n"
        )
    recipe = lambda name, guidance, *more: read_recipe(
        "digits", [f"teacher.card={tmp_path / name}.yaml", f"teacher.guidance={guidance}", *more]
    )
    for guidance, more in ((FREE, ()), ("null", ("data.drop_condition=0.1",))):
        with pytest.raises(RecipeError, match="a UNet2DModel has no label for none"):
            check_guidance(resolve(recipe("unet", guidance, *more)))
    check_guidance(resolve(recipe("unet", "null")))
    with pytest.raises(
        RecipeError, match=r"reads a guidance scale \(guidance_embeds\): give teacher.guidance {kind: embedded}"
    ):
        check_guidance(resolve(recipe("flux", FREE)))
    check_guidance(resolve(recipe("flux", "{kind: embedded}")))


@pytest.mark.parametrize(
    ("interval", "says"),
    [
        ("[0.7, 0.3]", "teacher.guidance.interval: (0.7, 0.3) must be two rising times in [0, 1]"),
        ("[0.5, 0.5]", "teacher.guidance.interval: (0.5, 0.5) must be two rising times in [0, 1]"),
        ("[-0.1, 0.5]", "teacher.guidance.interval[0]: -0.1 must lie in [0, 1]"),
        ("[0.3, 1.2]", "teacher.guidance.interval[1]: 1.2 must lie in [0, 1]"),
        ("[0.3]", "teacher.guidance.interval: "),
    ],
)
@pytest.mark.parametrize("kind", ["classifier_free", "autoguidance, snapshot: 0.5", "embedded"])
def test_a_wrong_interval_is_one_line(kind, interval, says):
    with pytest.raises(RecipeError) as caught:
        read_recipe("digits", [f"teacher.guidance={{kind: {kind}, interval: {interval}}}"])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_interval_reaches_the_teacher_its_calls_and_its_price():
    """The exact teacher of the mixture, 10 Euler steps: those from t = 0.7, 0.6, 0.5, 0.4 and 0.3 are guided."""
    free = "teacher.guidance={kind: classifier_free, default: 2.0, interval: [0.3, 0.7]}"
    recipe = read_recipe("toy/mixture", [free])
    teacher = build_teacher(resolve(recipe))
    assert teacher.calls(10) == 15 and teacher.calls_per_step == 2
    assert guided_calls(recipe.teacher.guidance) == pytest.approx(1.4)
    x, cond = torch.randn(5, 2), {"class": torch.arange(5)}
    for t, scale in ((0.2, 1.0), (0.5, 2.0)):
        alone = ClassifierFree(teacher.guided.teacher.teacher, default=scale)
        time = torch.full((5,), t)
        torch.testing.assert_close(teacher.guided.velocity(x, time, cond), alone.velocity(x, time, cond))


def test_an_interval_of_all_times_is_in_no_hash():
    free = "teacher.guidance={{kind: classifier_free, interval: {}}}"
    default, whole, inner = (
        read_recipe("toy/mixture", [text])
        for text in ("teacher.guidance={kind: classifier_free}", free.format([0.0, 1.0]), free.format([0.3, 0.7]))
    )
    assert default.hash() == whole.hash() != inner.hash()
    guided = "coupling.teacher.guidance={{kind: classifier_free, interval: {}}}"
    whole, inner = (
        pairs_identity(resolve(read_recipe("rfpp/digits", [guided.format(at)])))["teacher"]["guidance"]
        for at in ("[0, 1]", "[0.3, 0.7]")
    )
    assert whole == {"kind": "classifier_free"} and inner == {**whole, "interval": [0.3, 0.7]}
