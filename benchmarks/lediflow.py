"""What does a learned prior save?  The same network and budget from N(0, I) and from a learned prior (LeDiFlow).

Quality is compared with total cost: of a sample in network FLOPs (the flow's calls, the auxiliary model's decoder and
the z-sampler) and in measured seconds, starts included.  Besides the curves it reports: the smallest cost at which the
learned prior reaches the Gaussian's Frechet distance at 50 Euler steps; an ablation of z-sampler, conditioning of the
network, weight and scale; the decoder alone; transport cost and straightness; students of 1, 2 and 4 steps. An arm of a
seed that is done is kept in runs/bench/lediflow-SET/seed-N/result.json and not run again, unless --anew.
`python benchmarks/lediflow.py [--set digits|fashion14|emoji] [--seeds 5] [--arms ARM ...] [--share 1.0] [--images N]
    [--anew] [key=value ...]`
--share multiplies the steps of every training (0.02: a quick test that it runs), --images the samples of a distance;
key=value overrides every flow (trainer.accelerator=gpu).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lib.report import environment, keep, kept, table, write
from tables.lediflow import PAIR, tables

KEPT = Path("runs/bench")
FULL = {"euler": (1, 2, 4, 8, 16, 32, 50), "midpoint": (1, 2, 4, 8), "heun": (1, 2, 4, 8), "rk4": (1, 2, 4)}
FEW = {"euler": (1, 2, 4, 8, 16, 50), "midpoint": (1, 2, 4, 8)}
GRID = {"digits": FULL, "fashion14": FULL, "emoji": FEW}  # a distance of emoji takes minutes
CODES = {"digits": 20, "fashion14": 40, "emoji": 10}  # components of the mixture
TIMED = 128  # samples of a draw that is timed
ARMS = {  # arm -> (recipe's suffix, what is changed in it)
    "gaussian": ("-gaussian", ()),
    "learned": ("", ()),
    "z not given": ("", ("prior.conditioning=false",)),
    "weight inverse_variance": ("", ("objective.weight.kind=inverse_variance",)),
    "weight variance": ("", ("objective.weight.kind=variance",)),
    "scale 0.7": ("", ("prior.scale=0.7",)),
    "scale 1.3": ("", ("prior.scale=1.3",)),
    "student of gaussian": ("-gaussian-ayf", ()),
    "student of learned": ("-ayf", ()),
}


def recipe_of(arm: str, options: argparse.Namespace, seed: int):
    """The arm's recipe with that seed, and that share of the steps, in everything that it needs."""
    from flowmap.recipe import read_recipe

    suffix, changes = ARMS[arm]
    name = f"lediflow/{options.set}"

    def tuned(of: str, *more: str) -> list[str]:
        steps = max(2, round(read_recipe(of).trainer.steps * options.share))
        return [f"seed={seed}", f"trainer.steps={steps}", f"trainer.checkpoint_every_steps={steps}", *more]

    plain, of = suffix.startswith("-gaussian"), json.dumps(tuned(f"{name}-prior"))
    prior = (
        []
        if plain
        else [
            f"prior.overrides={of}",
            f"prior.z.overrides={json.dumps(tuned(f'{name}-codes', f'data.overrides={of}'))}",
        ]
    )
    once = "sampler.steps=[1]"  # what the run itself measures; the curves are drawn here
    flow = tuned(name + ("-gaussian" if plain else ""), once, *options.overrides, *prior)
    if not arm.startswith("student"):
        return read_recipe(name + suffix, [*flow, *changes])
    teacher = f"teacher.overrides={json.dumps(flow)}"
    return read_recipe(name + suffix, [*tuned(name + suffix, *options.overrides, *prior), teacher])


def one_arm(arm: str, options: argparse.Namespace, seed: int) -> dict:
    """Trains the arm, and what it needs, and measures it."""
    from flowmap.plan.run_folders import dependency_folder
    from flowmap.train.fit import fit

    recipe = recipe_of(arm, options, seed)
    run = fit(recipe, dependency_folder(recipe), resume=True)
    look = Look.at(recipe, options)
    found = {"train_seconds": run.metrics["seconds"]["train"], "prior_seconds": prior_seconds(recipe), **look.floor()}
    if arm.startswith("student"):
        return found | {"curve": [look.row("own", k) for k in (1, 2, 4)]}
    found |= {"transport": look.transport(), "straightness": look.straightness()}
    if arm not in ("gaussian", "learned"):
        return found | {"curve": [look.row("euler", k) for k in (1, 2, 4, 50)]}
    found["curve"] = [look.row(solver, k) for solver, steps in GRID[options.set].items() for k in steps]
    return found | (look.codes() if arm == "learned" else {})


