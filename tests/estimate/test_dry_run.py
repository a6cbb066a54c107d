"""What a run would cost, without weights or data: closed forms, published counts, and every recipe."""

from __future__ import annotations

import json

import pytest
import torch

from flowmap.base.schema import RecipeError
from flowmap.compare.terms import evaluations_of
from flowmap.estimate.calls import Calls, calls_of
from flowmap.estimate.costs import cost_of
from flowmap.estimate.dry_run import dry_run
from flowmap.nets import DiT
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.lora import Base, LoRA
from flowmap.nets.mlp import MLP
from flowmap.plan.cards import find_card, list_cards
from flowmap.plan.named_networks import spec_of
from flowmap.recipe.recipe import list_recipes, read_recipe
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig


def config(net, shape, **more):
    return StudentConfig(net=net, sampler=Deterministic(), shape=shape, **more)


def test_a_perceptrons_flops_are_twice_its_weights():
    """Every weight of a linear layer is one multiply-add a sample."""
    cost = cost_of(config(MLP(width=16, depth=2), (5,), arrival=False))
    net = config(MLP(width=16, depth=2), (5,), arrival=False).build()
    weights = sum(p.numel() for p in net.parameters() if p.ndim == 2)
    assert cost.flops == 2 * weights and cost.trained == sum(p.numel() for p in net.parameters()) and cost.frozen == 0


def test_attention_is_counted_and_keeps_no_matrix_of_tokens_by_tokens():
    small, large = (cost_of(config(DiT(preset="nano", patch=1), (1, side, side))) for side in (8, 32))
    # attention alone grows with the square of the tokens: 2 * tokens^2 * 2 * width in each of three blocks of width 64
    quadratic = 3 * 2 * 2 * 64 * (1024**2 - 16 * 64**2)
    linear_share = large.flops - 16 * small.flops
    assert 0.9 * quadratic < linear_share <= quadratic
    assert large.kept_bytes < 17 * small.kept_bytes


LARGE_CARDS = ("flux-dev", "sd35-medium", "z-image", "flux2-klein-base-4b", "hunyuan-image-2.1", "lumina2",
               "qwen-image", "auraflow", "sdxl")  # fmt: skip


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in LARGE_CARDS else [])
    for name in list_cards()
    if find_card(name).network
])  # fmt: skip
def test_a_cards_network_has_the_published_number_of_parameters(name):
    card = find_card(name)
    spec = spec_of(card)
    cost = cost_of(config(spec, tuple(card.shape), num_classes=card.num_classes, arrival=False), graded=False)
    assert cost.parameters == pytest.approx(card.parameters, rel=0.005)


QUICK = (  # one of each kind of objective, prior, coupling and data; the others are slow tests
    *(
        "toy/mixture",
        "digits",
        "digits-adversarial",
        "digits-dmd",
        "digits-joint",
        "rfpp/digits",
        "instaflow/digits",
        "lediflow/digits",
    ),
    *("emoji32-autoencoder", "language/wordnet", "language/wordnet-joint"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in list_recipes()]
)
def test_every_recipe_says_what_it_costs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    if name.startswith("language/"):  # without the sentences, which take seconds to read
        monkeypatch.chdir(tmp_path)
    lines = dry_run(read_recipe(name), None)
    text = "\n".join(lines)
    assert ": ?" not in text and "M parameters" in text and "FLOP" in text and "memory for each device" in text
    if read_recipe(name).trainer.devices > 1:
        assert "GPU-hours" in text and "GPU-hours are a range: from 450 TFLOP/s in bf16" in text
    assert not any(tmp_path.iterdir())


def test_hours_follow_the_throughput():
    hours = {
        throughput: float(line.split(" to ")[1].split()[0].replace(",", ""))
        for throughput in (1e-3, 2e-3)
        for line in dry_run(read_recipe("digits-teacher", ["trainer.accelerator=auto"]), None, throughput=throughput)
        if "steps: " in line and "GPU-hours" in line
    }
    assert hours[1e-3] == pytest.approx(2 * hours[2e-3], rel=0.01)
    with pytest.raises(ValueError, match="--throughput: 0"):
        dry_run(read_recipe("digits"), None, throughput=0)


@pytest.mark.parametrize("name", ["digits-teacher", "fashion14-teacher"])
def test_the_costs_are_the_same_without_the_data(name, monkeypatch):
    from flowmap.data import Digits, Fashion

    recipe = read_recipe(name)
    assert recipe.data.outline() in (None, ((1, 14, 14), 10))
    if name == "digits-teacher":
        data = recipe.data.build()
        monkeypatch.setattr(Digits, "outline", lambda self: (data.shape, data.num_classes))
    costs = lambda lines: [line for line in lines if line.startswith("      ")]
    there = costs(dry_run(recipe, None))
    for kind in (Digits, Fashion):
        monkeypatch.setattr(kind, "build", lambda self: (_ for _ in ()).throw(ValueError("data.root: not here")))
    assert costs(dry_run(recipe, None)) == there and "M parameters" in there[0]


def test_a_folder_that_holds_another_run_is_seen(tmp_path):
    held = read_recipe("toy/mixture", ["seed=1"])
    (tmp_path / "recipe.yaml").write_text(held.to_yaml())
    told = lambda recipe: any("holds a run of another recipe" in line for line in dry_run(recipe, str(tmp_path)))
    assert told(read_recipe("toy/mixture")) and not told(held)


