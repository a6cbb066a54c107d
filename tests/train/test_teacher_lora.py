"""`teacher.lora`: the teacher is the pipeline's network with a LoRA, W + scale (alpha / rank) B A."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import flowmap
from flowmap.base.files import read_tensors
from flowmap.base.schema import RecipeError
from flowmap.build.teacher import build_teacher
from flowmap.nets.lora import TEACHER_LORA, fingerprint
from flowmap.nets.lora_file import add_file
from flowmap.nets.pretrained import load_pretrained
from flowmap.plan.plan import resolve
from flowmap.plan.provenance import pairs_identity
from flowmap.recipe.module_teacher import ModuleTeacher
from flowmap.student.folder import load_student, save_student
from flowmap.train.fit import fit
from flowmap.train.stage import Built
from tests.support.parity import relative
from tests.train.test_lora_runs import RECIPE, pipeline_in, quiet

pytest.importorskip("peft")
LAYERS = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.0.proj")
RANK, ALPHA, SCALE = 3, 6.0, 0.5


def write_style(path, model, seed=1):
    """Write a LoRA of the model as diffusers does, with alpha, and return B A by weight."""
    generator, found, products = torch.Generator().manual_seed(seed), {}, {}
    for layer in LAYERS:
        out, width = model.get_parameter(f"{layer}.weight").shape
        down = torch.randn(RANK, width, generator=generator)
        up = 0.1 * torch.randn(out, RANK, generator=generator)
        found |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
        found[f"transformer.{layer}.alpha"] = torch.tensor(ALPHA)
        products[f"{layer}.weight"] = up @ down
    save_file(found, path)
    return products


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline, its card, a LoRA for it and another, and a recipe with the first."""
    place = tmp_path_factory.mktemp("teacher_lora")
    pipeline_in(place)
    model = load_pretrained(str(place / "pipe"))[1].model
    for seed, name in enumerate(("style", "other"), 1):
        write_style(place / f"{name}.safetensors", model, seed)
    text = RECIPE.format(name="styled", card=place / "card.yaml", dropout=0.0)
    style = f"lora: {place / 'style.safetensors'}, lora_scale: {SCALE}"
    text = text.replace("card.yaml,", f"card.yaml, {style},").replace("steps: 6", "steps: 2")
    (place / "styled.yaml").write_text(text)
    return place


@pytest.fixture(scope="module")
def run(place):
    return fit(flowmap.read_recipe(place / "styled.yaml"), place / "run", log=quiet).folder


def test_the_teachers_weights_are_the_bases_and_the_scaled_product(place, tmp_path):
    base = load_pretrained(str(place / "pipe"))[1].model
    products = write_style(tmp_path / "again.safetensors", base)
    recipe = flowmap.read_recipe(place / "styled.yaml")
    teacher = build_teacher(resolve(recipe))
    for name, weight in teacher.network.flow_map.net.model.named_parameters():
        change = SCALE * ALPHA / RANK * products[name] if name in products else 0
        torch.testing.assert_close(weight, base.get_parameter(name) + change)
    plain = build_teacher(resolve(recipe.changed(teacher=_without(recipe))))
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(5, 1, 8, 8, generator=generator), torch.linspace(0.1, 0.9, 5)
    for scale in (0.0, 1.0):  # 0 is the branch without a condition, which is the same network
        cond = {"class": torch.arange(5), "guidance": torch.full((5,), scale)}
        styled, unstyled = teacher.guided.velocity(x, t, cond), plain.guided.velocity(x, t, cond)
        assert (styled - unstyled).abs().max() > 1e-2 * unstyled.abs().max()


def _without(recipe):
    from dataclasses import replace

    return replace(recipe.teacher, lora=None, lora_scale=1.0)


def test_a_network_without_blocks_has_it_too_and_another_card_has_not(place):
    settings = ["teacher.guidance={kind: autoguidance, skip_blocks: [1]}"]
    built = build_teacher(resolve(flowmap.read_recipe(place / "styled.yaml", settings)))
    strong, weak = (network.net.model for network in built.modules)
    name = f"{LAYERS[0]}.weight"
    assert torch.equal(weak.get_parameter(name), strong.get_parameter(name))
    settings = [f"teacher.guidance={{kind: autoguidance, weak: {place / 'card.yaml'}}}"]
    built = build_teacher(resolve(flowmap.read_recipe(place / "styled.yaml", settings)))
    weak, base = built.modules[1].net.model, load_pretrained(str(place / "pipe"))[1].model
    assert fingerprint(weak) == fingerprint(base)


