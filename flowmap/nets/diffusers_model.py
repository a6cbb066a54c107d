"""An adapter for diffusers transformers and UNets: F(x, t, s, cond) on our clock, for any prediction and schedule.

A teacher has no arrival and guidance branches. A student has them: they start at zero and are added to the model's
time embedding, so that F(x, t, s) = v(x, t) at step 0. CALLS defines how the forward of each family is called.
Conditions, by key of cond:
    class (B,)               label, -1 for none
    text (B, L, D), text_mask (B, L), pooled (B, P)        the output of the family's text encoders
    size (B, 6)              SDXL's original size, crop and target size
    guidance (B,)            for models that were distilled with a guidance input (FLUX.1-dev)
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowmap.base.ranges import Positive, check_ranges
from flowmap.base.schema import added
from flowmap.flow.clock import SMALL_UNIT, FlowClock, TableClock, velocity_of
from flowmap.flow.limit import Limit
from flowmap.flow.types import Cond
from flowmap.nets.diffusers_calls import CALLS, prepare
from flowmap.nets.embed import ScalarEmbedding, branches
from flowmap.nets.listening import Extra, listen
from flowmap.nets.second_time import SECOND_TIMES, SecondTime
from flowmap.nets.teacher_settings import check_network_settings, check_scheduler_settings, clock_of, limit_of
from flowmap.nets.time_embedding import EMBED_T, last_layer, listening, refit

# diffusers' names of a transformer's main list of blocks
BLOCKS = ("transformer_blocks", "layers", "single_transformer_blocks")
# of all lists of blocks, in transformers and in the levels of U-Nets
BLOCK_LISTS = (
    *BLOCKS, "joint_transformer_blocks", "noise_refiner", "context_refiner", "refiner_blocks",
    "resnets", "attentions", "downsamplers", "upsamplers",
)  # fmt: skip
# parts of blocks that the model also calls outside their blocks
CALLED_ALONE = {"DiTTransformer2DModel": ("transformer_blocks.0.norm1.emb",)}
LARGEST_SETTING = 1 << 20
LARGEST_DEPTH = 512


@dataclass(frozen=True)
class DiffusersModel:
    """A diffusers network by its class name, with its settings and those of its scheduler as JSON.

    `load_pretrained` reads them from a pipeline. time_unit: the network embeds time_unit x t instead of its scheduler's
    time (nets/time_embedding.py).
    """

    network: str
    settings: str
    scheduler: str
    scheduler_settings: str
    time_unit: Positive | None = added(None)
    # buffers such as position tables, which no weights file contains: build it on a real device, not on "meta"
    holds_constants: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)
        if self.network not in CALLS:
            raise ValueError(f"network: no call is known for {self.network!r}; known: {', '.join(CALLS)}")
        for name, text in (("settings", self.settings), ("scheduler_settings", self.scheduler_settings)):
            try:
                settings = json.loads(text)
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
        with torch.device("cpu"):  # even if the network is built on the meta device
            clock, prediction = clock_of(made(self.scheduler, self.scheduler_settings))
        return clock if self.time_unit is None else clock.with_unit(self.time_unit), prediction

    @property
    def embeds_t(self) -> bool:
        return self.network in EMBED_T or self.clock()[0].embeds_t

    def embedding_t(self) -> DiffusersModel:
        """The settings of the same network with an embedding of t."""
        return replace(self, time_unit=SMALL_UNIT)

    def limit(self) -> Limit | None:
        """The clipping or thresholding of predicted data in the scheduler's step, if any."""
        check_scheduler(self.scheduler)
        with torch.device("cpu"):
            return limit_of(made(self.scheduler, self.scheduler_settings))

    def check_teacher(self, shape: tuple[int, ...] | None = None) -> None:
        """Raise a ValueError that names a setting with which it cannot be a teacher of samples of that shape."""
        import diffusers

        check_scheduler(self.scheduler)
        check_scheduler_settings(getattr(diffusers, self.scheduler), json.loads(self.scheduler_settings))
        check_network_settings(self.network, self.settings, shape)
        self.clock()


