"""LoRA adapters in a frozen diffusers network: selected layers become W x + (alpha / rank) B A x.

Only A, B and our branches are trained and saved. Source: Hu et al. 2021, arXiv:2106.09685. The layers are peft's,
added as diffusers adds them, so that its `save_lora_adapter` can write them. B starts at zero: the network's output
is initially unchanged to the bit.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowmap.base.distributed import is_child
from flowmap.base.ranges import BelowOne, LoRAScale, Positive, Width, check_ranges
from flowmap.base.schema import added
from flowmap.nets.diffusers_model import DiffusersModel, DiffusersNet
from flowmap.nets.flow_map import mismatch
from flowmap.nets.lora_file import add_file, lora_path, read_adapters
from flowmap.nets.pretrained import load_pretrained

ADAPTER = "default"  # diffusers' default name of an adapter
TEACHER_LORA = "teacher_lora"  # the folder, next to a student's weights, of the LoRA in its base


@dataclass(frozen=True)
class LoRA:
    """Settings of adapters on all linear layers and convolutions with names that end in one of `targets`.

    alpha: defaults to the rank. dropout: on the adapters' input, in training only.
    """

    rank: Width = 16
    alpha: Positive | None = None
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    dropout: BelowOne = 0.0

    def __post_init__(self):
        check_ranges(self)
        if not self.targets or not all(self.targets):
            raise ValueError(f"targets: {list(self.targets)} must name at least one layer, and none by an empty text")


@dataclass(frozen=True)
class Base:
    """The frozen network of the adapters: a pipeline's folder or hub id, its revision, and its weights' SHA-256.

    lora, lora_scale: the name of the LoRA that the teacher had added to these weights, and how much of it. The file is
    in the student's folder, in TEACHER_LORA.
    """

    source: str
    revision: str | None = None
    sha256: str = ""
    lora: str | None = added(None)
    lora_scale: LoRAScale = added(1.0)

    def __str__(self) -> str:
        where = f"{self.source} (revision {self.revision})" if self.revision else self.source
        return where if self.lora is None else f"{where} with the LoRA {self.lora} (scale {self.lora_scale:g})"


def add_lora(net: DiffusersNet, lora: LoRA) -> None:
    """Add adapters to the network's model and freeze its other weights. F is unchanged to the bit.

    A is drawn from torch's generator. Afterwards state_dict() contains adapters and branches only, and
    load_state_dict requires exactly those. Raises a ValueError if a target matches no layer that can be adapted
    (naming those that can), or if peft is not installed.
    """
    from diffusers.loaders import PeftAdapterMixin

    _check_targets(net.model, lora.targets)
    config = _peft_config(lora)
    with _seen_in_float32(net.model):  # peft makes adapters in the precision of their layer
        if isinstance(net.model, PeftAdapterMixin):
            net.model.add_adapter(config, ADAPTER)
        else:  # DiT and UNet2D, which have no LoRA pipeline in diffusers
            from peft import inject_adapter_in_model

            inject_adapter_in_model(config, net.model, ADAPTER)
    net.requires_grad_(True)
    for name, parameter in net.model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
    net.frozen = _frozen_names(net)
    net.register_state_dict_post_hook(_leave_out_base)
    net.register_load_state_dict_pre_hook(_put_in_base)


@torch.no_grad()
def start_adapters(net: DiffusersNet, path: Path, key: str) -> None:
    """Give the network's adapters the matrices of a LoRA file, whose product they then have to rounding.

    Where the file has a smaller rank, the remaining columns of B are zero. Layers without matrices keep B = 0. Raises a
    one-line ValueError that names `key` for a layer that has no adapter, another shape, a larger rank or a bias.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: layer for name, layer in net.model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, given in read_adapters(path, [f"{layer}.weight" for layer in layers], key).items():
        what = f"{key}: {path}: {name}"
        if name not in layers:
            raise ValueError(f"{what}: the student has no adapter there; lora.targets wants {_ending(name)}")
        down, up = layers[name].lora_A[ADAPTER].weight, layers[name].lora_B[ADAPTER].weight
        if given.rank > len(down):
            raise ValueError(f"{what}: has rank {given.rank}, more than lora.rank, {len(down)}")
        if given.down.shape[1:] != down.shape[1:] or given.up.shape[:1] != up.shape[:1]:
            shapes = f"A {tuple(given.down.shape)} and B {tuple(given.up.shape)}"
            raise ValueError(f"{what}: {shapes} do not fit a layer of A {tuple(down.shape)} and B {tuple(up.shape)}")
        if given.bias is not None and given.bias.any():
            raise ValueError(f"{what}: has a bias, which a student's adapters have not")
        down[: given.rank] = given.down
        up[:, : given.rank] = given.up * (given.ratio / layers[name].scaling[ADAPTER])


