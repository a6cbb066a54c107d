"""How close do students of 1, 2, 4 and 8 steps come to teachers that other people trained and published?

`python benchmarks/published.py --rows teacher ayf_mixed --seeds 0 1 2 3 4` (see `--help`), from the project's folder:
the recipes of examples/published/ read ../shared/published, with the files that examples/published/run.py names. Each
finished (row, seed) is kept at once in benchmarks/results/published.json, so a run goes on where it was stopped.

MNIST's 10,000 test pictures, which the teachers have not seen, are split at random: one half gives the students' x0,
the figures are against the other. Features: 64 principal components of that half's pixels, and a small classifier of
digits that is trained here on the first half (its labels too); neither is part of a loss. `--packaged 1000` adds a
third space for the rows whose students are in the folder of runs: EfficientNet-Lite0, of flowmap's extra "features".
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from lib.report import RESULTS, environment, keep, kept
from tables.published import tables
from torch import Tensor, nn
from torch.nn import functional as F

import flowmap
from flowmap.build.data import build_data
from flowmap.build.teacher import build_teacher
from flowmap.data import Dataset
from flowmap.flow.solver import Euler, Heun, euler_step, integrate
from flowmap.metrics.frechet import FrechetDistance
from flowmap.metrics.nearest import NearestScore
from flowmap.metrics.picture_nets import EfficientNetLite0
from flowmap.metrics.precision_recall import PrecisionRecallScore
from flowmap.nets.module_clock import DDPM
from flowmap.plan.plan import resolve
from flowmap.recipe import Recipe

FOLDER = Path(__file__).resolve().parents[1] / "examples/published"
RESULT = RESULTS / "published.json"
IMAGES, COMPONENTS, NEIGHBOURS = 5000, 64, 1000
PACKAGED = 32  # components of the packaged network's features
STEPS = {"instaflow": (1,)}  # of sampling; other methods: 1, 2, 4, 8
MIXED = [
    *("objective.kind=ayf_mixed", "objective.warmup_steps=400", "objective.r_max=1.0"),
    *("objective.lagrangian=0.25", "objective.own_lagrangian=1.0"),
]
EMD = ["objective.kind=ayf_emd", "objective.warmup_steps=400", "objective.r_max=1.0"]
METHODS = {  # overrides of the model's recipe
    "ayf_emd": EMD,
    "by_output": [*EMD, "objective.weight={kind: power}"],
    "by_output_longer": [*EMD, "objective.weight={kind: power}", "trainer.steps=5500"],
    "ayf_mixed": MIXED,
    "more_jumps": [*MIXED, "times.one_step=0.4"],
    "ayf_lmd": ["objective.kind=ayf_lmd", "objective.warmup_steps=400", "objective.r_max=1.0"],
    "meanflow": ["objective.kind=meanflow"],
    "weighted": ["optimizer.lr=3e-4", "trainer.steps=1200"],
    "unweighted": [
        *("objective.weight={kind: none}", "objective.warmup_steps=400", "sampler.t_max=0.95"),
        *("optimizer.lr=1e-4", "trainer.steps=1500"),
    ],
    "weighted_rate": ["optimizer.lr=1e-3", "trainer.steps=1500"],
}
OF_DDPM = ("weighted", "unweighted", "weighted_rate")
FILES = {name: f"mnist_flow_vit_{name}.yaml" for name in ("adversarial", "reflow", "instaflow")}
MODELS = {  # the recipe's file, and overrides
    "mnist-flow-vit": ("mnist_flow_vit", []),
    "mnist-flow-vit-unguided": ("mnist_flow_vit", ["teacher.guidance=null"]),
    "mnist-ddpm": ("mnist_ddpm", []),
}
SOLVERS = {
    "mnist_flow_vit": {
        **{f"euler {n}": lambda v, z, n=n: Euler(steps=n)(v, z).x for n in (1, 2, 4, 8, 12, 16, 50, 100)},
        "heun 25": lambda v, z: Heun(steps=25, euler_last=True)(v, z).x,
    },
    "mnist_ddpm": {
        f"ddim {n}": lambda v, z, n=n: integrate(v, z, places(n), step=euler_step).x for n in (1, 2, 4, 8, 50)
    },
}


def places(n: int) -> list[float]:
    """Our times of n DDIM steps, even in the 1,000 places of a DDPM's table: Euler on the linear path is DDIM."""
    times = DDPM().build().times
    return [1.0, *(float(times[round(1000 * i / n) - 1]) for i in range(n - 1, 0, -1)), 0.0]


