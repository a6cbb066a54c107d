"""`fit`: what a recipe needs is built first, then the recipe itself; a run folder is filled, resumed, or left alone."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from flowmap.base.distributed import is_child
from flowmap.base.files import POLL, check_writable, copy_folder, only_process, read_json, real_folder
from flowmap.base.schema import RecipeError
from flowmap.build.parts import build_data, build_samples, build_student, build_teacher, student_config
from flowmap.build.prior import build_prior, write_prior
from flowmap.estimate.dry_run import check_stages
from flowmap.estimate.teacher_check import check_teacher
from flowmap.flow.prior import LearnedPrior
from flowmap.nets.flow_map import mismatch
from flowmap.plan.data_folders import data_of
from flowmap.plan.pictures import describe_pictures
from flowmap.plan.plan import Encoding, Needed, Pairing, Stage, plan
from flowmap.plan.run_folders import runs_root, stamp
from flowmap.prepare.encode import encode
from flowmap.prepare.make_pairs import make_pairs
from flowmap.recipe import Recipe
from flowmap.student.config import SHIPPED_AUTOENCODER, StudentConfig
from flowmap.student.folder import load_student
from flowmap.student.student import Student
from flowmap.train.artifacts import ARTIFACTS
from flowmap.train.bar import Bar
from flowmap.train.callbacks import Average, Figures
from flowmap.train.checkpoint_file import has_checksum, read_checkpoint, restoring
from flowmap.train.clock import Clock
from flowmap.train.csv_log import CSVLog
from flowmap.train.finish import FitError, finish
from flowmap.train.module import DistillModule, NotFinite
from flowmap.train.modules import module_of
from flowmap.train.run_folder import STUDENT, check_step, guard, measures_again, move_aside, put_back, recover, sweep
from flowmap.train.strategy import AtomicCheckpointIO, strategy_for
from flowmap.train.wandb_log import close_wandb, wandb_logger

LogFunction = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the contents of its metrics.json (empty in the processes beside the first)."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def student(self) -> Student:
        return load_student(self.folder / "student")


def fit(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    log: LogFunction | None = None,
    clock: Clock | None = None,
    shared: bool = False,
) -> Run:
    """Runs the recipe, and first whatever it needs; stages that are complete and unchanged are skipped.

    out: the run folder, default runs/<recipe name>. A folder that holds another or an unfinished run is touched only with resume or
    overwrite. clock: counts the seconds of the recipe's own training, and may end it before its last step. shared: where another process
    fills the folder, wait for it, as for whatever the recipe needs. Raises RecipeError for a user's mistake, FitError where training had to
    stop.
    """
    log = silent if is_child() else log or (lambda message: print(message, file=sys.stderr, flush=True))
    folder = real_folder(Path(out) if out else runs_root() / recipe.name, "--out")
    if recipe.missing():
        raise RecipeError(
            f"{recipe.name}: {', '.join(recipe.missing())}: must be given, as key=value or in a recipe of your own"
        )
    stages = plan(recipe, folder)
    if is_child():
        _make_all(stages, resume=resume, overwrite=overwrite, log=log, clock=clock)
        return Run(folder, {})  # the first process may still be writing metrics.json
    check_writable(folder, "--out")
    with only_process(folder, waiting_for(recipe.name, folder, log) if shared else None):
        recover(folder, log)
        guard(stages[-1], resume=resume, overwrite=overwrite)
        check_stages(stages, again=overwrite)  # before pictures are encoded for hours
        _make_all(stages, resume=resume, overwrite=overwrite, log=log, clock=clock)
    return Run(folder, read_json(folder / "metrics.json"))


def _make_all(stages: list[Needed], *, resume: bool, overwrite: bool, log: LogFunction, clock: Clock | None) -> None:
    """Makes the stages that are not complete, in order; of the last, the caller has the lock and has asked `guard`."""
    for i, stage in enumerate(stages):
        label = f"[{i + 1}/{len(stages)}] {stage.recipe.name}"
        last = i == len(stages) - 1
        again = last and not overwrite and measures_again(stage, resume=resume, log=clock is None)
        if stage.complete and not again and not (last and overwrite):
            log(f"{label}: complete in {stage.folder}")
            for line in describe_pictures(stage) if isinstance(stage, Encoding) else ():
                log(line)
            continue
        if not isinstance(stage, Stage):
            what = (
                f"{stage.recipe.coupling.num} pairs ->"
                if isinstance(stage, Pairing)
                else f"its pictures -> {stage.makes} in"
            )
            log(f"{label}: {what} {stage.folder}")
            make(stage, log, waiting_for(label, stage.folder, log))
            continue
        log(f"{label}: {'measured again' if again else f'{stage.recipe.trainer.steps} steps'} -> {stage.folder}")
        with nullcontext() if last or is_child() else only_process(stage.folder, waiting_for(label, stage.folder, log)):
            if stage.complete and not last:
                log(f"{label}: complete in {stage.folder}, made by another process")
                continue
            _run(
                stage,
                resume=resume or not last,
                overwrite=last and overwrite,
                again=again,
                log=log,
                clock=clock if last else None,
            )


def silent(message: str) -> None: ...


def waiting_for(label: str, folder: Path, log: LogFunction) -> Callable[[], None]:
    """What says that another process makes that folder."""
    return lambda: log(f"{label}: another flowmap process is filling {folder}; waiting for it")


def make(stage: Encoding | Pairing, log: LogFunction, waiting: Callable[[], None] | None = None) -> None:
    """Makes the data set on disk or the pairs of that stage, or what of them is not there yet. RecipeError names the recipe."""
    options = dict(device=device_of(stage.recipe), log=log, waiting=waiting)
    done = lambda: (
        make_pairs(stage.recipe, stage.folder, **options)
        if isinstance(stage, Pairing)
        else encode(stage.spec, stage.folder, **options)
    )
    try:
        while done() is None:  # another process completes it just now
            time.sleep(POLL)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{stage.recipe.name}: {error}") from error


def device_of(recipe: Recipe) -> str:
    """Where the recipe's networks run outside a Lightning trainer."""
    return "cuda" if torch.cuda.is_available() and recipe.trainer.accelerator in ("auto", "gpu", "cuda") else "cpu"


