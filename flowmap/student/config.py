"""The configuration of a student: its network, its sampler, its conditions, and what decodes its samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowmap.base.schema import kind_of
from flowmap.data import Autoencoder, TextCoder, TextEncoder
from flowmap.data.text.dataset import Attribute
from flowmap.data.text.token_rows import TokenCondition
from flowmap.flow.types import Sampler
from flowmap.nets.diffusers_model import DiffusersModel, DiffusersNet
from flowmap.nets.embed import ExtraCondition
from flowmap.nets.flow_map import FlowMapNet
from flowmap.nets.lora import Base, LoRA, add_lora
from flowmap.nets.stacked import NetSpec
from flowmap.recipe.kinds import TABLES, StudentSpec, student_part
from flowmap.student.prior import Shipped
from flowmap.student.tuned import Tuned

SHIPPED_AUTOENCODER = "autoencoder"  # the folder, next to a student's weights, of the autoencoder that a recipe trained


def in_student_folder(spec: Any, folder: Path | None) -> Any:
    """The settings of an autoencoder (or None), with the path of the student's own where its source is that."""
    if spec is None or folder is None or spec.source != SHIPPED_AUTOENCODER:
        return spec
    return replace(spec, source=str(folder / SHIPPED_AUTOENCODER))


@dataclass(frozen=True)
class Pixels:
    """Samples that need no decoding. clamp: they are pictures and are clamped to [-1, 1]."""

    clamp: bool = True


@dataclass(frozen=True)
class ImageLatents:
    """Samples that an autoencoder decodes to pictures."""

    autoencoder: Autoencoder


@dataclass(frozen=True)
class TextLatents:
    """Samples that a text autoencoder decodes to sentences; text_autoencoder is None while one run trains it and the
    student.

    attributes, contexts, token_conditions: the conditions that describe a sentence. edits: the styles (source, target)
    of a student that starts from sentences instead of noise.
    """

    text_autoencoder: TextCoder | None = None
    attributes: tuple[Attribute, ...] = ()
    contexts: tuple[str, ...] = ()
    edits: tuple[str, ...] = ()
    token_conditions: tuple[TokenCondition, ...] = ()


