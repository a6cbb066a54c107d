"""What does the adversarial stage buy beyond training on?  A student before it, after it, and without a discriminator.

The control, without a discriminator, is trained for as many steps: the stage's recipe with its base objective alone,
with the same start, draws, learning rate, steps and averages.  All three are evaluated with 1, 2 and 4 steps from the
same noise: in the recipe's first feature space, which is made of the pixels that the discriminator sees, and in one
that no loss uses (_labels.py: a network trained to classify the real pictures; --features adds others). Students and
teachers are those that main_job.py keeps; arms are kept in runs/bench/adversarial, and finished ones are not run again.
Costs are CPU seconds of whole processes; seconds a step are the difference of a longer and a shorter run, of the first
seed.
`python benchmarks/adversarial.py [--set digits|fashion14] [--seeds 5] [--students FOLDER]
    [--features efficientnet_lite0] [--look-again] [--smoke]`
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from lib.report import environment, keep, kept, table, write
from tables.adversarial import tables

KEPT = Path("runs/bench")
UNSEEN = "_labels:labels"
ARMS = ("control", "after")
TIMED = (20, 60)  # steps of the two runs whose difference is timed
SMOKE = 4  # steps of a stage with --smoke
SMOKE_IMAGES = 100


@dataclass(frozen=True)
class Case:
    """A data set: the recipe of the stage, and where the runs that it goes on from are kept, {seed} for the seed."""

    recipe: str
    students: str
    seeds: int


CASES = {
    "digits": Case("digits-adversarial", "runs/bench/digits/seed-{seed}", 5),
    "fashion14": Case("fashion14-adversarial", "runs", 1),
}


class Seed:
    """The runs of one seed in a folder of their own; what has been measured of them is in result.json."""

    def __init__(self, options: argparse.Namespace, seed: int):
        self.options, self.seed, self.case = options, seed, CASES[options.set]
        name = f"adversarial-{options.set}" + "-smoke" * options.smoke
        self.root = (KEPT / name / f"seed-{seed}").resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self.kept = self.root / "result.json"
        self.found = kept(self.kept)
        self.start = self._start(Path((options.students or self.case.students).format(seed=seed)))

    def _start(self, source: Path) -> Path:
        """The kept run that the stage starts from; it and its teacher are linked where `flowmap` looks for them."""
        from flowmap.plan.dependencies import teacher_recipes
        from flowmap.plan.run_folders import matches
        from flowmap.recipe.recipe import read_recipe, read_resolved

        name = read_recipe(self.case.recipe).student.recipe
        run = source / name
        if not (run / "metrics.json").is_file():
            raise SystemExit(
                f"{run} is not there: `python benchmarks/main_job.py` makes digits, "
                f"`flowmap fit --recipe {name}` any other"
            )
        needed = [run]
        for teacher in teacher_recipes(read_resolved(run / "recipe.yaml")):
            needed += [folder for folder in sorted(source.glob(f"{teacher.name}*")) if matches(folder, teacher)][:1]
        for folder in needed:
            link = self.root / folder.name
            if not link.is_symlink():
                link.symlink_to(folder.resolve())
        return run.resolve()

    def keep(self, key: str, value) -> None:
        self.found[key] = value
        keep(self.kept, self.found)

    def recipe(self, arm: str, steps: int | None = None) -> Path:
        """The file of the arm's recipe; of `steps` steps where that is said, otherwise as long as the shipped one."""
        from flowmap.recipe.recipe import read_recipe, read_resolved

        name = f"timed-{arm}-{steps}" if steps else arm
        steps = steps or (SMOKE if self.options.smoke else read_recipe(self.case.recipe).trainer.steps)
        started = self.start / "recipe.yaml"
        changes = [
            f"seed={self.seed}",
            f"trainer.steps={steps}",
            f"student.recipe={started}",
            "metrics=[]",
            "log.wandb=false",
        ]
        if (overrides := read_resolved(started).teacher.overrides) is not None:
            changes.append(f"teacher.overrides={json.dumps(list(overrides))}")
        changes += ["objective.start=1"] if self.options.smoke else []  # so that the discriminator steers a few steps
        found = read_recipe(self.case.recipe, (*changes, "log.samples_every_steps=0", "log.metrics_every_steps=0"))
        found = replace(found, name=name, objective=found.objective.base if arm == "control" else found.objective)
        path = self.root / f"{name}.yaml"
        path.write_text(found.to_yaml())
        return path

    def make(self, arm: str) -> None:
        """Trains the arm where that is not done."""
        from flowmap.plan.run_folders import matches
        from flowmap.recipe import read_recipe

        path, out = self.recipe(arm), self.root / arm
        if out.is_dir() and not matches(out, read_recipe(path)):
            raise SystemExit(f"{out} is of another recipe: remove {self.root} to measure this one")
        if arm in self.found.get("cost", {}):
            return
        cost = self._fit(path, out)
        self.keep("cost", self.found.get("cost", {}) | {arm: cost})
        print(f"seed {self.seed}, {arm}: {cost}", flush=True)

    def time(self) -> None:
        """CPU seconds a step of each arm, checkpoints and start apart; kept."""
        if "seconds a step" in self.found:
            return
        few, many = (2, 4) if self.options.smoke else TIMED
        seconds = {}
        for arm in ARMS:
            spent = [
                self._fit(self.recipe(arm, k), self.root / f"timed-{arm}-{k}", anew=True)["cpu_seconds"]
                for k in (few, many)
            ]
            for k in (few, many):
                shutil.rmtree(self.root / f"timed-{arm}-{k}")
            seconds[arm] = (spent[1] - spent[0]) / (many - few)
            print(f"seed {self.seed}, {arm}: {seconds[arm]:.3f} CPU seconds a step", flush=True)
        self.keep("seconds a step", seconds)

    def _fit(self, path: Path, out: Path, anew: bool = False) -> dict[str, float]:
        """What a process of `flowmap fit` took; of a run that was cut off, what the rest of it took."""
        if anew:
            shutil.rmtree(out, ignore_errors=True)
        env = os.environ | {"FLOWMAP_RUNS": str(self.root), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "flowmap", "fit", "--recipe", str(path), "--out", str(out), "--resume"]
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        return {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_gib": used.ru_maxrss / 2**20}

    def look(self) -> None:
        """The figures of all arms, by one process, so that they share what is known of the real pictures."""
        spaces = [UNSEEN, *self.options.features]
        before = any(
            key.endswith("_train") for key in self.found.get("floor", {})
        )  # else taken to training samples alone
        if self.found.get("spaces") == spaces and before and not self.options.look_again:
            return
        command = [
            sys.executable,
            __file__,
            "--look",
            str(self.recipe("after")),
            "--start",
            str(self.start),
            "--features",
            *spaces,
        ]
        command += ["--smoke"] if self.options.smoke else []
        env = os.environ | {"FLOWMAP_RUNS": str(self.root)}
        done = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True)
        for key, value in json.loads(done.stdout.splitlines()[-1]).items():
            self.keep(key, value)
        self.keep("spaces", spaces)
        metric = next(iter(self.found["floor"]))
        rows = {arm: [round(row[metric], 4) for row in steps.values()] for arm, steps in self.found["student"].items()}
        print(f"seed {self.seed}, {metric}: {rows}", flush=True)