class Classifier(nn.Module):
    """Ten logits of pictures (B, 1, 28, 28) in [-1, 1]; `features` are the 64 numbers before them."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(32 * 49, 64),
        )  # fmt: skip
        self.out = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.convolutions(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.dropout(self.features(x), 0.3, self.training)))


def trained_classifier(x0: Tensor, labels: Tensor, epochs: int = 12) -> Classifier:
    """A classifier trained on these pictures, moved by up to two pixels; the same one in every run."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = Classifier()
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * (len(x0) // 100))
        for _ in range(epochs):
            for rows in torch.randperm(len(x0), generator=generator).split(100):
                down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
                moved = x0[rows].roll((down, right), (2, 3))
                loss = F.cross_entropy(net(moved), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
    return net.eval().requires_grad_(False)


@dataclass(frozen=True)
class Ruler:
    """What pictures are measured by: the held-out half, its principal components, and the classifier."""

    held_out: Tensor
    mean: Tensor
    components: Tensor
    classifier: Classifier

    @classmethod
    def of(cls, data) -> Ruler:
        flat = data.held_out.flatten(1)
        mean = flat.mean(0)
        components = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:COMPONENTS].mT
        return cls(data.held_out, mean, components, trained_classifier(data.train, data.labels))

    def pixels(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - self.mean) @ self.components

    @torch.no_grad()
    def classified(self, x: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(part) for part in x.split(1000)])

    @torch.no_grad()
    def measure(self, x: Tensor, labels: Tensor | None) -> dict[str, float]:
        """The figures of generated pictures (N, 1, 28, 28); labels: what they were asked to be."""
        found: dict[str, float] = {}
        for name, features in (("pixels", self.pixels), ("classifier", self.classified)):
            frechet = FrechetDistance(features, COMPONENTS)
            near = PrecisionRecallScore(features)
            for part, real in ((self.held_out, True), (x, False)):
                frechet.update(part, real=real)
                near.update(part, real=real)
            found[f"frechet_{name}"] = float(frechet.compute())
            if name == "classifier":
                found |= {key: float(value) for key, value in near.compute().items()}
        nearest = NearestScore(self.pixels, self.pixels(self.held_out))
        nearest.update(x[:NEIGHBOURS])
        found["nearest"] = float(nearest.compute())
        return found if labels is None else found | {"accuracy": self.accuracy(x, labels)}

    @torch.no_grad()
    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """The share of pictures of which the classifier says the label."""
        logits = torch.cat([self.classifier(part) for part in x.split(1000)])
        return float((logits.argmax(1) == labels).double().mean())


def teacher_row(work: Work, seed: int, done: dict) -> None:
    """The figures of the teacher from the seed's noise, by solver and steps; those in `done` are not made again."""
    teacher = build_teacher(resolve(work.recipe), work.data)
    start = teacher.network.start(work.images, torch.Generator().manual_seed(seed)).x1
    for name, solve in SOLVERS[MODELS[work.model][0]].items():
        if name not in done:
            started = time.process_time()
            x = solved(teacher.guided.velocity, solve, start, work.cond)
            done[name] = work.figures(x, time.process_time() - started)
            work.keep("teacher", seed, done, f"{name}: {shown(done[name])}")


