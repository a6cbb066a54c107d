"""A diffusers transformer or UNet as a network of ours: F(x, t, s, cond) on our clock, whatever it predicts on whatever schedule.

A teacher is one of these without arrival and guidance branches, a student one with them: silent at the start, they are added to the model's
own time embedding, so that F(x, t, s) = v(x, t) at step 0. One adapter for every prediction and schedule; a row of CALLS for what a
family's forward wants to be told. Conditions, by key of cond:
    class (B,)               label, -1 for none
    text (B, L, D), text_mask (B, L), pooled (B, P)        what the family's text encoders gave
    size (B, 6)              SDXL's original size, crop and target size
    guidance (B,)            read by models that were distilled with a guidance input of their own (FLUX.1-dev)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowmap.flow.clock import FlowClock, TableClock, velocity_of
from flowmap.flow.limit import Limit
from flowmap.flow.types import Cond
from flowmap.nets.embed import ScalarEmbedding, branches
from flowmap.nets.teacher_settings import check_network_settings, check_scheduler_settings, clock_of, limit_of

TIME_EMBEDDINGS = ("timestep_embedder", "time_embedding")
BLOCKS = "transformer_blocks"
LARGEST_SETTING = 1 << 20
LARGEST_DEPTH = 512


@dataclass(frozen=True)
class DiffusersModel:
    """A diffusers network by its class, with its settings and its scheduler's as JSON texts; `load_pretrained` fills it in from a pipeline."""

    network: str
    settings: str
    scheduler: str
    scheduler_settings: str
    holds_constants: ClassVar[bool] = (
        True  # position tables and the like that no file of weights has: it must be built with memory
    )

    def __post_init__(self):
        if self.network not in CALLS:
            raise ValueError(f"network: no call is known for {self.network!r}; known: {', '.join(CALLS)}")
        for name in ("settings", "scheduler_settings"):
            try:
                settings = json.loads(getattr(self, name))
                if not isinstance(settings, dict):
                    raise ValueError(f"{settings!r} is not a mapping of settings, as JSON")
                _check_sizes(settings)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def build(
        self, shape: tuple[int, ...], *, num_classes: int | None = None, arrival: bool = True, guidance: bool = False
    ) -> DiffusersNet:
        return DiffusersNet(made(self.network, self.settings), *self.clock(), arrival=arrival, guidance=guidance)

    def clock(self) -> tuple[FlowClock | TableClock, str]:
        check_scheduler(self.scheduler)
        with torch.device("cpu"):  # also where the network is built without memory
            return clock_of(made(self.scheduler, self.scheduler_settings))

    def limit(self) -> Limit | None:
        """What a sampler of its scheduler does with the predicted data; the network itself does not do it."""
        check_scheduler(self.scheduler)
        with torch.device("cpu"):
            return limit_of(made(self.scheduler, self.scheduler_settings))

    def check_teacher(self, shape: tuple[int, ...] | None = None) -> None:
        """ValueError, by name, for a setting with which it cannot be a teacher (of samples of that shape)."""
        import diffusers

        check_scheduler(self.scheduler)
        check_scheduler_settings(getattr(diffusers, self.scheduler), json.loads(self.scheduler_settings))
        check_network_settings(self.network, self.settings, shape)
        self.clock()


