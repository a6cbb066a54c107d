"""What a student of sentences has beside one of pictures: attributes and contexts as conditions, editing, and how a recipe names them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowmap.base.schema import RecipeError
from flowmap.data import Text, TextCoder, TextDataset
from flowmap.data.text import Attribute
from flowmap.data.tokens import BPE, Pair, Pretrained
from flowmap.flow.prior import Start
from flowmap.flow.solver import Euler
from flowmap.kinds import left_by
from flowmap.nets.text_joint import TextJoint
from flowmap.objectives import FlowMatching
from flowmap.student.conditions import texts_of
from flowmap.student.config import BESIDE, found_beside
from flowmap.student.text_autoencoder import TextAutoencoder

if TYPE_CHECKING:
    from flowmap.kinds import StudentSpec
    from flowmap.recipe import Recipe
    from flowmap.student.student import Student


ON_TOKENS = ("text_autoencoder", "text_joint")  # what runs leave whose samples are rows of tokens


@runtime_checkable
class OnTokens(Protocol):
    """The settings of a network of one of those: a dataclass whose fields include vocab."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab(self) -> int | None: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...


class Sentences:
    """What a Student can do whose samples are latents of sentences."""

    config: Any
    folder: Path | None

    def sentences(self, x0: Tensor) -> list[str]:
        """What latents x0 (B, *shape) say."""
        return self.words.to(x0.device).decode(x0)

    def edit(self, texts: Sequence[str], steps: int = 1, cond: Mapping[str, Any] | None = None, *, reverse: bool = False) -> list[str]:
        """The sentences, carried from the style that this student starts from to the other; reverse: the other way, by a velocity alone.

        Sentences that are too long are cut, and a warning counts them. ValueError where the student starts from noise, texts is no list of
        sentences, one is empty, or reverse is asked of a flow map.
        """
        student: Any = self  # a Student: this class is a part of that one
        return edit(student, texts, steps, cond, reverse)

    @cached_property
    def words(self):
        """The frozen text autoencoder, loaded when first asked for; None where samples are no sentences."""
        spec = found_beside(self.config.text_autoencoder, self.folder)
        coder = None if spec is None else spec.load()
        if coder is not None and tuple(coder.shape) != tuple(self.config.shape):
            raise ValueError(f"text_autoencoder: its latents have shape {tuple(coder.shape)}, the student's samples {tuple(self.config.shape)}")
        return coder


def fitted(recipe: Recipe, net: StudentSpec, data: TextDataset) -> StudentSpec:
    """A text autoencoder's network told the tokenizer of its data; any other as it is. RecipeError where they do not fit."""
    if left_by(net) not in ON_TOKENS:
        if data.tokens is not None:
            raise RecipeError(f"{recipe.name}: data.autoencoder: is required: a flow runs between latents, not tokens")
        return net
    if data.tokens is None:
        raise RecipeError(f"{recipe.name}: data.autoencoder: a text autoencoder is trained on tokens; leave it out")
    assert isinstance(net, OnTokens)
    if net.vocab is not None and net.vocab < data.tokens.vocab:
        raise RecipeError(f"{recipe.name}: student.vocab: {net.vocab} is smaller than the tokenizer's {data.tokens.vocab}")
    if data.tokens.pair != hasattr(net, "encoder_tokens"):
        raise RecipeError(f"{recipe.name}: data.tokenizer: kind pair is for a student of kind text_pair, and it for nothing else")
    return replace(net, vocab=net.vocab or data.tokens.vocab, **data.tokens.told())


