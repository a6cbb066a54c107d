"""FSDP2 of a network: its blocks are the units that are gathered one by one, and what remains is the root unit.

Weights are stored in float32 and reduced in float32. With bf16, blocks are gathered in bfloat16; the root unit, which
embeds times and conditions, is gathered as it is stored, and no input is cast: t and s keep their precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from flowmap.nets.blocks import blocks_of
from flowmap.nets.flow_map import FlowMapNet
from flowmap.recipe.settings import Trainer

# the root too: its gathered weights would otherwise be those of before the last step of the optimizer
RESHARD: dict[str, Any] = {"reshard_after_forward": True}
METHODS = ("mean_velocity", "velocity", "log_error")  # of FlowMapNet, each of which is a forward pass


def mesh_of(trainer: Trainer, device: str) -> DeviceMesh:
    """The devices in groups of trainer.shards, in order: one dimension, or (replicas, shards) for several groups."""
    replicas = trainer.devices * trainer.num_nodes // trainer.shards
    if replicas == 1:
        return init_device_mesh(device, (trainer.shards,), mesh_dim_names=("shards",))
    return init_device_mesh(device, (replicas, trainer.shards), mesh_dim_names=("replicas", "shards"))


def shard(net: FlowMapNet, mesh: DeviceMesh, *, dtype: torch.dtype | None = None) -> None:
    """Shard the network over the mesh, in place. Each process keeps its part of every parameter.

    mesh: of one dimension, or (replicas, shards). dtype: of the gathered blocks, by default that of the weights.
    """
    _own_frozen(net)
    _lift_scalars(net)
    policy = partial(MixedPrecisionPolicy, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False)
    trains = any(p.requires_grad for p in net.parameters())  # it is no average
    kept = {p for p in net.parameters() if trains and not p.requires_grad}
    for block in blocks_of(net.net):
        _widen(block, kept)
        fully_shard(block, mesh=mesh, mp_policy=policy(param_dtype=dtype), **RESHARD)
    _widen(net, kept)
    fully_shard(net, mesh=mesh, mp_policy=policy(), **RESHARD)
    for method in METHODS:
        register_fsdp_forward_method(net, method)


def shard_frozen(nets: Sequence[FlowMapNet], mesh: DeviceMesh) -> None:
    """Shard networks that are not trained, in place, as they are stored; they may share modules.

    They have one root unit, as a module can be in one only. Their mean velocity may be called, not their networks.
    """
    group = _Group(nets)
    _lift_scalars(group)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    blocks = dict.fromkeys(block for net in nets for block in blocks_of(net.net))
    for block in sorted(blocks, key=lambda block: len(list(block.modules()))):  # blocks in blocks first
        fully_shard(block, mesh=mesh, mp_policy=policy, **RESHARD)
    fully_shard(group, mesh=mesh, mp_policy=policy, **RESHARD)
    for i, net in enumerate(nets):
        name = f"mean_velocity_{i}"
        setattr(group, name, net.mean_velocity)
        register_fsdp_forward_method(group, name)
        net.__dict__["mean_velocity"] = getattr(group, name)  # what its other methods call


class _Group(nn.Module):
    """Networks with one root unit."""

    def __init__(self, nets: Sequence[FlowMapNet]):
        super().__init__()
        self.nets = nn.ModuleList(nets)


def units(net: nn.Module) -> dict[str, FSDPModule]:
    """The units of a sharded network by their names; the root's is empty."""
    return {name: module for name, module in net.named_modules() if isinstance(module, FSDPModule)}


def _widen(module: nn.Module, frozen: set[nn.Parameter]) -> None:
    """Make float32 of half-precision weights that are not frozen: a student may have them from its teacher's files."""
    for p in module.parameters():
        if p not in frozen and p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()


def _own_frozen(net: nn.Module) -> None:
    """Give frozen weights parameters of the network's own: those of the teacher keep their values until it is sharded.

    The values are shared, so nothing is copied.
    """
    own: dict[nn.Parameter, nn.Parameter] = {}
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if not p.requires_grad:
                module.register_parameter(name, own.setdefault(p, nn.Parameter(p.detach(), False)))


def _lift_scalars(net: nn.Module) -> None:
    """Give parameters without dimensions one of size 1, since FSDP2 shards the first; state dicts keep their shapes."""
    for module in net.modules():
        names = [name for name, p in module.named_parameters(recurse=False) if p.ndim == 0]
        for name in names:
            scalar = module.get_parameter(name)
            module.register_parameter(name, nn.Parameter(scalar.detach().reshape(1), scalar.requires_grad))
        if names:
            module.register_state_dict_post_hook(partial(_lower, names))
            module.register_load_state_dict_pre_hook(partial(_lift, names))


def _lower(names: list[str], module: nn.Module, state: dict[str, Tensor], prefix: str, metadata) -> None:
    """Hook of state_dict(): scalars without dimensions."""
    for name in names:
        value = state[prefix + name]
        state[prefix + name] = (value.full_tensor() if isinstance(value, DTensor) else value).reshape(())


def _lift(names: list[str], module: nn.Module, state: dict[str, Tensor], prefix: str, *unused) -> None:
    """Hook of load_state_dict(), the inverse: a value as the parameter is, sharded or not."""
    for name in names:
        if prefix + name in state:
            value, like = state[prefix + name].reshape(1), module.get_parameter(name)
            if isinstance(like, DTensor) and not isinstance(value, DTensor):
                value = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
            state[prefix + name] = value
