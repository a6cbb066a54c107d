"""Configure students of sentences: tokenizer, text autoencoder, attributes and contexts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flowmap.base.schema import RecipeError
from flowmap.data import TextCoder
from flowmap.data.outline import SentencesOutline
from flowmap.data.text.autoencoder import TextAutoencoder
from flowmap.nets.text_joint import TextJoint
from flowmap.nets.text_pair import TextPair
from flowmap.objectives import FlowMatching
from flowmap.plan.outlines import OnTokens
from flowmap.plan.plan import ResolvedRun
from flowmap.recipe.kinds import StudentSpec, student_part
from flowmap.student.config import SHIPPED_AUTOENCODER, TextLatents

ON_TOKENS = ("text_autoencoder", "text_joint")  # The artifacts of runs on rows of tokens.


def fitted(run: ResolvedRun, net: StudentSpec, data: SentencesOutline) -> StudentSpec:
    """Return the network's settings with those of the tokenizer if it reads tokens, else unchanged.

    Raises RecipeError if network and data do not match.
    """
    if student_part(net).artifact not in ON_TOKENS:
        if data.tokens is not None:
            raise RecipeError(f"{run.name}: data.autoencoder: is required: a flow runs between latents, not tokens")
        return net
    if data.tokens is None:
        raise RecipeError(f"{run.name}: data.autoencoder: a text autoencoder is trained on tokens; leave it out")
    assert isinstance(net, OnTokens)
    if net.vocab is not None and net.vocab < data.tokens.vocab:
        raise RecipeError(f"{run.name}: student.vocab: {net.vocab} is smaller than the tokenizer's {data.tokens.vocab}")
    if data.tokens.pair != isinstance(net, TextPair):
        raise RecipeError(
            f"{run.name}: data.tokenizer: kind pair is for a student of kind text_pair, and it for nothing else"
        )
    return replace(net, vocab=net.vocab or data.tokens.vocab, **data.tokens.conditioning)


def flow_alone(run: ResolvedRun, folder: Path) -> ResolvedRun:
    """Return the run of the flow alone if its recipe trains it together with its autoencoder, else the run itself.

    The flow is in the latents of the autoencoder in that student's folder.
    """
    recipe = run.recipe
    if recipe.artifact != "text_joint":
        return run
    assert isinstance(recipe.student, TextJoint)
    data = replace(recipe.data, autoencoder=TextAutoencoder(source=str(folder / SHIPPED_AUTOENCODER)), tokenizer=None)
    return run.changed(data=data, student=recipe.student.flow, objective=FlowMatching())


def text_latents(run: ResolvedRun, data: SentencesOutline, autoencoder: TextCoder | None) -> TextLatents:
    """Return what the samples of a student of sentences are."""
    styles, recipe = run.styles, run.recipe
    edits = (", ".join(styles.source), ", ".join(styles.target)) if styles is not None else ()
    if not recipe.data.conditional or recipe.artifact not in ("student", "text_joint"):
        return TextLatents(autoencoder, edits=edits)
    return TextLatents(autoencoder, data.attributes, data.contexts, edits, data.token_conditions)
