"""LoRA students of a diffusers pipeline: a run saves adapters and branches alone and resumes bit-equal."""

from __future__ import annotations

import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import flowmap
from flowmap.base.files import read_tensors
from flowmap.build.teacher import build_teacher
from flowmap.nets.lora import fingerprint
from flowmap.plan.plan import resolve
from flowmap.student.folder import load_student, save_student
from flowmap.train.fit import fit
from flowmap.train.module import DistillModule
from flowmap.train.stage import Built
from flowmap.train.strategy import read_checkpoint
from tests.support.tiny_nets import dit, with_random_weights

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

RECIPE = """
name: {name}
data: {{kind: digits, batch_size: 8}}
teacher: {{card: {card}, guidance: {{kind: classifier_free, scale: [1.0, 2.0], default: 1.5}}}}
student: {{kind: from_teacher, lora: {{rank: 2, dropout: {dropout}}}}}
times: {{kind: mixture, base: {{kind: interval}}, one_step: 0.125, diagonal: 0.25}}
objective: {{kind: ayf_emd, warmup_steps: 2}}
optimizer: {{lr: 1.0e-2}}
sampler: {{kind: deterministic, steps: [1, 2]}}
trainer: {{steps: 6, accelerator: cpu, checkpoint_every_steps: 3}}
ema: {{kind: power, std: 0.1, snapshot_stds: [0.05, 0.1], snapshot_every_steps: 3}}
metrics: [{{kind: frechet, features: pixels, images: 64, reference_images: 64}}]
evaluation: {{teacher_steps: 2, batch_size: 64}}
log: {{every_steps: 1, wandb: false, grid_images: 4}}
"""


