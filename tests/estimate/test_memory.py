"""The dry run's memory of a device against what FSDP2 and DDP keep, at tiny and at full size, in fake groups."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from flowmap.estimate.dry_run import networks_costs, networks_memory
from flowmap.estimate.frozen_networks import live_text_bytes
from flowmap.estimate.memory import memory_of
from flowmap.estimate.networks import config_without_weights, outline_of_network, teacher_configs
from flowmap.estimate.outlines import Outlines
from flowmap.nets.precision import hold
from flowmap.plan.plan import resolve
from flowmap.recipe import read_recipe
from flowmap.train.sharding import mesh_of, shard, shard_frozen
from tests.support.fake_group import fake_group
from tests.support.families import FAMILIES

FSDP = {"strategy": "fsdp", "precision": "bf16"}


def recipe_on(name, devices, nodes=1, **more):
    recipe = read_recipe(name, ["data.images.root=x"] if name in ("sd35-medium", "flux-dev-lora", "sana") else [])
    trainer = replace(recipe.trainer, devices=devices, num_nodes=nodes, accelerator="gpu", **more)
    return recipe.changed(trainer=trainer, data=replace(recipe.data, global_batch_size=None))


def local_bytes(*nets):
    parts = {id(p): p.to_local() for p in nn.ModuleList(nets).parameters()}
    return sum(p.numel() * p.element_size() for p in parts.values())


def buffer_bytes(*nets):
    return sum(b.numel() * b.element_size() for net in nets for b in net.buffers())


@pytest.mark.parametrize(("devices", "nodes", "size", "shape"), [
    (8, 1, None, (8,)), (8, 4, None, (4, 8)), (8, 4, 32, (32,)), (8, 1, 2, (4, 2)), (1, 4, None, (4,)),
])  # fmt: skip
def test_weights_are_split_within_nodes(devices, nodes, size, shape):
    trainer = recipe_on("digits", devices, nodes, shard_size=size, **FSDP).trainer
    with fake_group(devices * nodes):
        mesh = mesh_of(trainer, "cpu")
        assert tuple(mesh.shape) == shape and trainer.shards == shape[-1]
        net = FAMILIES["dit"].student()
        whole = sum(p.numel() for p in net.parameters()) * 4
        shard(net, mesh)
        assert local_bytes(net) == pytest.approx(whole / shape[-1], rel=0.15), "rows are padded"


@pytest.mark.parametrize(("devices", "nodes"), [(8, 1), (8, 4)])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_are_those_of_fully_shard(name, devices, nodes):
    recipe = recipe_on("digits", devices, nodes, **FSDP)
    student, teacher = FAMILIES[name].student(), FAMILIES[name].student(1).requires_grad_(False)
    found = memory_of(recipe, student, [copy.deepcopy(teacher)], activations=0)
    hold(teacher, torch.bfloat16)
    with fake_group(devices * nodes):
        mesh = mesh_of(recipe.trainer, "cpu")
        shard(student, mesh)
        shard_frozen([teacher], mesh)
        assert found.weights == local_bytes(student) + buffer_bytes(student)
        assert found.gradients == local_bytes(student) == found.optimizer / 2
        assert found.frozen == local_bytes(teacher) + buffer_bytes(teacher)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "nodes"), [(8, 1), (8, 4)])
@pytest.mark.parametrize("name", ["imagenet512", "sd35-medium"])
def test_the_table_of_a_large_recipe_is_what_a_device_has(name, devices, nodes):
    recipe = recipe_on(name, devices, nodes, **FSDP)
    run = resolve(recipe)
    config = config_without_weights(run, Outlines().of(run)[0])
    found = networks_memory(run, config, networks_costs(run, config))
    student, *teachers = map(outline_of_network, (config, *(one for _, one in teacher_configs(run, config))))
    for net in teachers:
        hold(net.requires_grad_(False), torch.bfloat16)
    hold(student, torch.bfloat16)  # the base of adapters; nothing where all is trained
    with fake_group(devices * nodes):
        mesh = mesh_of(recipe.trainer, "cpu")
        shard(student, mesh, dtype=torch.bfloat16)
        shard_frozen(teachers, mesh)
        weights = local_bytes(student, *teachers) + buffer_bytes(student, *teachers)
    assert found.weights + found.frozen == pytest.approx(weights, rel=0.001)
    assert found.text == live_text_bytes(recipe, config)


def test_ddp_keeps_all_of_it_and_autocasts_copies():
    net = FAMILIES["sana"].student()
    count = sum(p.numel() for p in net.parameters())
    whole = memory_of(recipe_on("digits", 8, strategy="ddp"), net, [], activations=0)
    assert whole.weights == 4 * count + buffer_bytes(net) and whole.working == 0
    assert whole.state == 4 * count * 5 + 2 * buffer_bytes(net), "weights, gradients, two moments and an average"
    half = memory_of(recipe_on("digits", 8, strategy="ddp", precision="bf16"), net, [], activations=0)
    assert 0 < half.working < 2 * count and half.state == whole.state


@pytest.mark.parametrize(
    ("name", "parameters"), [("sd15", 0.12e9), ("sdxl", 0.82e9), ("sd35-medium", 5.58e9), ("flux-dev-lora", 4.88e9)]
)
def test_encoders_of_captions_are_counted_in_the_precision_of_frozen_networks(name, parameters):
    """CLIP among them; each recipe is in bf16 and stores captions."""
    run = resolve(read_recipe(name))
    config = config_without_weights(run, Outlines().of(run, whole=False)[0])
    bytes_of = lambda *settings: live_text_bytes(read_recipe(name, settings), config)
    assert bytes_of() == 2 * parameters and bytes_of("trainer.precision=32") == 4 * parameters
    assert bytes_of("data.stored_text=padded") == 0
