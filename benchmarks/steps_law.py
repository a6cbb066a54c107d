"""Does a flow map keep its quality with more steps where a consistency model loses it?  Error against steps 1..32.

The law of Align Your Flow (arXiv:2506.14603).  Same net, same budget, same teacher.  The flow map is trained on pairs
(t, s) and sampled deterministically; the consistency model is trained on (t, 0) and sampled by going to data and back
(gamma = 1).  The data are a Gaussian and a ring of Gaussians (exact teachers, the settings of exactness.py; error:
sliced Wasserstein distance to fresh data, in units of the data's std), and digits (Frechet distance on pixels to
held-out digits, and to those of training; the runs that `main_job.py --recipe digits-ayf-emd` made, and the same recipe
with s = 0).
`python benchmarks/steps_law.py [--seeds 5] [--digits-seeds 3] [--keep-toys] [--plot docs/images/steps_law.png]`
"""

import argparse
import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from lib.report import RESULTS, environment, table, write

from flowmap.flow.path import Linear
from flowmap.flow.times import Consistency, Mixture, Uniform
from flowmap.nets import MLP
from flowmap.nets.flow_map import FlowMapNet
from flowmap.objectives import AYFEMD
from flowmap.samplers import Deterministic, Gamma
from flowmap.teachers.exact import GaussianTeacher, MixtureTeacher

STEPS = (1, 2, 4, 8, 16, 32)
DIGITS = "digits-ayf-emd"
TRAINING = "digits, to training ones"
RING = tuple((float(torch.cos(a)), float(torch.sin(a))) for a in torch.arange(8) * (2 * torch.pi / 8))
TEACHERS = {"gaussian": GaussianTeacher(mean=(0.5, -0.5), std=0.5), "ring": MixtureTeacher(means=RING, std=(0.1,))}
MODELS = {
    "flow map": (Mixture(base=Uniform(pairs="sorted"), one_step=0.05, diagonal=0.25), Deterministic()),
    "consistency": (Mixture(base=Consistency(law="uniform"), one_step=0.05, diagonal=0.0), Gamma(gamma=1.0)),
}