def flow_alone(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe as one of a flow in the latents of the autoencoder beside the student in that folder, where it trained both; else itself."""
    if recipe.leaves != "text_joint":
        return recipe
    assert isinstance(recipe.student, TextJoint)
    data = replace(recipe.data, autoencoder=TextAutoencoder(source=str(folder / BESIDE)), tokenizer=None)
    return recipe.changed(data=data, student=recipe.student.flow, objective=FlowMatching())


def described(recipe: Recipe) -> tuple[TextDataset, list[str]]:
    """The recipe's data as far as it is known without any network, with no sentence in it, and what is missing on this machine."""
    from flowmap.planning.plan import autoencoder_recipes

    spec, missing, trained = recipe.data, list[str](), autoencoder_recipes(recipe)
    assert isinstance(spec, Text)
    attributes: tuple[Attribute, ...] = ()
    tokenizer = spec.tokenizer or BPE()
    shape: tuple[int, ...] = (tokenizer.max_tokens * (2 if isinstance(tokenizer, Pair) else 1),)
    try:
        if spec.autoencoder is not None:
            shape = _latent_shape(trained[0].student) if trained else spec.autoencoder.load().shape
        attributes = spec.read()[2] if "???" not in repr(spec.sentences) else ()
    except ValueError as error:
        missing.append(str(error))
    latents = torch.zeros(1, *shape) if spec.autoencoder is not None else None
    codes = {"left": latents, "right": latents} if spec.infill and latents is not None else {}
    tokens = None if spec.autoencoder is not None else _unfitted(tokenizer, missing)
    data = TextDataset("text", torch.zeros(0, *shape), torch.zeros(0, *shape), attributes=attributes, codes=codes, tokens=tokens)
    return data, missing


def _latent_shape(net: StudentSpec) -> tuple[int, ...]:
    assert isinstance(net, OnTokens)
    return net.latent_shape


def _unfitted(spec, missing: list[str]) -> Any:
    """The tokenizer itself where no sentence trains it, else as much of it as is known; why it cannot be had is told among what is missing."""
    if isinstance(spec, (Pair, Pretrained)):
        try:
            return spec.fit([])
        except ValueError as error:
            missing.append(str(error))
    return _Unfitted(spec)


class _Unfitted:
    """As much of a tokenizer as a network is told, before it has seen a sentence."""

    def __init__(self, spec):
        self.pair = isinstance(spec, Pair)
        self.vocab = 0 if self.pair else getattr(spec, "vocab", 50_000)
        self.max_tokens = spec.max_tokens

    def told(self) -> dict[str, Any]:
        return {"special": (0, 1, 2, 3)} | ({"encoder_tokens": self.max_tokens} if self.pair else {})


def text_config(recipe: Recipe, data: TextDataset, autoencoder: TextCoder | None) -> dict[str, Any]:
    """The fields of StudentConfig that a student of sentences has."""
    from flowmap.planning.plan import styles_of

    styles = styles_of(recipe)
    edits = (", ".join(styles.source), ", ".join(styles.target)) if styles is not None else ()
    plain: dict[str, Any] = {"text_autoencoder": autoencoder, "edits": edits}
    if recipe.data.conditional and recipe.leaves in ("student", "text_joint"):
        plain |= {"attributes": data.attributes, "contexts": tuple(key for key, rows in data.codes.items() if rows.is_floating_point())}
    return plain


def described_by(student: Student, num: int, cond: Mapping[str, Any]) -> dict[str, Tensor]:
    """Attributes (a value by name, or num of them; -1 and absent: none) and contexts (texts, or latents) as rows on the student's device."""
    rows = {}
    for attribute in student.config.attributes:
        value = cond.get(attribute.name, -1)
        if isinstance(value, Tensor):
            odd = value.is_floating_point() or value.shape != (num,)
            if odd or int(value.min()) < -1 or int(value.max()) >= len(attribute.values):
                raise ValueError(f"{attribute.name}: wants {num} whole numbers in -1..{len(attribute.values) - 1}")
            rows[attribute.name] = value.to(student.device)
            continue
        values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value] * num
        if len(values) != num:
            raise ValueError(f"{attribute.name}: {len(values)} values given; allowed: one, or {num}")
        numbers = [-1 if type(one) is int and one == -1 else attribute.number(one) for one in values]
        rows[attribute.name] = torch.tensor(numbers, device=student.device)
    for name in student.config.contexts:
        rows[name] = _context(student, num, name, cond.get(name))
    return rows


def _context(student: Student, num: int, name: str, given: Any) -> Tensor:
    if isinstance(given, Tensor):
        if given.shape != (num, *student.config.shape):
            raise ValueError(f"{name}: has shape {tuple(given.shape)}, wants {(num, *student.config.shape)}")
        return given.to(student.device)
    if given is None:
        return torch.zeros(num, *student.config.shape, device=student.device)
    texts = texts_of(given, num, name)
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    z, cut = student.words.to(student.device).encode(list(place), count_cut=True)
    _tell_cut(student, name, cut, len(place), stacklevel=7)  # the caller of Student.sample, which torch wraps
    return z[torch.tensor([place[text] for text in texts])].to(student.device)


def _tell_cut(student: Student, key: str, cut: int, num: int, stacklevel: int) -> None:
    if cut:
        most = student.words.tokens.longest
        warnings.warn(f"{key}: {cut} of {num} are longer than the decoder's {most} tokens and were cut", stacklevel=stacklevel)


@torch.no_grad()
def edit(student: Student, texts: Sequence[str], steps: int, cond, reverse: bool, mark: str = "") -> list[str]:
    """The sentences, their latents carried from t = 1 to 0 (reverse: from 0 to 1 by Euler), decoded. mark: what stands before the names of
    arguments in errors and warnings."""
    if not student.config.edits:
        raise ValueError(f"{mark}texts: this student starts from noise, not from sentences; {'leave it out' if mark else 'use sample(num)'}")
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ValueError(f"{mark}texts: {texts!r} is no list of sentences; for one, give a list of one")
    texts = list(texts)
    if not texts or not all(isinstance(one, str) and one.strip() for one in texts):
        raise ValueError(f"{mark}texts: must be one or more sentences, none of them empty")
    if steps < 1:
        raise ValueError(f"{mark}steps: {steps} must be 1 or more")
    if reverse and student.config.arrival:
        why = "a flow map runs from its source to its target alone; a velocity (objective rectified) runs both ways"
        raise ValueError(f"{mark}reverse: {why}")
    rows = student.conditions(len(texts), cond)
    x, cut = student.words.to(student.device).encode(texts, count_cut=True)
    x = x.to(student.device)
    _tell_cut(student, f"{mark}texts", cut, len(texts), stacklevel=5)  # the caller of Sentences.edit
    if not reverse:
        carried = student.carry(Start(x), rows, steps, torch.Generator().manual_seed(0))
        assert isinstance(carried, list)
        return carried
    return student.sentences(Euler(steps=steps)(lambda x, t: student.flow_map.velocity(x, t, rows), x, start=0.0, end=1.0).x)
