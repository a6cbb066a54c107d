"""Where does a training step's time go beside the derivative: teacher, student, optimizer, averages, draws, loader?

Each recipe's own module is trained by Lightning with the callbacks that act on every step: digits and fashion14 at
full size, full-scale recipes with toy networks of their own class.  All networks have random weights, all data is
random.  Time is exclusive: that of a teacher called within an objective counts for the teacher alone.  Operations are
those that PyTorch dispatches and that are not views, counted in steps of their own.
`python benchmarks/step_parts.py [--recipes NAME ...] [--steps 40] [--name step_parts]`
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import lightning as L
import torch
from lib.full_scale import Built, FullScale, shrunk
from lib.report import environment, table, write
from torch.utils._python_dispatch import TorchDispatchMode

from flowmap.build.teacher import BuiltTeacher
from flowmap.data import Dataset
from flowmap.estimate.roofline import VIEWS
from flowmap.student.examples import conditions_of, empty_of
from flowmap.train.agree import Agree
from flowmap.train.bar import Bar
from flowmap.train.callbacks import Average, Figures
from flowmap.train.logging import quiet_lightning
from flowmap.train.module import DistillModule

os.environ.setdefault("HF_HUB_OFFLINE", "1")
FULL_SIZE = ("digits", "fashion14")
RECIPES = ("digits", "imagenet512", "dit256")
BATCH, WARM, COUNTED = 8, 5, 4
PARTS = ("loader", "draw", "teacher", "student", "backward", "checks", "optimizer", "averages", "logs", "rest")


class Operations(TorchDispatchMode):
    """Counts the operations that are not views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


@dataclass
class Spent:
    """A number that grows, shared out over nested parts: what is spent in an inner part is not the outer one's."""

    now: Callable[[], float]
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    within: list[str] = field(default_factory=lambda: ["rest"])
    since: float = 0.0

    def share_out(self) -> None:
        value = self.now()
        self.parts[self.within[-1]] += value - self.since
        self.since = value

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        self.share_out()
        self.within.append(part)
        try:
            yield
        finally:
            self.share_out()
            self.within.pop()

    def around(self, owner: Any, name: str, part: str) -> None:
        """Count every call of that method of the object for the part."""
        method = getattr(owner, name)

        @wraps(method)
        def counted(*args, **kwargs):
            with self.of(part):
                return method(*args, **kwargs)

        object.__setattr__(owner, name, counted)


@dataclass(frozen=True)
class Velocities:
    """A teacher whose calls are counted."""

    teacher: Any
    spent: Spent

    def velocity(self, x, t, cond=None):
        with self.spent.of("teacher"):
            return self.teacher.velocity(x, t, cond)


@dataclass(frozen=True)
class CountedTeacher(BuiltTeacher):
    """A teacher whose calls in training are counted."""

    spent: Any = None

    def on_drawn_scales(self, scale):
        return Velocities(super().on_drawn_scales(scale), self.spent)


@dataclass(frozen=True, eq=False)
class Random(Dataset):
    """Random samples in memory with conditions of any kind."""

    conditions: dict[str, torch.Tensor] = field(default_factory=dict)
    nothing: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def empty(self):
        return self.nothing

    def __getitems__(self, indices):
        rows = list(indices)
        return self.train[rows], {key: value[rows] for key, value in self.conditions.items()}


