"""Loads a student from its folder, local or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowmap.student.files import FILES, FOLDERS, check_place, copy_models, read_student, save_student
from flowmap.student.student import Student

__all__ = ["FILES", "FOLDERS", "check_place", "copy_models", "load_student", "save_student"]


def load_student(
    source: str | Path,
    *,
    base: str | Path | None = None,
    imports: str | Sequence[str] = (),
    revision: str | None = None,
    quantize: str | None = None,
) -> Student:
    """The student in that folder (a run's student/, or the run itself) or under that hub id, on the CPU, in evaluation
    mode.

    Reads config.json and model.safetensors only, and for a LoRA student its base's safetensors; nothing is unpickled.
    base: where the base is now, if it has moved. imports: modules, or .py files, of yours that have a student's network
    of kind module; the folder itself never makes flowmap import anything. revision: the branch, tag or commit of a hub
    id. quantize: `int8` or `nf4`, the format in which large linear layers hold their weights from now on, for sampling;
    of a LoRA student those of its base alone. Raises a one-line ValueError that names the file, or the hub id, and what
    is wrong with it.
    """
    return Student(*read_student(source, base=base, imports=imports, revision=revision, quantize=quantize))
