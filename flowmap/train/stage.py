"""The training of one recipe: build its parts, begin or resume its folder, train with Lightning, measure."""

from __future__ import annotations

import inspect
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from flowmap.base import preempt
from flowmap.base.distributed import is_child
from flowmap.base.files import copy_folder
from flowmap.base.preempt import STATUS, Preempted
from flowmap.base.progress import LogFunction
from flowmap.base.schema import RecipeError
from flowmap.base.team import the_team
from flowmap.build.data import build_data, build_samples
from flowmap.build.frozen import hold_frozen
from flowmap.build.module import check_derivative
from flowmap.build.prior import build_prior, write_prior
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import BuiltTeacher, build_teacher
from flowmap.data import Dataset
from flowmap.estimate.module_check import check_prediction
from flowmap.estimate.teacher_check import check_teacher
from flowmap.flow.prior import LearnedPrior
from flowmap.flow.tangent.compiled import Way
from flowmap.nets.flow_map import FlowMapNet, mismatch
from flowmap.nets.lora import TEACHER_LORA
from flowmap.nets.lora_file import copy_lora
from flowmap.objectives.adversarial import start_warnings
from flowmap.plan.plan import Stage
from flowmap.plan.run_folders import stamp
from flowmap.recipe import Recipe
from flowmap.recipe.recipe import read_resolved
from flowmap.student.config import SHIPPED_AUTOENCODER, StudentConfig
from flowmap.student.student import Student
from flowmap.train.agree import Agree, agreement
from flowmap.train.artifacts import ARTIFACTS
from flowmap.train.bar import Bar
from flowmap.train.callbacks import Average, Figures
from flowmap.train.checkpoint_file import checkpoint_step, has_checksum, read_checkpoint, restoring
from flowmap.train.clock import Clock
from flowmap.train.compiling import compile_networks, report
from flowmap.train.device import fast_matmul
from flowmap.train.environment import Started
from flowmap.train.finish import FitError, finish
from flowmap.train.finite import NotFinite
from flowmap.train.logging import loggers_of, quiet_lightning
from flowmap.train.module import DistillModule
from flowmap.train.modules import module_of
from flowmap.train.run_folder import LAST, STUDENT, check_step, move_aside, put_back, sweep
from flowmap.train.strategy import AtomicCheckpointIO, strategy_for
from flowmap.train.wandb_log import close_wandb

WITHOUT_CHECKSUM = ", from a checkpoint without a checksum (flowmap 0.1 wrote none)"


@dataclass(frozen=True)
class Built:
    """The objects of a recipe that its training needs."""

    data: Dataset
    teacher: BuiltTeacher | None
    config: StudentConfig
    prior: LearnedPrior | None
    module: DistillModule
    compiled: list[Way]

    @staticmethod
    def of(stage: Stage, log: LogFunction) -> Built:
        data = build_data(stage)
        teacher = build_teacher(stage, data)
        config = student_config(stage, data, teacher)
        prior = build_prior(stage)
        # sharding copies the weights: no process has the whole student in memory of its own
        student = build_student(stage, config, teacher, share=stage.recipe.trainer.strategy == "fsdp")
        check_derivative(stage, student, config)
        module = module_of(stage, config, student, teacher, data, build_samples(stage, data))
        module.prior = prior
        frozen = cast(Sequence[FlowMapNet], teacher.modules) if teacher is not None else ()
        if teacher is not None:
            hold_frozen(stage.recipe, frozen, module.student, cast(Sequence[FlowMapNet], module.averages))
        compiled = compile_networks(stage.recipe, device_of(stage.recipe), module.networks, frozen, log)
        return Built(data, teacher, config, prior, module, compiled)


def device_of(recipe: Recipe) -> str:
    """The device of the recipe's networks outside a Lightning trainer."""
    return the_team().launch.device(recipe.trainer.accelerator)


