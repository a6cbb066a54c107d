"""Configure students of sentences: tokenizer, text autoencoder, attributes and contexts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from flowmap.base.schema import RecipeError
from flowmap.data import TextCoder
from flowmap.data.outline import SentencesOutline
from flowmap.data.text.autoencoder import TextAutoencoder
from flowmap.nets.text_joint import TextJoint
from flowmap.nets.text_pair import TextPair
from flowmap.objectives import FlowMatching
from flowmap.plan.dependencies import styles_of
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import StudentSpec, student_part
from flowmap.student.config import SHIPPED_AUTOENCODER, TextLatents

ON_TOKENS = ("text_autoencoder", "text_joint")  # The artifacts of runs on rows of tokens.


@runtime_checkable
class OnTokens(Protocol):
    """The settings of a network whose samples are rows of tokens, a dataclass whose fields include vocab."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab(self) -> int | None: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...


def fitted(recipe: Recipe, net: StudentSpec, data: SentencesOutline) -> StudentSpec:
    """Return the network's settings with those of the tokenizer if it reads tokens, else unchanged.

    Raises RecipeError if network and data do not match.
    """
    if student_part(net).artifact not in ON_TOKENS:
        if data.tokens is not None:
            raise RecipeError(f"{recipe.name}: data.autoencoder: is required: a flow runs between latents, not tokens")
        return net
    if data.tokens is None:
        raise RecipeError(f"{recipe.name}: data.autoencoder: a text autoencoder is trained on tokens; leave it out")
    assert isinstance(net, OnTokens)
    if net.vocab is not None and net.vocab < data.tokens.vocab:
        raise RecipeError(
            f"{recipe.name}: student.vocab: {net.vocab} is smaller than the tokenizer's {data.tokens.vocab}"
        )
    if data.tokens.pair != isinstance(net, TextPair):
        raise RecipeError(
            f"{recipe.name}: data.tokenizer: kind pair is for a student of kind text_pair, and it for nothing else"
        )
    return replace(net, vocab=net.vocab or data.tokens.vocab, **data.tokens.conditioning)


def flow_alone(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe of the flow alone if a run trained it together with its autoencoder, else the recipe.

    The flow is in the latents of the autoencoder in that student's folder.
    """
    if recipe.artifact != "text_joint":
        return recipe
    assert isinstance(recipe.student, TextJoint)
    data = replace(recipe.data, autoencoder=TextAutoencoder(source=str(folder / SHIPPED_AUTOENCODER)), tokenizer=None)
    return recipe.changed(data=data, student=recipe.student.flow, objective=FlowMatching())


def text_latents(recipe: Recipe, data: SentencesOutline, autoencoder: TextCoder | None) -> TextLatents:
    """Return what the samples of a student of sentences are."""
    styles = styles_of(recipe)
    edits = (", ".join(styles.source), ", ".join(styles.target)) if styles is not None else ()
    if not recipe.data.conditional or recipe.artifact not in ("student", "text_joint"):
        return TextLatents(autoencoder, edits=edits)
    return TextLatents(autoencoder, data.attributes, data.contexts, edits)
