"""What devices send one another in an optimizer step: gradients under DDP; weights and gradients under FSDP2.

Rings: a device of n sends (n - 1) / n of a tensor to gather or to scatter it, and twice that to reduce it everywhere.
Reductions over several nodes are scattered within each node first, so that a device sends its part to other nodes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowmap.estimate.memory import gathered_bytes
from flowmap.estimate.roofline import Step
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.precision import hold
from flowmap.recipe.settings import Trainer

FULL = 4  # bytes of a gradient as it is reduced


@dataclass(frozen=True)
class Links:
    """Bytes that a device sends in a second: within its node (NVLink), to other nodes (InfiniBand, 400 Gbit/s)."""

    within: float = 400e9
    between: float = 50e9

    @property
    def halved(self) -> Links:
        return Links(self.within / 2, self.between / 2)


@dataclass(frozen=True)
class Sent:
    """Bytes that each device sends within its node and to other nodes."""

    within: float = 0.0
    between: float = 0.0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.within + other.within, self.between + other.between)

    def times(self, count: float) -> Sent:
        return Sent(self.within * count, self.between * count)

    def seconds(self, links: Links) -> float:
        """The seconds of sending, one after the other."""
        return self.within / links.within + self.between / links.between


def sent_in_a_step(trainer: Trainer, step: Step, accumulate: int) -> Sent:
    """Return what a device sends in an optimizer step of so many micro-batches.

    DDP reduces gradients once, after the last micro-batch. FSDP2 gathers a network's blocks in every forward and
    backward pass and scatters gradients in every backward pass.
    """
    gradients = FULL * sum(p.numel() for p in step.student.parameters() if p.requires_grad)
    if trainer.strategy != "fsdp":
        return reduced(gradients, trainer.devices, trainer.num_nodes)
    half, shards = trainer.precision == "bf16", trainer.shards
    student = gathered_bytes(step.student, half) * (step.student_calls + step.student_graded)
    gathered = student + _frozen(step.teachers, step.teacher_calls, trainer.frozen_precision)
    micro = _spread(gathered + step.student_graded * gradients, shards, trainer)
    replicas = trainer.devices * trainer.num_nodes // shards
    # Replicas are groups of neighbours: within a node where several groups share one.
    inside = max(trainer.devices // shards, 1)
    return (micro + reduced(gradients / shards, inside, replicas // inside)).times(accumulate)


def reduced(size: float, devices: int, nodes: int) -> Sent:
    """Return what a device sends until all of nodes x devices have the sum of a tensor of so many bytes."""
    within, between = 2 * (devices - 1) / devices, 2 * (nodes - 1) / nodes
    return Sent(within * size, between * size / devices)


def _frozen(nets: Sequence[FlowMapNet], calls: Sequence[int], precision: str) -> float:
    if precision == "bf16":
        nets = [copy.deepcopy(net).requires_grad_(False) for net in nets]
        for net in nets:
            hold(net, torch.bfloat16)
    return sum(count * gathered_bytes(net, False) for net, count in zip(nets, calls, strict=True))


def _spread(size: float, shards: int, trainer: Trainer) -> Sent:
    """Return what a device sends to gather, or to scatter, so many bytes over a group of `shards` neighbours."""
    if shards <= trainer.devices:
        return Sent((shards - 1) / shards * size)
    nodes = shards // trainer.devices  # a ring through nodes: each link to another node carries its share
    return Sent((shards - nodes) / shards * size, (nodes - 1) / nodes * size / trainer.devices)