@contextmanager
def _seen_in_float32(model: nn.Module) -> Iterator[None]:
    """A context in which weights in other precisions are replaced by zeros in float32 that take no memory."""
    kept = {p: p.data for p in model.parameters() if p.dtype != torch.float32}
    for p, data in kept.items():
        p.data = torch.zeros((), device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for p, data in kept.items():
            p.data = data


def leave_out_base(net: nn.Module) -> None:
    """Name the frozen weights of a LoRA network anew after its layers have changed, so that no state has them."""
    if isinstance(net, DiffusersNet) and net.frozen:
        net.frozen = _frozen_names(net)


def merged(net: DiffusersNet) -> DiffusersNet:
    """A copy of the network with the adapters merged into its weights: F is equal to rounding."""
    from diffusers.loaders import PeftAdapterMixin
    from peft.tuners.tuners_utils import BaseTunerLayer

    net = copy.deepcopy(net)
    for name, layer in list(net.model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            net.model.get_submodule(parent).register_module(child, layer.get_base_layer())
    del net.model.peft_config
    if isinstance(net.model, PeftAdapterMixin):
        net.model._hf_peft_config_loaded = False  # as after diffusers' unload_lora
    net.frozen = frozenset()
    return net


def load_base(base: Base, spec: DiffusersModel, folder: Path = Path()) -> DiffusersNet:
    """The frozen network without branches, on the clock of `spec`. folder: that of the student.

    Raises a one-line ValueError if it cannot be loaded or is not the network that the student was trained on; of a
    run's processes, the first compares the hash.
    """
    _, net = load_pretrained(base.source, base.revision)
    with torch.device("meta"):
        found = mismatch(spec.build((), arrival=False).model.state_dict(), net.model.state_dict())
    if found is not None:
        name, wanted, was = found
        what = f"{name} is {was} there, {wanted} here"
        raise ValueError(f"{base}: is another network than this student was trained on: {what}")
    digest = base.sha256 if is_child() else fingerprint(net.model)
    if digest != base.sha256:
        hashes = f"its weights have SHA-256 {digest[:12]}, those that this student was trained on {base.sha256[:12]}"
        raise ValueError(f"{base}: {hashes}: it is another revision or another model")
    if base.lora is not None:
        add_file(net.model, lora_path(str(folder / TEACHER_LORA), "lora"), base.lora_scale, "lora")
    return DiffusersNet(net.model, *spec.clock(), arrival=False, guidance=False)


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of a model's weights: names, shapes and values in float32; about a second per gigabyte.

    If weights are sharded, all processes must call it.
    """
    from torch.distributed.tensor import DTensor

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().float().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _frozen_names(net: DiffusersNet) -> frozenset[str]:
    return frozenset(f"model.{name}" for name in net.model.state_dict() if not _is_adapter(name))


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _peft_config(lora: LoRA):
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("lora: needs peft: pip install 'flowmap-distillation[lora]'") from error
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets), lora_dropout=lora.dropout)


def _check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    layers = {name: module for name, module in model.named_modules() if name}
    can = [name for name, module in layers.items() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for target in targets:
        found = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not found or not set(found) <= set(can):
            what = "matches no layer" if not found else f"matches {found[0]}, a {type(layers[found[0]]).__name__}"
            candidates = dict.fromkeys(_ending(name) for name in can)
            allowed = f"layers that can be adapted: {', '.join(candidates)}"
            raise ValueError(f"lora.targets: {target!r} {what} of {type(model).__name__}; {allowed}")


def _ending(name: str) -> str:
    """The last component of a layer's name, with trailing indices: to_q, to_out.0."""
    found = re.search(r"[^.]+(\.\d+)*$", name)
    assert found is not None, name
    return found[0]


def _leave_out_base(net: DiffusersNet, state: dict[str, Tensor], prefix: str, metadata) -> None:
    """Hook of state_dict(): remove the frozen weights."""
    for name in net.frozen:
        state.pop(prefix + name, None)


def _put_in_base(net: DiffusersNet, state: dict[str, Tensor], prefix: str, *unused) -> None:
    """Hook of load_state_dict(), the inverse: add the frozen weights, which are the current parameters themselves."""
    if net.frozen:
        there = {
            **dict(net.named_parameters(remove_duplicate=False)),
            **dict(net.named_buffers(remove_duplicate=False)),
        }
        state.update({prefix + name: there[name] for name in net.frozen})
