"""A diffusers pipeline on disk as the teacher: from its folder to a student that samples; pipelines that do not fit."""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import flowmap
from flowmap.build.teacher import build_teacher
from flowmap.plan.plan import resolve
from flowmap.train.stage import Built
from tests.support.tiny_nets import dit, with_random_weights

diffusers = pytest.importorskip("diffusers")

RECIPE = """
data: {{kind: digits, batch_size: 16}}
teacher: {{card: {card}, guidance: {guidance}}}
student: {{kind: from_teacher}}
times: {{kind: mixture, base: {{kind: interval}}, one_step: 0.125, diagonal: 0.25}}
objective: {{kind: ayf_emd, warmup_steps: 2}}
sampler: {{kind: deterministic, steps: [1, 2]}}
trainer: {{steps: 4, accelerator: cpu, checkpoint_every_steps: 4}}
metrics: [{{kind: frechet, features: pixels, images: 128, reference_images: 128}}]
evaluation: {{teacher_steps: 3, batch_size: 64}}
log: {{every_steps: 2, wandb: false}}
"""


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A class-conditional DiT with random weights, as DiTPipeline saves it without autoencoder, and a card for it."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    torch.manual_seed(0)
    folder = tmp_path / "pipe"
    with_random_weights(dit(channels=1, num_layers=3), scale=0.15).save_pretrained(folder / "transformer")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    parts = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(parts))
    (tmp_path / "card.yaml").write_text(f"kind: diffusers\nsource: {folder}\nshape: [1, 8, 8]\nnum_classes: 10\n")
    return tmp_path


def recipe_in(folder, guidance="{kind: classifier_free, scale: [1.0, 2.0], default: 1.5}"):
    (folder / "recipe.yaml").write_text(RECIPE.format(card=folder / "card.yaml", guidance=guidance))
    return folder / "recipe.yaml"


KINDS = ("classifier_free", "autoguidance, skip_blocks: [1]")
KINDS_WITH_SCALES = [f"{{kind: {kind}, scale: [1.0, 2.0], default: 1.5}}" for kind in KINDS]


@pytest.mark.parametrize("guidance", KINDS_WITH_SCALES)
def test_from_a_pipelines_folder_to_a_student(pipeline, command, guidance):
    path = recipe_in(pipeline, guidance)
    code, out, err = command("fit", "--recipe", path, "--dry-run")
    assert code == 0 and "nothing is missing" in out, err
    code, out, err = command("fit", "--recipe", path, "--out", pipeline / "run")
    assert code == 0 and "teacher 3" in out, err
    student = flowmap.load_student(pipeline / "run")
    images = student.sample(4, steps=2, cond={"class": 3}, guidance=2.0)
    assert images.shape == (4, 1, 8, 8) and images.isfinite().all()
    teacher = build_teacher(resolve(flowmap.read_recipe(path)))
    assert set(teacher.network.flow_map.state_dict()) < set(student.flow_map.state_dict())
    code, out, err = command(
        "sample", "--student", pipeline / "run", "--steps", 1, "--num", 4, "--out", pipeline / "drawn"
    )
    assert code == 0, err


def test_in_bf16_the_teacher_is_held_in_bfloat16_and_the_student_starts_from_all_its_digits(pipeline):
    path = recipe_in(pipeline, KINDS_WITH_SCALES[1])
    plain, half = (
        Built.of(resolve(flowmap.read_recipe(path, [f"trainer.precision={name}"])), print) for name in ("32", "bf16")
    )
    mine = half.module.student.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in plain.module.student.state_dict().items())
    (strong, weak), (other, _) = half.teacher.modules, plain.teacher.modules
    assert strong.held == weak.held == torch.bfloat16 and other.held is None
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert strong.net.model.transformer_blocks[0].ff.net[2].weight.dtype == torch.bfloat16
    kept = Built.of(
        resolve(flowmap.read_recipe(path, ["trainer.precision=bf16", "trainer.teacher_precision=32"])), print
    )
    assert {p.dtype for net in kept.teacher.modules for p in net.parameters()} == {torch.float32}


def test_what_does_not_fit_is_one_line(pipeline, command):
    path, card = recipe_in(pipeline), pipeline / "card.yaml"
    good = card.read_text()
    for text, says in (
        (good.replace("[1, 8, 8]", "[4, 64, 64]"), "in_channels: 1: it denoises 1 channels, the card's shape says 4"),
        (good.replace("[1, 8, 8]", "[1, 64, 64]"), "its samples are (1, 8, 8)"),
        (good.replace(str(pipeline / "pipe"), str(pipeline / "nowhere")), "no diffusers pipeline is there"),
        ("kind: diffusers\n", "source: a card of kind diffusers names"),
    ):
        card.write_text(text)
        code, out, err = command("fit", "--recipe", path, "--out", pipeline / "run")
        last = err.strip().splitlines()[-1]
        assert code == 2 and last.startswith("flowmap: ") and says in last and "Traceback" not in err
        assert not list((pipeline / "run").glob("*"))
    card.write_text(good.replace(str(pipeline / "pipe"), "nobody/nothing"))
    code, out, err = command("fit", "--recipe", path, "--dry-run")
    assert code == 3 and "nobody/nothing: not on this machine" in out
