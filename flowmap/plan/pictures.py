"""What can be told of an encoding's pictures before one is decoded; of a finished encoding, what its index says."""

from __future__ import annotations

from flowmap.base.schema import RecipeError
from flowmap.data import Encoded
from flowmap.data.encoded import read_index
from flowmap.data.images import survey
from flowmap.plan.plan import Encoding


def check_pictures(stage: Encoding) -> None:
    """RecipeError where the pictures that are still to be encoded are not here, or lack the captions that the recipe reads."""
    if stage.complete:
        return
    data = _encoded(stage)
    try:
        survey.check_captions(data.images, data.text is not None)
    except ValueError as error:
        raise RecipeError(f"{stage.recipe.name}: {str(error).replace('data.root:', 'data.images.root:')}") from error


def describe_pictures(stage: Encoding) -> list[str]:
    """What a person should know of them, a line each; [] where they are not here, or all are used. RecipeError as from `check_pictures`."""
    if stage.complete:
        return survey.describe_index(read_index(stage.folder))
    data = _encoded(stage)
    try:
        data.images.length()
    except ValueError:  # not here: what is missing is told apart
        return []
    check_pictures(stage)
    return survey.describe_source(data.images, data.text is not None)


def _encoded(stage: Encoding) -> Encoded:
    assert isinstance(stage.recipe.data, Encoded)
    return stage.recipe.data
