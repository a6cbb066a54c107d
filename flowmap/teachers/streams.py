"""Two independent frozen networks at the same time on a CUDA device, one of them on a side stream.

The kernels of a small network do not fill a large device, and those of the other one can run beside them. The results
are those of two calls in turn, and both networks' activations are in memory at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowmap.flow.tangent.compiled import Compiled
from flowmap.flow.tangent.inductor import inductor_with_cuda_graphs
from flowmap.flow.types import Teacher
from flowmap.teachers.network import NetworkTeacher


def on_two_streams(
    first: Callable[[], Tensor], second: Callable[[], Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The results of both calls; the second runs on a side stream of the CUDA device.

    The side stream waits for what the current stream has been given, such as the inputs, and the current stream waits
    for the side stream before this function returns, so inputs may be freed afterwards. The second result belongs to
    the side stream's memory; record_stream keeps that memory until the current stream has used it.
    """
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            other = second()
        one = first()
    finally:
        current.wait_stream(side)
    other.record_stream(current)
    return one, other


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def may_overlap(x: Tensor) -> bool:
    """Whether calls on x can use two streams: x is a plain CUDA tensor, and nothing traces or captures the calls.

    A compiler, torch.func and FakeTensors (type(x)) do not follow streams; a CUDA graph under capture would have to
    contain the side stream.
    """
    if x.device.type != "cuda" or type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not torch.cuda.is_current_stream_capturing()


def independent(first: Teacher, second: Teacher) -> bool:
    """Whether two teachers are networks that can run at the same time.

    They must share no module, since modules may fill caches in a call. Networks sharded by FSDP gather weights in the
    order of calls, and CUDA graphs may share one memory pool: neither can overlap.
    """
    nets = [_module(teacher) for teacher in (first, second)]
    if nets[0] is None or nets[1] is None or not set(nets[0].modules()).isdisjoint(nets[1].modules()):
        return False
    return not any(_is_sharded(net) or _has_cuda_graphs(net) for net in nets if net is not None)


def _module(teacher: Teacher) -> nn.Module | None:
    found = teacher.flow_map if isinstance(teacher, NetworkTeacher) else None
    return found if isinstance(found, nn.Module) else None


def _is_sharded(net: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in net.parameters())


def _has_cuda_graphs(net: nn.Module) -> bool:
    forwards = (module.forward for module in net.modules())
    return any(isinstance(f, Compiled) and f.plain.backend is inductor_with_cuda_graphs for f in forwards)
