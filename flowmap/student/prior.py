"""A learned prior on disk: the auxiliary model and a z-sampler in config.json and model.safetensors, read without
pickle.

The run that trains the auxiliary model writes one to student/, with codes ~ N(0, I). A student that starts from it has
its own in prior/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from flowmap.base.files import read_json, read_tensors, write_json, write_tensors
from flowmap.base.schema import construct, renamed, to_plain
from flowmap.flow.codes import FlowDraws, MixtureDraws, NormalDraws
from flowmap.flow.prior import CodeSampler, FlowCodes, LearnedPrior, MixtureCodes, NormalCodes
from flowmap.flow.solver import Heun
from flowmap.nets.flow_map import FlowMapNet, mismatch
from flowmap.nets.stacked import NetSpec
from flowmap.recipe.kinds import TABLES, StudentSpec

FORMAT = 1
PRIOR = "prior"


@dataclass(frozen=True)
class Shipped:
    """The learned prior in the folder `prior` next to a student's weights.

    size: the length of z. recipe_hash: the hash of the recipe that trained it.
    """

    size: int
    scale: float
    conditioning: bool = field(metadata=renamed("told"))
    recipe: str
    recipe_hash: str

    def same_start(self, other: Shipped | None) -> bool:
        """Whether both have the same auxiliary model, scale and conditioning, so that one velocity serves both.

        The source of the codes does not matter.
        """
        return other is not None and (self.scale, self.conditioning, self.recipe_hash) == (
            other.scale,
            other.conditioning,
            other.recipe_hash,
        )

    def __str__(self) -> str:
        code = "conditioned on z" if self.conditioning else "without z"
        return f"the prior of {self.recipe!r} ({self.recipe_hash}), scale {self.scale:g}, {code}"


@dataclass(frozen=True)
class PriorConfig:
    """All that is needed to build an auxiliary model and its z-sampler. z_net: the network of a z-sampler that is a
    flow.
    """

    net: StudentSpec
    shape: tuple[int, ...]
    z: CodeSampler = NormalCodes()
    z_net: StudentSpec | None = None
    recipe: str = "unnamed"
    recipe_hash: str = ""
    step: int = 0
    what: str = PRIOR
    format: int = FORMAT


@runtime_checkable
class AuxiliarySpec(NetSpec, Protocol):
    """The settings of an auxiliary model (nets/auxiliary.py). size: the length of its codes z."""

    @property
    def size(self) -> int: ...


def auxiliary(net: StudentSpec) -> AuxiliarySpec:
    """Return the settings, which must be those of an auxiliary model."""
    assert isinstance(net, AuxiliarySpec)
    return net


def save_prior(folder: Path, config: PriorConfig, model: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
    """Write model.safetensors, then config.json."""
    named = {f"model.{name}": tensor for name, tensor in model.items()} | {
        f"codes.{name}": tensor for name, tensor in codes.items()
    }
    write_tensors(folder / "model.safetensors", named)
    write_json(folder / "config.json", to_plain(config, TABLES))


def read_prior_config(folder: Path) -> PriorConfig:
    path = folder / "config.json"
    plain = read_json(path)
    if plain.get("what") != PRIOR or plain.get("format") != FORMAT:
        raise ValueError(f"{path}: is no learned prior of format {FORMAT}")
    return construct(PriorConfig, plain, TABLES, file=str(path))


def load_prior(folder: Path, *, scale: float = 1.0, conditioning: bool = True, size: int | None = None) -> LearnedPrior:
    """The prior in that folder, on the CPU, frozen. size: the length of code that its student takes.

    Raises ValueError that names the file and what is wrong with it.
    """
    config, file = read_prior_config(folder), folder / "model.safetensors"
    spec = auxiliary(config.net)
    if size not in (None, spec.size):
        what = f"codes of {spec.size} numbers; its student was trained on codes of {size}"
        raise ValueError(f"{folder / 'config.json'}: {what}")
    state = read_tensors(file)
    model = spec.build(config.shape)
    _fill(model, {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}, file)
    codes = {k.removeprefix("codes."): v for k, v in state.items() if k.startswith("codes.")}
    draws = built_codes(config, codes, file)
    return LearnedPrior(model.eval().requires_grad_(False), draws, spec.size, scale=scale, conditioning=conditioning)


def built_codes(
    config: PriorConfig, tensors: Mapping[str, Tensor], file: Path | str
) -> NormalDraws | MixtureDraws | FlowDraws:
    """The z-sampler of those tensors. Raises ValueError if its codes have another length than the auxiliary model's."""
    size = auxiliary(config.net).size
    if isinstance(config.z, MixtureCodes):
        k = config.z.components
        wanted = {"weights": (k,), "means": (k, size), "factors": (k, size, size)}
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if given != wanted:
            what = f"{k} components of codes of {size} numbers"
            raise ValueError(f"{file}: its z-sampler, a mixture of {given}, does not match config.json, {what}")
        return MixtureDraws(*(tensors[name].double() for name in wanted))
    if isinstance(config.z, FlowCodes):
        assert isinstance(config.z_net, NetSpec)
        net = FlowMapNet(config.z_net.build((size,), num_classes=None, arrival=False, guidance=False))
        _fill(net, tensors, file, "its z-sampler, a flow, does not match the encoder's codes: ")
        return FlowDraws(net, Heun(steps=config.z.steps))
    return NormalDraws()


def _fill(net, state: Mapping[str, Tensor], file: Path | str, what: str = "") -> None:
    found = mismatch(net.state_dict(), state)
    if found is not None:
        name, expected, shape = found
        raise ValueError(f"{file}: {what}{name} has shape {shape}, config.json says {expected}")
    net.load_state_dict({name: tensor.float() for name, tensor in state.items()})
