"""What a student's branches add to its time embedding, as weights of the embedding's last layer.

On an even grid the branches of a student add one vector at every step, arrival(1 / K) + guidance((w - 1) / 4): a bias.
A layer without a bias (FLUX.2's) gets it by a matrix of rank 1, whose product with what the layer is given is that
vector at the K times of the grid. A student with a second time (second_time.py) adds another vector at each step: the
stock network with that time has it for any number of steps, and an adapter by a matrix of rank K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowmap.export.plan import Export
from flowmap.flow.clock import FlowClock
from flowmap.nets.diffusers_model import DiffusersNet
from flowmap.nets.second_time import SecondTime
from flowmap.nets.time_embedding import hidden, last_layer, listening

ARRIVAL = "timestep_embedder_r"  # diffusers' name of the embedding of the second time, next to that of the first


def network_of(plan: Export) -> DiffusersNet:
    """The student's network, which must be a diffusers network."""
    net = plan.student.flow_map.net
    assert isinstance(net, DiffusersNet)
    return net


def unit_of(net: DiffusersNet) -> float:
    """The time that the network embeds at t = 1."""
    assert isinstance(net.clock, FlowClock)  # has_stock has checked
    return net.clock.unit


def has_second_time(plan: Export) -> bool:
    """Whether the student reads its arrival as diffusers' class does, so that any number of steps can be exported."""
    return isinstance(network_of(plan).arrival, SecondTime)


def last_layers(model: nn.Module) -> list[str]:
    """The names of the last layers of the time embeddings with branches. ValueError if one does not come last."""
    found = listening(model)
    if any(getattr(module, "post_act", None) is not None for _, module in found):
        raise ValueError(f"--to: a time embedding of {type(model).__name__} does not end in a layer; take --custom")
    return [f"{name}.{last_layer(module)}" for name, module in found]


@torch.no_grad()
def constant_extra(plan: Export) -> Tensor | None:
    """The vector (width,) that the branches add at every step; None without branches. Not with a second time."""
    assert not has_second_time(plan)
    t = torch.ones(1, device=plan.student.device)
    extra = network_of(plan).added(t, t - 1 / plan.steps, _conditions(plan, t))
    return None if extra is None else extra[0]


@torch.no_grad()
def product_of(plan: Export, model: nn.Module, layer: str) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r): B A x is what the branches add at each step of the plan, x what the layer is given.

    The rank is 1 if that is one vector, and the number of steps with a second time. A is the smallest such matrix.
    """
    path = next(name for name, _ in listening(model) if layer.startswith(f"{name}."))
    times, device = torch.tensor(plan.times, dtype=torch.float64), next(model.parameters()).device
    given = hidden(model, path, (unit_of(network_of(plan)) * times[:-1]).to(device)).double()
    probes = torch.linalg.pinv(given).T.float()  # K x in: each is 1 at its own step and 0 at the others
    if not has_second_time(plan):
        extra = constant_extra(plan)
        assert extra is not None
        return probes.sum(0, keepdim=True), extra.unsqueeze(1)
    t, s = (value.float().to(plan.student.device) for value in (times[:-1], times[1:]))
    added = network_of(plan).added(t, s, _conditions(plan, t))
    assert added is not None
    return probes, added.T


@torch.no_grad()
def with_second_time(plan: Export) -> nn.Module:
    """The stock network with a second time (use_meanflow) and the student's output at any step, on the CPU.

    Its embedding is the mean of those of both times, so the last layers of both have twice the student's weights.
    """
    net = network_of(plan)
    model = type(net.model).from_config({**net.model.config, "use_meanflow": True})
    ((path, _),) = listening(net.model)
    parent = path.rpartition(".")[0]
    arrival: Any = net.arrival
    weights = dict(net.model.state_dict())
    weights |= {f"{parent}.{ARRIVAL}.{name}": value for name, value in arrival.state_dict().items()}
    for name in (path, f"{parent}.{ARRIVAL}"):
        for end in ("weight", "bias"):
            weights[f"{name}.linear_2.{end}"] = 2 * weights[f"{name}.linear_2.{end}"]
    if net.guidance is not None:
        t = torch.ones(1, device=plan.student.device)
        weights[f"{path}.linear_2.bias"] += 2 * (net.added(t, t, _conditions(plan, t)) - arrival(net.clock.at(t)[1]))[0]
    load_weights(model, weights)
    return model.eval().cpu()


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load the weights. ValueError if they are not those of the plain network, as with adapters that are not merged."""
    try:
        model.load_state_dict({key: value.cpu() for key, value in weights.items()})
    except RuntimeError as error:
        what = f"its weights are not those of a plain {type(model).__name__}"
        raise ValueError(f"--student: {what}; merge its adapters first") from error


def _conditions(plan: Export, t: Tensor) -> dict[str, Tensor]:
    return {} if plan.guidance is None else {"guidance": plan.guidance * torch.ones_like(t)}