def packaged_rows(work: Work, seeds: Sequence[int], count: int) -> None:
    """Frechet distances on principal components of a packaged network's features, of `count` pictures a row."""
    components = PackagedComponents(work.data.held_out[:count])
    frechet = FrechetDistance(components, PACKAGED)
    frechet.update(work.data.held_out[:count], real=True)
    cond = None if work.cond is None else {key: value[:count] for key, value in work.cond.items()}

    def kept_row(row: str, seed: int, name: str, make: Callable[[], Tensor]) -> None:
        if name in kept(RESULT).get(work.packaged, {}).get(row, {}).get(str(seed), {}):
            return
        frechet.reset()
        frechet.update(make(), real=False)
        work.keep_packaged(row, seed, name, float(frechet.compute()))

    kept_row("real", 0, "real", lambda: work.data.train[:count])
    teacher = build_teacher(resolve(work.recipe), work.data)
    for seed in seeds:
        start = teacher.network.start(count, torch.Generator().manual_seed(seed)).x1
        for name in ("euler 50", "euler 12"):  # the first is what the others are compared with
            solve = SOLVERS[MODELS[work.model][0]][name]
            kept_row("teacher", seed, name, partial(solved, teacher.guided.velocity, solve, start, cond))
        for method in [*METHODS, *FILES]:
            folder = work.runs / f"{work.model}-{method}-{seed}" / "student"
            for k in STEPS.get(method, (1, 2, 4, 8)) if folder.is_dir() else ():
                student = flowmap.load_student(folder)
                kept_row(method, seed, str(k), partial(student.sample, count, k, cond, seed=seed, batch_size=250))


class PackagedComponents:
    """The leading principal components, of these pictures, of features that a package brings. x (B, 1, 28, 28)."""

    def __init__(self, reference: Tensor):
        self.net = EfficientNetLite0().eval()
        found = self.features(reference)
        self.mean = found.mean(0)
        self.components = torch.linalg.svd(found - self.mean, full_matrices=False).Vh[:PACKAGED].mT

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(part) for part in x.split(100)])

    def __call__(self, x: Tensor) -> Tensor:
        return (self.features(x) - self.mean) @ self.components


@torch.no_grad()
def solved(velocity: Callable, solve: Callable, start: Tensor, cond: dict[str, Tensor] | None) -> Tensor:
    """The pictures in [-1, 1] at the ends of the teacher's paths from `start`, in parts of 250."""
    found = []
    for rows in torch.arange(len(start)).split(250):
        part = None if cond is None else {key: value[rows] for key, value in cond.items()}
        found.append(solve(lambda x, t, part=part: velocity(x, t, part), start[rows]))
    return torch.cat(found).clamp(-1, 1)


def student_row(work: Work, method: str, seed: int) -> None:
    """The figures of a student that is trained here, by its number of steps, and the cost of its training."""
    recipe, folder = work.recipe_of(method, seed), work.runs / f"{work.model}-{method}-{seed}"
    started, resumed = time.process_time(), folder.exists()
    run = flowmap.fit(recipe, folder, resume=resumed, log=lambda line: print(f"  {line}", flush=True))
    done = {"train_steps": recipe.trainer.steps}
    done |= {} if resumed else {"train_cpu_seconds": time.process_time() - started}
    for k in STEPS.get(method, (1, 2, 4, 8)):
        started = time.process_time()
        x = run.student.sample(work.images, k, work.cond, seed=seed, batch_size=250)
        done[str(k)] = work.figures(x, time.process_time() - started)
        print(f"  {k}: {shown(done[str(k)])}", flush=True)
    work.keep(method, seed, done, "done")


