"""The network of a student, compiled for sampling."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flowmap.nets.flow_map import FlowMapNet


def compiled(flow_map: FlowMapNet) -> FlowMapNet:
    """The same map, its network compiled by torch.compile when it is first called; the weights are shared.

    A batch of another size compiles it once more, then for any size.
    """
    network: Any = torch.compile(flow_map.net)
    found = FlowMapNet(network)
    found.held, found.decode = flow_map.held, flow_map.decode
    return found.eval()


@contextmanager
def compiler_needed() -> Iterator[None]:
    """A context in which a network is compiled. Raises a ValueError of one line if this machine cannot do that."""
    try:
        yield
    except RuntimeError as error:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or not isinstance(error, dynamo.exc.BackendCompilerFailed):
            raise
        reason = str(error.inner_exception).strip().partition("\n")[0]
        raise ValueError(f"compile: torch.compile cannot compile this network here: {reason}") from error
