"""The artifact that a run writes to student/, by the objective's `artifact`: its callbacks during training, its
figures, and its files.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import lightning as L
from torch import Tensor

from flowmap.base.progress import LogFunction
from flowmap.evaluation.known_rows import read_known
from flowmap.evaluation.measure import measure
from flowmap.plan.plan import Stage
from flowmap.student.student import Student
from flowmap.train import autoencoder, text_autoencoder, text_joint
from flowmap.train.callbacks import Keep, Measure, keep_student
from flowmap.train.module import DistillModule
from flowmap.train.pictures import Pictures
from flowmap.train.prior import Drawn, KeepPrior, keep_prior, measure_prior

Figures = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """A run from which its artifact is written: `state` has the averaged weights after `done` steps."""

    stage: Stage
    student: Student
    module: DistillModule
    state: dict[str, Tensor]
    done: int


class Artifact(Protocol):
    def shows(self, stage: Stage, student: Student, log: LogFunction) -> list[L.Callback]:
        """Callbacks that draw, measure and save the averaged weights.

        The one that saves a checkpoint comes last, so that a checkpoint has the figures of its step.
        """
        ...

    def measure(self, stage: Stage, student: Student, module: DistillModule, log: LogFunction | None) -> dict[str, Any]:
        """The contents of metrics.json."""
        ...

    def write(self, run: Ended, metrics: Figures | None) -> None: ...


class StudentArtifact:
    def shows(self, stage: Stage, student: Student, log: LogFunction) -> list[L.Callback]:
        return [Measure(stage, student, log), Pictures(stage, student), Keep(stage, student.config)]

    def measure(self, stage: Stage, student: Student, module: DistillModule, log: LogFunction | None) -> dict[str, Any]:
        known = read_known(stage.folder / "student")  # there if the run is measured again
        return measure(stage.recipe, student, module.teacher, module.data, progress=log, known=known)

    def write(self, run: Ended, metrics: Figures | None) -> None:
        keep_student(run.stage, run.student.config, run.state, run.done, metrics)


@dataclass(frozen=True)
class AutoencoderArtifact:
    """kind: the module that draws, measures and saves the autoencoder, that of pictures or that of text."""

    kind: ModuleType

    def shows(self, stage: Stage, student: Student, log: LogFunction) -> list[L.Callback]:
        return [self.kind.Reconstructions(stage), self.kind.KeepAutoencoder(stage, student.config)]

    def measure(self, stage: Stage, student: Student, module: DistillModule, log: LogFunction | None) -> dict[str, Any]:
        return self.kind.measure_autoencoder(module)

    def write(self, run: Ended, metrics: Figures | None) -> None:
        self.kind.save_autoencoder(run.stage, run.module, run.state, run.done, metrics)


class PriorArtifact:
    def shows(self, stage: Stage, student: Student, log: LogFunction) -> list[L.Callback]:
        return [Drawn(stage, student), KeepPrior(stage, student.config)]

    def measure(self, stage: Stage, student: Student, module: DistillModule, log: LogFunction | None) -> dict[str, Any]:
        return measure_prior(module, log)

    def write(self, run: Ended, metrics: Figures | None) -> None:
        keep_prior(run.stage, run.student.config, run.module, run.state, run.done, metrics)


class JointTextArtifact:
    """A text autoencoder and the flow on its latents."""

    def shows(self, stage: Stage, student: Student, log: LogFunction) -> list[L.Callback]:
        return [text_autoencoder.Reconstructions(stage), text_joint.KeepJoint(stage, student.config)]

    def measure(self, stage: Stage, student: Student, module: DistillModule, log: LogFunction | None) -> dict[str, Any]:
        return text_joint.measure_joint(stage, module, log)

    def write(self, run: Ended, metrics: Figures | None) -> None:
        text_joint.save_joint(run.stage, run.student.config, run.module, run.state, run.done, metrics)


ARTIFACTS: dict[str, Artifact] = {
    "student": StudentArtifact(),
    "autoencoder": AutoencoderArtifact(autoencoder),
    "text_autoencoder": AutoencoderArtifact(text_autoencoder),
    "text_joint": JointTextArtifact(),
    "prior": PriorArtifact(),
}