def _run(stage: Stage, *, resume: bool, overwrite: bool, again: bool, log: LogFunction, clock: Clock | None) -> None:
    recipe, folder = stage.recipe, stage.folder
    data = build_data(recipe)
    teacher = build_teacher(recipe, data)
    config = student_config(recipe, data, teacher)
    prior = build_prior(recipe)
    module = module_of(
        recipe, config, build_student(recipe, config, teacher), teacher, data, build_samples(recipe, data)
    )
    module.prior = prior
    if (
        recipe.trainer.compile
    ):  # in place; a ride goes through the network eagerly, the teacher and differences are compiled
        for net in (
            module.student,
            *(teacher.modules if teacher else ()),
            *([module.fake] if hasattr(module, "fake") else ()),
        ):
            net.net.compile()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    start = _check_checkpoint(checkpoint, module) if resume and not overwrite and checkpoint.exists() else 0
    if again:
        check_step(folder, start)
    elif start:
        log(
            f"resuming at step {start}{'' if has_checksum(checkpoint) else ', from a checkpoint without a checksum (flowmap 0.1 wrote none)'}"
        )
    checked = (
        {}
        if start or is_child()
        else check_teacher(recipe, teacher, data, device=device_of(recipe), prior=prior, log=log)
    )
    student = Student(
        config, module.averaged, folder / "student"
    )  # one for the run: what it loads to decode and to read prompts, it keeps
    student.prior = prior
    steps = start if again else recipe.trainer.steps
    trainer = _trainer(stage, student, clock, steps, automatic=module.automatic_optimization, log=log)
    _check_optimizers(module)
    started = time.perf_counter()
    try:
        if not is_child() and not again:
            _begin(stage, prior, config, overwrite)
        trainer.loggers = _loggers(stage, start, log)
        for logger in trainer.loggers if checked else ():
            logger.log_metrics(checked, 0)
        _train(trainer, module, checkpoint if start else None, clock)
        finish(stage, student, module, trainer, time.perf_counter() - started, log, clock, again=again)
        close_wandb(0)
    except BaseException:
        close_wandb(1)
        if not is_child() and put_back(folder):
            log(f"{folder}: the run that was there is back: the new one ended before its first checkpoint")
        raise


def _check_optimizers(module: DistillModule) -> None:
    """RecipeError where torch refuses the settings of an optimizer: Lightning builds them only once training begins."""
    try:
        module.configure_optimizers()
    except ValueError as error:
        raise RecipeError(f"{module.recipe.name}: optimizer: {error}") from error