def run_stage(
    stage: Stage, *, resume: bool, overwrite: bool, again: bool, needed: bool, log: LogFunction, clock: Clock | None
) -> None:
    """Train the recipe into its folder and measure its student.

    resume: from the last checkpoint, if there is one. overwrite: replace the run in the folder. again: measure the
    finished run again, without training. needed: another recipe needs it. The caller has the lock on the folder.
    """
    recipe, folder = stage.recipe, stage.folder
    built = Built.of(stage, log)
    if recipe.batches.split and not again:
        log(f"batch: {recipe.batches}")
    start = _resumed_step(folder, built.module, again=again, log=log) if resume and not overwrite else 0
    checked: dict[str, float] = {}
    if not start and not is_child():
        for line in start_warnings(recipe.objective, recipe.trainer.steps):
            log(f"warning: {line}")
        device = device_of(recipe)
        check_prediction(recipe, built.teacher, built.data, device=device, log=log)
        checked = check_teacher(recipe, built.teacher, built.data, device=device, prior=built.prior, log=log)
    # one student for the run: it keeps what it loads to decode samples and to encode prompts
    student = Student(built.config, built.module.averaged, folder / "student")
    student.prior = built.prior
    trainer = _trainer(stage, student, built.module, clock, start if again else recipe.trainer.steps, log)
    _check_optimizers(built.module)
    started = time.perf_counter()
    try:
        if not is_child() and not again:
            _begin(stage, built, overwrite)
        trainer.loggers = loggers_of(stage, start, log, needed=needed)
        for logger in trainer.loggers if checked else ():
            logger.log_metrics(checked, 0)
        _train(trainer, built.module, folder / LAST if start else None, clock)
        report(built.compiled, log)
        finish(stage, student, built.module, trainer, time.perf_counter() - started, log, clock, again=again)
        close_wandb(0)
    except BaseException as error:
        close_wandb(STATUS if isinstance(error, Preempted) else 1, preempted=isinstance(error, Preempted))
        if not is_child() and put_back(folder):
            log(f"{folder}: the run that was there is back: the new one ended before its first checkpoint")
        raise


def _resumed_step(folder: Path, module: DistillModule, *, again: bool, log: LogFunction) -> int:
    """The step of the last checkpoint, 0 if there is none; RecipeError if it cannot be read or does not fit."""
    checkpoint = folder / LAST
    start = _check_checkpoint(checkpoint, module) if checkpoint.exists() else 0
    if again:
        check_step(folder, start)
    elif start:
        log(f"resuming at step {start}{'' if has_checksum(checkpoint) else WITHOUT_CHECKSUM}")
        was = read_resolved(folder / "recipe.yaml").batches
        if was != module.recipe.batches:
            log(f"its steps before were split otherwise, which changes rounding alone: {was}")
    return start


def _check_checkpoint(path: Path, module: DistillModule) -> int:
    """The step that the checkpoint was taken at; RecipeError if it cannot be read or is of another architecture."""
    try:
        state = read_checkpoint(path)
    except ValueError as error:
        raise RecipeError(f"--resume: {error}") from error
    found = mismatch(module.state_dict(), state["state_dict"])
    if found is not None:
        name, wants, was = found
        raise RecipeError(
            f"--resume: {path}: is of another architecture: {name} is {was}, the recipe's student has {wants}"
        )
    return int(state["global_step"])


def _check_optimizers(module: DistillModule) -> None:
    """Raise RecipeError if torch refuses the settings of an optimizer: Lightning builds them only later."""
    try:
        module.configure_optimizers()
    except ValueError as error:
        raise RecipeError(f"{module.recipe.name}: optimizer: {error}") from error


