"""A student's config.json, read and written. Its keys are flat, and do not change: students are kept and published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flowmap.base.files import read_json
from flowmap.base.schema import RecipeError, added, construct, to_plain
from flowmap.data import Autoencoder, TextCoder, TextEncoder
from flowmap.data.text.dataset import Attribute
from flowmap.data.text.token_rows import TokenCondition
from flowmap.flow.types import Sampler
from flowmap.nets.lora import Base, LoRA
from flowmap.recipe.kinds import TABLES, StudentSpec
from flowmap.recipe.plugins import plugins
from flowmap.student.config import ImageLatents, Pixels, StudentConfig, TextLatents
from flowmap.student.prior import PRIOR, Shipped
from flowmap.student.tuned import Tuned, tuned_json, tuned_rows

FORMAT = 1


@dataclass(frozen=True)
class _Flat:
    """The settings in config.json, in its order: those of StudentConfig, with those of its samples next to them."""

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
    tuned: tuple[Tuned, ...] = ()
    recipe: str = "unnamed"
    recipe_hash: str = ""
    step: int = 0
    format: int = FORMAT
    guidance_interval: tuple[float, float] | None = added(None)
    token_conditions: tuple[TokenCondition, ...] = added(())

    def typed(self) -> StudentConfig:
        """The configuration that these settings describe."""
        plain = {field.name: getattr(self, field.name) for field in fields(StudentConfig) if field.name != "samples"}
        return StudentConfig(**plain, samples=self._samples())

    def _samples(self) -> Pixels | ImageLatents | TextLatents:
        given = (self.attributes, self.contexts, self.edits, self.token_conditions)
        if self.text_autoencoder is not None or any(given):
            return TextLatents(self.text_autoencoder, *given)
        return Pixels(self.clamp) if self.autoencoder is None else ImageLatents(self.autoencoder)


def config_json(config: StudentConfig) -> dict[str, Any]:
    """The contents of config.json. The names of classes are `id2label`, as in other libraries' configurations."""
    plain = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "samples"}
    found = config.samples
    of_samples: dict[str, Any] = {"clamp": False, **{field.name: getattr(found, field.name) for field in fields(found)}}
    # what a later version added is written where it is used, so that older versions read the rest
    flat = to_plain(_Flat(**plain, **of_samples), TABLES, hashed=True)
    if flat["prior"] is not None:  # the file keeps the key of version 0.1
        flat["prior"] = {"told" if key == "conditioning" else key: value for key, value in flat["prior"].items()}
    names = flat.pop("class_names")
    if flat.pop("tuned"):
        flat["tuned"] = tuned_json(config.tuned)
    return flat if names is None else flat | {"id2label": {str(i): name for i, name in enumerate(names)}}


def read_config(path: Path) -> StudentConfig:
    """The configuration in that config.json. ValueError names the file and what is wrong with it."""
    plugins()
    plain = read_json(path)
    if str(plain.get("_class_name", "")).startswith("Autoencoder") or str(plain.get("format")).startswith(
        "flowmap-text-autoencoder"
    ):
        raise ValueError(f"{path}: is an autoencoder's, not a student's")
    if plain.get("what") == PRIOR:
        raise ValueError(f"{path}: is a learned prior's, not a student's")
    if plain.get("format") != FORMAT:
        raise ValueError(f"{path}: format: {plain.get('format')!r} is not {FORMAT}, the one that this version reads")
    try:
        if "tuned" in plain:
            plain = {**plain, "tuned": tuned_rows(plain["tuned"])}
        return construct(_Flat, _with_class_names(plain, path), TABLES, file=str(path)).typed()
    except RecipeError:
        raise
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error


def _with_class_names(plain: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings with `id2label` as class_names. ValueError where it is not {"0": name, "1": name, ...}."""
    others = {key: value for key, value in plain.items() if key != "id2label"}
    labels = plain.get("id2label")
    if labels is None:
        return others
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(len(labels))}:
        raise ValueError(f'{path}: id2label: is not {{"0": name, "1": name, ...}}')
    return others | {"class_names": [labels[str(i)] for i in range(len(labels))]}