def _begin(stage: Stage, prior: LearnedPrior | None, config: StudentConfig, overwrite: bool) -> None:
    """Makes the folder that of this run: nothing can be refused any more."""
    folder = stage.folder
    if overwrite:
        move_aside(folder)
    sweep(folder)
    stamp(folder, stage.recipe)
    if SHIPPED_AUTOENCODER in (getattr(part, "source", None) for part in (config.autoencoder, config.text_autoencoder)):
        source = Path(data_of(stage.recipe).autoencoder.source)
        copy_folder(
            source,
            folder / "student" / SHIPPED_AUTOENCODER,
            lambda path: path.parent == source and path.name in STUDENT,
        )
    if prior is not None:
        write_prior(stage.recipe, prior, folder / "student")


def _train(trainer: L.Trainer, module: DistillModule, checkpoint: Path | None, clock: Clock | None) -> None:
    safe = {"weights_only": True} if "weights_only" in inspect.signature(trainer.fit).parameters else {}
    try:
        with restoring(checkpoint, lambda: module.begun):
            trainer.fit(module, ckpt_path=checkpoint, **safe)
    except NotFinite as error:
        raise FitError(f"{error}; {_last_checkpoint(trainer)}") from error
    except SystemExit as error:  # Lightning's answer to Ctrl-C, after which it leaves SIGINT ignored
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt(
            f"interrupted at step {trainer.global_step}; --resume goes on: {_last_checkpoint(trainer)}"
        ) from error
    if trainer.global_step < trainer.max_steps and not (clock and clock.spent):
        raise FitError(
            f"stopped at step {trainer.global_step} of {trainer.max_steps}; --resume goes on: {_last_checkpoint(trainer)}"
        )


def _last_checkpoint(trainer: L.Trainer) -> str:
    last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    return (
        f"the last good checkpoint is {last} (step {read_checkpoint(last)['global_step']})"
        if last.exists()
        else "no checkpoint was kept yet"
    )


def _check_checkpoint(path: Path, module: DistillModule) -> int:
    """The step that the checkpoint was taken at; RecipeError if it cannot be read or is of another architecture."""
    try:
        state = read_checkpoint(path)
    except ValueError as error:
        raise RecipeError(f"--resume: {error}") from error
    odd = mismatch(module.state_dict(), state["state_dict"])
    if odd is not None:
        name, wants, was = odd
        raise RecipeError(
            f"--resume: {path}: is of another architecture: {name} is {was}, the recipe's student has {wants}"
        )
    return int(state["global_step"])


def _trainer(
    stage: Stage, student: Student, clock: Clock | None, steps: int, *, automatic: bool, log: LogFunction
) -> L.Trainer:
    recipe, trainer = stage.recipe, stage.recipe.trainer
    quiet_lightning()
    every = recipe.log.every_steps
    # averages first: all see them
    callbacks = [Average(), Bar(every, log), Figures(every), *ARTIFACTS[recipe.artifact].shows(stage, student)]
    if clock is not None:
        callbacks = [callbacks[0], clock, *callbacks[1:], clock.restart]
    try:
        return L.Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=strategy_for(recipe),
            precision={"32": "32-true", "bf16": "bf16-mixed"}[trainer.precision],
            max_steps=steps,
            accumulate_grad_batches=trainer.accumulate if automatic else 1,  # else the module's own doing
            gradient_clip_val=recipe.optimizer.clip_norm or None if automatic else None,
            callbacks=callbacks,
            logger=False,  # set by _run, once nothing can be refused any more
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            default_root_dir=stage.folder,
        )
    except (MisconfigurationException, ValueError) as error:  # no such accelerator, more devices than there are, ...
        raise RecipeError(f"{recipe.name}: trainer: {' '.join(str(error).split())}") from error


def _loggers(stage: Stage, start: int, log: LogFunction) -> list:
    if is_child():
        return []
    loggers: list = [CSVLog(stage.folder / "log.csv", keep_below=start)]
    if stage.recipe.log.wandb and os.environ.get("WANDB_MODE") != "disabled":
        logger = wandb_logger(stage, start, log)
        loggers += [] if logger is None else [logger]
    return loggers


def quiet_lightning() -> None:
    """Lightning's advice on workers, hardware and sanity is not for our users."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*isinstance.*LeafSpec.*")
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view tensor"
    )  # nothing of ours writes into an output
