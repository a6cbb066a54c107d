"""What is known of an encoding's pictures before they are decoded and, once it is complete, from its index."""

from __future__ import annotations

from flowmap.base.schema import RecipeError
from flowmap.data import Encoded
from flowmap.data.encoded import read_index
from flowmap.data.images import survey
from flowmap.plan.plan import Encoding


def check_pictures(stage: Encoding) -> None:
    """Raise RecipeError if pictures still to be encoded are missing, or lack captions that the recipe reads."""
    if stage.complete:
        return
    data = _encoded(stage)
    try:
        survey.check_captions(data.images, data.text is not None)
    except ValueError as error:
        raise RecipeError(f"{stage.recipe.name}: {str(error).replace('data.root:', 'data.images.root:')}") from error


def describe_pictures(stage: Encoding) -> list[str]:
    """Return lines that describe the pictures; [] if they are missing or all of them are used.

    Raises RecipeError as `check_pictures` does.
    """
    if stage.complete:
        return survey.describe_index(read_index(stage.folder))
    data = _encoded(stage)
    try:
        data.images.length()
    except ValueError:  # The dry run reports missing pictures itself.
        return []
    check_pictures(stage)
    return survey.describe_source(data.images, data.text is not None)


def _encoded(stage: Encoding) -> Encoded:
    assert isinstance(stage.recipe.data, Encoded)
    return stage.recipe.data
