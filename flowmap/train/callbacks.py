"""Callbacks of a run: checkpoints, snapshots of averages, figures, sample grids, metrics."""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from flowmap.base.distributed import rank
from flowmap.base.progress import LogFunction, paced
from flowmap.base.schema import RecipeError
from flowmap.evaluation.measure import measure
from flowmap.flow.derivative import eulerian_derivative
from flowmap.flow.tangent.compiled import uncompiled
from flowmap.nets.flow_map import BESIDE_NET
from flowmap.plan.plan import Stage
from flowmap.student.config import StudentConfig
from flowmap.student.folder import save_student
from flowmap.student.snapshots import save_snapshot
from flowmap.student.student import Student
from flowmap.train.agree import agreement, interruptible
from flowmap.train.card import model_card
from flowmap.train.checkpoints import drop_retired, is_milestone, retire
from flowmap.train.finite import NotFinite
from flowmap.train.module import DistillModule, norm_of, trained
from flowmap.train.run_folder import LAST, drop_old
from flowmap.train.strategy import ShardedStrategy


class AtSteps(L.Callback):
    """Calls `at(trainer, module, done)` once after every optimizer step; done is the number of finished steps."""

    def __init__(self):
        self._seen = -1

    def on_train_start(self, trainer, module) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.at(trainer, module, self._seen)

    def at(self, trainer, module: DistillModule, done: int) -> None:
        raise NotImplementedError


def going_on(what: str, look: Callable[[], None]) -> None:
    """Call look(); if it fails, warn and go on training."""
    try:
        look()
    except Exception as error:
        warnings.warn(
            f"{what} failed, training goes on: {type(error).__name__}: {' '.join(str(error).split())}", stacklevel=2
        )


class AtPictures(AtSteps):
    """Calls `show(trainer, module, done)` every log.samples_every_steps.

    finish.py draws the samples of the last step, once the student is saved.
    """

    def __init__(self, stage: Stage):
        super().__init__()
        self.stage = stage

    def at(self, trainer, module: DistillModule, done: int) -> None:
        every = self.stage.recipe.log.samples_every_steps
        if every and done % every == 0 and done < self.stage.recipe.trainer.steps and not trainer.should_stop:
            look = lambda: going_on("drawing samples", lambda: self.show(trainer, module, done))
            interruptible(trainer, look)

    def show(self, trainer, module: DistillModule, done: int) -> None:
        raise NotImplementedError


class Average(AtSteps):
    """Adds the weights of every step to the averages.

    It is the first of the callbacks, which run before the module's own hook, so that the others see averages with the
    step.
    """

    def at(self, trainer, module: DistillModule, done: int) -> None:
        module.check_finite(done)
        module.average()