def _begin(stage: Stage, built: Built, overwrite: bool) -> None:
    """Make the folder that of this run; nothing can be refused any more."""
    folder = stage.folder
    if overwrite:
        move_aside(folder)
    sweep(folder)
    stamp(folder, stage.recipe)
    coders = (built.config.autoencoder, built.config.text_autoencoder)
    if any(coder is not None and coder.source == SHIPPED_AUTOENCODER for coder in coders):
        source = Path(stage.data.autoencoder.source)
        ours = lambda path: path.parent == source and path.name in STUDENT
        copy_folder(source, folder / "student" / SHIPPED_AUTOENCODER, ours)
    if built.config.base is not None and built.config.base.lora is not None:
        copy_lora(built.config.base.lora, folder / "student" / TEACHER_LORA)
    if built.prior is not None:
        write_prior(stage, built.prior, folder / "student")


def _train(trainer: L.Trainer, module: DistillModule, checkpoint: Path | None, clock: Clock | None) -> None:
    safe = {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
    try:
        with preempt.held(), restoring(checkpoint, lambda: module.begun), fast_matmul(module.recipe):
            trainer.fit(module, ckpt_path=checkpoint, **safe)
    except NotFinite as error:
        raise FitError(f"{error}; {_last_checkpoint(trainer)}") from error
    except SystemExit as error:  # Lightning's answer to Ctrl-C, after which it leaves SIGINT ignored, or to SIGTERM
        if not isinstance(error, Preempted) and not preempt.requested():
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt(
                f"interrupted at step {trainer.global_step}; --resume goes on: {_last_checkpoint(trainer)}"
            ) from error
    if agreement(trainer).ended or preempt.requested():
        where = "the checkpoint of that step" if agreement(trainer).ended else "the last checkpoint"
        preempt.end(f"at step {trainer.global_step}; --resume goes on from {where}")
    if trainer.global_step < trainer.max_steps and not (clock and clock.spent):
        raise FitError(
            f"stopped at step {trainer.global_step} of {trainer.max_steps}; "
            f"--resume goes on: {_last_checkpoint(trainer)}"
        )


def _last_checkpoint(trainer: L.Trainer) -> str:
    last = Path(trainer.default_root_dir) / LAST
    if not last.exists():
        return "no checkpoint was kept yet"
    return f"the last good checkpoint is {last} (step {checkpoint_step(last)})"


def _trainer(
    stage: Stage, student: Student, module: DistillModule, clock: Clock | None, steps: int, log: LogFunction
) -> L.Trainer:
    """Lightning's trainer, without loggers; RecipeError for settings that do not fit this machine."""
    recipe, trainer, automatic = stage.recipe, stage.recipe.trainer, module.automatic_optimization
    quiet_lightning()
    try:
        return L.Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=strategy_for(recipe),
            precision={"32": "32-true", "bf16": "bf16-mixed"}[trainer.precision],
            max_steps=steps,
            # a module that steps its optimizers itself also accumulates and clips itself
            accumulate_grad_batches=recipe.batches.accumulate if automatic else 1,
            gradient_clip_val=recipe.optimizer.clip_norm or None if automatic else None,
            callbacks=_callbacks(stage, student, clock, log),
            logger=False,
            plugins=[AtomicCheckpointIO(), Started(the_team().launch, trainer.devices * trainer.num_nodes)],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            default_root_dir=stage.folder,
        )
    except (MisconfigurationException, ValueError) as error:  # no such accelerator, too many devices, ...
        raise RecipeError(f"{recipe.name}: trainer: {' '.join(str(error).split())}") from error


def _callbacks(stage: Stage, student: Student, clock: Clock | None, log: LogFunction) -> list[L.Callback]:
    """The averages come first, so that all others see them; the clock encloses the rest."""
    every = stage.recipe.log.every_steps
    rest: list[Any] = [Bar(every, log), Figures(every), *ARTIFACTS[stage.recipe.artifact].shows(stage, student, log)]
    looks = [often for often in (stage.recipe.log.samples_every_steps, stage.recipe.log.metrics_every_steps) if often]
    looking = lambda done: any(done % often == 0 for often in looks)
    first = [Average(), Agree(stage.recipe.trainer.checkpoint_every_minutes, looking)]
    return [*first, *rest] if clock is None else [*first, clock, *rest, clock.restart]