def look(path: Path, start: Path, spaces: list[str], smoke: bool) -> dict:
    """{"student": {arm: {steps: figures}}, "floor": figures}, with the stage's recipe, its sampler and noise."""
    import _labels

    from flowmap.base.trust import allow_import
    from flowmap.build.data import build_data
    from flowmap.evaluation.measure import measure
    from flowmap.plan.plan import resolve
    from flowmap.recipe import read_recipe
    from flowmap.student.folder import load_student

    recipe = read_recipe(path)
    data = build_data(resolve(recipe))
    known = _labels.fit(data)
    for space in (UNSEEN, *(space for space in spaces if ":" in space)):
        allow_import(space.partition(":")[0])
    metrics, found = metrics_for(read_recipe(start / "recipe.yaml").metrics, spaces, smoke), {}
    for arm in ("before", *ARMS):
        student = load_student(start if arm == "before" else path.parent / arm)
        measured = measure(recipe, student, None, data, steps=[1, 2, 4], metrics=metrics)
        found[arm] = measured["student"]
    return {
        "student": found,
        "floor": measured["floor"],
        "held-out pictures whose class the unseen network tells": known,
    }


def metrics_for(shipped, spaces: list[str], smoke: bool) -> list:
    """The recipe's own Frechet distance with its precision and recall, and the same in every one of the spaces."""
    from flowmap.metrics import Frechet, PrecisionRecall

    first = next(metric for metric in shipped if isinstance(metric, Frechet))
    images = SMOKE_IMAGES if smoke else min(first.images, 2000)
    both = [replace(first, images=images), PrecisionRecall(first.features, min(images, 1000))]
    return [replace(metric, features=space) for space in (first.features, *spaces) for metric in both]


def report(options: argparse.Namespace, seeds: list[Seed]) -> None:
    """Prints every table and, of whole runs, writes them with all that was measured."""
    runs = [seed.found for seed in seeds if seed.found]
    made = tables(runs)
    for key, one in made.items():
        print(f"\n{key}\n{table(one['rows'], one['columns'])}")
    if options.smoke:
        return
    name = "adversarial" if options.set == "digits" else f"adversarial_{options.set}"
    settings = {"set": options.set, "seeds": [seed.seed for seed in seeds]}
    write(
        name,
        {
            "question": __doc__.splitlines()[0],
            "environment": environment(),
            "settings": settings,
            "tables": made,
            "figures": runs,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", default="digits", choices=CASES)
    parser.add_argument("--seeds", type=int, help="default: five of digits, one of fashion14")
    parser.add_argument(
        "--students", help="the folder of the kept runs, {seed} for the seed, where it is not below this one's runs/"
    )
    parser.add_argument(
        "--features",
        nargs="*",
        default=[],
        help="further feature spaces to look in; efficientnet_lite0 takes ten minutes a seed",
    )
    parser.add_argument("--look-again", action="store_true", help="measure finished runs once more")
    parser.add_argument(
        "--smoke", action="store_true", help=f"{SMOKE} steps and {SMOKE_IMAGES} samples: a look at whether it runs"
    )
    parser.add_argument("--look", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.look:
        print(json.dumps(look(options.look, options.start, options.features, options.smoke)))
        return
    seeds = [Seed(options, i) for i in range(options.seeds or CASES[options.set].seeds)]
    for seed in seeds:
        for arm in ARMS:
            seed.make(arm)
        seed.look()
    seeds[0].time()
    report(options, seeds)


if __name__ == "__main__":
    main()
