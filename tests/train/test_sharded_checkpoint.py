"""Sharded checkpoints: what was saved comes back to the bit, on as many processes or on another number of them."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from flowmap.base.files import write_json
from flowmap.train.sharded_checkpoint import (
    check_shards,
    complete,
    place_of,
    put_back,
    restore,
    shapes_in,
    shard_file,
    snapshot,
    write_shard,
)
from flowmap.train.sharding import shard
from tests.support.fake_group import fake_group, lone_group
from tests.support.families import FAMILIES


def trained(name: str, seed: int, steps: int = 2, mesh=None):
    """A module as a run has it, with an optimizer that has made steps, sharded if a mesh is given."""
    torch.manual_seed(seed)
    module = nn.Module()
    module.student = FAMILIES[name].student(seed)
    if mesh is not None:
        shard(module.student, mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(steps):
        for p in module.parameters():
            p.grad = torch.ones_like(p) if seed else torch.zeros_like(p)
        optimizer.step()
    return module, optimizer


def save(folder, target, name):
    """Write the checkpoint of one process, and return the weights and the optimizer that are in it."""
    with lone_group():
        write(folder, target, name, init_device_mesh("cpu", (1,)), first=True)
    return trained(name, 1)


def write(folder, target, name, mesh, first):
    module, optimizer = trained(name, 1, mesh=mesh)
    _, place, shards = place_of(module)
    shapes = {key: list(p.shape) for key, p in trained(name, 1, 0)[0].state_dict().items()}
    write_shard(folder, place, snapshot(module, [optimizer], place))
    if first:
        complete(folder, target, shapes, shards)
        assert not folder.exists()


def compare(target, name, mesh, rank, others):
    """What this process reads is its part of the whole weights and moments."""
    want, moments = trained(name, 1)
    module, optimizer = trained(name, 0, steps=0, mesh=mesh)
    restore(target, module, [optimizer], [optimizer.state_dict()["param_groups"]])
    for p, q in zip(module.parameters(), want.parameters(), strict=True):
        state, there = optimizer.state[p], moments.state[q]
        assert state["step"] == there["step"] == 2
        for one, other in ((p, q), (state["exp_avg"], there["exp_avg"])):
            whole = other.detach().reshape(one.shape)
            chunks = whole.chunk(others)
            assert torch.equal(one.to_local(), chunks[rank] if rank < len(chunks) else whole[:0])


@pytest.mark.parametrize("others", [1, 2, 3])
@pytest.mark.parametrize("name", ["dit", "edm2", "sana"])
def test_the_first_process_reads_its_part(tmp_path, name, others):
    target = tmp_path / "last.ckpt"
    want, _ = save(tmp_path / "writing", target, name)
    shapes = {key: value.shape for key, value in shapes_in(target).items()}
    assert shapes == {key: value.shape for key, value in want.state_dict().items()}
    check_shards(target)
    with fake_group(others):
        compare(target, name, init_device_mesh("cpu", (others,)), 0, others)


def in_processes(rank, world, folder, saves):
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}{saves}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    for name in ("dit", "edm2"):
        target = folder / f"{name}.ckpt"
        if saves:
            write(folder / f"{name}-writing", target, name, mesh, first=rank == 0)
        else:
            compare(target, name, mesh, rank, world)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the interpreter's teardown and abort


@pytest.mark.slow
def test_two_processes_read_what_three_have_written_and_three_what_they_have(tmp_path):
    for world, saves in ((3, True), (2, False), (3, False)):
        mp.spawn(in_processes, (world, tmp_path, saves), nprocs=world)


def test_what_is_torn_or_of_another_network_is_named(tmp_path):
    target = tmp_path / "last.ckpt"
    save(tmp_path / "writing", target, "dit")
    with lone_group():
        mesh = init_device_mesh("cpu", (1,))
        module, optimizer = trained("sana", 0, 0, mesh)
        with pytest.raises(ValueError, match="is missing in the checkpoint"):
            restore(target, module, [optimizer], [[]])
    path = shard_file(target, 0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    check_shards(target, slice(1, None, 2))
    with pytest.raises(ValueError, match=r"shard-00000.safetensors: its content is not what was written"):
        check_shards(target)
    path.unlink()
    with pytest.raises(ValueError, match="does not have all of its 1 shards"):
        check_shards(target)
    write_json(target / "index.json", {"shards": -1, "shapes": {}})
    with pytest.raises(ValueError, match="is no index of a checkpoint"):
        check_shards(target)


def test_a_replacement_that_was_interrupted_is_undone(tmp_path):
    target = tmp_path / "last.ckpt"
    save(tmp_path / "writing", target, "dit")
    target.rename(tmp_path / "last.ckpt.before")
    put_back(target)
    check_shards(target)
    save(tmp_path / "writing", target, "dit")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert not dist.is_initialized()