def test_it_is_part_of_the_hash_and_of_the_pairs_identity(place):
    styled = flowmap.read_recipe(place / "styled.yaml")
    other = flowmap.read_recipe(place / "styled.yaml", [f"teacher.lora={place / 'other.safetensors'}"])
    scaled = flowmap.read_recipe(place / "styled.yaml", ["teacher.lora_scale=0.25"])
    plain = styled.changed(teacher=_without(styled))
    assert len({recipe.hash() for recipe in (styled, other, scaled, plain)}) == 4
    made = []
    for slot in (styled.teacher, other.teacher, scaled.teacher, _without(styled)):
        recipe = styled.changed(coupling=flowmap.data.Pairs(teacher=slot), teacher=None, student=_net())
        made.append(json.dumps(pairs_identity(resolve(recipe))))
    assert len(set(made)) == 4 and str(place) not in made[0]


def _net():
    from flowmap.nets import DiT

    return DiT(width=16, depth=1, heads=2)


def test_a_student_of_it_is_loaded_where_the_lora_is_gone_and_merged(place, run, tmp_path):
    shipped = run / "student" / TEACHER_LORA / "adapter_model.safetensors"
    assert shipped.read_bytes() == (place / "style.safetensors").read_bytes()
    student = load_student(run)
    base = load_pretrained(str(place / "pipe"))[1].model
    assert student.config.base.sha256 == fingerprint(base), "of the pipeline's own weights"
    options = dict(steps=2, cond={"class": 3}, guidance=1.5)
    images = student.sample(4, **options)
    moved = shutil.copytree(place / "pipe", tmp_path / "pipe")
    alone = load_student(shutil.copytree(run / "student", tmp_path / "student"), base=moved)
    assert torch.equal(alone.sample(4, **options), images)
    whole = alone.merged()
    save_student(tmp_path / "whole", whole.config, whole.flow_map.state_dict(), recipe="", card="")
    shutil.rmtree(moved)
    # to the rounding of a product that is added to a weight before
    assert relative(load_student(tmp_path / "whole").sample(4, **options), images) < 1e-4
    shutil.rmtree(tmp_path / "student" / TEACHER_LORA)
    with pytest.raises(ValueError, match=r"config.json: base: lora: .*teacher_lora': there is no such file") as error:
        load_student(tmp_path / "student", base=place / "pipe")
    assert "\n" not in str(error.value)


def test_the_students_own_deltas_and_the_loras_are_what_the_stock_base_lacks(place, run):
    """Two adapters on the stock base: W + style + B A is the student's merged weight."""
    base = load_pretrained(str(place / "pipe"))[1].model
    products = write_style(place / "again.safetensors", base)
    adapters = {
        name.removeprefix("net.model."): tensor
        for name, tensor in read_tensors(run / "student/model.safetensors").items()
    }
    for name, weight in load_student(run).merged().flow_map.net.model.named_parameters():
        layer = name.removesuffix(".weight")
        change = SCALE * ALPHA / RANK * products[name] if name in products else 0
        if f"{layer}.lora_A.default.weight" in adapters:
            change = change + adapters[f"{layer}.lora_B.default.weight"] @ adapters[f"{layer}.lora_A.default.weight"]
        torch.testing.assert_close(weight, base.get_parameter(name) + change)


def test_a_run_does_not_go_on_with_another_lora(place, run, command):
    words = ["fit", "--recipe", place / "styled.yaml", "--out", run, "--resume"]
    for setting in (f"teacher.lora={place / 'other.safetensors'}", "teacher.lora_scale=1.0"):
        code, _, err = command(*words, setting)
        assert code == 2 and f"first difference: {setting.split('=')[0]}" in err, err


def test_a_dry_run_names_it_and_counts_nothing_more(place, command):
    words = ["fit", "--recipe", place / "styled.yaml", "--out", place / "dry", "--dry-run"]
    code, out, err = command(*words)
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.strip().startswith("teacher: "))
    assert line.endswith(f"(card) with the LoRA {place / 'style.safetensors'} times {SCALE}")
    code, out, _ = command(*words, "teacher.lora=null", "teacher.lora_scale=1.0")
    assert line.partition(" with")[0] in out
    code, out, err = command(*words, "teacher.lora=someone/style")
    assert code == 3 and "teacher.lora: 'someone/style': not on this machine; fit fetches it" in out + err


def test_in_bf16_the_sum_is_rounded_once(place):
    recipe = flowmap.read_recipe(place / "styled.yaml", ["trainer.precision=bf16"])
    exact = build_teacher(resolve(flowmap.read_recipe(place / "styled.yaml"))).network.flow_map.net.model
    rounded = build_teacher(resolve(recipe)).network.flow_map.net.model
    for name, weight in exact.named_parameters():
        assert torch.equal(rounded.get_parameter(name).to(torch.bfloat16), weight.to(torch.bfloat16)), name


