"""InstaFlow end to end at tiny size: from captioned pictures to a one-step student, and the chain of recipes that names
its parts by recipe alone.
"""

from __future__ import annotations

import pytest
import torch
from conftest import FLOW

import flowmap
from flowmap.nets import Stacked
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.plan.plan import Pairing, Stage, plan, resolve
from flowmap.plan.provenance import baked_scale
from flowmap.recipe import read_recipe

pytest.importorskip("datasets")

REFLOW = """\
base: flow
name: reflow
teacher: {recipe: FOLDER/flow.yaml}
coupling:
  kind: pairs
  teacher: {recipe: FOLDER/flow.yaml, guidance: {kind: classifier_free}}
  guidance: 2.5
  num: 40
  solver: {kind: euler, steps: 3}
student: {kind: from_teacher}
objective: {kind: rectified, distance: {kind: squared}}
evaluation: {teacher_steps: 2, batch_size: 50}
"""
ONE_STEP = """\
base: flow
name: one-step
data: {drop_condition: 0.0}
teacher: {recipe: FOLDER/reflow.yaml}
coupling: {kind: pairs, recipe: FOLDER/reflow.yaml, num: 50, solver: {kind: euler, steps: 3}}
student: {kind: from_recipe, recipe: FOLDER/reflow.yaml}
objective: {kind: endpoint}
sampler: {kind: deterministic, steps: [1]}
evaluation: {teacher_steps: 2, batch_size: 50}
"""


@pytest.fixture
def chain(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    for name, text in (("flow", FLOW), ("reflow", REFLOW), ("one-step", ONE_STEP)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    return tmp_path / "one-step.yaml"


def test_one_fit_builds_all_that_leads_to_one_step(chain, tmp_path, command):
    recipe = read_recipe(chain)
    stages = plan(recipe, tmp_path / "run")
    assert [(type(stage), stage.recipe.name) for stage in stages] == [
        (Stage, "flow"), (Pairing, "reflow"), (Stage, "reflow"), (Pairing, "one-step"), (Stage, "one-step"),
    ]  # fmt: skip
    code, out, err = command("fit", "--recipe", chain, "--out", tmp_path / "run")
    assert code == 0, err
    student = flowmap.load_student(tmp_path / "run")
    assert student.config.baked_guidance == 2.5 and not student.config.arrival and student.sample(4).shape == (4, 2)
    assert "train/squared" in (tmp_path / "run" / "log.csv").read_text().split("\n")[0]
    sample = ("sample", "--student", tmp_path / "run", "--num", 4, "--steps", 1, "--out", tmp_path / "drawn")
    assert command(*sample)[0] == 0
    for words, says in (
        (("--guidance", 2.0), "2.5 is baked in by the pairs"),
        (("--negative-prompt", "red"), "makes one prediction a step"),
    ):
        code, _, err = command(*sample, *words)
        assert code == 2 and says in err and err.count("\n") == 1
    code, _, err = command("export", "--student", tmp_path / "run", "--guidance", 2.0, "--out", tmp_path / "exported")
    assert code == 2 and "2.5 is baked in by the pairs" in err


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("digits-reflow", 2.0),
        ("digits", 2.0),
        ("emoji-reflow", 2.0),
        ("emoji", 2.0),
        ("sd15-reflow", 6.0),
        ("sd15-reflow-1024", 6.0),
        ("sd15", 1.5),
    ],
)
def test_the_scale_in_the_pairs_is_known_down_the_chain(name, scale):
    assert baked_scale(resolve(read_recipe(f"instaflow/{name}"))) == scale
    assert baked_scale(resolve(read_recipe("digits"))) is None


TINY = """
data: {{images: {{root: {images}, size: 16}}, autoencoder: {{source: {pipe}}}, text: {{source: {pipe}}}, held_out: 4,
  reference_images: 8,
        batch_size: 4, global_batch_size: 4}}
trainer: {{steps: 2, accumulate: 1, devices: 1, strategy: auto, precision: "32", accelerator: cpu,
  checkpoint_every_steps: 2}}
metrics: [{{kind: frechet, features: pixels, images: 8}}]
evaluation: {{teacher_steps: 2, batch_size: 8, captions: null}}
log: {{wandb: false, every_steps: 1, samples_every_steps: 0, grid_images: 4}}
"""
PAIRS = "num: 12, shard_items: 8, solver: {kind: euler, steps: 2}"
STAGES = {
    "sd15-reflow": "teacher: {card: CARD}\ncoupling: {teacher: {card: CARD}, PAIRS}\n"
    "objective: {distance: {kind: lpips_huber, net: NET}}\n",
    "sd15-reflow-1024": "teacher: {card: CARD}\ncoupling: {teacher: {card: CARD}, PAIRS}\n"
    "student: {overrides: [+FOLDER/sd15-reflow.yaml]}\n",
    "sd15": "teacher: {overrides: [ON]}\ncoupling: {teacher: {overrides: [ON]}, PAIRS}\nstudent: START\n"
    "objective: {perceptual: {net: NET}, perceptual_after_steps: 1, squared: 0.1}\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True], ids=["one net", "stacked"])
def test_the_full_scale_recipes_from_pictures_on_disk_to_one_step(stacked, tmp_path, monkeypatch, command):
    from tests.support.tiny_pipelines import save
    from tests.train.test_recipes_at_tiny_size import card, pictures

    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    pipe = save("sd", tmp_path / "pipe")
    on, start = f"+{tmp_path}/sd15-reflow-1024.yaml", "{overrides: [ON]}"
    if stacked:
        start = "{kind: stacked, net: {kind: from_recipe, recipe: instaflow/sd15-reflow-1024, overrides: [ON]}}"
    told = {
        "START": start,
        "CARD": str(card(tmp_path / "card.yaml", pipe, (4, 8, 8))),
        "PAIRS": PAIRS,
        "ON": on,
        "FOLDER": str(tmp_path),
    }
    told["NET"] = "'tests.objectives.test_instaflow:one_sided'"
    common = TINY.format(images=pictures(tmp_path / "pictures"), pipe=pipe)
    for name, text in STAGES.items():
        for word, value in told.items():
            text = text.replace(word, value)
        (tmp_path / f"{name}.yaml").write_text(common + text)
    code, out, err = command("fit", "--recipe", "instaflow/sd15", f"+{tmp_path}/sd15.yaml", "--out", tmp_path / "run")
    assert code == 0, err
    student = flowmap.load_student(tmp_path / "run")
    net = student.config.net.net if stacked else student.config.net
    assert (
        isinstance(net, DiffusersModel)
        and isinstance(student.config.net, Stacked) == stacked
        and student.config.baked_guidance == 1.5
    )
    images = student.sample(3, cond={"prompt": "a red cat"}, seed=1)
    assert images.shape == (3, 3, 16, 16) and images.isfinite().all()
    assert "train/perceptual" in (tmp_path / "run" / "log.csv").read_text().split("\n")[0]
    assert not any("decode" in name for name in student.flow_map.state_dict())
    with pytest.raises(ValueError, match="negative_prompt"):
        student.sample(1, cond={"prompt": "a cat", "negative_prompt": "a dog"})
    torch.testing.assert_close(
        student.sample(2, cond={"prompt": "a cat"}, seed=2), student.sample(2, cond={"prompt": "a cat"}, seed=2)
    )
