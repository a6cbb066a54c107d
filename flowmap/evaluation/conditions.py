"""The conditions of samples that are measured: the reference set's classes, or held-out text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowmap.data import Dataset
from flowmap.data.dataset import looked_at
from flowmap.data.prompts import read_prompts
from flowmap.data.text.token_rows import texts_of_rows
from flowmap.flow.apportion import apportioned
from flowmap.flow.types import Cond
from flowmap.student.config import StudentConfig
from flowmap.student.student import Student

Captions = Callable[[Tensor], list[str]]  # places of an evaluation -> their captions


def captions_in(path: str | None) -> Captions | None:
    """The captions of a file (data/prompts.py) at places of an evaluation, in an order drawn once; None without one."""
    if path is None:
        return None
    texts = read_prompts(path)
    return lambda places: [texts[i] for i in looked_at(places, len(texts)).tolist()]


def classes_by_law(data: Dataset, law: str = "data") -> Callable[[int], Tensor] | None:
    """A function of num that returns the classes (num,) of as many samples; None if the data has no classes.

    law: "data" for the proportions of held-out samples (of training ones if none are held out), with -1 for no class;
    "uniform" for as many of each class.
    """
    labels = data.held_out_labels if data.num_held_out and data.held_out_labels is not None else data.labels
    if labels is None or data.num_classes is None:
        return None
    counts = torch.bincount(labels + 1, minlength=data.num_classes + 1)
    if law == "uniform":
        counts = torch.ones(data.num_classes + 1, dtype=torch.int64).index_fill(0, torch.tensor(0), 0)
    return lambda num: apportioned(counts, num) - 1


def class_label(config: StudentConfig, label: int) -> str:
    """The name of a class, or "class 3"."""
    return config.class_names[label] if config.class_names else f"class {label}"


def condition_labels(student: Student, data: Dataset, cond: Cond, num: int) -> list[str]:
    """What each of the first `num` samples of `conditions_for` without captions is conditioned on, in words.

    That is its class, its attributes, tags and the texts around it, or the caption of its data; "" where there is none.
    Texts that are latents are shown as they are decoded.
    """
    config = student.config
    parts: list[list[str]] = [[] for _ in range(num)]
    held_out = bool(data.num_held_out)
    rows = data.num_held_out if held_out else len(data)
    captions = data.captions_at(looked_at(torch.arange(num), rows), held_out=held_out) if config.text else None
    for i, caption in enumerate(captions or ()):
        parts[i].append(caption)
    for i, label in enumerate(cond["class"][:num].tolist() if "class" in cond else ()):
        parts[i] += [class_label(config, label)] if label >= 0 else []
    for one in config.sentences.attributes:
        for i, number in enumerate(cond[one.name][:num].tolist()):
            parts[i] += [f"{one.name}={one.values[number]}"] if number >= 0 else []
    for name, texts in _described(student, cond, num).items():
        for i, text in enumerate(texts):
            parts[i] += [f"{name}={text}"] if text else []
    return [", ".join(part) for part in parts]


def _described(student: Student, cond: Cond, num: int) -> dict[str, list[str]]:
    """The conditions of sentences that are rows of tokens or latents, as texts by name."""
    given, words = student.config.sentences, student.config.text_autoencoder
    found = {}
    for one in given.token_conditions:
        tokens = None if one.values or words is None else student.words.tokens
        found[one.name] = texts_of_rows(one, cond[one.name][:num], tokens)
    for name in given.contexts:
        rows = cond[name][:num]
        texts = student.sentences(rows)
        found[name] = [text if bool(row.any()) else "" for row, text in zip(rows, texts, strict=True)]
    return found


def conditions_for(
    student: Student,
    data: Dataset,
    num: int,
    guidance: float | None = None,
    classes: Callable[[int], Tensor] | None = None,
    captions: Captions | None = None,
) -> Callable[[Tensor], Cond]:
    """A function that returns the conditions at some places of a set of `num` samples.

    For text they are the captions, or those of held-out samples (of training ones if none are held out), in an order
    drawn once; otherwise `classes`, by default all classes in turn. Raises ValueError at once if the guidance scale is
    not allowed.
    """
    if captions is not None:
        given = captions  # for the function below
        return lambda places: student.conditions(len(places), {"prompt": given(places)}, guidance)
    if student.config.text is None and not student.config.descriptions:
        whole = student.conditions(num, None if classes is None else {"class": classes(num)}, guidance)
        return lambda places: {key: value[places.to(value.device)] for key, value in whole.items()}
    rows, asked = (
        (data.num_held_out, data.held_out_conditions_at) if data.num_held_out else (len(data), data.conditions_at)
    )

    def at(places: Tensor) -> Cond:
        return student.taken(len(places), asked(looked_at(places, rows)), guidance)

    at(torch.arange(1))
    return at
