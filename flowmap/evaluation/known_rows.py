"""Rows of metrics.json that are not measured again while nothing that they depend on has changed: teacher and floor.

metrics.json has a `stamp` for each: a hash of settings, of the start of every row, of some of the data and, for the
teacher, of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowmap
from flowmap.base.distributed import world_size
from flowmap.base.files import file_digest, read_json
from flowmap.base.schema import short_hash, to_plain
from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset
from flowmap.data.pairs import contents
from flowmap.flow.types import Cond
from flowmap.nets.lora import fingerprint
from flowmap.recipe import Recipe
from flowmap.recipe.kinds import TABLES
from flowmap.student.student import Student

Row = Mapping[str, float]
LOOK = 8  # samples of each kind that a stamp depends on


def read_known(folder: Path) -> dict[str, Any]:
    """The metrics.json of the run that the student's folder belongs to; {} if there is none that can be read."""
    try:
        return read_json(folder.parent / "metrics.json")
    except (OSError, ValueError):
        return {}


def stamps(
    recipe: Recipe,
    student: Student,
    teacher: BuiltTeacher | None,
    data: Dataset,
    specs: Sequence[Any],
    look: tuple[Tensor, Cond],
) -> dict:
    """{"floor", "teacher", "student"}: hashes of what floor, teacher's rows and distances to the teacher depend on.

    look: the start of the first samples and their conditions.
    """
    settings = {
        key: value.cpu()
        for key, value in data.held_out_conditions_at(torch.arange(min(LOOK, data.num_held_out))).items()
    }
    shared = [
        flowmap.__version__,
        to_plain(tuple(specs), TABLES, hashed=True),
        to_plain(recipe.data, TABLES, hashed=True),
        to_plain(recipe.evaluation, TABLES, hashed=True),
    ]
    shared += [contents(data, 0), data.num_reference, data.num_held_out, _values(settings), world_size()]
    files = [path for spec in specs for path in spec.files]
    files += [recipe.evaluation.captions] if recipe.evaluation.captions else []
    shared += [[file_digest(path) for path in files]] if files else []
    found = {"floor": short_hash(shared)}
    if teacher is None:
        return found
    x1, cond = look
    shared += [
        to_plain(recipe.teacher, TABLES, hashed=True),
        _values({"start": x1, **cond}),
        repr(student.config.autoencoder),
    ]
    shared += [fingerprint(module) for module in teacher.modules]
    found["teacher"] = short_hash(shared)
    own = [to_plain(recipe.sampler, TABLES, hashed=True), fingerprint(student.flow_map), *student.config.tuned]
    own += [student.quantized] if student.quantized else []  # of a LoRA student's base, which has no fingerprint here
    found["student"] = short_hash([*shared, *own])
    return found


def to_teacher(known: Mapping[str, Any], k: int) -> Row:
    """The distances of the student's samples at k steps to the teacher's, from its known row."""
    return {
        key: value for key, value in known.get("student", {}).get(str(k), {}).items() if key.endswith("_to_teacher")
    }


def _values(tensors: Mapping[str, Tensor]) -> list[Any]:
    return [[key, value[:LOOK].double().cpu().tolist()] for key, value in sorted(tensors.items())]
