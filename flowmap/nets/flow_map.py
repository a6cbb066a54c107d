"""The flow map of a network, and the initialisation of a student from a teacher.

f(x, t, s) = x + (s - t) F(x, t, s): the boundary condition f(x, t, t) = x is exact for any network F.
Source: Align Your Flow, arXiv:2506.14603.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flowmap.flow.types import Cond, broadcast_time
from flowmap.nets.policy import EmitsPolicy
from flowmap.nets.prediction import Predicts
from flowmap.nets.stacked import StackedNet
from flowmap.nets.time_embedding import EmbedsTime


@runtime_checkable
class ReadsText(Protocol):
    """A network that replaces dropped text by the conditions of an empty one."""

    empty: Cond


class FlowMapNet(nn.Module):
    """A student: a network F(x, t, s, cond), interpreted as the mean velocity over [s, t].

    decode: a differentiable function from latents to images, for objectives on images; train/ sets it during training.
    It is not a submodule: no state_dict contains it. uncertainty: the branch for learned loss weights (uncertainty.py),
    in training only. held: the precision of weights that precision.py has rounded, in which the network is computed.
    """

    net: Any  # one of nets/, or a module of another library
    decode: Callable[[Tensor], Tensor] | None = None
    held: torch.dtype | None = None
    uncertainty: nn.Module | None

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.register_module("uncertainty", None)

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """F(x, t, s), shaped and typed like x. x (B, ...), t and s (B,)."""
        with self._precision(x.device.type):
            return self.net(x, t, s, cond).to(x.dtype)

    def _precision(self, device: str) -> AbstractContextManager:
        if self.held is None or not torch.amp.is_autocast_available(device):  # the meta device has no autocast
            return nullcontext()
        return torch.autocast(device, self.held)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """The arrival point f(x, t, s); exactly x if s = t."""
        return x + (broadcast_time(s - t, x) * self.mean_velocity(x, t, s, cond)).to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The instantaneous velocity F(x, t, t)."""
        return self.mean_velocity(x, t, t, cond)

    def policy(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """The velocities u_k (B, K, ...) of the policy on [s, t] (flow/policy.py). ValueError for another network."""
        if not isinstance(self.net, EmitsPolicy) or self.net.points == 1:
            raise ValueError("student.points: must be 2 or more, of a network of kind dit or mlp, to give a policy")
        with self._precision(x.device.type):
            return self.net.policy(x, t, s, cond).to(x.dtype)

    @property
    def empty(self) -> Cond:
        """The conditions of an empty text, one row each, which the network uses where a call gives none."""
        first = _parts(self.net)[0]
        return first.empty if isinstance(first, ReadsText) else {}

    def with_null_conditions(self, empty: Cond) -> None:
        """Use these conditions of an empty text, one row each, if the network reads text."""
        for part in _parts(self.net):
            if isinstance(part, ReadsText):
                part.empty = dict(empty)

    def checkpoint_activations(self, on: bool) -> None:
        """Recompute activations in the backward pass, or keep them; nothing for a network without that setting."""
        if hasattr(self.net, "activation_checkpointing"):
            self.net.activation_checkpointing = on

    def log_error(self, t: Tensor, s: Tensor) -> Tensor:
        """u(t, s), (B,): the log of the student's expected error for these times."""
        assert self.uncertainty is not None
        return self.uncertainty(t, s)

    def pictures(self, x: Tensor) -> Tensor:
        """The images of samples x, with gradients: x itself without `decode`."""
        return x if self.decode is None else self.decode(x)


def _parts(net: nn.Module) -> tuple[nn.Module, ...]:
    return net.parts if isinstance(net, StackedNet) else (net,)


def mismatch(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[str, Any, Any] | None:
    """The first difference of two state dicts: (name, shape wanted, shape given); None if names and shapes match.

    The shape of a missing tensor is "absent".
    """
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (wanted, given)]
    first = next((name for name in [*shapes[0], *shapes[1]] if shapes[0].get(name) != shapes[1].get(name)), None)
    return None if first is None else (first, shapes[0].get(first, "absent"), shapes[1].get(first, "absent"))


SILENT = ("arrival.", "guidance.", "ends.")  # the branches that start at zero
BESIDE_NET = "uncertainty."  # the prefix of state dict keys that do not belong to the flow map


def start_from(student: FlowMapNet, teacher: FlowMapNet, *, share: bool = False) -> None:
    """Copy the teacher's weights to the student, so that F(x, t, s) = v(x, t).

    share: the student's parameters have the teacher's memory instead, in the teacher's precision.

    Branches for arrival, guidance and its interval that the teacher does not have keep their initial value, which is
    zero. A student that embeds t gets an embedding fitted to the teacher's, if that embeds another time: F is then v to
    the error of the fit (time_embedding.py). A stack copies the weights of a single network to both of its networks.
    The outputs of a policy are copies of the teacher's one. Raises a ValueError, and changes nothing, if the networks
    differ in anything except those.
    """
    if isinstance(student.net, StackedNet) and not isinstance(teacher.net, StackedNet):
        for part in student.net.parts:
            start_from(FlowMapNet(part), teacher, share=share)
        return
    if _embeds_other_time(teacher.net) and not _embeds_other_time(student.net):
        teacher = FlowMapNet(teacher.net.with_embedding_of_t())
    if isinstance(student.net, EmitsPolicy) and isinstance(teacher.net, EmitsPolicy):
        if student.net.points > teacher.net.points == 1:
            teacher = FlowMapNet(teacher.net.with_points(student.net.points))
    wanted, given = student.state_dict(), teacher.state_dict()
    differ = [key for key in wanted if key not in given and not any(part in key for part in SILENT)]
    differ += [key for key in given if key not in wanted or wanted[key].shape != given[key].shape]
    if differ:
        names = ", ".join(differ[:3]) + (" ..." if len(differ) > 3 else "")
        raise ValueError(f"student: its network is not the teacher's: {names}")
    if isinstance(student.net, Predicts) and isinstance(teacher.net, Predicts):
        if (own := student.net.prediction) != (other := teacher.net.prediction):
            raise ValueError(f"student.prediction: {own!r} cannot start with weights that predict {other!r}")
    if share:
        buffers = {name for name, _ in student.named_buffers()}
        given = {name: value.clone() if name in buffers else value for name, value in given.items()}
    student.load_state_dict(given, strict=False, assign=share)


def _embeds_other_time(net: nn.Module) -> bool:
    """Whether it embeds another time than t, and its embedding can be replaced."""
    return isinstance(net, EmbedsTime) and not net.embeds_t
