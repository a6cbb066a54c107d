"""Memory of one device in a run, from the shapes of its networks' weights and how these are split over devices.

Weights are exact: the parts that FSDP2 keeps of every parameter, rows padded as it pads them. Activations are those of
costs.py. Not counted are the allocator's fragmentation, CUDA's context and libraries (about 2 GiB), and evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import nn

from flowmap.build.frozen import hold_frozen
from flowmap.nets.blocks import blocks_of
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.precision import rounded_parameters
from flowmap.nets.quantized import quantized_layers
from flowmap.recipe import Recipe

FULL, HALF = 4, 2  # bytes of a number in float32 and bfloat16


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    weights, gradients, optimizer: of the student and of what trains with it. averages: of its weights. frozen: the
    networks of the teacher, and the base of adapters. working: copies of weights for a pass, which are the gathered
    units under FSDP2, and otherwise autocast's, and a dequantised layer. activations: kept for the backward pass. text:
    the encoders of captions, whole on each device.
    """

    weights: float
    gradients: float
    optimizer: float
    averages: float
    frozen: float
    working: float
    activations: float
    text: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def state(self) -> float:
        """Bytes that stay between steps, except the teacher's."""
        return self.weights + self.gradients + self.optimizer + self.averages


def memory_of(
    recipe: Recipe, student: FlowMapNet, teachers: Sequence[FlowMapNet], *, activations: float, others: int = 0
) -> Memory:
    """Return the memory of a device.

    student, teachers: on the meta device; the teachers' weights are rounded here as the run rounds them. A LoRA
    student's base is counted among the frozen weights, once, as it is the teacher's own. activations: bytes. others:
    parameters of networks that train with the student, whole on each device.
    """
    trainer, sharded = recipe.trainer, recipe.trainer.strategy == "fsdp"
    shards = trainer.shards if sharded else 1
    hold_frozen(recipe, teachers, student)
    base = [p for p in student.parameters() if not p.requires_grad]
    trained = _bytes([p for p in student.parameters() if p.requires_grad], shards)
    frozen = sum(_bytes(list(net.parameters()), shards) + _buffers(net) for net in teachers)
    if base:
        frozen += 0 if teachers else _bytes(base, shards)
    copies = len(recipe.ema.widths)
    return Memory(
        weights=trained + _buffers(student) + FULL * others,
        gradients=trained + FULL * others,
        optimizer=2 * (trained + FULL * others),
        averages=copies * (trained + (0 if sharded else _buffers(student))),  # sharded averages share the buffers
        frozen=frozen,
        working=(_gathered(recipe, student, teachers) if sharded else _casts(recipe, student))
        + _dequantised(recipe, [student, *teachers]),
        activations=activations,
    )


def _bytes(parameters: Sequence[nn.Parameter], shards: int) -> float:
    """The bytes of one part of parameters whose first dimension is split, and padded to equal parts."""
    total = 0
    for p in parameters:
        rows = p.shape[0] if p.ndim else 1
        total += math.ceil(rows / shards) * (p.numel() // max(rows, 1)) * p.element_size()
    return total


def _buffers(net: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in net.buffers())


def _gathered(recipe: Recipe, student: FlowMapNet, teachers: Sequence[FlowMapNet]) -> float:
    """The bytes of whole units in a pass: the root's, a block's and the next one's, or in the backward pass a block's
    gradients, and these in float32 as they are reduced.
    """
    half = recipe.trainer.precision == "bf16"
    *blocks, root = _units(student)
    stored = [(sum(p.numel() for p in unit if p.requires_grad), _size(unit, half)) for unit in blocks]
    backward = max((size + (HALF if half else FULL) * count + FULL * count for count, size in stored), default=0)
    forward = 2 * max((size for _, size in stored), default=0)
    found = [_size(root, False) + max(forward, backward)]
    for net in teachers[1:] if recipe.lora is not None else teachers:  # the first has the student's own base
        *blocks, root = _units(net)
        found.append(_size(root, False) + 2 * max((_size(unit, False) for unit in blocks), default=0))
    return max(found)


def gathered_bytes(net: FlowMapNet, half: bool) -> float:
    """Return the bytes of all units of a sharded network as they are gathered: blocks in bf16 with `half`."""
    *blocks, root = _units(net)
    return sum(_size(unit, half) for unit in blocks) + _size(root, False)


def _size(unit: list[nn.Parameter], half: bool) -> int:
    return sum(p.numel() * (HALF if half and p.is_floating_point() else p.element_size()) for p in unit)


def _units(net: FlowMapNet) -> list[list[nn.Parameter]]:
    """The parameters of each block, inner blocks first, and those of the rest."""
    blocks, seen = sorted(blocks_of(net.net), key=lambda block: len(list(block.modules()))), set[nn.Parameter]()
    found = []
    for module in (*blocks, net):
        found.append([p for p in module.parameters() if p not in seen])
        seen.update(found[-1])
    return found


def _casts(recipe: Recipe, student: FlowMapNet) -> float:
    """The bytes of the copies of trained weights in bfloat16 that autocast keeps during a step."""
    if recipe.trainer.precision != "bf16":
        return 0
    return HALF * sum(p.numel() for p in rounded_parameters(student.net) if p.requires_grad)


def _dequantised(recipe: Recipe, nets: Sequence[FlowMapNet]) -> float:
    """The bytes that the largest quantised layer takes while it is dequantised."""
    largest = max(
        (layer.in_features * layer.out_features for net in nets for layer in quantized_layers(net)), default=0
    )
    size = HALF if recipe.trainer.frozen_precision == "bf16" else FULL
    return largest * (size + (2 * FULL if recipe.quantize.frozen == "int8" else 0))  # int8 by way of float32
