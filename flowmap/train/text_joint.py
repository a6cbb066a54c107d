"""The artifact of the objective `text_joint`: a student of sentences, and the autoencoder that trained with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from flowmap.build.data import build_data
from flowmap.build.text import flow_alone
from flowmap.data.text.autoencoder import TextAutoencoder
from flowmap.evaluation.measure import measure
from flowmap.plan.plan import Stage
from flowmap.student.config import SHIPPED_AUTOENCODER, StudentConfig
from flowmap.student.folder import load_student
from flowmap.train.callbacks import Keep, keep_student
from flowmap.train.module import DistillModule
from flowmap.train.text_autoencoder import measure_autoencoder, save_autoencoder


class KeepJoint(Keep):
    """Saves the flow as student/ and the text autoencoder as student/autoencoder."""

    def ship(self, module: DistillModule, state: dict[str, Tensor], done: int) -> None:
        save_joint(self.stage, self.config, module, state, done)


def measure_joint(stage: Stage, module: DistillModule, log=None) -> dict[str, Any]:
    """The contents of metrics.json: those of a flow, measured on the saved student, and the "autoencoder"'s figures."""
    folder = stage.folder / "student"
    alone = flow_alone(stage, folder)
    figures = measure(alone.recipe, load_student(folder).to(module.device), None, build_data(alone), progress=log)
    return {**figures, "autoencoder": measure_autoencoder(module)["student"]["1"]}


def save_joint(
    stage: Stage,
    config: StudentConfig,
    module: DistillModule,
    state: dict[str, Tensor],
    done: int,
    metrics: dict | None = None,
) -> None:
    """Write the autoencoder, then the student that samples its latents."""
    net: Any = config.net  # nets/text_joint.py's settings
    mine: dict[str, dict[str, Tensor]] = {"net.autoencoder.": {}, "net.flow.": {}}
    for name, tensor in state.items():
        part = next(one for one in mine if name.startswith(one))
        mine[part]["net." + name.removeprefix(part)] = tensor
    coder = module.averaged.net.autoencoder
    save_autoencoder(
        stage, module, mine["net.autoencoder."], done, net=coder, folder=stage.folder / "student" / SHIPPED_AUTOENCODER
    )
    samples = replace(config.sentences, text_autoencoder=TextAutoencoder(source=SHIPPED_AUTOENCODER))
    flow = replace(config, net=net.flow, shape=net.latent_shape, samples=samples)
    keep_student(stage, flow, mine["net.flow."], done, metrics)
