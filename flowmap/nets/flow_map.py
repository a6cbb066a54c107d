"""The head that makes a network a flow map, and the way from a teacher's weights to a student's.

f(x, t, s) = x + (s - t) F(x, t, s): the boundary f(x, t, t) = x holds exactly, whatever the network says.
Source: Align Your Flow, arXiv:2506.14603.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from flowmap.flow.types import Cond, broadcast_time
from flowmap.nets.stacked import StackedNet


class FlowMapNet(nn.Module):
    """A student: a network F(x, t, s, cond) read as the mean velocity over [s, t].

    decode: what makes pictures of latents, with grad, for objectives that look at pictures; train/ sets it on the student that trains. It
    is no submodule: no state_dict and no copy has it. uncertainty: the branch of a learned weight (uncertainty.py) while the student trains, and
    None in what ships.
    """

    net: Any  # one of nets/, or a library's
    decode: Callable[[Tensor], Tensor] | None = None
    uncertainty: nn.Module | None

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.register_module("uncertainty", None)

    def mean_velocity(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """F(x, t, s), shaped and typed like x. x (B, ...), t and s (B,)."""
        return self.net(x, t, s, cond).to(x.dtype)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """The arrival point f(x, t, s); exactly x where s = t."""
        return x + (broadcast_time(s - t, x) * self.mean_velocity(x, t, s, cond)).to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The instantaneous velocity F(x, t, t)."""
        return self.mean_velocity(x, t, t, cond)

    def checkpoint_activations(self, on: bool) -> None:
        """Recompute activations in the backward pass, or keep them; nothing for a network without that setting."""
        if hasattr(self.net, "activation_checkpointing"):
            self.net.activation_checkpointing = on

    def log_error(self, t: Tensor, s: Tensor) -> Tensor:
        """u(t, s), (B,): the logarithm of the error that the student expects of itself there."""
        assert self.uncertainty is not None
        return self.uncertainty(t, s)

    def pictures(self, x: Tensor) -> Tensor:
        """What samples x look like, with grad: x itself where nothing decodes."""
        return x if self.decode is None else self.decode(x)


def mismatch(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[str, Any, Any] | None:
    """The first tensor that two state dicts do not share in name and shape: (name, shape wanted, shape given); None where they fit.

    A tensor that is not there has the shape "absent".
    """
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (wanted, given)]
    odd = next((name for name in [*shapes[0], *shapes[1]] if shapes[0].get(name) != shapes[1].get(name)), None)
    return None if odd is None else (odd, shapes[0].get(odd, "absent"), shapes[1].get(odd, "absent"))


SILENT = ("arrival.", "guidance.")
BESIDE_NET = "uncertainty."  # what a state dict names so is no part of the map


def start_from(student: FlowMapNet, teacher: FlowMapNet) -> None:
    """The student's weights are the teacher's; its arrival and guidance branches, where the teacher has none, stay silent: F(x, t, s) = v(x, t).

    A stack whose start is a single network takes those weights twice. Raises ValueError, and changes nothing, if the two networks differ in
    anything but those branches.
    """
    if isinstance(student.net, StackedNet) and not isinstance(teacher.net, StackedNet):
        for part in student.net.parts:
            start_from(FlowMapNet(part), teacher)
        return
    wanted, given = student.state_dict(), teacher.state_dict()
    odd = [key for key in wanted if key not in given and not any(part in key for part in SILENT)]
    odd += [key for key in given if key not in wanted or wanted[key].shape != given[key].shape]
    if odd:
        raise ValueError(
            f"student: its network is not the teacher's: {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}"
        )
    student.load_state_dict(given, strict=False)
