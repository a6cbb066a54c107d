"""Reference statistics of all training pictures: what `reference: auto` of a Frechet distance means for a recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flowmap.base.schema import RecipeError, short_hash, to_plain
from flowmap.data import TeacherSamples
from flowmap.data.dataset import Source
from flowmap.data.sources import READER
from flowmap.metrics import Frechet, Spec
from flowmap.metrics.features import check_weights, short_name
from flowmap.metrics.reference import AUTO, SETS, check_reference
from flowmap.plan.run_folders import runs_root
from flowmap.recipe.kinds import TABLES
from flowmap.recipe.recipe import Recipe

FILE = "statistics.npz"


@dataclass(frozen=True)
class ReferenceStatistics:
    """The mean and the covariance of the features of all training pictures, and the folder that they are kept in.

    Recipes with the same pictures share the folder. For encoded data the pictures are all those of data.images, as in
    the papers, also the ones that data.held_out sets aside; for samples in pixels they are the training samples.
    """

    recipe: Recipe
    features: str
    weights: str | None = None

    def __post_init__(self):
        check_reference(AUTO, SETS[0], self.features, None)
        check_weights(self.features, self.weights)

    @cached_property
    def folder(self) -> Path:
        """runs/reference-<hash of the pictures, the features and their weights>."""
        return runs_root() / f"reference-{short_hash((self._pictures, self.features, self.weights))}"

    @property
    def makes(self) -> str:
        return f"statistics of {short_name(self.features)}"

    @property
    def file(self) -> Path:
        return self.folder / FILE

    @property
    def complete(self) -> bool:
        return self.file.is_file()

    def identity(self) -> dict[str, Any]:
        """What the statistics depend on, as JSON would give it back."""
        return json.loads(json.dumps({"pictures": self._pictures, "features": short_name(self.features)}))

    @property
    def _pictures(self) -> dict[str, Any]:
        data = self.recipe.data
        if isinstance(data, TeacherSamples):
            raise RecipeError(
                f"{self.recipe.name}: metrics: reference: auto is of real pictures, and the data are samples of the "
                "teacher: give a file"
            )
        if data.images is not None:
            return {"reader": READER, **to_plain(data.images, TABLES, hashed=True)}
        if not data.in_pixels:
            raise RecipeError(
                f"{self.recipe.name}: metrics: reference: auto is of pictures, and data has none: give data.images, "
                "or a file"
            )
        unused = {field.name for field in fields(Source)}
        return {key: value for key, value in to_plain(data, TABLES, hashed=True).items() if key not in unused}


def references_of(recipe: Recipe) -> list[ReferenceStatistics]:
    """The reference statistics that the recipe's metrics ask to be made, each once."""
    specs = [spec for spec in recipe.metrics if _is_auto(spec)]
    found = [ReferenceStatistics(recipe, spec.features, spec.weights) for spec in specs if isinstance(spec, Frechet)]
    return list({one.folder: one for one in found}.values())


def located(recipe: Recipe, specs: Sequence[Spec]) -> tuple[Spec, ...]:
    """The metrics with the file of the recipe's reference statistics in the place of `reference: auto`."""
    return tuple(
        replace(spec, reference=str(ReferenceStatistics(recipe, spec.features, spec.weights).file))
        if isinstance(spec, Frechet) and _is_auto(spec)
        else spec
        for spec in specs
    )


def _is_auto(spec: Spec) -> bool:
    return isinstance(spec, Frechet) and spec.reference == AUTO