class DiffusersNet(nn.Module):
    """F(x, t, s, cond) for x (B, C, H, W): the model's prediction on its own clock, said as x1 - x0.

    empty: the conditions of "no text", with batch size 1, which fill in what a call leaves out (classifier-free guidance asks without text).
    frozen: the names of the weights that LoRA adapts and does not train; lora.py sets it, and no other network has it.
    """

    model: Any  # a network of diffusers
    frozen: frozenset[str]

    def __init__(
        self, model: nn.Module, clock: FlowClock | TableClock, prediction: str, *, arrival: bool, guidance: bool
    ):
        super().__init__()
        self.model, self.clock, self.prediction = model, clock, prediction
        self.empty: dict[str, Tensor] = {}
        self.call = CALLS[type(model).__name__]
        self.extra = _Extra()
        width = _listen(model, self.extra) if arrival or guidance else 0
        self.arrival = ScalarEmbedding(width, silent=True) if arrival else None
        self.guidance = ScalarEmbedding(width, silent=True) if guidance else None

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        cond = cond or {}
        self.extra.value = branches(self.arrival, self.guidance, t, s, cond)
        missing = {
            key: value.to(x.device).expand(len(x), *value.shape[1:])
            for key, value in self.empty.items()
            if key not in cond
        }
        given = _Conditions(type(self.model).__name__, {**missing, **cond})

        def predict(state: Tensor, time: Tensor) -> Tensor:
            out = self.call(self.model, state.to(next(self.model.parameters()).dtype), time, given)
            return (out[:, : x.shape[1]] if out.shape[1] == 2 * x.shape[1] else out).to(
                x.dtype
            )  # a learned variance is left out

        return velocity_of(predict, self.clock, x, t, self.prediction)

    def train(self, mode: bool = True) -> DiffusersNet:
        """The model itself stays in evaluation mode, adapters' dropout apart: dropped labels would differ between a value and its derivative."""
        super().train(mode)
        self.model.eval()
        for name, module in self.model.named_modules():
            if name.endswith(".lora_dropout"):
                module.train(mode)
        return self

    def with_branches(self, *, arrival: bool, guidance: bool) -> DiffusersNet:
        """The same network beside silent branches: modules of its own, the parameters shared."""
        model = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        net = DiffusersNet(model, self.clock, self.prediction, arrival=arrival, guidance=guidance)
        net.empty = dict(self.empty)
        return net

    def without_blocks(self, skip: tuple[int, ...]) -> DiffusersNet:
        """The same network, weights shared, with those transformer blocks left out: a weak model for autoguidance."""
        blocks = getattr(self.model, BLOCKS, None)
        if blocks is None or any(not 0 <= i < len(blocks) for i in skip):
            allowed = (
                f"0..{len(blocks) - 1}"
                if blocks is not None
                else "nothing: this network has no row of transformer blocks"
            )
            raise ValueError(f"skip_blocks: {tuple(skip)} must lie in {allowed}")
        weak, model = copy.copy(self), copy.copy(self.model)
        weak._modules, model._modules = dict(self._modules), dict(self.model._modules)
        model._modules[BLOCKS] = nn.ModuleList(block for i, block in enumerate(blocks) if i not in skip)
        weak._modules["model"] = model
        return weak

    @property
    def activation_checkpointing(self) -> bool:
        return bool(getattr(self.model, "is_gradient_checkpointing", False))

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        if on:
            self.model.enable_gradient_checkpointing()


class _Extra:
    """What is added to the model's time embeddings in the current pass; not a module, so that state_dict keeps the model's own names."""

    value: Tensor | None = None


def _listen(model: nn.Module, extra: _Extra) -> int:
    """Makes the model's time embeddings add `extra`, and gives their width. The class of each is exchanged: names and weights stay."""
    found = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in TIME_EMBEDDINGS]
    widths = {module.linear_2.out_features for module in found}
    if len(widths) != 1:
        raise ValueError(
            f"{type(model).__name__}: a student needs time embeddings of one width; found {len(found)} of {len(widths)} widths"
        )
    for module in found:
        module.__class__ = _listening(type(module))
        module.extra = extra
    return widths.pop()


_LISTENING: dict[type[nn.Module], type[nn.Module]] = {}


def _listening(cls: type[nn.Module]) -> type[nn.Module]:
    """The embedding's class, with the extra added to what it gives."""
    if cls not in _LISTENING:

        def forward(self, *args, **kwargs):
            out = cls.forward(self, *args, **kwargs)
            return out if self.extra.value is None else out + self.extra.value.to(out.dtype)

        _LISTENING[cls] = type(f"Listening{cls.__name__}", (cls,), {"forward": forward})
    return _LISTENING[cls]