@dataclass(frozen=True)
class StudentConfig:
    """All that is needed to build the network and to sample from it. config_file.py reads and writes it.

    samples             what samples are, and what decodes them
    class_names         the name of each class, in order, where the names are known
    arrival             whether the network takes an arrival time; False for a plain velocity (a teacher)
    guidance            the range of scales that it was trained on and the default, None where the scale is no input
    baked_guidance      the one guidance scale of the pairs that it was trained on, None where there was none
    guidance_interval   the default times in which guidance acts, and the widest of those that it was trained on; None
                        where they are no input
    text                the text encoder of its prompts
    lora, base          its weights are adapters and branches on top of the frozen `base`
    prior               the learned prior in the folder prior/, where samples do not start from N(0, I)
    tuned               the settings for some numbers of steps, where `flowmap tune` found better ones
    """

    net: StudentSpec
    sampler: Sampler
    shape: tuple[int, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    arrival: bool = True
    guidance: tuple[float, float, float] | None = None
    baked_guidance: float | None = None
    samples: Pixels | ImageLatents | TextLatents = Pixels()
    text: TextEncoder | None = None
    lora: LoRA | None = None
    base: Base | None = None
    prior: Shipped | None = None
    tuned: tuple[Tuned, ...] = ()
    recipe: str = "unnamed"
    recipe_hash: str = ""
    step: int = 0
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self):
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape: {self.shape} must be whole numbers from 1")
        self._check_classes()
        if self.guidance is not None and not all(0 <= scale < math.inf for scale in self.guidance):
            raise ValueError(f"guidance: {self.guidance} must be finite scales from 0")
        if (found := self.guidance_interval) is not None and not 0 <= found[0] < found[1] <= 1:
            raise ValueError(f"guidance_interval: {found} must be two rising times in [0, 1]")
        if self.lora is not None and not (isinstance(self.net, DiffusersModel) and self.base is not None):
            raise ValueError("lora: adapters are for a network of kind diffusers with a named base")
        if not student_part(self.net).takes_extra_conditions:
            self._check_no_extra_conditions()
        self._check_tokens()
        for one in self.tuned:
            self.sampler_at(one.steps)

    def tuned_at(self, steps: int) -> Tuned | None:
        """The tuned settings for that number of steps; None if there are none."""
        return next((one for one in self.tuned if one.steps == steps), None)

    def sampler_at(self, steps: int) -> Sampler:
        """The sampler of a call of that many steps."""
        tuned = self.tuned_at(steps)
        return self.sampler if tuned is None else tuned.sampler(self.sampler)

    def scale_at(self, steps: int) -> float | None:
        """The guidance scale of a call of that many steps; None where the scale is no input."""
        if self.guidance is None:
            return None
        tuned = self.tuned_at(steps)
        return self.guidance[2] if tuned is None or tuned.guidance is None else tuned.guidance

    def _check_classes(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes: {self.num_classes} must be 1 or more")
        names = self.class_names
        if names is not None and not len(names) == len(set(names)) == self.num_classes:
            raise ValueError(f"class_names: {self.num_classes} classes want as many different names, not {len(names)}")

    def _check_no_extra_conditions(self) -> None:
        kind = kind_of(self.net, TABLES)
        if self.guidance_interval is not None:
            what = f"a network of kind {kind} takes no interval as an input"
            raise ValueError(f"teacher.guidance.interval_input: {what}; set it to false")
        if self.conditioning:
            raise ValueError(
                f"prior.conditioning: a network of kind {kind} takes no code z; set prior.conditioning: false"
            )
        if self.descriptions:
            nets = TABLES[StudentSpec].items()
            kinds = ", ".join(kind for kind, net in nets if student_part(net).takes_extra_conditions)
            what = f"a network of kind {kind} takes no condition {', '.join(self.descriptions)}"
            raise ValueError(f"attributes: {what}; allowed: {kinds}")

    def _check_tokens(self) -> None:
        if not (given := [one.name for one in self.sentences.token_conditions]):
            return
        if not student_part(self.net).attends_to_tokens:
            kinds = ", ".join(kind for kind, net in TABLES[StudentSpec].items() if student_part(net).attends_to_tokens)
            what = f"a network of kind {kind_of(self.net, TABLES)} has no attention to the tokens of {', '.join(given)}"
            raise ValueError(f"student.kind: {what}; allowed: {kinds}")

    @property
    def clamp(self) -> bool:
        """Whether samples are pictures in [-1, 1]."""
        return isinstance(self.samples, Pixels) and self.samples.clamp

    @property
    def autoencoder(self) -> Autoencoder | None:
        """What decodes samples to pictures, None where nothing does."""
        return self.samples.autoencoder if isinstance(self.samples, ImageLatents) else None

    @property
    def sentences(self) -> TextLatents:
        """What is known of the sentences that samples decode to; nothing where they decode to none."""
        return self.samples if isinstance(self.samples, TextLatents) else TextLatents()

    @property
    def text_autoencoder(self) -> TextCoder | None:
        """What decodes samples to sentences, None where nothing does."""
        return self.sentences.text_autoencoder

    @property
    def edits(self) -> tuple[str, ...]:
        """The styles (source, target) of a student that starts from sentences, empty for any other."""
        return self.sentences.edits

    @property
    def conditioning(self) -> bool:
        """Whether the code z of a learned prior is a condition of the network."""
        return self.prior is not None and self.prior.conditioning

    @property
    def descriptions(self) -> tuple[str, ...]:
        """The names of the conditions that describe a sentence: its attributes, contexts and rows of tokens."""
        attributes = (one.name for one in self.sentences.attributes)
        return (*attributes, *self.sentences.contexts, *(one.name for one in self.sentences.token_conditions))

    @property
    def extra_conditions(self) -> tuple[ExtraCondition, ...]:
        """The conditions of the network other than class and guidance."""
        attributes = (ExtraCondition(one.name, len(one.values), "number") for one in self.sentences.attributes)
        contexts = (ExtraCondition(name, math.prod(self.shape), "context") for name in self.sentences.contexts)
        tokens = (
            ExtraCondition(one.name, one.size, "tokens", one.length, one.vocabulary)
            for one in self.sentences.token_conditions
        )
        code = [ExtraCondition("z", self.prior.size, "code")] if self.prior is not None and self.conditioning else []
        interval = [] if self.guidance_interval is None else [ExtraCondition("guidance_interval", 2, "interval")]
        return (*attributes, *contexts, *tokens, *code, *interval)

    def frozen_base(self) -> Base:
        """The base of a LoRA student."""
        assert self.base is not None
        return self.base

    def classes_listed(self, shown: int = 20) -> str:
        """One line with the numbers and names of the first classes, for a model card."""
        names = self.class_names or ()
        rest = f", and {len(names) - shown} more" if len(names) > shown else ""
        return f"Classes: {', '.join(f'{i} {name}' for i, name in enumerate(names[:shown]))}{rest}."

    def build(self, base: DiffusersNet | None = None) -> FlowMapNet:
        """The network with random weights, or with those of `base`, shared. Adapters, if any, have no effect yet."""
        guidance = self.guidance is not None
        extra = {"extra_conditions": self.extra_conditions} if self.extra_conditions else {}
        if base is None:
            assert isinstance(self.net, NetSpec)  # a recipe's from_teacher and from_recipe are resolved
            net: Any = self.net.build(
                self.shape, num_classes=self.num_classes, arrival=self.arrival, guidance=guidance, **extra
            )
        else:
            net = base.with_branches(arrival=self.arrival, guidance=guidance)
        if self.lora is not None:
            add_lora(net, self.lora)
        return FlowMapNet(net)