def test_a_step_asks_what_its_objective_asks():
    """AYF-EMD: a forward pass, a tangent, a backward pass, and the guided teacher's two networks.

    Samples on the diagonal have no tangent.
    """
    times = "times={kind: interval, mean: -0.6, std: 1.6}"
    calls = lambda *overrides: calls_of(read_recipe("digits-ayf-emd", overrides), conditional=True)
    free = "teacher.guidance={kind: classifier_free, rescale_patch: %s}"
    assert calls(times, free % 2) == calls(times, free % "null")
    assert calls(times) == Calls(2, 1, 1, 1)
    assert calls(times, "teacher.guidance={kind: classifier_free}") == Calls(2, 1, 2, 0)
    assert calls(times, "objective.derivative=difference") == Calls(2, 1, 1, 1)
    assert calls("objective={kind: flow_matching}") == Calls(1, 1, 1, 1)
    mixed = lambda lagrangian, eulerian: (
        f"objective={{kind: ayf_mixed, lagrangian: 0.25, own_lagrangian: {lagrangian}, own_eulerian: {eulerian}}}"
    )
    assert calls(times, mixed(0, 0)) == Calls(2, 1, 1, 1)
    assert calls(times, mixed(1.0, 0.4)) == Calls(
        2 + 0.25 + 0.75 * 0.4, 1, 1, 1
    )  # a jump from the noise for each row on an own state
    diagonal = read_recipe("digits-ayf-emd").times.diagonal
    assert calls().forward == pytest.approx(2 - diagonal, abs=0.01)


def test_a_late_discriminator_costs_as_often_as_it_is_there_and_one_that_never_is_is_said():
    recipe = lambda *more: read_recipe("digits-joint-adversarial", more)
    asked = lambda *more: evaluations_of(recipe(*more))
    whole, base = (
        asked("objective.discriminator_start=0"),
        asked("objective.discriminator_start=3040", "trainer.steps=1"),
    )
    assert asked() == pytest.approx(base + (whole - base) * (1 - 2880 / 3800))
    matched = "objective.base={kind: joint, base: {kind: ayf_emd}, term: {kind: self_fake}}"  # in every step
    assert asked(matched) - asked() > 1 and asked(matched) - asked() == pytest.approx(
        asked(matched, "objective.discriminator_start=0") - whole
    )
    lines = dry_run(recipe(), "runs")
    assert any(line.endswith("from step 2,880 of 3,800 on") for line in lines)
    assert not any("is not reached" in line for line in lines)
    said = "warning: objective.start: 3040 is not reached in 2000 steps: the student has no discriminator"
    assert said in [line.strip() for line in dry_run(recipe("trainer.steps=2000"), "runs")]


@pytest.mark.parametrize("patch", [3, 16])
def test_patches_that_do_not_divide_the_samples_are_named(patch):
    settings = f"teacher.guidance={{kind: classifier_free, rescale_patch: {patch}}}"
    with pytest.raises(RecipeError, match=f"guidance.rescale_patch: patches of {patch} x {patch} do not divide"):
        dry_run(read_recipe("digits", [settings]), "runs")


def test_a_backward_pass_is_two_forward_passes_and_one_where_the_weights_are_frozen():
    plain = cost_of(config(DiT(preset="nano", patch=1), (1, 8, 8)))
    again = cost_of(config(DiT(preset="nano", patch=1), (1, 8, 8)), checkpointing=True)
    assert plain.backward_flops == pytest.approx(2 * plain.flops, rel=0.02)
    assert again.backward_flops == pytest.approx(3 * plain.flops, rel=0.05) and again.kept_bytes < plain.kept_bytes / 4
    heads = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 32,
    }
    sana = heads | {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "caption_channels": 16,
        "sample_size": 8,
    }
    net = DiffusersModel(
        "SanaTransformer2DModel",
        json.dumps(sana | {"cross_attention_dim": 64}),
        "FlowMatchEulerDiscreteScheduler",
        "{}",
    )
    whole, lora = (
        cost_of(config(net, (4, 8, 8))),
        cost_of(config(net, (4, 8, 8), lora=LoRA(rank=1), base=Base("there"))),
    )
    assert whole.backward_flops == pytest.approx(2 * whole.flops, rel=0.02)  # its convolutions are in groups
    assert lora.frozen and lora.backward_flops == pytest.approx(lora.flops, rel=0.1)


def test_what_is_kept_is_what_autograd_keeps():
    """Against the storages that a real network keeps on this machine's processor, with its own fused attention."""
    spec, rows = config(DiT(preset="nano", patch=1), (1, 16, 16)), 3
    flow_map, kept = spec.build(), {}
    weights = {p.untyped_storage().data_ptr() for p in flow_map.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, t = torch.randn(rows, 1, 16, 16), torch.rand(rows)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = flow_map.mean_velocity(x, t, t / 2)
    cost = cost_of(spec)
    assert out.isfinite().all()
    assert cost.kept_bytes * rows + cost.shared_bytes == pytest.approx(sum(kept.values()), rel=0.05)


def test_averages_are_counted_once():
    """At digits-teacher's widths the exported average is also a snapshot's.

    In memory: weights, gradients, two moments and two averages.
    """
    lines = dry_run(read_recipe("digits-teacher", ["student={kind: mlp, width: 512, depth: 8}"]), None)
    count = float(lines[1].split()[1]) * 1e6
    said = float(lines[2].split("estimated: ")[1].split()[0])
    assert said == pytest.approx(6 * 4 * count / 2**20, abs=1.1)
