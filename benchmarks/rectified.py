"""What does reflow buy, which steps of 2-rectified flow++ help at this scale, and how does it compare with AYF-EMD?

AYF-EMD is compared at equal cost. Every seed has its own teacher, pairs and students, each made by `flowmap` in a
process of its own and kept in runs/bench/rectified.  Finished runs are not made again, so an interrupted benchmark
continues. The machine is shared, so costs are CPU seconds of whole processes, imports included. Frechet distances are
in the recipe's first feature space; the losses' perceptual net is another.
`python benchmarks/rectified.py [--set digits|fashion14] [--seeds 5] [--parts reflow ablation ayf instaflow speed]`
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lib.report import environment, keep, kept, table, write
from tables.rectified import tables

KEPT = Path("runs/bench/rectified")


@dataclass(frozen=True)
class Arm:
    """One run: a shipped recipe with changes, in which @NAME is the recipe file of another arm; looked at with `steps`.

    kept: where another benchmark keeps finished runs of the same recipe, {seed} for the seed; they are not made again.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    steps: tuple[int, ...] = (1, 2)
    kept: str = ""


@dataclass(frozen=True)
class Case:
    """A data set: its teacher's recipe, its arms by part, and the settings of its evaluation.

    images and features: of a Frechet distance; many: the number of steps that counts as many.
    """

    teacher: str
    parts: dict[str, dict[str, Arm]]
    features: str
    images: int
    many: int = 50

    def arms(self, parts) -> dict[str, Arm]:
        return {name: arm for part in parts for name, arm in self.parts.get(part, {}).items()}


EMD = "objective={kind: ayf_emd, warmup_steps: 400, r_max: 1.0}"  # the paper's, over recipes whose own is ayf_mixed


