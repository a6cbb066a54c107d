"""A captured graph with its walk in place of its nodes, and the key by which torch caches what it compiles of it."""

from __future__ import annotations

import functools
import hashlib
import operator
from pathlib import Path

import torch
from torch import fx, nn

from flowmap.flow.tangent.rules import RULES
from flowmap.flow.tangent.walk import Walk, enter

OWN_RULES = dict(RULES)
"""The rules as they are shipped."""


def is_dual(graph: fx.GraphModule) -> bool:
    """Whether tangents enter the graph."""
    return any(node.target is enter for node in graph.graph.nodes)


def walked(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with one node in place of all others, which walks them; its inputs stay as torch captured them."""
    nodes = graph.graph
    copied = fx.Graph()
    copied.output(copied.graph_copy(nodes, {}))
    walk = WalkModule(fx.GraphModule(graph, copied))
    (count,) = (len(node.args[0]) for node in nodes.find_nodes(op="output"))
    for node in reversed(nodes.nodes):
        if node.op != "placeholder":
            nodes.erase_node(node)
    graph.add_module("walk", walk)
    call = nodes.call_module("walk", tuple(nodes.find_nodes(op="placeholder")))
    nodes.output(tuple(nodes.call_function(operator.getitem, (call, i)) for i in range(count)))
    graph.recompile()
    return graph


class WalkModule(nn.Module):
    """A walk as a module, which a graph can call. Torch's caches know it by its text and by the rules' source."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__()
        self.graph = graph

    def forward(self, *args):
        return Walk(self.graph).run(*args)

    def __reduce__(self):
        return str, (text_of(self.graph) + fingerprint(),)


def text_of(graph: fx.GraphModule) -> str:
    """The code of the graph and of those within it. TypeError, so that nothing is cached, if it has constants."""
    if next(graph.parameters(), None) is not None or next(graph.buffers(), None) is not None:
        raise TypeError("a graph with tensors of its own")
    graphs = [(name, module) for name, module in graph.named_modules() if isinstance(module, fx.GraphModule)]
    return "\n".join(f"{name}: {module.code}" for name, module in graphs)


def fingerprint() -> str:
    """A hash of the source of the rules; TypeError, so that nothing is cached, if rules were added or replaced."""
    if RULES != OWN_RULES:
        raise TypeError("rules were added")
    return source_hash()


@functools.cache
def source_hash() -> str:
    """A hash of this folder's source and of torch's version."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files) + torch.__version__.encode()).hexdigest()
