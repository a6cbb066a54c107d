"""Build a recipe's data: samples, pairs, and the decoder that turns latents into pictures for an objective."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowmap.base.schema import RecipeError
from flowmap.build.prior import build_prior
from flowmap.data import Dataset, PairedDataset, Pairs, StyledDataset
from flowmap.data.pairs import first_difference
from flowmap.data.teacher_samples import TeacherSamplesDataset
from flowmap.plan.plan import ResolvedRun
from flowmap.plan.provenance import pairs_identity
from flowmap.plan.requirements import check_sizes
from flowmap.teachers.autoencoder import FrozenAutoencoder


def build_data(run: ResolvedRun, read: Callable[[Any], Any] | None = None) -> Dataset:
    """Return the run's data. Raise RecipeError if it cannot be read or lacks what a metric of the recipe needs.

    Captions that are encoded as they are used are encoded in the precision of the run's frozen networks.
    read: reads the data with those settings, in place of their `build`.
    """
    try:
        data = run.data.build() if read is None else read(run.data)
        if isinstance(data, TeacherSamplesDataset):
            _check_made_by(run, data)
        data = StyledDataset.of(data, run.styles) if run.styles is not None else data
    except ValueError as error:
        raise RecipeError(f"{run.name}: {error}") from error
    check_sizes(run, data)
    if run.recipe.trainer.frozen_precision == "bf16":
        data.hold_text(torch.bfloat16)
    return data


def _check_made_by(run: ResolvedRun, data: TeacherSamplesDataset) -> None:
    """Raise ValueError unless the samples are those of the recipe's teacher."""
    found = first_difference(data.index["identity"], pairs_identity(run.sampled))
    if found:
        raise ValueError(f"data.root: {data.folder}: holds samples of another teacher or another solver: {found}")


def build_samples(run: ResolvedRun, data: Dataset) -> Dataset | PairedDataset:
    """Return what training reads: the data itself, or the pairs made from it if their provenance matches the recipe."""
    if not isinstance(run.recipe.coupling, Pairs):
        return data
    try:
        return PairedDataset(Path(run.pairs.root), data, pairs_identity(run), build_prior(run))
    except ValueError as error:
        raise RecipeError(f"{run.name}: {error}") from error


def build_decoder(run: ResolvedRun) -> FrozenAutoencoder | None:
    """Return the autoencoder that decodes latents for an objective that compares pictures; None if none is needed."""
    objectives = (run.recipe.objective, run.recipe.distillation)
    if run.recipe.data.in_pixels or not any(one.sees_pictures for one in objectives):
        return None
    try:
        return run.data.autoencoder.load()
    except ValueError as error:
        raise RecipeError(f"{run.name}: data.{error}") from error
