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
TIME_EMBEDDINGS = ("timestep_embedder", "time_embedding", "t_embedder", "time_step_proj")  # names in diffusers
SINUSOIDS = ("time_proj", "time_step_embed")  # of the sinusoids beside it
LAST_LAYERS = ("linear_2", "mlp.2")  # names of the last layer of a time embedding
OWN_TIMES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "QwenImageTransformer2DModel": lambda config, time: time / 1000,
    "AuraFlowTransformer2DModel": lambda config, time: time / 1000,
    "SanaTransformer2DModel": lambda config, time: time * config.timestep_scale,
    "ZImageTransformer2DModel": lambda config, time: (1 - time / 1000) * config.t_scale,
    "Lumina2Transformer2DModel": lambda config, time: 1 - time / 1000,
}
"""What a diffusers network's sinusoids are given, where that is not the time of its schedule."""
EMBED_T = ("Lumina2Transformer2DModel",)  # networks that embed 1 - t, whose sinusoids are slow
OF_CAPTIONS = "context_embedder."  # where HunyuanImage embeds time a second time, for its caption

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
    t = _times()
    for path, embedding in time_embeddings(model):
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(parent)
        sinusoids = _sinusoids(model, module, embedding)
        before, after = (sinusoids(_own_time(model, time(t))).double() for time in (old, new))
        module.register_module(name, _refit_one(embedding, before, after))


def time_embeddings(model: Any) -> list[tuple[str, Any]]:
    """The time embeddings of a diffusers model by name."""
    return [(name, module) for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in TIME_EMBEDDINGS]


def listening(model: Any) -> list[tuple[str, Any]]:
    """The time embeddings by name to which a student adds its branches."""
    return [(name, module) for name, module in time_embeddings(model) if not name.startswith(OF_CAPTIONS)]


def last_layer(embedding: Any) -> str:
    """The name of a time embedding's last layer in it. ValueError if it has none of the known names."""
    names = {name for name, _ in embedding.named_modules()}
    found = next((name for name in LAST_LAYERS if name in names), None)
    if found is None:
        raise ValueError(f"{type(embedding).__name__}: a time embedding without a layer {' or '.join(LAST_LAYERS)}")
    return found


@torch.no_grad()
def hidden(model: Any, path: str, time: Tensor) -> Tensor:
    """What the last layer of the time embedding `path` is given at these times (K,) of the schedule: (K, features)."""
    embedding = model.get_submodule(path)
    first, act, _ = _layers(embedding)
    sinusoids = _sinusoids(model, model.get_submodule(path.rpartition(".")[0]), embedding)
    return act(first(sinusoids(_own_time(model, time)).to(first.weight.dtype)))


def _own_time(model: Any, time: Tensor) -> Tensor:
    """What the network's sinusoids are given at these times of its schedule, float32."""
    own = OWN_TIMES.get(type(model).__name__)
    return time.float() if own is None else own(model.config, time.float())


def _sinusoids(model: Any, module: Any, embedding: Any) -> OfTime:
    """The sinusoids (B, features) that the embedding, a child of that module, is given."""
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    sinusoids = next((child for name, child in module.named_children() if name in SINUSOIDS), None)
    if isinstance(sinusoids, Timesteps) and isinstance(embedding, TimestepEmbedding):
        return sinusoids
    if type(model).__name__ == "ZImageTransformer2DModel":
        return lambda time: embedding.timestep_embedding(time, embedding.frequency_embedding_size)
    raise ValueError(f"time_embedding: 't' replaces sinusoids of time, which {type(model).__name__} does not have")


def _layers(embedding: Any) -> tuple[nn.Linear, nn.Module, nn.Linear]:
    """The first layer of a time embedding, its activation, and its last layer."""
    if last_layer(embedding) == "linear_2":
        return embedding.linear_1, embedding.act, embedding.linear_2
    return tuple(embedding.mlp)


def _refit_one(embedding: Any, before: Tensor, after: Tensor) -> Any:
    """A copy of the embedding that gives for the features `after` what it gave for `before`."""
    kept, fit = (copy.deepcopy(embedding).double() for _ in range(2))
    (first, act, last), (new_first, _, new_last) = _layers(kept), _layers(fit)
    _fit(new_first, after, first(before), RIDGE)
    _fit(new_last, act(new_first(after)), last(act(first(before))), RIDGE)
    return fit.to(next(embedding.parameters()).dtype)


def _times() -> Tensor:
    return (torch.arange(NUM_TIMES, dtype=torch.float64) + 0.5) / NUM_TIMES


def _fit(layer: nn.Linear, x: Tensor, y: Tensor, ridge: float) -> None:
    """Set a layer to the linear map from the rows x to the rows y, by ridge regression; affine if it has a bias."""
    x, y = x.double(), y.double()
    affine = layer.bias is not None
    centre, shift = (rows.mean(0) if affine else torch.zeros_like(rows[0]) for rows in (x, y))
    square = (x - centre).T @ (x - centre)
    square.diagonal().add_(ridge * square.diagonal().mean())
    weight = torch.linalg.solve(square, (x - centre).T @ (y - shift)).T
    layer.weight.copy_(weight)
    if affine:
        layer.bias.copy_(shift - weight @ centre)