class Figures(AtSteps):
    """Logs the loss, its parts by time, throughput, memory, and how close the tangent is to a finite difference."""

    def __init__(self, every: int):
        super().__init__()
        self.every, self._last = every, (0, 0.0)

    def on_train_start(self, trainer, module) -> None:
        super().on_train_start(trainer, module)
        self._last = (trainer.global_step, time.perf_counter())

    def at(self, trainer, module: DistillModule, done: int) -> None:
        if (done - 1) % self.every:
            return
        logs = module.loss_logs()
        (before, then), now = self._last, time.perf_counter()
        self._last = (done, now)
        batch = module.recipe.data.batch_size * module.recipe.batches.accumulate * trainer.world_size
        logs["speed/images_per_second"] = (done - before) * batch / (now - then)
        logs["speed/step_seconds"] = (now - then) / (done - before)
        logs["speed/memory_gib"] = peak_gib(module.device)
        logs["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        if module.recipe.distillation.derivative == "dual" and ((done - 1) // self.every) % 10 == 0:
            logs["train/tangent_against_difference"] = tangent_error(module)
        for logger in trainer.loggers:
            logger.log_metrics(logs, done - 1)


def peak_gib(device: torch.device) -> float:
    """The peak memory of this process in GiB: on the accelerator if there is one, otherwise resident memory.

    On Linux the resident peak is that since the last reset (compare/entry.py).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def tangent_error(module: DistillModule, rows: int = 16) -> float:
    """|| dF/dt by dual numbers - dF/dt by difference || / || the latter || on a few rows of the last batch."""
    sample, _ = module.last
    moving = (sample.t > sample.s).nonzero().squeeze(1)[:rows]
    if len(moving) == 0:  # sharded weights: every process must call the network as often as the others
        moving = torch.arange(min(rows, len(sample.t)), device=sample.t.device)
    cond = None if sample.cond is None else {key: value[moving] for key, value in sample.cond.items()}
    x, t, s, v = (tensor[moving] for tensor in (sample.xt, sample.t, sample.s, sample.vt))
    module.student.eval()  # two calls under dropout would see different masks
    with uncompiled():
        ridden = eulerian_derivative(module.student, x, t, s, v, cond, mode="dual")[1]
        differed = eulerian_derivative(module.student, x, t, s, v, cond, mode="difference")[1]
    module.student.train()
    return float((ridden - differed).norm() / differed.norm().clamp_min(1e-12))


class Keep(AtSteps):
    """Saves checkpoints/last.ckpt and student/ every so many steps, when Agree says so, and at the end.

    It also saves snapshots of the averages. Weights that are not finite are never saved. Earlier checkpoints are kept
    as train/checkpoints.py describes.
    """

    def __init__(self, stage: Stage, config: StudentConfig):
        super().__init__()
        self.stage, self.config, self._saved = stage, config, 0

    def on_train_start(self, trainer, module) -> None:
        super().on_train_start(trainer, module)
        self._saved = trainer.global_step  # 0, or the step of the checkpoint from which the run goes on
        agreement(trainer).keep = lambda: self._keep_once(trainer, module)

    def _keep_once(self, trainer, module: DistillModule) -> None:
        """Save a checkpoint of this step, and wait until it is written, unless there is one."""
        if self._saved != trainer.global_step:
            self.keep(trainer, module, trainer.global_step)
            agreement(trainer).saved()
        if isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.finish_writing()

    def at(self, trainer, module: DistillModule, done: int) -> None:
        recipe, settings = self.stage.recipe, self.stage.recipe.trainer
        snapshots = recipe.ema.snapshot_every_steps
        if snapshots and done % snapshots == 0:
            self._snapshot(trainer, module, done)
        due = done % settings.checkpoint_every_steps == 0 or done == settings.steps or is_milestone(settings, done)
        if due or agreement(trainer).due:
            self.keep(trainer, module, done)
            agreement(trainer).saved()

    def _snapshot(self, trainer, module: DistillModule, done: int) -> None:
        """Save every average of the weights."""
        self.check(module, done)
        for width, average in zip(module.widths, module.averages, strict=True):
            state = full_state(average)
            if trainer.is_global_zero:
                save_snapshot(self.stage.folder, done, width, state)

    def check(self, module: DistillModule, done: int) -> None:
        check_weights(module, done)

    def keep(self, trainer, module: DistillModule, done: int) -> None:
        self.check(module, done)
        if isinstance(trainer.strategy, ShardedStrategy):  # the last one may be in writing
            trainer.strategy.finish_writing()
        folder, settings = self.stage.folder, self.stage.recipe.trainer
        if trainer.is_global_zero and self._saved not in (0, done):
            retire(folder, self._saved, settings)
        trainer.save_checkpoint(folder / LAST)
        self._saved = done
        state = full_state(module.averaged)
        if trainer.is_global_zero:
            drop_retired(folder, settings)
            self.ship(module, state, done)
            drop_old(self.stage.folder)  # the run that this one replaces, if there is one

    def ship(self, module: DistillModule, state: dict[str, Tensor], done: int) -> None:
        keep_student(self.stage, self.config, state, done)


def metric_logs(metrics: Mapping[str, Any], group: str = "metrics") -> dict[str, float]:
    """The student's figures of metrics.json under the names that loggers use: GROUP/NAME/STEPS."""
    rows = metrics["student"]
    return {f"{group}/{name}/{k}": value for k, row in rows.items() for name, value in row.items()}


def with_at_most(spec: Any, images: int | None) -> Any:
    """A metric's settings with at most so many images; unchanged if it has no such setting."""
    if images is None or not any(field.name == "images" for field in fields(spec)):
        return spec
    try:
        return replace(spec, images=min(spec.images, images))
    except ValueError as error:
        raise RecipeError(f"log.metrics_images: {images}: metrics.{error}") from error


def check_weights(module: DistillModule, done: int) -> None:
    """Raise NotFinite with the name of a weight, or of an average of it, that is not finite; all processes call it."""
    module.check_finite()
    names = {id(p): name for name, p in module.named_parameters()}
    kept = {"a weight that is trained": trained(module)}
    kept |= {
        f"the average of width {width:g}": [p for p in net.parameters() if p.is_floating_point()]
        for width, net in zip(module.widths, module.averages, strict=True)
    }
    for what, weights in kept.items():
        if not bool(torch.isfinite(norm_of([p.detach() for p in weights]))):
            name = next(
                (names.get(id(p), "?") for p in weights if not bool(torch.isfinite(norm_of([p.detach()])))),
                "the norm of all",
            )
            raise NotFinite(f"{what} is not finite after step {done - 1}: {name}")


def keep_student(
    stage: Stage, config: StudentConfig, state: dict[str, Tensor], done: int, metrics: dict | None = None
) -> None:
    config = replace(config, step=done)
    save_student(
        stage.folder / "student",
        config,
        state,
        recipe=stage.recipe.to_yaml(),
        card=model_card(stage.recipe, config, metrics),
    )


def full_state(net: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of the map on the CPU, as it ships, in the first process; {} in the others.

    All processes call it. Sharded weights are gathered one at a time, and no other process keeps or copies them.
    """
    from torch.distributed.tensor import DTensor

    found = {}
    for name, tensor in net.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0 and not name.startswith(BESIDE_NET):
            found[name] = whole.detach().cpu()
    return found


class Measure(AtSteps):
    """Measures the averaged student every log.metrics_every_steps by the recipe's metrics of samples.

    The teacher is measured only at the end of the run, the real-vs-real baseline once. Progress is at most a line in 10
    seconds.
    """

    def __init__(self, stage: Stage, student: Student, log: LogFunction):
        super().__init__()
        self.stage, self.student, self.write = stage, student, log
        self.known: dict[str, Any] = {}
        most, metrics = stage.recipe.log.metrics_images, stage.recipe.metrics
        self.metrics = [with_at_most(spec, most) for spec in metrics if spec.on_samples]

    def at(self, trainer, module: DistillModule, done: int) -> None:
        recipe = self.stage.recipe
        if not recipe.log.metrics_every_steps or done % recipe.log.metrics_every_steps or done == recipe.trainer.steps:
            return
        if not trainer.should_stop:
            interruptible(trainer, lambda: going_on("measuring", lambda: self.look(trainer, module, done)))

    def look(self, trainer, module: DistillModule, done: int) -> None:
        recipe, most = self.stage.recipe, self.stage.recipe.log.metrics_images
        chosen: dict[str, Any] = {"steps": recipe.log.metrics_steps or None, "metrics": self.metrics}
        log = paced(self.write) if trainer.is_global_zero else None
        # by held-out captions, which are encoded already: a text encoder would stay on the device
        recipe = recipe.changed(evaluation=replace(recipe.evaluation, captions=None))
        self.known = measure(recipe, self.student, None, module.data, **chosen, known=self.known, progress=log)
        logs = metric_logs(self.known, "metrics" if most is None else f"metrics_of_{most}")
        for logger in trainer.loggers:
            logger.log_metrics(logs, done - 1)
