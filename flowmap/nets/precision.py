"""Weights held in bfloat16: half the memory of a frozen network, and the same output as under autocast.

Autocast rounds the weights of linear layers and convolutions to bfloat16 in every call. Here they are rounded once.
Norms, tables, embeddings of times and everything that is trained stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from flowmap.nets.edm2 import Conv
from flowmap.nets.embed import ExtraEmbeddings, ScalarEmbedding
from flowmap.nets.flow_map import FlowMapNet

LAYERS = (nn.Linear, _ConvNd, Conv)
KEPT = (ScalarEmbedding, ExtraEmbeddings)


def hold(flow_map: FlowMapNet, dtype: torch.dtype) -> None:
    """Round the frozen weights of layers to `dtype`, in place, and compute with it from now on, as autocast does.

    Parameters that other networks share are rounded there too: set their `held` as well. EDM2's layers, which
    normalise their weights, round twice unless `fold_filters` has been called.
    """
    flow_map.held = dtype
    for parameter in rounded_parameters(flow_map.net):
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def rounded_parameters(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that autocast rounds in every call."""
    layers = [module for module in _outside(net, KEPT) if isinstance(module, LAYERS)]
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False)]


def _outside(module: nn.Module, kept: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """The module and those within it, without the `kept` ones and what they have within them."""
    if isinstance(module, kept):
        return []
    return [module, *(inner for child in module.children() for inner in _outside(child, kept))]