def pipeline_in(place):
    """Save the pipeline and its card."""
    torch.manual_seed(0)
    with_random_weights(dit(channels=1), scale=0.15).save_pretrained(place / "pipe" / "transformer")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(place / "pipe" / "scheduler")
    parts = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (place / "pipe" / "model_index.json").write_text(json.dumps(parts))
    (place / "card.yaml").write_text(f"kind: diffusers\nsource: {place / 'pipe'}\nshape: [1, 8, 8]\nnum_classes: 10\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A class-conditional DiT with random weights as a pipeline's folder, a card for it, and two recipes."""
    place = tmp_path_factory.mktemp("lora")
    pipeline_in(place)
    for name, dropout in (("plain", 0.0), ("dropout", 0.2)):
        (place / f"{name}.yaml").write_text(RECIPE.format(name=name, card=place / "card.yaml", dropout=dropout))
    return place


@pytest.fixture(scope="module")
def run(place):
    return fit(flowmap.read_recipe(place / "plain.yaml"), place / "runs" / "plain", log=quiet).folder


def quiet(message):
    pass


def trained(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name or ".arrival." in name or ".guidance." in name


def test_a_run_keeps_adapters_and_branches_alone(place, run):
    shipped, state = (
        read_tensors(run / "student" / "model.safetensors"),
        read_checkpoint(run / "checkpoints" / "last.ckpt"),
    )
    assert shipped and all(map(trained, shipped)) and all(map(trained, state["state_dict"]))
    assert {name.split(".", 2)[2] for name in state["state_dict"] if name.startswith("averages.0.")} == set(shipped)
    assert len(state["state_dict"]) == 3 * len(shipped)  # the student and two averages
    assert len(state["optimizer_states"][0]["state"]) == len(shipped)
    assert all(set(read_tensors(path)) == set(shipped) for path in (run / "ema").iterdir())
    adapters = [(tensor, name) for name, tensor in shipped.items() if ".lora_B." in name]
    assert adapters and all(bool(tensor.any()) for tensor, _ in adapters), "they are trained"


def test_in_bf16_the_base_is_held_in_bfloat16_and_the_adapters_are_not(place, tmp_path):
    recipe = flowmap.read_recipe(place / "plain.yaml", ["trainer.precision=bf16"])
    built = Built.of(resolve(recipe), print)
    student, average = built.module.student.net, built.module.averaged.net
    for name, p in student.named_parameters():
        assert p.dtype == (torch.bfloat16 if ".base_layer.weight" in name else p.dtype), name
        assert not trained(name) or p.dtype == torch.float32, name
    assert all(p.dtype == torch.float32 for name, p in average.named_parameters() if trained(name))
    base = next(p for name, p in student.named_parameters() if ".base_layer.weight" in name)
    assert any(p is base for p in average.parameters())
    assert any(p is base for p in built.teacher.network.flow_map.parameters())
    whole = fit(recipe, tmp_path / "run", log=quiet).folder
    state = read_tensors(whole / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert load_student(whole).sample(2, steps=1, cond={"class": 1}).isfinite().all()


def test_the_base_is_shared_and_unchanged(place, run):
    from flowmap.build.data import build_data
    from flowmap.build.student import build_student, student_config

    recipe = flowmap.read_recipe(place / "plain.yaml")
    teacher, data = build_teacher(resolve(recipe)), build_data(resolve(recipe))
    model = teacher.network.flow_map.net.model
    config = student_config(resolve(recipe), data, teacher)
    student = load_student(run)
    assert student.config.base == config.base and config.base.sha256 == fingerprint(model)
    module = DistillModule(resolve(recipe), build_student(resolve(recipe), config, teacher), teacher, data)
    base = {id(p) for p in model.parameters()}
    for net in (module.student, *module.averages):
        assert base < {id(p) for p in net.parameters()}
    assert not base & {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    given = dict(model.named_parameters())
    there = {
        name.replace(".base_layer", "").removeprefix("net.model."): p
        for name, p in student.flow_map.named_parameters()
        if not trained(name)
    }
    assert set(there) == set(given) and all(torch.equal(there[name], given[name]) for name in given)


def test_a_student_is_loaded_sampled_and_merged(place, run, tmp_path):
    student = load_student(run)
    options = dict(steps=2, cond={"class": 3}, guidance=2.0)
    images = student.sample(4, **options)
    assert images.shape == (4, 1, 8, 8) and images.isfinite().all()
    alone = student.merged()
    assert alone.merged() is alone and (alone.sample(4, **options) - images).abs().max() < 1e-6
    save_student(tmp_path / "alone", alone.config, alone.flow_map.state_dict(), recipe="", card="")
    again = load_student(tmp_path / "alone")
    assert again.config.lora is None and torch.equal(again.sample(4, **options), alone.sample(4, **options))


@pytest.mark.parametrize("name", ["plain", "dropout"])
def test_a_resumed_run_is_the_whole_run_to_the_bit(place, run, tmp_path, monkeypatch, name):
    recipe = flowmap.read_recipe(place / f"{name}.yaml")
    whole = run if name == "plain" else fit(recipe, tmp_path / "whole", log=quiet).folder
    original = DistillModule.training_step

    def stopped(self, batch, batch_idx):
        if self.global_step == 5:
            raise RuntimeError("stopped")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DistillModule, "training_step", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(recipe, tmp_path / "run", log=quiet)
    monkeypatch.undo()
    torch.manual_seed(99)  # another process's
    said = []
    fit(recipe, tmp_path / "run", resume=True, log=said.append)
    assert "resuming at step 3" in said
    for path in [
        p for part in ("student", "ema", "samples") for p in (whole / part).iterdir() if p.name != "README.md"
    ]:
        assert path.read_bytes() == (tmp_path / "run" / path.relative_to(whole)).read_bytes(), path
    one, two = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, tmp_path / "run"))
    assert all(torch.equal(tensor, two["state_dict"][name]) for name, tensor in one["state_dict"].items())


def test_a_base_that_is_gone_has_moved_or_is_another_is_one_line(place, run, tmp_path, command):
    folder = shutil.copytree(run / "student", tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"base": config["base"] | {"source": str(tmp_path / "gone")}})
    )
    with pytest.raises(ValueError, match=r"config.json: base: .*gone: no diffusers pipeline is there") as error:
        load_student(folder)
    assert "\n" not in str(error.value)
    assert torch.equal(load_student(folder, base=place / "pipe").sample(2), load_student(run).sample(2))
    words = ["sample", "--student", folder, "--num", 2, "--out", tmp_path / "drawn"]
    code, _, err = command(*words)
    assert code == 2 and "no diffusers pipeline is there" in err
    assert command(*words, "--base", place / "pipe")[0] == 0 and len(list((tmp_path / "drawn").glob("*.png"))) >= 2
    (folder / "config.json").write_text(json.dumps(config | {"base": config["base"] | {"sha256": "0" * 64}}))
    with pytest.raises(
        ValueError, match=r"base: .*SHA-256 \w{12}, those that this student was trained on 000000000000"
    ):
        load_student(folder)
    (folder / "config.json").write_text(json.dumps(config | {"lora": config["lora"] | {"rank": 10**9}}))
    with pytest.raises(ValueError, match="lora.rank: 1000000000 must be 1 or more, at most 65536"):
        load_student(folder)
    with pytest.raises(ValueError, match="lora_A.*: has shape"):
        (folder / "config.json").write_text(json.dumps(config | {"lora": config["lora"] | {"rank": 4}}))
        load_student(folder)


