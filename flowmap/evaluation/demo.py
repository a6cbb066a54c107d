"""What the page of `flowmap demo` draws, without the page: inputs as the user gives them, and columns of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from flowmap.base.images import steps_label, to_grid
from flowmap.base.progress import LogFunction
from flowmap.evaluation.columns import Column, LoadedTeacher, columns, load_teacher, teacher_or_none
from flowmap.student.conditions import class_of
from flowmap.student.folder import load_student
from flowmap.student.student import Student

ALL = "each class in turn"
NONE = "any"  # of an attribute
MOST = 64  # samples of a column
ACROSS = 4  # pictures in a row of a column
POINTS = 4096  # samples of a column of points, whose density is drawn


@dataclass(frozen=True)
class Demo:
    """A student, the numbers of steps at which it is drawn, and its teacher if there is one on this machine.

    Raises ValueError for a student that edits sentences, which has no noise to start from.
    """

    student: Student
    teacher: LoadedTeacher | None = None
    steps: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self):
        if self.student.config.edits:
            raise ValueError("--student: it edits sentences; `flowmap sample --texts FILE` does that")
        for k in self.steps:
            if k < 1:
                raise ValueError(f"--steps: {k} must be 1 or more")

    @property
    def classes(self) -> list[str]:
        """The choices of a class, the first one without a choice; [] for a student without classes."""
        config = self.student.config
        if not config.num_classes:
            return []
        return [ALL, *(config.class_names or map(str, range(config.num_classes)))]

    @property
    def points(self) -> bool:
        """Whether samples are points (N, D), which are drawn as a density."""
        return len(self.student.config.shape) == 1 and self.student.config.text_autoencoder is None

    @property
    def sentences(self) -> bool:
        return self.student.config.text_autoencoder is not None

    @property
    def labels(self) -> list[str]:
        """The labels of the columns."""
        return [*(steps_label("student", k) for k in self.steps), *([self.teacher.label] if self.teacher else [])]

    def draw(
        self,
        seed: int = 0,
        num: int = 16,
        label: str = ALL,
        prompt: str | None = None,
        guidance: float | None = None,
        attributes: Sequence[str] = (),
    ) -> list[Column]:
        """The columns: the student at each number of steps, then the teacher, all from the same noise.

        label: a class by its name or its number. attributes: one value for each attribute of a student of sentences.
        Raises a ValueError that names what is wrong.
        """
        if not 1 <= num <= MOST:
            raise ValueError(f"num: {num} must lie in 1..{MOST}")
        cond: dict[str, Any] = {}
        if self.student.config.num_classes and label != ALL:
            cond["class"] = class_of(label, self.student.config.class_names)
        if self.student.config.text is not None:
            if not (prompt or "").strip():
                raise ValueError("prompt: is empty; this student draws what a text describes")
            cond["prompt"] = prompt
        known = self.student.config.sentences.attributes
        cond |= {one.name: value for one, value in zip(known, attributes, strict=False) if value != NONE}
        num = POINTS if self.points else num
        return columns(
            self.student, self.teacher, num=num, steps=self.steps, cond=cond, guidance=guidance, seed=int(seed)
        )


def open_demo(
    student: str | Path | Student,
    *,
    steps: Sequence[int] = (1, 2, 4),
    teacher: str | Path | bool = True,
    teacher_steps: int | None = None,
    log: LogFunction = lambda message: None,
) -> Demo:
    """The demo of a student, by its folder, hub id or itself.

    teacher: False for none, True for that of its recipe if its weights are on this machine (otherwise a line says why
    it is left out), or a folder or hub id.
    """
    student = student if isinstance(student, Student) else load_student(student)
    loaded = None
    if teacher is True:
        loaded = teacher_or_none(student, teacher_steps, log)
    elif teacher is not False:
        loaded = load_teacher(student, teacher, steps=teacher_steps)
    return Demo(student, loaded, tuple(steps))


def shown(column: Column) -> Image.Image | str:
    """The samples of a column as one picture, or as lines of text."""
    if isinstance(column.samples, Tensor):
        return to_grid(column.samples.float(), columns=ACROSS)
    return "\n".join(" ".join(text.splitlines()) for text in column.samples)


def cost(column: Column) -> str:
    """What a column cost: "0.25 s, 2 network calls a sample"."""
    calls = f"{column.calls} network call{'s' * (column.calls != 1)} a sample"
    return f"{column.seconds:.3g} s, {calls}"