@dataclass(frozen=True)
class Work:
    """What all rows of a model share."""

    model: str
    recipe: Recipe
    data: Dataset
    ruler: Ruler
    images: int
    runs: Path
    found: dict

    @property
    def cond(self) -> dict[str, Tensor] | None:
        """Labels in turn; None for a model without classes."""
        return {"class": torch.arange(self.images) % 10} if self.recipe.data.conditional else None

    def recipe_of(self, method: str, seed: int) -> Recipe:
        """The model's own recipe with another objective, or that of the method's file.

        The adversarial stage starts from the seed's student of ayf_emd.
        """
        if method in FILES:
            first = json.dumps(self._settings("ayf_emd", seed))
            start = [f"student.overrides={first}"] if method == "adversarial" else []
            return flowmap.read_recipe(FOLDER / FILES[method], [*self._own(method, seed), *start])
        return recipe_of(self.model, self._settings(method, seed))

    def _settings(self, method: str, seed: int) -> list[str]:
        """The overrides of the model's recipe."""
        return [f"trainer.steps={self.recipe.trainer.steps}", *METHODS[method], *self._own(method, seed)]

    def _own(self, method: str, seed: int) -> list[str]:
        """What differs between the runs of one method."""
        return [f"name={self.model}-{method}-{seed}", f"seed={seed}", "metrics=[]"]

    def figures(self, x: Tensor, cpu_seconds: float) -> dict[str, float]:
        labels = None if self.cond is None else self.cond["class"]
        return self.ruler.measure(x, labels) | {"seconds_a_picture": cpu_seconds / len(x)}

    def keep(self, row: str, seed: int, figures: dict, line: str) -> None:
        """Write the figures of a row and seed to the file of results, at once."""
        self._keep(self.model, row, seed, figures)
        self.found.setdefault(row, {})[str(seed)] = figures
        print(f"{self.model} {row} seed {seed}: {line}", flush=True)

    def keep_packaged(self, row: str, seed: int, name: str, distance: float) -> None:
        """The same for one distance in the packaged network's features."""
        known = kept(RESULT).get(self.packaged, {}).get(row, {}).get(str(seed), {})
        self._keep(self.packaged, row, seed, known | {name: distance})
        print(f"{self.packaged} {row} seed {seed}: {name}: {distance:.4g}", flush=True)

    @property
    def packaged(self) -> str:
        """What the results of the packaged network's features are kept as."""
        return f"packaged-{self.model}"

    def _keep(self, model: str, row: str, seed: int, figures: dict) -> None:
        everything = kept(RESULT)
        everything.setdefault(model, {}).setdefault(row, {})[str(seed)] = figures
        settings = {"pictures of each row": self.images, "components": COMPONENTS}
        made = {"environment": environment(), "settings": settings, "tables": tables(everything)}
        keep(RESULT, everything | made)


def shown(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def recipe_of(model: str, overrides: Sequence[str]) -> Recipe:
    stem, own = MODELS[model]
    return flowmap.read_recipe(FOLDER / f"{stem}.yaml", [*own, *overrides])


def work_of(model: str, args: argparse.Namespace) -> Work:
    """The recipe of that model with what is measured here, its data, and what is measured with it."""
    for name in ("mnist_test", MODELS[model][0]):
        flowmap.allow_import(str(FOLDER / f"{name}.py"))
    recipe = recipe_of(model, ["metrics=[]", *([f"trainer.steps={args.steps}"] if args.steps else [])])
    data = build_data(resolve(recipe))
    return Work(model, recipe, data, Ruler.of(data), args.images, args.runs, kept(RESULT).get(model, {}))


def main() -> None:
    rows = ["teacher", *METHODS, *FILES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mnist-flow-vit", choices=MODELS)
    parser.add_argument("--rows", nargs="+", choices=rows, help="by default those of the model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help="of training; by default the recipe's")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--packaged", type=int, help="measure students in the folder of runs, by EfficientNet-Lite0")
    parser.add_argument("--runs", type=Path, default=Path("runs/published"))
    args = parser.parse_args()
    os.environ.setdefault("FLOWMAP_RUNS", str(args.runs))  # of pairs, and of the runs that others build on
    torch.set_num_threads(1)
    work = work_of(args.model, args)
    if args.packaged:
        return packaged_rows(work, args.seeds, args.packaged)
    if "real" not in work.found:
        data = work.data
        accuracy = work.ruler.accuracy(data.held_out, data.held_out_labels)
        halves = work.ruler.measure(data.train, None) | {"accuracy": accuracy}
        work.keep("real", 0, halves, shown(halves))
    of_ddpm = args.model == "mnist-ddpm"
    for row in args.rows or [row for row in rows if row == "teacher" or (row in OF_DDPM) == of_ddpm]:
        for seed in args.seeds:
            done = work.found.get(row, {}).get(str(seed), {})
            if row == "teacher":
                teacher_row(work, seed, done)
            elif not done:
                student_row(work, row, seed)


if __name__ == "__main__":
    main()