def test_a_module_has_none_and_a_lora_on_a_hub_is_named_in_the_pairs_identity(place):
    with pytest.raises(ValueError, match="lora: wants a teacher of kind card"):
        ModuleTeacher(module="mine", shape=(1, 8, 8), lora="style.safetensors")
    recipe = flowmap.read_recipe(place / "styled.yaml", ["teacher.lora=someone/style"])
    pairs = recipe.changed(coupling=flowmap.data.Pairs(teacher=recipe.teacher), teacher=None, student=_net())
    assert pairs_identity(resolve(pairs))["teacher"]["lora"] == {"source": "someone/style", "scale": SCALE}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["teacher.lora=nowhere.safetensors"], "teacher.lora: 'nowhere.safetensors': there is no such file or folder"),
        (["teacher.lora=EMPTY"], r"teacher.lora: .*: has no LoRA \(pytorch_lora_weights.safetensors"),
        (["teacher.lora=STRANGE"], "teacher.lora: .*strange.safetensors: text_encoder.q: fits no layer of DiTTrans"),
        (["teacher.lora=LARGE"], r"teacher.lora: .*large.safetensors: .*to_q.weight: makes \(9, 8\), the weight there"),
        (["teacher.lora=null"], "teacher.lora_scale: 0.5 wants lora"),
        (["teacher.lora_scale=1000"], "teacher.lora_scale: 1000.0 must be"),
        (["teacher.card=digits", "student={kind: from_teacher}"], "teacher.lora: .* wants a teacher of kind diffusers"),
    ],
)
def test_mistakes_are_named_in_one_line(place, tmp_path, settings, says):
    (tmp_path / "empty").mkdir()
    pair = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(9, 2)}
    save_file({f"text_encoder.q.{end}": value for end, value in pair.items()}, tmp_path / "strange.safetensors")
    save_file({f"{LAYERS[0]}.{end}": value for end, value in pair.items()}, tmp_path / "large.safetensors")
    for word in ("EMPTY", "STRANGE", "LARGE"):
        there = tmp_path / word.lower()
        settings = [one.replace(word, str(there if there.is_dir() else f"{there}.safetensors")) for one in settings]
    with pytest.raises(RecipeError, match=says) as error:
        fit(flowmap.read_recipe(place / "styled.yaml", settings), tmp_path / "run", log=quiet)
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "recipe.yaml").exists()


def started(place, *settings):
    """The student at step 0, without a LoRA in the teacher."""
    words = ["teacher.lora=null", "teacher.lora_scale=1.0", f"student.lora_start={place / 'style.safetensors'}"]
    words += ["student.lora.targets=[to_q, ff.net.0.proj]", *settings]
    return Built.of(resolve(flowmap.read_recipe(place / "styled.yaml", words)), quiet).module.student


@pytest.mark.parametrize("settings", [["student.lora.rank=3"], ["student.lora.rank=5", "student.lora.alpha=2.0"]])
def test_a_student_starts_at_the_base_with_a_published_lora(place, tmp_path, settings):
    student = started(place, *settings).eval()
    base = load_pretrained(str(place / "pipe"))[1]
    add_file(base.model, place / "style.safetensors", 1.0, "lora")
    x, t, cond = torch.randn(5, 1, 8, 8), torch.linspace(0.2, 1.0, 5), {"class": torch.arange(5)}
    with torch.no_grad():
        wanted, got = base(x, t, t, cond), student.net(x, t, 0 * t, {**cond, "guidance": torch.ones(5)})
    # the file's product is added to a weight there, and beside it here
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    ups = [tensor for name, tensor in student.state_dict().items() if ".lora_B." in name]
    assert all(p.requires_grad for name, p in student.named_parameters() if ".lora_" in name)
    assert sum(bool(up.any()) for up in ups) == len(LAYERS) < len(ups), "the other layers start without effect"


def test_what_does_not_fit_the_adapters_is_one_line(place, tmp_path):
    for settings, says in (
        (["student.lora.rank=2"], "student: lora_start: .* has rank 3, more than lora.rank, 2"),
        (["student.lora.targets=[to_v]"], "lora_start: .*the student has no adapter there; lora.targets wants "),
        (["student.lora_start=nowhere"], "lora_start: 'nowhere': there is no such file or folder"),
        (["student.lora=null"], "student.lora_start: .* wants student.lora"),
    ):
        with pytest.raises(RecipeError, match=says) as error:
            started(place, *(["student.lora.rank=3"] if "lora=null" not in settings[0] else []), *settings)
        assert "\n" not in str(error.value)