def train(teacher, times, seed: int, *, steps: int, batch: int = 256) -> FlowMapNet:
    torch.manual_seed(seed)
    student = FlowMapNet(MLP(width=96, depth=3, cycles=1.0).build((2,)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    objective, generator = AYFEMD(warmup_steps=steps // 2, c=1.0), torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        x0 = teacher.sample(batch, generator)
        x1 = torch.randn(batch, 2, generator=generator)
        sample = Linear().sample(x0, x1, *times(batch, generator=generator))
        optimizer.zero_grad()
        objective(student, teacher, sample, step).value.backward()
        optimizer.step()
    return student.eval()


@torch.no_grad()
def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor, directions: int = 64) -> float:
    """The mean over directions of the 1-Wasserstein distance of the projections, over y's std. x and y (N, 2)."""
    angle = torch.arange(directions) * (torch.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])
    return float(((x @ axes).sort(0).values - (y @ axes).sort(0).values).abs().mean() / y.std())


def errors(student, sampler, teacher, seed: int, num: int = 20_000) -> dict[int, float]:
    generator = torch.Generator().manual_seed(10_000 + seed)
    data, x1 = teacher.sample(num, generator), torch.randn(num, 2, generator=generator)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return {k: sliced_wasserstein(sampler(student, x1, steps=k, generator=draw), data) for k in STEPS}


def toy(name: str, model: str, seed: int, steps: int) -> dict[int, float]:
    """One training, one thread, in a process of its own."""
    torch.set_num_threads(1)
    teacher, (times, sampler) = TEACHERS[name], MODELS[model]
    return errors(train(teacher, times, seed, steps=steps), sampler, teacher, seed)


def toys(seeds: int, steps: int) -> list[list]:
    rows = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = {
            (n, m): [pool.submit(toy, n, m, seed, steps) for seed in range(seeds)] for n in TEACHERS for m in MODELS
        }
        for (name, model), waiting in jobs.items():
            found = [job.result() for job in waiting]
            rows += [[name, model, k, *spread([f[k] for f in found])] for k in STEPS]
            print(name, model, [round(spread([f[k] for f in found])[0], 4) for k in STEPS], flush=True)
    for name, teacher in TEACHERS.items():
        floors = [
            sliced_wasserstein(*(teacher.sample(20_000, torch.Generator().manual_seed(s)) for s in (seed, 99 + seed)))
            for seed in range(seeds)
        ]
        rows.append([name, "real against real", 0, *spread(floors)])
    return rows


def digits(seeds: int) -> list[list]:
    """The recipe digits-ayf-emd beside the same recipe with s = 0, one teacher each seed."""
    import flowmap
    from flowmap.build.data import build_data
    from flowmap.evaluation.measure import measure
    from flowmap.plan.plan import resolve

    if not seeds:
        return []
    found, floor = {"flow map": [], "consistency": []}, []
    consistency = [
        "times.base.kind=consistency",
        "times.diagonal=0",
        "times.diagonal_at=departure",
        "sampler.kind=gamma",
        "sampler.gamma=1",
    ]
    for seed in range(seeds):
        root = Path(f"runs/bench/{DIGITS}/seed-{seed}")  # where main_job.py left its teacher and student
        os.environ["FLOWMAP_RUNS"] = str(root)
        for model, overrides in (("flow map", []), ("consistency", consistency)):
            recipe = flowmap.read_recipe(
                DIGITS, [f"seed={seed}", f"teacher.overrides=[seed={seed}]", "log.wandb=false", *overrides]
            )
            if (
                overrides and not (root / "consistency" / "metrics.json").is_file()
            ):  # what is trained is not trained again
                flowmap.fit(recipe, root / "consistency", resume=True)
            student = flowmap.load_student(root / ("consistency" if overrides else DIGITS))
            only = [spec for spec in recipe.metrics if spec.on_samples][:1]
            figures = measure(recipe, student, None, build_data(resolve(recipe)), steps=STEPS, metrics=only)
            found[model].append(figures["student"])
            floor.append(figures["floor"])
    rows = []
    for data, key in (("digits", "frechet_pixels"), (TRAINING, "frechet_pixels_train")):
        rows += [
            [data, model, k, *spread([run[str(k)][key] for run in runs])]
            for model, runs in found.items()
            for k in STEPS
        ]
        rows.append([data, "real against real", 0, *spread([one[key] for one in floor])])
    return rows


def spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def plot(rows: list[list], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(row[0] for row in rows if row[0] != TRAINING))
    figure, axes = plt.subplots(1, len(sets), figsize=(4 * len(sets), 3.4))
    for axis, name in zip(axes if len(sets) > 1 else [axes], sets, strict=True):
        for model in MODELS:
            line = [row for row in rows if row[:2] == [name, model]]
            axis.plot([r[2] for r in line], [r[3] for r in line], marker="o", label=model)
            axis.fill_between([r[2] for r in line], [r[4] for r in line], [r[5] for r in line], alpha=0.2)
        floor = next(row[3] for row in rows if row[:2] == [name, "real against real"])
        axis.axhline(floor, color="grey", linestyle=":", label="real against real")
        axis.set(xscale="log", yscale="log", xlabel="steps", title=name, xticks=STEPS, xticklabels=STEPS)
    axes = axes if len(sets) > 1 else [axes]
    axes[0].set_ylabel("distance to data")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--digits-seeds", type=int, default=3)
    parser.add_argument("--keep-toys", action="store_true", help="take the toys' rows from the last result")
    parser.add_argument("--plot", default="docs/images/steps_law.png")
    arguments = parser.parse_args()
    kept = json.loads((RESULTS / "steps_law.json").read_text())["rows"] if arguments.keep_toys else []
    rows = [row for row in kept if not row[0].startswith("digits")] or toys(arguments.seeds, arguments.steps)
    rows += digits(arguments.digits_seeds)
    print(table(rows, ["data", "model", "steps", "median", "least", "most"]))
    plot(rows, arguments.plot)
    seeds = {"toys": arguments.seeds, "digits": arguments.digits_seeds}
    write(
        "steps_law", {"question": __doc__.splitlines()[0], "environment": environment(), "seeds": seeds, "rows": rows}
    )


if __name__ == "__main__":
    main()
