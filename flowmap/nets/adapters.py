"""Networks that are a LoRA student's in other respects, without a base of their own: its average, and its teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowmap.flow.types import Cond
from flowmap.nets.flow_map import FlowMapNet


class AdapterAverage(FlowMapNet):
    """The student's flow map with these adapters and branches in the place of the student's own.

    They are exchanged for every call, without gradients; a call costs two copies of them. It has one copy of the
    weights that are trained, under the names that they have in the student, and nothing else. If the student is
    sharded, `follow` makes the average so.
    """

    def __init__(self, student: FlowMapNet):
        shared = [p for p in student.parameters() if not p.requires_grad]
        shared_buffers = list(student.buffers())
        net = copy.deepcopy(student.net, {id(one): one for one in (*shared, *shared_buffers)})
        super().__init__(net)
        if student.uncertainty is not None:
            self.uncertainty = copy.deepcopy(student.uncertainty)
        _drop_untrained(self)
        net.frozen = frozenset()  # so that its state is what it has
        self._student = (student,)  # in a tuple: not a submodule

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        (student,) = self._student
        theirs, mine, training = _trained(student), list(self.parameters()), student.training
        with torch.no_grad():
            kept = [p.clone() for p in theirs]
            try:
                torch._foreach_copy_(theirs, [_local(p) for p in mine])
                return student.eval().mean_velocity(x, t, s, cond)
            finally:
                torch._foreach_copy_(theirs, kept)
                student.train(training)

    def follow(self) -> None:
        """Split the weights over devices as the student's are; the average is then that of the student's weights."""
        (student,) = self._student
        for name, p in student.named_parameters():
            if p.requires_grad:
                owner, _, last = name.rpartition(".")
                self.get_submodule(owner).register_parameter(last, nn.Parameter(p.detach().clone(), False))


def share_base(teacher: FlowMapNet, student: FlowMapNet) -> None:
    """Make the teacher's mean velocity that of the student without adapters and branches, and drop its own network.

    The value is the same, as the student's base is the teacher's network.
    """

    def mean_velocity(x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        with torch.no_grad(), _base_alone(student):
            return student.mean_velocity(x, t, s, cond)

    teacher.__dict__["mean_velocity"] = mean_velocity
    teacher.net = nn.Identity()


def shares_base(teacher: FlowMapNet, student: FlowMapNet) -> bool:
    """Whether the teacher's weights are all of the student's frozen ones, the same objects."""
    frozen = {id(p) for p in student.parameters() if not p.requires_grad}
    return bool(frozen) and frozen == {id(p) for p in teacher.parameters()}


@contextmanager
def _base_alone(student: FlowMapNet) -> Iterator[None]:
    """A context in which the student's network has no branches and its adapters have no effect."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    net = student.net
    layers = [module for module in net.modules() if isinstance(module, BaseTunerLayer)]
    kept = net.arrival, net.guidance
    net.arrival = net.guidance = None
    for layer in layers:  # not by peft's enable_adapters, which also says what requires gradients
        layer._disable_adapters = True
    try:
        yield
    finally:
        net.arrival, net.guidance = kept
        for layer in layers:
            layer._disable_adapters = False


def _drop_untrained(net: nn.Module) -> None:
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                module.register_parameter(name, None)
        for name, _ in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, None)


def _trained(student: FlowMapNet) -> list[Tensor]:
    """What this process has of the weights that are trained, to be changed in place."""
    return [_local(p.detach()) for p in student.parameters() if p.requires_grad]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