def case(teacher: str, rfpp: str, ayf: str, *, features: str, images: int, steps: int, few: int, kept: str) -> Case:
    """The case of that teacher and those recipes.

    steps: of the first reflow, which with its pairs costs about as much as the AYF-EMD recipe (digits-ayf-emd).
    few: the steps of each row of the ablation.
    """
    long = (1, 2, 4, 50)
    on_pairs = (*_taught("teacher"), *_paired("teacher"))
    of_reflow = (*_taught("reflow"), *_paired("reflow"), "coupling.teacher.guidance=null", "coupling.guidance=null")
    short = (*_length(steps // 4), "objective.warmup_steps=50", "teacher.guidance=null")
    reflow = {
        "reflow": Arm(f"{rfpp}d", (*on_pairs, *_length(steps)), long),
        "third": Arm(f"{rfpp}d", (*of_reflow, *_length(steps // 2)), long),
    }
    ablation = {letter: Arm(f"{rfpp}{letter}", (*on_pairs, *_length(few))) for letter in "abcdef"}
    ablation["g"] = Arm(f"{rfpp}g", (*on_pairs, "student.recipe=@f", *_length(few // 3)))
    maps = {
        "ayf": Arm(ayf, (*_taught("teacher"), EMD), (1, 2, 4), kept),
        "ayf of reflow": Arm(ayf, (*_taught("reflow"), EMD, *short), (1, 2, 4)),
    }
    return Case(teacher, {"reflow": reflow, "ablation": ablation, "ayf": maps}, features, images)


def _length(count: int) -> tuple[str, ...]:
    return (f"trainer.steps={count}",)


def _taught(by: str) -> tuple[str, ...]:
    return ("teacher.card=null", f"teacher.recipe=@{by}")


def _paired(by: str) -> tuple[str, ...]:
    return ("coupling.teacher.card=null", f"coupling.teacher.recipe=@{by}")


def instaflow(
    recipe: str, *, pairs: int, solver: str, reflow: int, distil: int, long: tuple[int, ...]
) -> dict[str, Arm]:
    """Reflow and then distillation, or distillation alone on the same pairs for as many steps.

    Each with the squared distance, or with a perceptual one at its end.
    """
    pairing, both = (f"coupling.num={pairs}", f"coupling.solver={solver}"), reflow + distil
    guided = (
        "coupling.guidance=2.0",
        "coupling.recipe=null",
        "coupling.teacher={recipe: @teacher, guidance: {kind: classifier_free}}",
    )
    ends = {
        "": lambda count: ("objective.perceptual=null", "objective.perceptual_after_steps=0"),
        ", seen": lambda count: (f"objective.perceptual_after_steps={count - distil // 3}",),
    }
    arms = {
        "insta reflow": Arm(
            f"{recipe}-reflow", (*_taught("teacher"), *_paired("teacher"), *_length(reflow), *pairing), long
        )
    }
    for name, end in ends.items():
        own = (
            "coupling.recipe=null",
            "coupling.teacher={recipe: @insta-reflow}",
            "student.recipe=@insta-reflow",
            *_taught("insta-reflow"),
        )
        arms[f"insta reflow + distil{name}"] = Arm(recipe, (*own, *_length(distil), *pairing, *end(distil)), (1,))
        direct = (*guided, "student.recipe=@teacher", *_taught("teacher"))
        arms[f"insta distil{name}"] = Arm(recipe, (*direct, *_length(both), *pairing, *end(both)), (1,))
    return arms


KEPT_AYF = "runs/bench/digits-ayf-emd/seed-{seed}/digits-ayf-emd"  # main_job.py --recipe digits-ayf-emd
KEPT_FASHION = "runs/fashion14-ayf-emd"  # flowmap fit --recipe fashion14, with EMD as an override
CASES = {
    "digits": case(
        "digits-teacher", "rfpp/", "digits", features="pixels", images=2000, steps=3800, few=600, kept=KEPT_AYF
    ),
    "fashion14": case(
        "fashion14-teacher",
        "rfpp/fashion14-",
        "fashion14",
        features="pca",
        images=2000,
        steps=2500,
        few=600,
        kept=KEPT_FASHION,
    ),
    "emoji": Case("emoji32-teacher", {}, "efficientnet_lite0", 1000, many=25),
}
CASES["digits"].parts["instaflow"] = instaflow(
    "instaflow/digits", pairs=4000, solver="{kind: heun, steps: 10}", reflow=1200, distil=600, long=(1, 2, 4, 50)
)
CASES["emoji"].parts["instaflow"] = instaflow(
    "instaflow/emoji", pairs=2400, solver="{kind: euler, steps: 25}", reflow=600, distil=300, long=(1, 2, 25)
)


def _file(arm: str) -> str:
    """The arm's name as its recipe, file and run have it."""
    return "-".join(re.findall(r"\w+", arm))


class Seed:
    """The runs of one seed in a folder of their own; what has been measured of them is in result.json."""

    def __init__(self, name: str, seed: int):
        self.case, self.seed, self.root = CASES[name], seed, KEPT / name / f"seed-{seed}"
        self.root.mkdir(parents=True, exist_ok=True)
        self.kept = self.root / "result.json"
        self.found = kept(self.kept)
        self._recipe("teacher", self.case.teacher, ("log.wandb=false",))

    def keep(self, key: str, value) -> None:
        self.found[key] = value
        keep(self.kept, self.found)

    def outdated(self, key: str) -> bool:
        """Whether what is kept there was taken to training samples alone."""
        names = {name for row in self.found.get(key, {}).get("student", {}).values() for name in row}
        return any(name.startswith("frechet") for name in names) and not any(name.endswith("_train") for name in names)

    def make(self, name: str, arm: Arm, again: bool = False) -> None:
        """Trains the arm, its pairs first, where that is not done, and looks at it; again: looks once more."""
        if name in self.found and not again and not self.outdated(name):
            return
        if arm.kept:
            return self._take(name, arm)
        path = self._arm(name, arm)
        if name in self.found:
            cost = self.found[name]["cpu_seconds"]
        else:
            pairs = self._run("pairs", path) if "kind: pairs" in path.read_text() else 0.0
            cost = {"pairs": pairs, "fit": self._run("fit", path, "--resume")}
        self.keep(name, {"cpu_seconds": cost, **self._look(path, arm)})
        distances = {k: round(next(iter(row.values())), 4) for k, row in self.found[name]["student"].items()}
        print(f"seed {self.seed}, {name}: {cost}, {distances}", flush=True)

    def _take(self, name: str, arm: Arm) -> None:
        """Evaluate a run that is kept elsewhere.

        Its cost in CPU seconds is extrapolated from two short runs of the first seed.
        """
        run = Path(arm.kept.format(seed=self.seed))
        if not (run / "metrics.json").is_file():
            other = f'`flowmap fit --recipe {arm.recipe} "{EMD}" --out {run}`'
            raise SystemExit(
                f"{run} is not there: `python benchmarks/main_job.py --recipe digits-ayf-emd` makes digits, "
                f"{other} any other"
            )
        found = self._look(run / "recipe.yaml", arm, student=run)
        if self.seed == 0 and name in self.found:
            found["cpu_seconds"] = self.found[name]["cpu_seconds"]
        elif self.seed == 0:
            timed = [
                self._run("fit", self._arm(f"{name}-{k}", replace(arm, changes=(*arm.changes, f"trainer.steps={k}"))))
                for k in (20, 120)
            ]
            found["cpu_seconds"] = {"pairs": 0.0, "fit": timed[0] + (timed[1] - timed[0]) / 100 * self._steps(run)}
        self.keep(name, found)

    def _steps(self, run: Path) -> int:
        from flowmap.recipe.recipe import read_resolved

        return read_resolved(run / "recipe.yaml").trainer.steps

    def teachers(self) -> None:
        """The guided teacher's rows, from the recipe of the arm that distils it.

        The teacher's network is also a row, as a first flow of its own.
        """
        rows = {"teacher": "reflow", "first": "reflow", "insta teacher": "insta reflow"}
        arms = self.case.arms(self.case.parts)
        for key, name in rows.items():
            if name in self.found and (key not in self.found or self.outdated(key)):
                self.keep(key, self._look(self._arm(name, arms[name]), arms[name], whose=key.split()[-1]))

    def _arm(self, name: str, arm: Arm) -> Path:
        common = (
            "metrics=[]",
            "log.wandb=false",
            "log.samples_every_steps=0",
            "log.metrics_every_steps=0",
            "evaluation.batch_size=250",
        )
        return self._recipe(_file(name), arm.recipe, (*common, *arm.changes))

    def _recipe(self, name: str, shipped: str, changes: tuple[str, ...]) -> Path:
        from omegaconf import OmegaConf

        from flowmap.recipe import read_recipe

        changes = (
            re.sub(r"@([\w-]+)", lambda m: str((self.root / f"{m[1]}.yaml").resolve()), change) for change in changes
        )
        plain = OmegaConf.create(read_recipe(shipped, (*changes, f"seed={self.seed}")).to_yaml())
        plain.name = plain.name if name == "teacher" else name
        path = self.root / f"{name}.yaml"
        path.write_text(OmegaConf.to_yaml(plain))
        return path

    def _run(self, verb: str, path: Path, *more: str) -> float:
        """CPU seconds of that command."""
        env = os.environ | {"FLOWMAP_RUNS": str(self.root), "WANDB_MODE": "disabled"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "flowmap", verb, "--recipe", str(path), *more],
            check=True,
            env=env,
            stdout=subprocess.DEVNULL,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def _look(self, path: Path, arm: Arm, whose: str = "student", student: Path | None = None) -> dict:
        command = [
            sys.executable,
            __file__,
            "--look",
            str(path),
            "--steps",
            *map(str, arm.steps),
            "--set",
            self.root.parent.name,
            "--whose",
            whose,
        ]
        command += ["--student", str(student)] if student else []
        env = os.environ | {"FLOWMAP_RUNS": str(self.root)}
        done = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])


def look(path: Path, steps: list[int], name: str, whose: str, run: Path | None) -> dict:
    """The figures of a finished run: as samples, as a path and, of plain flows, as an inverse and a loss by time."""
    from flowmap.build.data import build_data
    from flowmap.build.teacher import build_teacher
    from flowmap.data import Independent
    from flowmap.evaluation.measure import measure
    from flowmap.flow.solver import Heun
    from flowmap.metrics import Agreement, EndpointError, Frechet, Inversion, LossByTime, Retrieval, Straightness
    from flowmap.objectives import FlowMatching
    from flowmap.plan.plan import resolve
    from flowmap.plan.run_folders import dependency_folder
    from flowmap.recipe import read_recipe
    from flowmap.samplers import Anchored, Deterministic
    from flowmap.student.folder import load_student

    case, recipe = CASES[name], read_recipe(path)
    many, data = case.many, build_data(resolve(recipe))
    evaluation = replace(
        recipe.evaluation, teacher_steps=many, teacher_extra_steps=tuple(k for k in steps if k != many)
    )
    agreement = Retrieval(case.features, case.images) if name == "emoji" else Agreement(case.features, case.images)
    metrics = [Frechet(case.features, case.images), Straightness(256, 32), EndpointError(500, many), agreement]
    flow = [LossByTime(500), Inversion(256, Heun(steps=16))]
    if whose == "teacher":
        slot, scale = recipe.coupling.teacher, recipe.coupling.guidance
        slot = replace(slot, guidance=replace(slot.guidance, default=scale))
        teaching = replace(
            recipe, evaluation=evaluation, teacher=slot, coupling=Independent(), objective=FlowMatching()
        )
        student = load_student(dependency_folder(read_recipe(path.parent / "teacher.yaml")))
        found = measure(teaching, student, build_teacher(resolve(teaching), data), data, steps=[1], metrics=metrics)
        return {"student": found["teacher_few"] | {str(many): found["teacher"]}, "floor": found["floor"]}
    if whose == "first":  # the teacher's network without guidance, on noise and data that nothing has joined
        recipe, steps, metrics = read_recipe(path.parent / "teacher.yaml"), [many], []
    if run is not None:  # kept since before its recipe's sampler was what it is
        recipe = replace(recipe, sampler=read_recipe(recipe.name).sampler)
    student = load_student(run or dependency_folder(recipe))
    found = {
        "student": measure(recipe, student, None, data, steps=steps, metrics=metrics + (flow if many in steps else []))[
            "student"
        ]
    }
    if isinstance(recipe.sampler, Anchored) and many in steps:
        plain = replace(recipe, sampler=Deterministic(recipe.sampler.steps))
        found["euler"] = measure(plain, student, None, data, steps=steps[1:], metrics=metrics[:1])["student"]
    return found


def speed(seed: Seed, rounds: int = 5, num: int = 512) -> dict:
    """Pairs a second, relative to the forward passes of the bare network that the solver needs.

    Medians of rounds that take turns.
    """
    import torch

    from flowmap.plan.plan import resolve
    from flowmap.prepare.make_pairs import Maker
    from flowmap.recipe import read_recipe

    os.environ["FLOWMAP_RUNS"] = str(seed.root)
    maker = Maker.of(resolve(read_recipe(seed._arm("reflow", seed.case.parts["reflow"]["reflow"]))), "cpu")
    network, x, t = maker.teacher.network.flow_map, torch.randn(num, *maker.data.shape), torch.rand(num)
    cond = {"class": torch.arange(num) % maker.data.num_classes}
    calls, ratios, rates = maker.columns(range(num))[1], [], []
    for _ in range(rounds):
        started = time.process_time()
        maker.columns(range(num))
        made = time.process_time()
        with torch.no_grad():
            for _ in range(calls):
                network.velocity(x, t, cond)
        bare = time.process_time() - made
        ratios.append(bare / (made - started))
        rates.append(num / (made - started))
    return {
        "calls a pair": calls,
        "pairs a CPU second": statistics.median(rates),
        "of the bound": statistics.median(ratios),
        "each": ratios,
    }


def report(name: str, seeds: list[Seed]) -> None:
    """Prints every table and writes them with all that was measured."""
    runs = [seed.found for seed in seeds if seed.found]
    made = tables(runs, f"frechet_{CASES[name].features}", CASES[name].many)
    for key, one in made.items():
        print(f"\n{key}\n{table(one['rows'], one['columns'])}")
    payload = {"environment": environment(), "settings": {"set": name, "seeds": list(range(len(runs)))}}
    write(f"rectified_{name}", {"question": __doc__.splitlines()[0], **payload, "tables": made, "figures": runs})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", default="digits", choices=CASES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="leave the seeds below it to another process")
    parser.add_argument("--parts", nargs="+", default=["reflow", "ablation", "ayf", "instaflow", "speed"])
    parser.add_argument("--look-again", action="store_true", help="measure finished runs once more")
    parser.add_argument("--look", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--student", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--whose", default="student", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.look:
        print(json.dumps(look(arguments.look, arguments.steps, arguments.set, arguments.whose, arguments.student)))
        return
    seeds = [Seed(arguments.set, i) for i in range(arguments.seeds)]
    for seed in seeds[arguments.first_seed :]:
        for name, arm in seed.case.arms(arguments.parts).items():
            seed.make(name, arm, again=arguments.look_again)
        seed.teachers()
    speedy = "speed" in arguments.parts and "reflow" in seeds[0].case.parts
    if arguments.first_seed == 0 and speedy and "speed" not in seeds[0].found:
        seeds[0].keep("speed", speed(seeds[0]))
    report(arguments.set, seeds)


if __name__ == "__main__":
    main()
