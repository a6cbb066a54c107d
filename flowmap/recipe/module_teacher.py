"""A teacher that is a module of one's own: `teacher: {kind: module, module: NAME, ...}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowmap.base.ranges import Classes, check_ranges
from flowmap.base.schema import MISSING
from flowmap.data import TeacherSlot
from flowmap.nets.module import Module, ModuleSettings
from flowmap.recipe.settings import ClassifierFree


@dataclass(frozen=True)
class ModuleTeacher(ModuleSettings, TeacherSlot):
    """A frozen module with its guidance; shape: of a sample, such as [1, 28, 28]. The rest is that of ModuleSettings.

    Its weights are those of the file `weights`, or were given in Python (`digest`).
    """

    shape: tuple[Classes, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self)
        if self.card is not None or self.recipe is not None or self.overrides:
            raise ValueError("card: a teacher of kind module has no card, recipe or overrides")
        if self.lora is not None or self.lora_scale != 1.0:
            raise ValueError("lora: wants a teacher of kind card, which names a diffusers model")
        if self.module != MISSING and not (self.shape and min(self.shape) > 0):
            raise ValueError(f"shape: {list(self.shape)} is not the shape of a sample, such as [1, 28, 28]")
        if self.null_class is None and isinstance(self.guidance, ClassifierFree):
            raise ValueError("null_class: classifier-free guidance asks the module without a class; name its label")

    @property
    def name(self) -> str:
        return self.module

    @property
    def net(self) -> Module:
        """The settings of the network alone."""
        return Module(**self.settings())

    @property
    def source(self) -> Any:
        """The settings with those of the weights, for build/module.py."""
        return Module(**self.settings(), weights=self.weights, sha256=self.sha256, digest=self.digest)
