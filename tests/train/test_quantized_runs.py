"""Runs with quantised frozen weights: a LoRA student's base and a teacher alone, resuming, folders, refusals."""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import flowmap
from flowmap.base.files import read_tensors
from flowmap.nets.lora import fingerprint
from flowmap.nets.pretrained import load_pretrained
from flowmap.nets.quantized import quantized_layers
from flowmap.plan.plan import resolve
from flowmap.student.folder import load_student
from flowmap.train.fit import fit
from flowmap.train.module import DistillModule
from flowmap.train.stage import Built
from tests.train.test_lora_runs import RECIPE, pipeline_in, quiet, trained

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
NF4 = ["quantize.frozen=nf4", "student.lora.targets=[to_q, net.2]", "ema.snapshot_every_steps=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("quantised")
    pipeline_in(place)
    (place / "lora.yaml").write_text(RECIPE.format(name="lora", card=place / "card.yaml", dropout=0.0))
    return place


def test_a_run_resumes_to_the_bit_and_its_folder_names_the_whole_base(place, tmp_path, monkeypatch):
    recipe = flowmap.read_recipe(place / "lora.yaml", NF4)
    whole = fit(recipe, tmp_path / "whole", log=quiet).folder
    original = DistillModule.training_step

    def stopped(self, batch, batch_idx):
        if self.global_step == 5:
            raise RuntimeError("stopped")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DistillModule, "training_step", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(recipe, tmp_path / "run", log=quiet)
    monkeypatch.undo()
    said = []
    fit(recipe, tmp_path / "run", resume=True, log=said.append)
    assert "resuming at step 3" in said
    one, two = (read_tensors(folder / "student" / "model.safetensors") for folder in (whole, tmp_path / "run"))
    assert all(map(trained, one)) and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert any(bool(tensor.any()) for name, tensor in one.items() if ".lora_B." in name), "they are trained"
    base = json.loads((whole / "student" / "config.json").read_text())["base"]
    assert base["sha256"] == fingerprint(load_pretrained(str(place / "pipe"))[1].model)
    assert load_student(whole).sample(2, steps=1, cond={"class": 1}).isfinite().all()


def test_teacher_student_and_average_hold_one_quantised_base(place):
    built = Built.of(resolve(flowmap.read_recipe(place / "lora.yaml", [*NF4, "trainer.precision=bf16"])), print)
    teacher = built.teacher.network.flow_map
    codes = [{id(q.codes) for q in quantized_layers(net)} for net in (teacher, built.module.student)]
    assert codes[0] and codes[0] == codes[1] == {id(q.codes) for q in quantized_layers(built.module.averaged)}
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.8])
    cond = {"class": torch.arange(3), "guidance": torch.ones(3)}
    built.module.student.eval()
    assert torch.equal(built.module.student.velocity(x, t, cond), teacher.velocity(x, t, cond))


def test_a_teacher_alone_is_quantised_and_the_student_starts_from_its_whole_weights(place):
    settings = ["student={kind: from_teacher}", "quantize.frozen=int8"]
    built = Built.of(resolve(flowmap.read_recipe(place / "lora.yaml", settings)), print)
    assert quantized_layers(built.teacher.network.flow_map) and not quantized_layers(built.module.student)
    whole = load_pretrained(str(place / "pipe"))[1].model.state_dict()
    start = built.module.student.state_dict()
    assert all(torch.equal(start[f"net.model.{name}"], value) for name, value in whole.items())


def test_the_dry_run_counts_codes_instead_of_weights(place, command):
    found = {}
    for form in ("null", "int8", "nf4"):
        words = ["--out", place / "none", "--dry-run", "trainer.precision=bf16", f"quantize.frozen={form}"]
        code, out, err = command("fit", "--recipe", place / "lora.yaml", *words)
        assert code == 0, err
        (found[form],) = [line for line in out.splitlines() if "memory for each device, estimated" in line]
    assert "frozen networks (" not in found["null"] and "dequantised" not in found["null"]
    assert "frozen networks (int8)" in found["int8"] and "frozen networks (nf4)" in found["nf4"]
    assert "weights in bf16 and a dequantised layer" in found["nf4"]


def test_what_cannot_be_quantised_is_one_line(place, tmp_path, command, monkeypatch):
    words = ["fit", "--recipe", place / "lora.yaml", "--out", tmp_path / "run", "--dry-run"]
    nothing = ["teacher=null", "student={kind: mlp}", "objective={kind: flow_matching}"]
    for recipe, settings, says in (
        (words, ["quantize.frozen=int4"], "quantize.frozen: 'int4' is not one of int8, nf4, null"),
        (words, [*nothing, "quantize.frozen=nf4"], "quantize.frozen: 'nf4' wants frozen weights"),
        (
            ["fit", "--recipe", "toy/mixture", *words[3:]],
            ["quantize.frozen=nf4"],
            "quantize.frozen: 'nf4' wants a teacher with weights",
        ),
    ):
        code, _, err = command(*recipe, *settings)
        assert code == 2 and says in err.strip().splitlines()[-1] and "Traceback" not in err, (settings, err)
    monkeypatch.setattr("flowmap.nets.quantized.find_spec", lambda name: None)
    code, _, err = command(*words, "quantize.frozen=nf4")
    assert code == 2 and "needs bitsandbytes: pip install 'flowmap-distillation[quantize]'" in err
