"""What a run would cost, without weights or data: closed forms, published counts, and every recipe."""

from __future__ import annotations

import pytest

from flowmap.build import spec_of
from flowmap.costs import cost_of
from flowmap.dry_run import dry_run
from flowmap.nets import DiT
from flowmap.nets.mlp import MLP
from flowmap.plan import find_card, list_cards
from flowmap.recipe import list_recipes, read_recipe
from flowmap.samplers import Deterministic
from flowmap.student import StudentConfig


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


@pytest.mark.parametrize("name", [name for name in list_cards() if find_card(name).network])
def test_a_cards_network_has_the_published_number_of_parameters(name):
    card = find_card(name)
    spec = spec_of(card, read_recipe("digits"))
    cost = cost_of(config(spec, tuple(card.shape), num_classes=card.num_classes, arrival=False))
    assert cost.parameters == pytest.approx(card.parameters, rel=0.005)


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_says_what_it_costs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path))
    lines = dry_run(read_recipe(name), None)
    text = "\n".join(lines)
    assert "parameters: ?" not in text and "M parameters" in text and "FLOP" in text and "memory for each device" in text
    if read_recipe(name).trainer.devices > 1:
        assert "GPU-hours at 200 TFLOP/s" in text
    assert not any(tmp_path.iterdir())


def test_hours_follow_the_throughput():
    hours = {
        throughput: float(line.split("steps: ")[1].split()[0])
        for throughput in (100.0, 200.0)
        for line in dry_run(read_recipe("dit256"), None, throughput=throughput)
        if "GPU-hours" in line
    }
    assert hours[100.0] == pytest.approx(2 * hours[200.0], rel=0.01)
    with pytest.raises(ValueError, match="--throughput: 0"):
        dry_run(read_recipe("dit256"), None, throughput=0)
