"""What peers.py compares: whose losses, on which recipes, and the draws that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flowmap.build.data import build_data
from flowmap.build.student import build_student, student_config
from flowmap.build.teacher import build_teacher
from flowmap.compare.entrants import at_seed
from flowmap.data import StepBatches
from flowmap.flow.types import PathSample
from flowmap.plan.plan import resolve
from flowmap.recipe import Recipe, read_recipe
from flowmap.train.draw import draw_sample, generator_for
from flowmap.train.module import as_trained
from lib.peers import FastGen, Loss, PyMeanFlow

BASE = "base: {kind: logit_normal, mean: -0.4, std: 1.0, pairs: sorted}"
LAW = (f"times={{kind: mixture, {BASE}, one_step: 0.0, diagonal: 0.75, diagonal_at: departure}}",)  # MeanFlow's own
FROM_DATA = (*LAW, "teacher=null", "student.kind=dit", "student.preset=tiny", "student.patch=2", "student.cycles=1.0")
FROM_DATA += ("optimizer.lr=2.0e-3", "optimizer.clip_norm=1.0")  # as digits-teacher, which starts from nothing too
GUIDANCE = ("objective.omega=1.5", "objective.kappa=0.3")
DATA, GUIDED, TAUGHT, SCM, AYF = (
    "MeanFlow from data",
    "MeanFlow from data, guided",
    "MeanFlow from a teacher",
    "sCM from a teacher",
    "AYF from a teacher",
)
RECOMMENDED = "flowmap as recommended"
EMD, MIXED = f"{RECOMMENDED}, AYF-EMD", f"{RECOMMENDED}, both of AYF's"
RECIPES = {
    DATA: ("digits-meanflow", FROM_DATA),
    GUIDED: ("digits-meanflow", FROM_DATA + GUIDANCE),
    TAUGHT: ("digits-meanflow", LAW),
    SCM: (
        "digits-scm",
        ("objective.weight={kind: none}",),
    ),  # theirs is learned apart, and off in the rows that are not "as published"
    AYF: ("digits-ayf-emd", LAW),  # the peers' times, which are MeanFlow's
    f"{TAUGHT}: {RECOMMENDED}": ("digits-meanflow", ()),
    f"{SCM}: {RECOMMENDED}": ("digits-scm", ()),
    f"{AYF}: {EMD}": ("digits-ayf-emd", ()),
    f"{AYF}: {MIXED}": ("digits", ()),
}
"""The recipe and its overrides, by job, and by the name of a row that has its own."""


@dataclass(frozen=True)
class Row:
    """A loss of one job and its owner: make(recipe, student, guided teacher) -> Loss; None without the peer.

    own_settings: it is not trained with the settings of the job's other rows. missing: what the tables show instead of
    figures if there is no loss.
    """

    job: str
    whose: str
    make: Callable[..., Loss] | None
    own_settings: bool = False
    missing: str = "not there"

    @property
    def name(self) -> str:
        return f"{self.job}: {self.whose}"

    @property
    def recipe(self) -> str:
        """The key of its recipe in RECIPES."""
        return self.name if self.name in RECIPES else self.job

    @property
    def ours(self) -> bool:
        return self.whose.startswith("flowmap")


def all_rows(fastgen: FastGen | None, meanflow: PyMeanFlow | None, *, to_train: bool) -> list[Row]:
    """The jobs in order, ours first; to train, or only to evaluate on our draws.

    FastGen's weight on CIFAR-10 is py-meanflow's: one row is for both.
    """
    weight = lambda recipe: dict(power=recipe.objective.distance.power, offset=recipe.objective.distance.offset)
    ours_as = lambda recipe: dict(sigma_data=recipe.objective.sigma_data, warmup_steps=recipe.objective.warmup_steps)
    plain = dict(prior_weighting_enabled=False, g_norm_spatial_invariance=False)
    theirs = meanflow and (lambda recipe, student, teacher: meanflow.mean_flow(student, **weight(recipe)))
    published = meanflow and (
        lambda recipe, student, teacher: meanflow.mean_flow(student, power=0.75, offset=1e-3, own_times=to_train)
    )
    guidance = lambda recipe: (recipe.objective.omega, recipe.objective.kappa)
    nvidia = fastgen and (
        lambda recipe, student, teacher: fastgen.mean_flow(
            student, teacher, **weight(recipe), guidance=guidance(recipe)
        )
    )
    nvidia_scm = fastgen and (
        lambda recipe, student, teacher: fastgen.scm(student, teacher, **ours_as(recipe), **plain)
    )
    nvidia_own = fastgen and (lambda recipe, student, teacher: fastgen.scm(student, teacher, **ours_as(recipe)))
    guided = [Row(GUIDED, "flowmap", ours), Row(GUIDED, "FastGen", nvidia)]
    none = f"has no AYF at {fastgen.checkout.state}" if fastgen else "not there"
    ayf = [
        Row(AYF, "flowmap", ours),
        Row(AYF, EMD, ours, True),
        Row(AYF, MIXED, ours, True),
        Row(AYF, "FastGen", None, missing=none),
    ]
    return [
        Row(DATA, "flowmap", ours),
        Row(DATA, "py-meanflow", theirs),
        Row(DATA, "FastGen", nvidia),
        Row(DATA, "py-meanflow as published", published, True),
        *([] if to_train else guided),
        Row(TAUGHT, "flowmap", ours),
        *([Row(TAUGHT, RECOMMENDED, ours, True)] if to_train else ()),
        Row(TAUGHT, "FastGen", nvidia),
        Row(SCM, "flowmap", ours),
        *([Row(SCM, RECOMMENDED, ours, True)] if to_train else ()),
        Row(SCM, "FastGen", nvidia_scm),
        Row(SCM, "FastGen as published", nvidia_own, True),
        *(ayf if to_train else ()),
    ]


def ours(recipe: Recipe, student, teacher) -> Loss:
    return lambda sample, seed, step: recipe.objective(student, teacher, sample, step).value


class Job:
    """A recipe of RECIPES at a seed with its data and teacher, and what it draws for a step, the same whoever asks."""

    def __init__(self, name: str, seed: int):
        self.recipe = self.recipe_of(name, seed)
        self.run = resolve(self.recipe)
        self.data, self.teacher = build_data(self.run), build_teacher(self.run)
        self.config = student_config(self.run, self.data, self.teacher)
        self.batches = StepBatches(len(self.data), self.recipe.data.batch_size, seed=seed)

    @staticmethod
    def recipe_of(name: str, seed: int) -> Recipe:
        recipe, overrides = RECIPES[name]
        return at_seed(read_recipe(recipe, overrides), seed)

    @property
    def guided(self):
        return self.teacher and self.teacher.guided

    def student(self):
        return as_trained(build_student(self.run, self.config, self.teacher), self.recipe).train()

    def draw(self, step: int, recipe: Recipe | None = None, dtype=torch.float32) -> tuple[PathSample, int]:
        """(sample, the seed that torch's own generator drew its noise from)."""
        recipe, seed = recipe or self.recipe, 1_000_003 * self.recipe.seed + step
        x0, cond = self.data.__getitems__(self.batches.indices(step))
        x0 = x0.to(dtype)
        torch.manual_seed(seed)
        x1 = torch.randn_like(x0)
        sample = draw_sample(
            recipe, x0, cond, generator_for(recipe.seed, step, step * len(x0), len(x0), x0.device), self.data.empty, x1
        )
        wide = recipe.path.sample(x0, x1, sample.t.to(dtype), sample.s.to(dtype), sample.cond)
        return (sample if dtype == torch.float32 else wide), seed
