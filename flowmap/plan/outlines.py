"""Outlines of data that is not read: as an index, settings, cards and other recipes state shape and classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from flowmap.base.schema import RecipeError
from flowmap.data import Encoded, Text
from flowmap.data.outline import DataOutline
from flowmap.data.text.tokens import BPE
from flowmap.nets.diffusers_model import DiffusersModel
from flowmap.nets.diffusers_text import example_conditions
from flowmap.nets.stacked import net_within
from flowmap.plan.cards import find_card, list_cards
from flowmap.plan.data_folders import finished_index
from flowmap.plan.requirements import HasSource
from flowmap.plan.resolved import Resolved
from flowmap.student.prior import auxiliary
from flowmap.teachers.autoencoder import Autoencoder

Shape = tuple[int, ...]


@runtime_checkable
class OnTokens(Protocol):
    """The settings of a network whose samples are rows of tokens, a dataclass whose fields include vocab."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab(self) -> int | None: ...

    @property
    def latent_shape(self) -> Shape: ...


def stated_outline(run: Resolved) -> DataOutline | None:
    """Return the outline of the run's data without reading any; None if nothing states its shape or the network.

    The index of a finished encoding is read; class names are known from it alone.
    """
    index = finished_index(run.data) if isinstance(run.recipe.data, Encoded) else None
    names = None if index is None else index.get("class_names")
    shape, num_classes = _stated(run) if index is None else (tuple(index["shape"]), index["num_classes"])
    if not shape or run.net is None:
        return None
    net = net_within(run.net)
    conditions = example_conditions(net, 1) if isinstance(net, DiffusersModel) else {}
    return DataOutline(shape, num_classes, tuple(names) if names else None, conditions)


def _stated(run: Resolved) -> tuple[Shape | None, int | None]:
    """Return shape and classes as settings, cards and other recipes state them, each None if they do not."""
    known = run.data.outline() or (_codes(run) or latents_shape(run) or sentences_shape(run), None)
    carded = _carded(run) or (None, None)
    return known[0] or carded[0], known[1] or carded[1]


def sentences_shape(run: Resolved) -> Shape | None:
    """Return the shape of rows of tokens, or of latents of sentences if a recipe trains their autoencoder, or None."""
    data = run.recipe.data
    if not isinstance(data, Text):
        return None
    if data.autoencoder is None:
        return ((data.tokenizer or BPE()).row_length,)
    for trained in run.autoencoders:
        net = trained.recipe.student
        assert isinstance(net, OnTokens)
        return net.latent_shape
    return None


def latents_shape(run: Resolved) -> Shape | None:
    """Return the shape of latents of pictures, or None.

    It is known of an autoencoder that a recipe trains, that a card of kind autoencoder describes, or that is a local
    folder. Raises RecipeError if the size of the pictures is not a multiple of its factor.
    """
    images, autoencoder = run.recipe.data.images, run.recipe.data.autoencoder
    for trained in run.autoencoders if images is not None else ():
        spec: Any = trained.recipe.student  # the settings of an autoencoder
        side = _halved(run, 2 ** (len(spec.channels) - 1), trained.name)
        return spec.latent_channels, side, side
    source = autoencoder.source if isinstance(autoencoder, HasSource) else None
    for card in map(find_card, list_cards()) if source else ():
        if card.kind == "autoencoder" and card.source == source:
            assert card.pixels is not None  # read_card has checked this.
            side = _halved(run, card.pixels // card.shape[1], card.name)
            return card.shape[0], side, side
    if isinstance(autoencoder, Autoencoder) and images is not None and source and Path(source).is_dir():
        outline = autoencoder.outline()
        return outline and (outline[0], *2 * (_halved(run, outline[1], source),))
    return None


def _codes(run: Resolved) -> Shape | None:
    """Return the shape of codes, if they are the data."""
    return next(((auxiliary(trained.recipe.student).size,) for trained in run.coders), None)


def _carded(run: Resolved) -> tuple[Shape, int | None] | None:
    """Return shape and classes of samples as the teacher's card states them.

    Without one, those of the run that trains the teacher or what the student starts from.
    """
    if run.cards and run.cards[0].shape:
        return tuple(run.cards[0].shape), run.cards[0].num_classes
    return next((found for needed in (*run.teachers, *run.starts) if (found := _carded(needed))), None)


def _halved(run: Resolved, factor: int, autoencoder: str) -> int:
    """Return the side of the latents of the run's pictures. Raise RecipeError if `factor` does not divide theirs."""
    data: Any = run.recipe.data  # of pictures
    size = data.images.size
    if size % factor:
        what = f"{size} is not a multiple of {factor}, the side of one latent of {autoencoder!r}"
        raise RecipeError(f"{run.name}: data.images.size: {what}")
    return size // factor
