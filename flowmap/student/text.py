"""What a student of sentences can do: attributes and contexts as conditions, and editing."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmap.data.text.sources import one_line
from flowmap.data.text.token_rows import TokenCondition, asked_tags, side_rows
from flowmap.flow.draws import Generator
from flowmap.flow.prior import Start
from flowmap.flow.solver import Euler
from flowmap.flow.types import Cond
from flowmap.nets.flow_map import FlowMapNet
from flowmap.student.conditions import texts_of
from flowmap.student.config import StudentConfig, in_student_folder


class Sentences:
    """The methods of a Student with samples that are latents of sentences."""

    config: StudentConfig
    flow_map: FlowMapNet
    folder: Path | None

    @property
    def device(self) -> torch.device:
        return next(self.flow_map.parameters()).device

    @abstractmethod
    def conditions(self, num: int, cond: Mapping[str, Any] | None, guidance: float | None = None) -> dict[str, Tensor]:
        """The user's conditions as tensors of `num` rows."""

    @abstractmethod
    def carry(self, start: Start, conditions: Cond, steps: int, generator: Generator) -> Tensor | list[str]:
        """Samples from the given start."""

    def sentences(self, x0: Tensor) -> list[str]:
        """The sentences that latents x0 (B, *shape) decode to."""
        return self.words.to(x0.device).decode(x0)

    def edit(
        self, texts: Sequence[str], steps: int = 1, cond: Mapping[str, Any] | None = None, *, reverse: bool = False
    ) -> list[str]:
        """The sentences carried from the student's source style to its target; with `reverse` back, by a velocity only.

        Sentences that are too long are cut, and a warning counts them. Raises ValueError where the student starts from
        noise, texts is no list of sentences, one is empty, or a flow map is reversed.
        """
        return edit(self, texts, steps, cond, reverse)

    @cached_property
    def words(self):
        """The frozen text autoencoder, loaded on first use; None where samples are no sentences."""
        spec = in_student_folder(self.config.text_autoencoder, self.folder)
        coder = None if spec is None else spec.load()
        if coder is not None and tuple(coder.shape) != tuple(self.config.shape):
            shapes = f"{tuple(coder.shape)}, the student's samples {tuple(self.config.shape)}"
            raise ValueError(f"text_autoencoder: its latents have shape {shapes}")
        return coder


def described_by(student: Sentences, num: int, cond: Mapping[str, Any]) -> dict[str, Tensor]:
    """Attributes and contexts as rows on the student's device.

    An attribute is one value by name, or num of them; -1 is none, also by default. A context is texts, or latents.
    """
    rows = {}
    for attribute in student.config.sentences.attributes:
        value = cond.get(attribute.name, -1)
        if isinstance(value, Tensor):
            misfits = value.is_floating_point() or value.shape != (num,)
            if misfits or int(value.min()) < -1 or int(value.max()) >= len(attribute.values):
                raise ValueError(f"{attribute.name}: wants {num} whole numbers in -1..{len(attribute.values) - 1}")
            rows[attribute.name] = value.to(student.device)
            continue
        values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value] * num
        if len(values) != num:
            raise ValueError(f"{attribute.name}: {len(values)} values given; allowed: one, or {num}")
        numbers = [-1 if type(one) is int and one == -1 else attribute.number(one) for one in values]
        rows[attribute.name] = torch.tensor(numbers, device=student.device)
    for name in student.config.sentences.contexts:
        rows[name] = _context(student, num, name, cond.get(name))
    return rows | _token_rows(student, num, cond)


