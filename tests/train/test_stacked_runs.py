"""A run of a stacked student, of a teacher's network or another recipe's, from nothing to an exported folder."""

from __future__ import annotations

import pytest
import torch
from conftest import FLOW

import flowmap
from flowmap.build.data import build_data
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import build_teacher
from flowmap.nets import MLP, Stacked
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe

STACK = """\
base: flow
name: stack
teacher: {recipe: FOLDER/flow.yaml}
student: {kind: stacked, net: {kind: START}}
times: {kind: interval}
objective: {kind: ayf_emd, warmup_steps: 2}
sampler: {kind: deterministic, steps: [1, 2]}
trainer: {steps: 3, accelerator: cpu}
evaluation: {teacher_steps: 2, batch_size: 50}
"""


@pytest.fixture(params=["from_teacher", "from_recipe, recipe: FOLDER/flow.yaml"], ids=["teacher", "recipe"])
def recipe(request, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    (tmp_path / "flow.yaml").write_text(FLOW.replace("drop_condition: 0.1", "conditional: false"))
    (tmp_path / "stack.yaml").write_text(STACK.replace("START", request.param).replace("FOLDER", str(tmp_path)))
    return read_recipe(tmp_path / "stack.yaml")


def test_from_nothing_to_an_exported_folder(recipe, tmp_path, command):
    code, out, err = command("fit", "--recipe", tmp_path / "stack.yaml", "--dry-run")
    assert code == 0 and "nothing is missing" in out, out + err
    run = flowmap.fit(recipe, tmp_path / "run", log=lambda message: None)
    student = run.student
    assert student.config.net == Stacked(MLP(width=16, depth=1)) and student.sample(5, steps=2).shape == (5, 2)
    data = build_data(resolve(recipe))
    teacher = build_teacher(resolve(recipe), data)
    start = build_student(resolve(recipe), student_config(resolve(recipe), data, teacher), teacher)
    x, t = torch.randn(5, 2), torch.rand(5)
    torch.testing.assert_close(start.mean_velocity(x, t, t), teacher.guided.velocity(x, t))
    pytest.importorskip("diffusers")
    from diffusers import DiffusionPipeline

    from tests.export.alone import own_modules

    with pytest.MonkeyPatch.context() as patch:
        own_modules(patch, tmp_path)
        code, out, err = command("export", "--student", tmp_path / "run", "--steps", 2, "--out", tmp_path / "exported")
        assert code == 0, err
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "exported", trust_remote_code=True)
        noise = torch.randn(4, 2)
        wanted = student.config.sampler(student.flow_map, noise, {}, steps=2)
        torch.testing.assert_close(
            pipe(latents=noise, num_inference_steps=2, output_type="latent").images, wanted, rtol=1e-5, atol=1e-5
        )