class DiffusersNet(nn.Module):
    """F(x, t, s, cond) for x (B, C, H, W): the model's prediction on its own clock, converted to x1 - x0.

    empty: the conditions for an empty prompt, batch size 1, used for conditions missing in a call (as in
    classifier-free guidance). frozen: the names of weights that LoRA adapts and does not train; set by lora.py.
    """

    model: Any  # a diffusers network
    frozen: frozenset[str] = frozenset()
    arrival: ScalarEmbedding | SecondTime | None

    def __init__(
        self, model: nn.Module, clock: FlowClock | TableClock, prediction: str, *, arrival: bool, guidance: bool
    ):
        super().__init__()
        self.model, self.clock, self.prediction = model, clock, prediction
        self.empty: dict[str, Tensor] = {}
        self.call = CALLS[type(model).__name__]
        prepare(model)
        self.extra = Extra()
        width = _listen(model, self.extra) if arrival or guidance else 0
        self.arrival = self._arrival(width) if arrival else None
        self.guidance = ScalarEmbedding(width, silent=True) if guidance else None

    def forward(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        cond = cond or {}
        self.extra.value = self.added(t, s, cond)
        missing = {
            key: value.to(x.device).expand(len(x), *value.shape[1:])
            for key, value in self.empty.items()
            if key not in cond
        }
        given = _Conditions(type(self.model).__name__, {**missing, **cond})

        def predict(state: Tensor, time: Tensor) -> Tensor:
            out = self.call(self.model, state.to(self._state_dtype(state)), time, given)
            learned_variance = out.shape[1] == 2 * x.shape[1]
            return (out[:, : x.shape[1]] if learned_variance else out).to(x.dtype)

        return velocity_of(predict, self.clock, x, t, self.prediction)

    def _arrival(self, width: int) -> ScalarEmbedding | SecondTime:
        if type(self.model).__name__ in SECOND_TIMES:
            assert isinstance(self.clock, FlowClock)
            return SecondTime(width, self.clock.unit)
        return ScalarEmbedding(width, silent=True)

    def added(self, t: Tensor, s: Tensor, cond: Cond) -> Tensor | None:
        """What the branches add to the time embedding (B, width); None without branches."""
        if not isinstance(self.arrival, SecondTime):
            return branches(self.arrival, self.guidance, t, s, cond)
        arrival, guidance = self.arrival(self.clock.at(s)[1]), branches(None, self.guidance, t, s, cond)
        return arrival if guidance is None else arrival + guidance

    def _state_dtype(self, state: Tensor) -> torch.dtype:
        """The model's, or under autocast, which casts what layers take, that of the state."""
        kind = state.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return state.dtype
        return next(self.model.parameters()).dtype

    def train(self, mode: bool = True) -> DiffusersNet:
        """Keep the model in evaluation mode, except for the adapters' dropout.

        Randomly dropped labels would differ between a value and its derivative.
        """
        super().train(mode)
        self.model.eval()
        for name, module in self.model.named_modules():
            if name.endswith(".lora_dropout"):
                module.train(mode)
        return self

    def with_branches(self, *, arrival: bool, guidance: bool) -> DiffusersNet:
        """The same network with new branches that start at zero: the modules are copies, the parameters are shared."""
        model = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        net = DiffusersNet(model, self.clock, self.prediction, arrival=arrival, guidance=guidance)
        net.empty = dict(self.empty)
        return net

    @property
    def embeds_t(self) -> bool:
        return type(self.model).__name__ in EMBED_T or self.clock.embeds_t

    def with_embedding_of_t(self) -> DiffusersNet:
        """The same network with time embeddings of t fitted to those of its schedule's time; the others are shared."""
        clock = self.clock.with_unit(SMALL_UNIT)
        net, model = copy.copy(self), copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        refit(model, lambda t: self.clock.at(t)[1], lambda t: clock.at(t)[1])
        net._modules, net.clock = {**self._modules, "model": model}, clock
        return net

    def without_blocks(self, skip: tuple[int, ...]) -> DiffusersNet:
        """The same network without some transformer blocks, with shared weights: a weak model for autoguidance."""
        name = next((name for name in BLOCKS if name in self.model._modules), None)
        if name is None:
            raise ValueError(f"skip_blocks: {tuple(skip)} must be empty: this network has no transformer blocks")
        blocks = self.model._modules[name]
        if any(not 0 <= i < len(blocks) for i in skip):
            raise ValueError(f"skip_blocks: {tuple(skip)} must lie in 0..{len(blocks) - 1}")
        weak, model = copy.copy(self), copy.copy(self.model)
        weak._modules, model._modules = dict(self._modules), dict(self.model._modules)
        model._modules[name] = nn.ModuleList(block for i, block in enumerate(blocks) if i not in skip)
        weak._modules["model"] = model
        return weak

    @property
    def blocks(self) -> list[nn.Module]:
        """The model's outermost repeated blocks in order, after parts of them that it also calls by themselves."""
        alone = [self.model.get_submodule(name) for name in CALLED_ALONE.get(type(self.model).__name__, ())]
        return [*alone, *_listed_blocks(self.model)]

    @property
    def activation_checkpointing(self) -> bool:
        return bool(self.model.is_gradient_checkpointing)

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        if on:
            self.model.enable_gradient_checkpointing(_checkpointed)


def _checkpointed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The block's output, which the backward pass computes again. diffusers' own takes no kwargs, which some pass."""
    return checkpoint(block.__call__, *args, use_reentrant=False, **kwargs)


def _listed_blocks(module: nn.Module) -> list[nn.Module]:
    """The modules in lists with one of the names in BLOCK_LISTS, without those inside another."""
    found: list[nn.Module] = []
    for name, child in module.named_children():
        listed = isinstance(child, nn.ModuleList) and name in BLOCK_LISTS
        found += child.children() if listed else _listed_blocks(child)
    return found


def _listen(model: nn.Module, extra: Extra) -> int:
    """Make the model's time embeddings add `extra`, and return their width.

    Only the class of each embedding changes: names and weights stay the same.
    """
    found = [module for _, module in listening(model)]
    widths = {module.get_submodule(last_layer(module)).out_features for module in found}
    if len(widths) != 1:
        what = f"found {len(found)} of {len(widths)} widths"
        raise ValueError(f"{type(model).__name__}: a student needs time embeddings of one width; {what}")
    for module in found:
        listen(module, extra)
    return widths.pop()


def called(model: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """The model's prediction for a state x (B, C, H, W) and time (B,) on its own schedule."""
    return CALLS[type(model).__name__](model, x, time, _Conditions(type(model).__name__, cond))


class _Conditions:
    """The conditions by key; a missing key raises a ValueError that names the network."""

    def __init__(self, network: str, cond: Cond):
        self.network, self.cond = network, cond

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.cond:
            raise ValueError(f"cond: {self.network} needs {key!r}; given: {', '.join(self.cond) or 'nothing'}")
        return self.cond[key]

    def get(self, key: str) -> Tensor | None:
        return self.cond.get(key)


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its class name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def made(name: str, settings: str) -> Any:
    """An object of the diffusers class `name` with these settings. ValueError if they are invalid."""
    import diffusers

    try:
        return getattr(diffusers, name).from_config(json.loads(settings))
    except Exception as error:  # diffusers raises various types for invalid settings
        raise ValueError(f"{name}: its settings do not make one: {first_line(error)}") from error


def check_scheduler(name: Any) -> None:
    import diffusers

    if not isinstance(name, str) or not name.endswith("Scheduler") or name not in dir(diffusers):
        raise ValueError(f"scheduler: diffusers has no {name!r}")


def _check_sizes(value: Any, key: str = "") -> None:
    """Raise a ValueError for a setting that would build an absurdly large network, since files may be untrusted."""
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
