"""An embedding of t itself, fitted to a network's embedding of another time before training.

A network that was trained on log-sigma or on 1,000 t keeps its weights, except that its time embedding is replaced by
one of low frequencies in t, with an output fitted to the old one's. The derivative of log-sigma is unbounded at both
ends of the path, that of a fast sinusoid is large everywhere, and both are factors of dF/dt.
Source: Align Your Flow (Sabour, Fidler, Kreis 2025), arXiv:2506.14603; how it fits is not known. Clock: 0 data, 1
noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

NUM_TIMES = 4096  # of the fit, even in t
HARMONICS = 12  # half periods of the fastest cosine
AT_NOISE = 1.0  # weight of t = 1, where every sample starts, in the fit of the cosines; the even times together have 1
RIDGE = 1e-2  # of a diffusers network's fit, relative to the mean square of the features
TIME_EMBEDDINGS = ("timestep_embedder", "time_embedding")  # names in diffusers
TIME_SCALES: dict[str, Callable[[Any], float]] = {
    "QwenImageTransformer2DModel": lambda config: 1e-3,
    "SanaTransformer2DModel": lambda config: config.timestep_scale,
}
"""What a diffusers network's sinusoids are given, relative to the time of its schedule, where that is not 1."""

OfTime = Callable[[Tensor], Tensor]  # a function of t (B,)


@runtime_checkable
class EmbedsTime(Protocol):
    """A network whose time embedding can be replaced by one of t itself; its settings are EmbedsTimeSpec."""

    @property
    def embeds_t(self) -> bool: ...

    def with_embedding_of_t(self) -> nn.Module: ...


@runtime_checkable
class EmbedsTimeSpec(Protocol):
    """The settings of such a network."""

    @property
    def embeds_t(self) -> bool: ...

    def embedding_t(self) -> Any: ...


class CosineEmbedding(nn.Linear):
    """A linear map of cos(pi k t), k = 0 .. 12, in float32 or better, also under autocast: t (B,) -> (B, width).

    The cosines are orthogonal on [0, 1], so that a fit has weights no larger than its target. With the random hidden
    layer of a perceptron, whose features are nearly dependent, it has large weights that cancel, until training moves
    them: dF/dt then explodes.
    """

    def __init__(self, width: int):
        super().__init__(HARMONICS + 1, width, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        kind = t.device.type if torch.amp.is_autocast_available(t.device.type) else "cpu"  # the meta device has none
        with torch.autocast(kind, enabled=False):
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            k = torch.arange(self.in_features, dtype=wide, device=t.device)
            return super().forward(torch.cos(t.to(wide)[:, None] * (torch.pi * k)).to(self.weight.dtype))


@torch.no_grad()
def fitted(old: OfTime, width: int) -> CosineEmbedding:
    """An embedding of t with the output (B, width) of `old`, by least squares over t in [0, 1] and at t = 1."""
    new, t = CosineEmbedding(width).double(), torch.cat([_times(), torch.ones(1, dtype=torch.float64)])
    weight = torch.ones_like(t)
    weight[-1] = AT_NOISE * NUM_TIMES
    cosines = torch.cos(t[:, None] * (torch.pi * torch.arange(new.in_features)))
    weighted = cosines.T * weight
    new.weight.copy_(torch.linalg.solve(weighted @ cosines, weighted @ old(t.float()).double()).T)
    return new.float()


@torch.no_grad()
def refit(model: Any, old: OfTime, new: OfTime) -> None:
    """Fit a diffusers model's time embeddings, so that they give at the times `new` what they gave at the times `old`.

    Each embedding gets new parameters: its first layer is fitted to its old output, then the last layer to its own.
    ValueError if the model embeds time in another way.
    """
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    t, scale = _times(), TIME_SCALES.get(type(model).__name__, lambda config: 1.0)(model.config)
    names = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in TIME_EMBEDDINGS]
    for parent, _, name in (name.rpartition(".") for name in names):
        module = model.get_submodule(parent)
        parts = dict(module.named_children())
        sinusoids, embedding = parts.get("time_proj"), parts[name]
        if not (isinstance(sinusoids, Timesteps) and isinstance(embedding, TimestepEmbedding)):
            raise ValueError(
                f"time_embedding: 't' replaces sinusoids of time, which {type(model).__name__} does not have"
            )
        before, after = (sinusoids(scale * time(t).float()).double() for time in (old, new))
        module.register_module(name, _refit_one(embedding, before, after))


def _refit_one(embedding: Any, before: Tensor, after: Tensor) -> Any:
    """A copy of the embedding that gives for the features `after` what it gave for `before`."""
    kept, fit = (copy.deepcopy(embedding).double() for _ in range(2))
    _fit(fit.linear_1, after, kept.linear_1(before), RIDGE)
    hidden = kept.act(kept.linear_1(before))
    _fit(fit.linear_2, fit.act(fit.linear_1(after)), kept.linear_2(hidden), RIDGE)
    return fit.to(next(embedding.parameters()).dtype)


def _times() -> Tensor:
    return (torch.arange(NUM_TIMES, dtype=torch.float64) + 0.5) / NUM_TIMES


def _fit(layer: nn.Linear, x: Tensor, y: Tensor, ridge: float) -> None:
    """Set a layer with a bias to the linear map from the rows x to the rows y, by ridge regression."""
    x, y = x.double(), y.double()
    centre, shift = x.mean(0), y.mean(0)
    square = (x - centre).T @ (x - centre)
    square.diagonal().add_(ridge * square.diagonal().mean())
    weight = torch.linalg.solve(square, (x - centre).T @ (y - shift)).T
    layer.weight.copy_(weight)
    layer.bias.copy_(shift - weight @ centre)
