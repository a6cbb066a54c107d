"""A network's forward, compiled: a plain call as by torch.compile, and a dual one with its derivative in one graph.

The dual forward (dual.py) calls a Compiled as any other function. If an argument is a dual tensor, the values and
tangents go to a compiled function that was traced by the same table of rules (walk.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from flowmap.flow.tangent.dual import Context, DualTensor, dual_tensor
from flowmap.flow.tangent.rows import Rows
from flowmap.flow.tangent.walk import Walk, enter, tangent_of


class Moving(NamedTuple):
    """A value with its tangent, as an argument or a result of a compiled function."""

    value: Tensor
    tangent: Tensor
    dim: int | None


class Compiled:
    """A function that is compiled at its first call, separately for plain and for dual tensors."""

    def __init__(self, forward: Callable, *, backend: Callable | None = None):
        self.forward = forward
        self.backend = inductor if backend is None else backend
        self.graphs = 0
        self.seconds = 0.0
        self._dual: Callable | None = None
        self._plain: Callable | None = None

    def __call__(self, *args, **kwargs):
        duals: list[DualTensor] = []
        given, named = moving(args, duals), moving(kwargs, duals)
        if not duals:
            return self.forward(*args, **kwargs)
        context = duals[0].context
        if self._dual is None:
            self._dual = self._compile(own(dual_call))
        with torch.compiler.set_stance("default"):
            out = self._dual(self.forward, given, named)
        return dual_again(out, context)

    def _compile(self, function: Callable) -> Callable:
        torch._dynamo.allow_in_graph([enter, tangent_of])
        return torch.compile(function, backend=self._build, fullgraph=True)

    def _build(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        started = time.perf_counter()
        if any(node.target is enter for node in graph.graph.nodes):
            graph = walked(graph)
        out = self.backend(graph, inputs)
        self.graphs += 1
        self.seconds += time.perf_counter() - started
        return out


def own(function: FunctionType | Callable) -> Callable:
    """The function with a code object of its own: torch counts what it compiled by code object."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)


def inductor(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs)


def walked(graph: fx.GraphModule) -> fx.GraphModule:
    """The captured graph with one node in place of all: its walk. Inputs and what is known of them stay."""
    inside = fx.GraphModule(graph, fx.Graph())
    inside.graph.graph_copy(graph.graph, {}, return_output_node=False)
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    walk = Walk(fx.GraphModule(graph, copied))
    for node in reversed(graph.graph.nodes):
        if node.op == "output":
            count = len(node.args[0])
        if node.op != "placeholder":
            graph.graph.erase_node(node)
    graph.add_module("walk", WalkModule(walk))
    call = graph.graph.call_module("walk", tuple(graph.graph.find_nodes(op="placeholder")))
    graph.graph.output(tuple(graph.graph.call_function(__import__("operator").getitem, (call, i)) for i in range(count)))
    graph.recompile()
    return graph


class WalkModule(torch.nn.Module):
    def __init__(self, walk: Walk):
        super().__init__()
        self.walk = walk

    def forward(self, *args):
        return self.walk.run(*args)


def dual_call(forward: Callable, args: tuple, kwargs: dict):
    """What is captured: the call with markers where tangents enter and leave."""
    tangents: list[Moving] = []
    values, named = entered(args, tangents), entered(kwargs, tangents)
    first = tangents[0]
    return paired(forward(*values, **named), first)


def entered(x, found: list[Moving]):
    """x with markers in place of Movings."""
    if isinstance(x, Moving):
        found.append(x)
        return enter(x.value, x.tangent, x.dim)
    if isinstance(x, (tuple, list)):
        return type(x)([entered(v, found) for v in x])
    return {key: entered(v, found) for key, v in x.items()} if isinstance(x, dict) else x


def paired(x, like: Moving):
    """x with a Moving in place of every tensor that can have a tangent."""
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            return x
        dim = None if like.dim is None else -x.ndim
        return Moving(x, tangent_of(x, dim, like.tangent), dim)
    if isinstance(x, (tuple, list)):
        return type(x)([paired(v, like) for v in x])
    return {key: paired(v, like) for key, v in x.items()} if isinstance(x, dict) else x


def moving(x, duals: list[DualTensor]):
    """x with Movings in place of dual tensors."""
    kind = type(x)
    if kind is DualTensor:
        duals.append(x)
        return Moving(x.value, x.tangent, None if x.rows is None else x.rows.dim)
    if kind is tuple or kind is list:
        return kind([moving(v, duals) for v in x])
    return {key: moving(v, duals) for key, v in x.items()} if kind is dict else x


def dual_again(x, context: Context):
    """x with dual tensors in place of Movings, or plain ones if the dual forward has ended."""
    if type(x) is Moving:
        if not context.active:
            return x.value
        rows = None if x.dim is None else Rows(x.dim, x.tangent.shape[x.dim])
        return dual_tensor(x.value, x.tangent, context, rows)
    if isinstance(x, (tuple, list)):
        return type(x)([dual_again(v, context) for v in x])
    return {key: dual_again(v, context) for key, v in x.items()} if isinstance(x, dict) else x
