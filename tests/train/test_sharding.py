"""FSDP2 of every family of networks: its units, and gradients and tangents that are those of the whole batch."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from flowmap.flow.derivative import eulerian_derivative
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.precision import hold
from flowmap.train.sharding import shard, shard_frozen, units
from tests.support.fake_group import fake_group, lone_group
from tests.support.families import FAMILIES, SHAPE

RANKS, ROWS = 2, 2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_units_are_the_blocks_and_the_rest(name):
    family, world = FAMILIES[name], 4
    net = family.student()
    whole = sum(p.numel() for p in net.parameters())
    blocks = {id(p) for block in net.net.blocks for p in block.parameters()}
    rest = sum(p.numel() for p in net.parameters() if id(p) not in blocks)
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    with fake_group(world):
        shard(net, init_device_mesh("cpu", (world,)))
        found = units(net)
        assert len(found) == family.blocks + 1
        groups = {key: module._get_fsdp_state()._fsdp_param_group.fsdp_params for key, module in found.items()}
        sizes = {key: sum(p._orig_size.numel() for p in group) for key, group in groups.items()}
        assert sum(sizes.values()) == whole and sizes[""] == rest < whole
        assert {key: value.shape for key, value in net.state_dict().items()} == shapes, "scalars keep their shapes"


@pytest.mark.parametrize("name", ["dit", "edm2", "sd15", "sd35", "flux", "dit_xl"])
def test_in_bf16_blocks_are_gathered_in_bfloat16_and_times_stay_float32(name):
    family = FAMILIES[name]
    reference, net = family.student(), family.student()
    x, t, s, v, cond = (as_float(one) for one in batch(family, ROWS))
    seen, times = set(), []
    with lone_group(), torch.autocast("cpu", torch.bfloat16):
        shard(net, init_device_mesh("cpu", (1,)), dtype=torch.bfloat16)
        for unit in net.net.blocks:
            unit.register_forward_pre_hook(lambda block, _: seen.update({p.dtype for p in gathered(block)}))
        for embedding in (net.net.arrival if name != "dit" else net.net.conditioning.departure,):
            embedding.register_forward_hook(lambda module, args, out: times.append((module.out.weight, args[0], out)))
        loss, _ = loss_of(net, x, t, s, v, cond)
        loss.backward()
        want, _ = loss_of(reference, x, t, s, v, cond)
    assert seen == {torch.bfloat16}
    assert times and all(one.dtype == torch.float32 for found in times for one in found)
    expected = t if name == "dit" else t - s
    assert all(torch.equal(given.detach().as_subclass(torch.Tensor), expected) for _, given, _ in times)
    assert {p.dtype for p in net.parameters()} == {p.grad.dtype for p in net.parameters() if p.grad is not None}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert loss.item() == pytest.approx(want.item(), rel=0.05), "rounding of weights that autocast rounds anyway"


def gathered(block):
    """The weights that are whole at this moment: not those of a unit within the block."""
    return [p for p in block.parameters() if not isinstance(p, DTensor)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_network_in_bfloat16_is_half_as_large_and_what_autocast_makes_of_it(name):
    family = FAMILIES[name]
    x, t, s, _, cond = (as_float(one) for one in batch(family, ROWS))
    net = family.student().requires_grad_(False).eval()
    size = bytes_of(net)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = net.mean_velocity(x, t, s, cond)
    hold(net, torch.bfloat16)
    with torch.no_grad():
        got = net.mean_velocity(x, t, s, cond)
    assert bytes_of(net) < 0.7 * size, "norms and embeddings of times are a large share at this size only"
    assert got.dtype == torch.float32
    if name == "edm2":  # weights that are normalised after they are rounded
        assert float((got - want).norm() / want.norm()) < 0.01
    else:
        assert torch.equal(got, want)
    assert family.student().held is None and {p.dtype for p in family.student().parameters()} == {torch.float32}


def bytes_of(net):
    return sum(p.numel() * p.element_size() for p in net.parameters())


@pytest.mark.parametrize("name", ["dit", "edm2", "sd35", "sana", "dit_xl"])
def test_frozen_networks_are_sharded_as_they_are_stored(name):
    """The teacher and a weak model that shares its blocks, as with skip_blocks."""
    family, world = FAMILIES[name], 4
    x, t, s, _, cond = (as_float(one) for one in batch(family, ROWS))
    with torch.no_grad():
        nets, reference = frozen(family), frozen(family)
        want = [net.mean_velocity(x, t, s, cond) for net in reference]
        with lone_group():
            shard_frozen(nets, init_device_mesh("cpu", (1,)))
            assert all(torch.equal(net.mean_velocity(x, t, s, cond), one) for net, one in zip(nets, want, strict=True))
        nets = frozen(family)
        whole = bytes_of(torch.nn.ModuleList(nets))
        with fake_group(world):
            shard_frozen(nets, init_device_mesh("cpu", (world,)))
            parts = {id(p): p.to_local() for p in torch.nn.ModuleList(nets).parameters()}
    assert sum(p.numel() * p.element_size() for p in parts.values()) == pytest.approx(whole / world, rel=0.05), (
        "rows are padded"
    )


def frozen(family):
    net = family.student().requires_grad_(False).eval()
    nets = [net] if family.blocks in (1, 10) else [net, FlowMapNet(net.net.without_blocks((0,)))]
    for one in nets:
        hold(one, torch.bfloat16)
    return nets


def as_float(value):
    if isinstance(value, dict):
        return {key: as_float(one) for key, one in value.items()}
    return value.float() if value.is_floating_point() else value


def test_a_forward_pass_sees_the_weights_of_the_last_step():
    family = FAMILIES["dit"]
    x, t, s, _, cond = (as_float(one) for one in batch(family, ROWS))
    net = family.student()
    with lone_group(), torch.no_grad():
        shard(net, init_device_mesh("cpu", (1,)))
        net.mean_velocity(x, t, s, cond)
        for p in net.parameters():
            p.mul_(0.5)
        got, reference = net.mean_velocity(x, t, s, cond), family.student()
        for p in reference.parameters():
            p.mul_(0.5)
        assert torch.equal(got, reference.mean_velocity(x, t, s, cond))


def batch(family, rows):
    x, v = torch.randn(2, rows, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t, s = torch.linspace(0.3, 0.9, rows, dtype=torch.float64), torch.linspace(0.1, 0.5, rows, dtype=torch.float64)
    return x, t, s, v, family.conditions(rows, torch.float64)


def loss_of(net, x, t, s, v, cond):
    value, rate = eulerian_derivative(net, x, t, s, v, cond, mode="dual")
    return ((value - (v - (t - s)[:, None, None, None] * rate.detach())) ** 2).mean(), rate


def compare(name):
    family, rank = FAMILIES[name], dist.get_rank()
    reference, net = family.student().double(), family.student().double()
    loss, rates = loss_of(reference, *batch(family, RANKS * ROWS))
    loss.backward()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    shard(net, init_device_mesh("cpu", (RANKS,)))
    x, t, s, v, cond = batch(family, RANKS * ROWS)
    for _ in range(2):  # the second step has the first one's state behind it
        net.zero_grad()
        loss, rate = loss_of(net, x[mine], t[mine], s[mine], v[mine], {key: value[mine] for key, value in cond.items()})
        loss.backward()
    torch.testing.assert_close(rate, rates[mine], rtol=1e-8, atol=1e-8, msg=lambda m: f"{name}: {m}")
    for (key, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        got, want = p.grad, q.grad
        assert (got is None) == (want is None), key
        if got is not None:
            got = got.full_tensor().view_as(want)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9, msg=lambda m, key=key: f"{name}: {key}: {m}")


def in_processes(rank, address, check, names):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    for name in names:
        check(name)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the interpreter's teardown and abort


@pytest.mark.slow
def test_gradients_and_tangents_of_two_processes_are_the_whole_batchs(tmp_path):
    mp.spawn(in_processes, (f"file://{tmp_path}/rendezvous", compare, list(FAMILIES)), nprocs=RANKS)