def test_what_cannot_be_a_lora_student_is_one_line(place, tmp_path, command):
    path = place / "plain.yaml"
    for override, says in (
        ("trainer.teacher_precision=bf16", "trainer.teacher_precision: 'bf16' wants trainer.precision: bf16"),
        ("student.lora.targets=[nothing]", "lora.targets: 'nothing' matches no layer of DiTTransformer2DModel"),
        ("student.lora.rank=0", "student.lora.rank: 0 must be 1 or more"),
        ("teacher.card=digits", "student.lora: wants a teacher of kind diffusers"),
    ):
        code, _, err = command("fit", "--recipe", path, "--out", tmp_path / "run", "--dry-run", override)
        assert code == 2 and says in err.strip().splitlines()[-1] and "Traceback" not in err, (override, err)
    settings = ["student.lora.dropout=0.1", "objective.derivative=difference"]
    with pytest.raises(ValueError, match="student.lora.dropout: 0.1 wants objective.derivative: dual"):
        flowmap.read_recipe(path, settings)


def test_dry_run_and_doctor_count_what_is_trained(place, run, command):
    count = sum(tensor.numel() for tensor in read_tensors(run / "student" / "model.safetensors").values())
    says = f"{count / 1e6:.2f} M trained"
    code, out, err = command("fit", "--recipe", place / "plain.yaml", "--out", place / "other", "--dry-run")
    assert code == 0 and says in out and "M frozen" in out, err
    code, out, err = command("doctor", "--recipe", place / "plain.yaml", "--batch", 2)
    assert code == 0 and says in out and "choose objective.derivative=dual" in out, err


def test_a_lora_run_is_a_teacher_in_its_turn(place, run, tmp_path, monkeypatch):
    """Also guided by its own earlier snapshot on the same base; a student of its own starts from the merged weights."""
    from flowmap.build.data import build_data
    from flowmap.build.student import build_student, student_config
    from flowmap.student.snapshots import nearest_snapshot

    monkeypatch.setenv("FLOWMAP_RUNS", str(place / "runs"))
    (tmp_path / "card.yaml").write_text(f"kind: recipe\nrecipe: {place / 'plain.yaml'}\n")
    guidance = "teacher.guidance={kind: autoguidance, snapshot: 0.5}"
    recipe = flowmap.read_recipe(
        place / "plain.yaml", ["student={kind: from_teacher}", f"teacher.card={tmp_path / 'card.yaml'}", guidance]
    )
    teacher = build_teacher(resolve(recipe))
    earlier = load_student(run)
    earlier.flow_map.load_state_dict(nearest_snapshot(run, share=0.5))
    x, t, cond = (
        torch.randn(5, 1, 8, 8),
        torch.linspace(0.1, 0.9, 5),
        {"class": torch.arange(5), "guidance": torch.full((5,), 1.5)},
    )
    strong, weak = (s.flow_map.velocity(x, t, cond) for s in (load_student(run), earlier))
    assert not torch.equal(strong, weak)
    both = [network.velocity(x, t, cond) for network in (teacher.guided.strong, teacher.guided.weak)]
    assert torch.equal(both[0], strong) and torch.equal(both[1], weak)
    config = student_config(resolve(recipe), build_data(resolve(recipe)), teacher)
    student = build_student(resolve(recipe), config, teacher).eval()
    assert config.lora is None and all(p.requires_grad for p in student.parameters())
    assert (student.velocity(x, t, cond) - strong).abs().max() < 1e-6 * max(1, float(strong.abs().max()))


def test_snapshots_combine_to_a_student(run, command, tmp_path):
    code, out, err = command("average", "--run", run, "--std", 0.07, "--out", tmp_path / "student")
    assert code == 0, err
    assert load_student(tmp_path / "student").sample(2).isfinite().all()