def prior_seconds(recipe) -> float:
    """Seconds that the training of the auxiliary model took: they are part of the learned prior's budget."""
    from flowmap.base.files import read_json
    from flowmap.plan.dependencies import prior_recipes
    from flowmap.plan.run_folders import dependency_folder

    return sum(read_json(dependency_folder(one) / "metrics.json")["seconds"]["train"] for one in prior_recipes(recipe))


class Look:
    """Figures of one trained flow or student."""

    def __init__(self, recipe, student, data, options: argparse.Namespace):
        from dataclasses import replace

        from flowmap.estimate.costs import cost_of, start_flops
        from flowmap.plan.plan import resolve

        self.recipe, self.student, self.data, self.options = recipe, student.to(options.device), data, options
        spec = recipe.metrics[0]
        self.spec = replace(spec, images=options.images or spec.images)
        self.metric = self.spec.compare(data)
        self.call = cost_of(student.config, graded=False).flops
        self.start = start_flops(resolve(recipe), student.config.shape)

    @classmethod
    def at(cls, recipe, options: argparse.Namespace) -> "Look":
        """Of what the recipe has trained."""
        from flowmap.build.data import build_data
        from flowmap.plan.plan import resolve
        from flowmap.plan.run_folders import dependency_folder
        from flowmap.student.folder import load_student

        return cls(recipe, load_student(dependency_folder(recipe)), build_data(resolve(recipe)), options)

    def floor(self) -> dict[str, float]:
        """Real samples against real ones: against held-out ones, and under `floor_train` against those of training."""
        from flowmap.metrics import baseline

        found = baseline(self.metric, self.data)
        return {
            f"floor{'_train' * key.endswith('_train')}": value
            for key, value in found.items()
            if not key.endswith("_std")
        }

    def row(self, solver: str, steps: int) -> dict:
        """One point of the curve: solver ("own": the student's sampler), steps, calls, Frechet distance.

        Also FLOPs and seconds a sample.
        """
        from flowmap.samplers import asked_for

        way = None if solver == "own" else solver
        calls = asked_for(self.student.config.sampler, solver=way).calls(steps)
        draw = lambda num, seed: self.student.sample(num, steps=steps, solver=way, seed=seed, latents=True)
        return {
            "solver": solver, "steps": steps, "calls": calls, "flops": calls * self.call + self.start,
            "seconds": self.seconds(lambda: draw(TIMED, 0)), **self.distances(draw(self.spec.images, 1234)),
        }  # fmt: skip

    def distances(self, samples) -> dict[str, float]:
        """The Frechet distance to held-out samples, and under `frechet_train` to those of training."""
        self.metric.reset()
        self.metric.update(self.student.pictures(samples).cpu())
        return {f"frechet{'_train' * key.endswith('_train')}": value for key, value in self.metric.report().items()}

    def distance(self, samples) -> float:
        return self.distances(samples)["frechet"]

    def seconds(self, draw, repeats: int = 3) -> float:
        """CPU seconds a sample (on a GPU: seconds), the median of some draws of TIMED after one that warms up."""
        now = time.process_time if self.options.device == "cpu" else time.perf_counter
        draw()
        found = []
        for _ in range(repeats):
            started = now()
            draw().cpu()
            found.append((now() - started) / TIMED)
        return statistics.median(found)

    def real(self, most: int):
        """Samples that it was trained on, evenly picked."""
        import torch

        places = torch.linspace(0, len(self.data) - 1, min(most, len(self.data))).long().tolist()
        return self.data.__getitems__(places)[0].to(self.student.device)

    def nearest(self, num: int = 500) -> dict[str, float]:
        """Are the samples copies?  The median distance to the nearest training sample, at 50 Euler steps.

        Also that of held-out samples, and the ratio.
        """
        from flowmap.metrics import NearestNeighbour

        metric = NearestNeighbour(self.spec.features, num, 20_000).compare(self.data)
        metric.update(self.student.sample(num, steps=50, solver="euler", seed=7).cpu())
        return dict(zip(("generated", "held_out", "ratio"), metric.report().values(), strict=True))

    def transport(self) -> float:
        """The mean square of x1 - x0 an entry, over training's couplings."""
        import torch

        from flowmap.flow.prior import Gaussian, start_of

        x0, prior = self.real(2048), self.student.prior or Gaussian()
        x1 = start_of(prior, x0, None, torch.Generator(x0.device).manual_seed(0)).x1
        return float((x1 - x0).square().mean())

    def straightness(self) -> float:
        from flowmap.evaluation.measure import measure
        from flowmap.metrics import Straightness

        spec = [Straightness(images=256, steps=32)]
        return measure(self.recipe, self.student, None, self.data, steps=[1], metrics=spec)["student"]["1"][
            "straightness"
        ]

    def codes(self) -> dict:
        """The decoder alone, and the flow from other z-samplers.

        Nothing is retrained, since training's codes are the encoder's.
        """
        import torch

        from flowmap.build.prior import fitted_mixture
        from flowmap.data.codes import draws_of
        from flowmap.flow.codes import MixtureDraws, NormalDraws
        from flowmap.flow.prior import MixtureCodes, starts
        from flowmap.plan.dependencies import prior_recipes
        from flowmap.plan.run_folders import dependency_folder

        prior, num = self.student.prior.to(self.student.device), self.spec.images
        start = starts(prior, tuple(self.student.config.shape), num, torch.Generator().manual_seed(1234))
        coarse = torch.randn(num, prior.size + 1, generator=torch.Generator().manual_seed(5)).to(self.student.device)
        with torch.no_grad():
            means = torch.cat([prior.model.decode(prior.codes(part))[0] for part in coarse.split(256)])
        found = {"decoder": {"mean": self.distance(means), "start": self.distance(start.x1), "flops": self.start}}
        z = draws_of(dependency_folder(prior_recipes(self.recipe)[0]) / "student", 1, 0, 20_000).flatten(0, 1)
        few = lambda k: MixtureDraws(*fitted_mixture(z, MixtureCodes(min(k, len(z) // 2))).values())
        ways = {
            "N(0, I)": NormalDraws(),
            "one Gaussian": few(1),
            f"mixture of {CODES[self.options.set]}": few(CODES[self.options.set]),
        }
        ways["flow, as the recipe has it"] = prior.codes
        found["codes"] = {}
        for name, codes in ways.items():
            prior.codes = codes.to(self.student.device)
            draw = lambda k: self.student.sample(num, steps=k, solver="euler", seed=1234, latents=True)
            found["codes"][name] = {str(k): self.distance(draw(k)) for k in (2, 8, 50)}
        return found


def one_seed(options: argparse.Namespace, seed: int) -> None:
    """All arms of a seed, each kept when it is done."""
    path = Path(os.environ["FLOWMAP_RUNS"]) / "result.json"
    found = kept(path)
    for arm in options.arms:
        if (
            arm not in found or "frechet_train" not in found[arm]["curve"][0]
        ):  # else trained and measured before, to training samples alone
            found[arm] = one_arm(arm, options, seed)
            keep(path, found)
            print(
                f"seed {seed}, {arm}: "
                f"{[(p['solver'], p['steps'], round(p['frechet'], 3)) for p in found[arm]['curve']]}",
                flush=True,
            )
        if arm in PAIR and "nearest" not in found[arm]:
            found[arm]["nearest"] = Look.at(recipe_of(arm, options, seed), options).nearest()
            keep(path, found)


def report(options: argparse.Namespace, runs: list[dict]) -> None:
    made = tables(runs)
    for name, one in made.items():
        print(f"\n{name}\n{table(one['rows'], one['columns'])}")
    if "curve" in made and options.share == 1:
        plot(made["curve"], Path("docs/images") / f"lediflow_{options.set}_curve.png")
    settings = {"set": options.set, "seeds": list(range(len(runs)))} | (
        {} if options.share == 1 else {"share": options.share}
    )
    payload = {
        "question": __doc__.splitlines()[0],
        "environment": environment(),
        "settings": settings,
        "tables": made,
        "figures": runs,
    }
    write(f"lediflow_{options.set}" + ("" if options.share == 1 else "_share"), payload)


def plot(made: dict, path: Path) -> None:
    """Distance against FLOPs of a sample, both priors by solver."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(figsize=(7, 4))
    solvers = list(dict.fromkeys(row[1] for row in made["rows"]))
    for prior, color in (("gaussian", "tab:gray"), ("learned", "tab:blue")):
        for solver, marker in zip(solvers, "os^D", strict=False):
            points = [(row[4], float(str(row[6]).split()[0])) for row in made["rows"] if row[:2] == [prior, solver]]
            axes.plot(*zip(*points, strict=True), marker + "-", color=color, alpha=0.8, label=f"{prior}, {solver}")
    axes.set(
        xscale="log", yscale="log", xlabel="MFLOP a sample, decoder and z-sampler counted", ylabel="Frechet distance"
    )
    ticks = [15 * 2**k for k in range(7)]
    axes.set_xticks(ticks, ticks)
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=7)
    picture.tight_layout()
    picture.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", choices=list(GRID), default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--images", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if options.one is not None:
        one_seed(options, options.one)
        return
    runs = []
    for seed in range(options.seeds):
        root = (
            KEPT
            / f"lediflow-{options.set}"
            / (f"seed-{seed}" + ("" if options.share == 1 else f"-share-{options.share:g}"))
        )
        if options.anew:
            shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"FLOWMAP_RUNS": str(root), "WANDB_MODE": "disabled"}
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", str(seed)], check=True, env=env)
        runs.append(kept(root / "result.json"))
    report(options, runs)


if __name__ == "__main__":
    main()