def _token_rows(student: Sentences, num: int, cond: Mapping[str, Any]) -> dict[str, Tensor]:
    """The conditions that are tokens, (num, length) int64 each, from texts or rows; -1 alone where none are given."""
    known, rows = student.config.sentences.token_conditions, {}
    sides = [one.name for one in known if not one.values]
    if missing := [name for name in sides if cond.get(name) is None]:
        if len(missing) < len(sides):
            raise ValueError(f'{missing[0]}: is missing; {" and ".join(sides)} go together, "" for an empty one')
    for one in known:
        given = cond.get(one.name)
        if isinstance(given, Tensor):
            fits = given.dtype == torch.int64 and given.shape == (num, one.length)
            if not fits or int(given.min()) < -1 or int(given.max()) >= one.size:
                raise ValueError(f"{one.name}: wants ({num}, {one.length}) whole numbers in -1..{one.size - 1}")
            rows[one.name] = given.to(student.device)
        elif given is None:
            rows[one.name] = torch.full((num, one.length), -1, device=student.device)
        else:
            rows[one.name] = _rows_of_texts(student, one, texts_of(given, num, one.name)).to(student.device)
    return rows


def _rows_of_texts(student: Sentences, one: TokenCondition, texts: Sequence[str]) -> Tensor:
    if one.values:
        return asked_tags(one, texts)
    rows, cut = side_rows(student.words.tokens, [one_line(text) for text in texts], one.name, one.length)
    if bool(cut.any()):
        what = f"{int(cut.sum())} of {len(texts)} are longer than {one.length} tokens, of which those next to the gap"
        warnings.warn(f"{one.name}: {what} are read", stacklevel=7)  # the caller of Student.sample, which torch wraps
    return rows


def _context(student: Sentences, num: int, name: str, given: Any) -> Tensor:
    if isinstance(given, Tensor):
        if given.shape != (num, *student.config.shape):
            raise ValueError(f"{name}: has shape {tuple(given.shape)}, wants {(num, *student.config.shape)}")
        return given.to(student.device)
    if given is None:
        return torch.zeros(num, *student.config.shape, device=student.device)
    texts = texts_of(given, num, name)
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    z, cut = student.words.to(student.device).encode(list(place), count_cut=True)
    _warn_cut(student, name, cut, len(place), stacklevel=7)  # the caller of Student.sample, which torch wraps
    return z[torch.tensor([place[text] for text in texts])].to(student.device)


def _warn_cut(student: Sentences, key: str, cut: int, num: int, stacklevel: int) -> None:
    if cut:
        most = student.words.tokens.longest
        warnings.warn(
            f"{key}: {cut} of {num} are longer than the decoder's {most} tokens and were cut", stacklevel=stacklevel
        )


@torch.no_grad()
def edit(student: Sentences, texts: Sequence[str], steps: int, cond, reverse: bool, prefix: str = "") -> list[str]:
    """Encode the sentences, carry their latents from t = 1 to 0 (`reverse`: from 0 to 1 by Euler), and decode them.

    prefix: precedes the names of arguments in errors and warnings.
    """
    if not student.config.edits:
        instead = "leave it out" if prefix else "use sample(num)"
        raise ValueError(f"{prefix}texts: this student starts from noise, not from sentences; {instead}")
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ValueError(f"{prefix}texts: {texts!r} is no list of sentences; for one, give a list of one")
    texts = list(texts)
    if not texts or not all(isinstance(one, str) and one.strip() for one in texts):
        raise ValueError(f"{prefix}texts: must be one or more sentences, none of them empty")
    if steps < 1:
        raise ValueError(f"{prefix}steps: {steps} must be 1 or more")
    if reverse and student.config.arrival:
        why = "a flow map runs from its source to its target alone; a velocity (objective rectified) runs both ways"
        raise ValueError(f"{prefix}reverse: {why}")
    rows = student.conditions(len(texts), cond)
    x, cut = student.words.to(student.device).encode(texts, count_cut=True)
    x = x.to(student.device)
    _warn_cut(student, f"{prefix}texts", cut, len(texts), stacklevel=5)  # the caller of Sentences.edit
    if not reverse:
        carried = student.carry(Start(x), rows, steps, torch.Generator().manual_seed(0))
        assert isinstance(carried, list)
        return carried
    return student.sentences(
        Euler(steps=steps)(lambda x, t: student.flow_map.velocity(x, t, rows), x, start=0.0, end=1.0).x
    )
