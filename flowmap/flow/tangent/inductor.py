"""Torch's default compiler, with one fault of it mended.

On a CPU, inductor splits the loops of a kernel that reads one number for many channels, as after a group norm
(CppScheduling.try_loop_split). Torch 2.13 asserts there that all parts of the kernel have the same ranges, but compares
them before it replaces symbols that are known to be equal. The rows of values and the rows of tangents are two such
symbols, so the exact step of a network with wide groups did not compile. The split is an optimization: the mended
function leaves it out where the assertion fails, before it has changed anything. It can go when torch simplifies the
ranges that it compares.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import fx

CUDA_GRAPHS = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
"""Inductor's settings for kernels that are recorded and replayed as one; graphs whose shapes change are left out."""


def inductor(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Torch's default compiler."""
    return _compiled(graph, inputs)


def inductor_with_cuda_graphs(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """The same; its kernels are recorded as CUDA graphs (torch.compiler.cudagraph_mark_step_begin starts a step)."""
    return _compiled(graph, inputs, config_patches=CUDA_GRAPHS)


def _compiled(graph: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx

    mend_loop_split()
    return compile_fx(graph, inputs, **settings)


@functools.cache
def mend_loop_split() -> None:
    """Mend it for the process: backward graphs are compiled later, when a loss is differentiated."""
    from torch._inductor.codegen.cpp import CppScheduling

    split = getattr(CppScheduling, "try_loop_split", None)
    if split is None:
        return

    def split_or_not(self: Any, nodes: Any) -> Any:
        try:
            return split(self, nodes)
        except AssertionError:
            return nodes

    CppScheduling.try_loop_split = split_or_not  # type: ignore[method-assign]