def called(model: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """What the model predicts for its own state x (B, C, H, W) at its own time (B,), called as its family is."""
    return CALLS[type(model).__name__](model, x, time, _Conditions(type(model).__name__, cond))


class _Conditions:
    """cond by key; a key that is not there is a ValueError that names the network."""

    def __init__(self, network: str, cond: Cond):
        self.network, self.cond = network, cond

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.cond:
            raise ValueError(f"cond: {self.network} needs {key!r}; given: {', '.join(self.cond) or 'nothing'}")
        return self.cond[key]

    def get(self, key: str) -> Tensor | None:
        return self.cond.get(key)


def first_line(error: Exception) -> str:
    """What an exception of another library says, its first line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def made(name: str, settings: str) -> Any:
    """The object of that class of diffusers' by these settings; ValueError where they do not make one."""
    import diffusers

    try:
        return getattr(diffusers, name).from_config(json.loads(settings))
    except Exception as error:  # settings of others make the library raise anything at all
        raise ValueError(f"{name}: its settings do not make one: {first_line(error)}") from error


def check_scheduler(name: Any) -> None:
    import diffusers

    if not isinstance(name, str) or not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise ValueError(f"scheduler: diffusers has no {name!r}")


def _check_sizes(value: Any, key: str = "") -> None:
    """ValueError where a setting of a foreign file would build a network that no weights could have."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_sizes(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check_sizes(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = LARGEST_DEPTH if "layers" in key else LARGEST_SETTING
        if abs(value) > most:
            raise ValueError(f"{key}: {value} is more than {most}")


def _dit(net, x, time, cond):
    label, nothing = cond["class"], net.config.num_embeds_ada_norm
    return net(x, timestep=time, class_labels=torch.where(label < 0, nothing, label)).sample


def _unet(net, x, time, cond):
    labelled = net.config.num_class_embeds is not None or net.config.class_embed_type is not None
    return net(x, time, class_labels=cond["class"] if labelled else None).sample


def _unet_condition(net, x, time, cond):
    added = (
        {"text_embeds": cond["pooled"], "time_ids": cond["size"]}
        if net.config.addition_embed_type == "text_time"
        else None
    )
    return net(x, time, encoder_hidden_states=cond["text"], added_cond_kwargs=added).sample


def _sd3(net, x, time, cond):
    return net(
        hidden_states=x, timestep=time, encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"]
    ).sample


def _sana(net, x, time, cond):
    scale = net.config.timestep_scale
    return net(
        x, encoder_hidden_states=cond["text"], encoder_attention_mask=cond.get("text_mask"), timestep=time * scale
    ).sample


def _pixart(net, x, time, cond):
    added = {"resolution": None, "aspect_ratio": None}
    mask = cond.get("text_mask")
    return net(
        x, encoder_hidden_states=cond["text"], encoder_attention_mask=mask, timestep=time, added_cond_kwargs=added
    ).sample


def _flux(net, x, time, cond):
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    places = torch.cartesian_prod(*(torch.arange(n, device=x.device, dtype=x.dtype) for n in (1, rows, columns)))
    words = torch.zeros(cond["text"].shape[1], 3, device=x.device, dtype=x.dtype)
    out = net(
        hidden_states=pack(x), timestep=time / 1000, guidance=cond["guidance"].to(x.dtype) if net.config.guidance_embeds else None,
        pooled_projections=cond["pooled"], encoder_hidden_states=cond["text"], txt_ids=words, img_ids=places,
    ).sample  # fmt: skip
    return unpack(out, rows, columns)


def _qwen(net, x, time, cond):
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    out = net(
        hidden_states=pack(x), timestep=time / 1000, encoder_hidden_states=cond["text"], encoder_hidden_states_mask=cond.get("text_mask"),
        img_shapes=[[(1, rows, columns)]],  # all are of one size: one entry keeps the batch free where it is traced
    ).sample  # fmt: skip
    return unpack(out, rows, columns)


def pack(x: Tensor) -> Tensor:
    """(B, C, 2 rows, 2 columns) -> (B, rows columns, 4 C): FLUX's and QwenImage's tokens."""
    x = x.unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2))  # B, C, rows, 2, columns, 2
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of pack."""
    x = tokens.unflatten(1, (rows, columns)).unflatten(-1, (-1, 2, 2))  # B, rows, columns, C, 2, 2
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


CALLS: dict[str, Callable] = {
    "DiTTransformer2DModel": _dit,
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet_condition,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
    "PixArtTransformer2DModel": _pixart,
    "FluxTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen,
}