def module_for(name: str, spent: Spent) -> DistillModule:
    """The recipe's training module with random weights and data."""
    toy = name not in FULL_SIZE
    settings = ["log.wandb=false", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto"]
    settings += [f"data.batch_size={BATCH}", "data.global_batch_size=null", "trainer.accumulate=1"] if toy else []
    scale = FullScale.of(name, overrides=settings, toy=False)
    if toy:
        config, *teachers = (shrunk(one) for one in (scale.config, *scale.teachers))
        scale = FullScale(scale.run, config, teachers)
    torch.manual_seed(0)
    built = Built.of(scale, torch.device("cpu"), half=scale.recipe.trainer.frozen_precision == "bf16")
    rows, config = 4 * scale.rows, scale.config
    cond = {key: value for key, value in conditions_of(config, rows).items() if key != "guidance"}
    data = Random("random", torch.randn(rows, *config.shape), torch.zeros(1, *config.shape), conditions=cond,
                  nothing=empty_of(cond))  # fmt: skip
    teacher = None if built.teacher is None else CountedTeacher(built.teacher, None, spent=spent)
    return DistillModule(scale.run, built.student, teacher, data)


def watched(module: DistillModule, spent: Spent) -> list[L.Callback]:
    """The callbacks of every step, with all parts of the step counted."""
    averages, figures = Average(), Figures(module.recipe.log.every_steps)
    bar = Bar(module.recipe.log.every_steps, lambda line: None)
    for owner, method, part in (
        (module, "draw", "draw"), (module, "learn", "student"), (module, "backward", "backward"),
        (module, "_must_be_finite", "checks"), (module, "on_before_optimizer_step", "checks"),
        (module, "configure_gradient_clipping", "optimizer"), (module, "optimizer_zero_grad", "optimizer"),
        (averages, "at", "averages"), (figures, "at", "logs"), (bar, "at", "logs"),
        (module, "transfer_batch_to_device", "loader"),
    ):  # fmt: skip
        spent.around(owner, method, part)
    configured = module.configure_optimizers

    def optimizers():
        made = configured()
        for one in made if isinstance(made, list) else [made]:
            step = one.step
            spent_step(one, step, spent)
        return made

    object.__setattr__(module, "configure_optimizers", optimizers)
    loader = module.train_dataloader

    def loading():
        batches = iter(loader())
        return Counted(batches, spent)

    object.__setattr__(module, "train_dataloader", loading)
    return [averages, Agree(None), bar, figures]


def spent_step(optimizer: Any, step: Callable, spent: Spent) -> None:
    """Count the optimizer's step without the closure that it calls."""

    def counted(closure=None):
        loss = None if closure is None else closure()
        with spent.of("optimizer"):
            step()
        return loss

    optimizer.step = counted


class Counted:
    """Batches whose reading is counted for the loader."""

    def __init__(self, batches, spent: Spent):
        self.batches, self.spent = batches, spent

    def __iter__(self):
        return self

    def __next__(self):
        with self.spent.of("loader"):
            return next(self.batches)


class EachStep(L.Callback):
    """Keeps what each step has spent, after the first ones; the last of the callbacks."""

    def __init__(self, spent: Spent, warm: int):
        self.spent, self.warm, self.steps = spent, warm, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.spent.share_out()
        if batch_idx >= self.warm:
            self.steps.append(dict(self.spent.parts))
        self.spent.parts.clear()


def trained_for(name: str, steps: int, now: Callable[[], float], warm: int) -> list[dict[str, float]]:
    """What each part of each step of a short run spends."""
    spent = Spent(now)
    module = module_for(name, spent)
    recipe, each = module.recipe, EachStep(spent, warm)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps + warm, logger=False, enable_checkpointing=False,
            precision={"32": "32-true", "bf16": "bf16-mixed"}[recipe.trainer.precision],
            gradient_clip_val=recipe.optimizer.clip_norm or None, enable_model_summary=False,
            enable_progress_bar=False, callbacks=[*watched(module, spent), each], default_root_dir=folder,
        )  # fmt: skip
        with torch.random.fork_rng():
            trainer.fit(module)
    return each.steps


def examined(name: str, steps: int) -> dict:
    """Milliseconds and operations of each part, and its share of the step, medians over steps."""
    timed = trained_for(name, steps, time.perf_counter, WARM)
    with Operations() as operations:
        counted = trained_for(name, COUNTED, lambda: operations.count, 2)
    middle = lambda found, part: statistics.median(step.get(part, 0) for step in found)
    whole = [sum(step.values()) for step in timed]
    shares = {p: statistics.median(s.get(p, 0) / t for s, t in zip(timed, whole, strict=True)) for p in PARTS}
    return {
        "milliseconds": {part: 1e3 * middle(timed, part) for part in PARTS} | {"step": 1e3 * statistics.median(whole)},
        "shares": shares,
        "operations": {part: middle(counted, part) for part in PARTS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--name", default="step_parts")
    a = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    warnings.filterwarnings("ignore")
    found = {name: examined(name, a.steps) for name in a.recipes}
    rows = []
    for name, one in found.items():
        rows.append([f"{name}, % of {one['milliseconds']['step']:.1f} ms", *(100 * one["shares"][p] for p in PARTS)])
        rows.append([f"{name}, operations", *(one["operations"][p] for p in PARTS)])
    columns = ["recipe", *PARTS]
    print(table(rows, columns))
    payload = {"question": __doc__.splitlines()[0], "environment": environment(), "steps": a.steps, "recipes": found}
    write(a.name, payload | {"columns": columns, "rows": rows})


if __name__ == "__main__":
    main()
