"""Build a recipe's data: samples, pairs, and the decoder that turns latents into pictures for an objective."""

from __future__ import annotations

from pathlib import Path

from flowmap.base.schema import RecipeError
from flowmap.build.prior import build_prior
from flowmap.data import Dataset, PairedDataset, Pairs, StyledDataset
from flowmap.plan.data_folders import data_of, pairs_of
from flowmap.plan.dependencies import styles_of
from flowmap.plan.provenance import pairs_identity
from flowmap.plan.requirements import check_sizes
from flowmap.recipe import Recipe
from flowmap.teachers.autoencoder import FrozenAutoencoder


def build_data(recipe: Recipe) -> Dataset:
    """Return the recipe's data. Raise RecipeError if it cannot be read or lacks what a metric of the recipe needs."""
    try:
        data = data_of(recipe).build()
        styles = styles_of(recipe)
        data = StyledDataset.of(data, styles) if styles is not None else data
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: {error}") from error
    check_sizes(recipe, data)
    return data


def build_samples(recipe: Recipe, data: Dataset) -> Dataset | PairedDataset:
    """Return what training reads: the data itself, or the pairs made from it if their provenance matches the recipe."""
    if not isinstance(recipe.coupling, Pairs):
        return data
    try:
        return PairedDataset(Path(pairs_of(recipe).root), data, pairs_identity(recipe), build_prior(recipe))
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: {error}") from error


def build_decoder(recipe: Recipe) -> FrozenAutoencoder | None:
    """Return the autoencoder that decodes latents for an objective that compares pictures; None if none is needed."""
    if recipe.data.in_pixels or not recipe.distillation.sees_pictures:
        return None
    try:
        return data_of(recipe).autoencoder.load()
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: data.{error}") from error
