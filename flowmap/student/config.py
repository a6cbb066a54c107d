"""All that a student's config.json says: its network, how it samples, what it is conditioned on, what lies beside its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowmap.base.schema import kind_of
from flowmap.data import Autoencoder, TextCoder, TextEncoder
from flowmap.data.text.dataset import Attribute
from flowmap.flow.types import Sampler
from flowmap.nets.diffusers_model import DiffusersModel, DiffusersNet
from flowmap.nets.embed import ExtraCondition
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.lora import Base, LoRA, add_lora
from flowmap.nets.stacked import NetSpec
from flowmap.recipe.kinds import TABLES, StudentSpec
from flowmap.student.prior import Shipped

FORMAT = 1
SHIPPED_AUTOENCODER = "autoencoder"  # the folder beside a student's weights with the autoencoder that a recipe trained


def in_student_folder(spec: Any, folder: Path | None) -> Any:
    """An autoencoder (or None) whose source is the folder beside the weights, told where that is; any other as it is."""
    return (
        replace(spec, source=str(folder / SHIPPED_AUTOENCODER))
        if spec is not None and spec.source == SHIPPED_AUTOENCODER and folder is not None
        else spec
    )


@dataclass(frozen=True)
class StudentConfig:
    """All that is needed to build the network again and to sample from it.

    guidance: the range of scales it was trained on and the default, or None where the scale is no input;
    class_names: of each class, in their order, where they are known; config.json has them as `id2label`.
    baked_guidance: the one scale in the pairs that it learned from, where there was one. arrival: False for a plain
    velocity (a teacher). clamp: samples are pictures in [-1, 1]. autoencoder: samples are its latents, and it makes pictures of them; the
    source "autoencoder" is the folder of that name beside the weights. text: what encodes prompts. lora: its weights are adapters and
    branches beside the frozen `base`. prior: the learned prior in the folder prior/ beside the weights, where samples do not start at N(0, I).

    text_autoencoder: samples are latents that it makes sentences of (text.py). attributes and contexts are then conditions. edits:
    the styles (source, target) of a student that starts from sentences, not from noise.
    """

    net: StudentSpec
    sampler: Sampler
    shape: tuple[int, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    arrival: bool = True
    guidance: tuple[float, float, float] | None = None
    baked_guidance: float | None = None
    clamp: bool = True
    autoencoder: Autoencoder | None = None
    text: TextEncoder | None = None
    text_autoencoder: TextCoder | None = None
    attributes: tuple[Attribute, ...] = ()
    contexts: tuple[str, ...] = ()
    edits: tuple[str, ...] = ()
    lora: LoRA | None = None
    base: Base | None = None
    prior: Shipped | None = None
    recipe: str = "unnamed"
    recipe_hash: str = ""
    step: int = 0
    format: int = FORMAT

    def __post_init__(self):
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape: {self.shape} must be whole numbers from 1")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes: {self.num_classes} must be 1 or more")
        if self.class_names is not None and (
            len(self.class_names) != self.num_classes or len(set(self.class_names)) != self.num_classes
        ):
            raise ValueError(
                f"class_names: {self.num_classes} classes want as many different names, not {len(self.class_names)}"
            )
        if self.guidance is not None and not all(0 <= scale < math.inf for scale in self.guidance):
            raise ValueError(f"guidance: {self.guidance} must be finite scales from 0")
        if self.lora is not None and not (isinstance(self.net, DiffusersModel) and self.base is not None):
            raise ValueError("lora: adapters are for a network of kind diffusers whose base is named")
        if self.conditioning and not getattr(self.net, "takes_extra_conditions", False):
            raise ValueError(
                f"prior.conditioning: a network of kind {kind_of(self.net, TABLES)} takes no code z; set prior.told: false"
            )
        if self.descriptions and not getattr(self.net, "takes_extra_conditions", False):
            kinds = ", ".join(
                kind for kind, net in TABLES[StudentSpec].items() if getattr(net, "takes_extra_conditions", False)
            )
            what = f"a network of kind {kind_of(self.net, TABLES)} is not told {', '.join(self.descriptions)}"
            raise ValueError(f"attributes: {what}; allowed: {kinds}")

    @property
    def conditioning(self) -> bool:
        """The network is told the code z of where a sample starts."""
        return self.prior is not None and self.prior.conditioning

    @property
    def descriptions(self) -> tuple[str, ...]:
        """The conditions that describe a sentence: its attributes and contexts."""
        return (*(one.name for one in self.attributes), *self.contexts)

    @property
    def further(self) -> tuple[ExtraCondition, ...]:
        """The conditions beside class and guidance, as networks are told of them."""
        attributes = (ExtraCondition(one.name, len(one.values), "number") for one in self.attributes)
        contexts = (ExtraCondition(name, math.prod(self.shape), "context") for name in self.contexts)
        code = [ExtraCondition("z", self.prior.size, "code")] if self.prior is not None and self.conditioning else []
        return (*attributes, *contexts, *code)

    def classes_listed(self, shown: int = 20) -> str:
        """One line with the names of the first classes and their numbers, for a model card."""
        names = self.class_names or ()
        rest = f", and {len(names) - shown} more" if len(names) > shown else ""
        return f"Classes: {', '.join(f'{i} {name}' for i, name in enumerate(names[:shown]))}{rest}."

    def build(self, base: DiffusersNet | None = None) -> FlowMapNet:
        """The network with random weights, or with those of `base`, shared; its adapters, where it has any, change nothing yet."""
        guidance = self.guidance is not None
        further = {"extra_conditions": self.further} if self.further else {}
        if base is None:
            assert isinstance(self.net, NetSpec)  # a recipe's from_teacher and from_recipe are resolved
            net: Any = self.net.build(
                self.shape, num_classes=self.num_classes, arrival=self.arrival, guidance=guidance, **further
            )
        else:
            net = base.with_branches(arrival=self.arrival, guidance=guidance)
        if self.lora is not None:
            add_lora(net, self.lora)
        return FlowMapNet(net)
