"""What does a student gain from an embedding of t that is fitted to its teacher's embedding of another time?

Two teachers of digits are trained here by flow matching: a small EDM2, which embeds log(sigma) / 4, and a small
transformer of diffusers, which embeds 1,000 t.  From each start two students: with the teacher's embedding, and with
one of t (student.time_embedding).  Measured at step 0: the student's output against its teacher's, and the norm of
dF/dt along the teacher's velocity, by t.  Then both are trained by AYF-EMD: the norms of tangent and residual, and
held-out Frechet distances at 1, 2 and 4 steps.
`python benchmarks/time_embedding.py [--networks edm2 transformer] [--seeds 1] [--draws 5]`
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
from pathlib import Path

import torch
from lib.report import environment, spread, table, write

import flowmap
from flowmap.build.data import build_data
from flowmap.flow.derivative import eulerian_derivative
from flowmap.nets.flow_map import FlowMapNet
from flowmap.plan.plan import resolve
from flowmap.recipe.recipe import read_resolved
from flowmap.student.folder import load_student

ROOT = Path("runs/bench/time_embedding")
TIMES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)
POINTS = 256
TEACHERS = {
    "edm2": """
student: {kind: edm2, channels: 32, multipliers: [1, 2], num_blocks: 1, attention_at: [], sigma_data: 0.75}
optimizer: {lr: 1.0e-2}
trainer: {steps: 1000, checkpoint_every_steps: 500}
""",
    "transformer": """
student:
  kind: diffusers
  network: DiTTransformer2DModel
  settings: >-
    {"sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 1, "num_layers": 4,
    "attention_head_dim": 24, "num_attention_heads": 4, "num_embeds_ada_norm": 10}
  scheduler: FlowMatchEulerDiscreteScheduler
  scheduler_settings: '{"shift": 1.0}'
trainer: {steps: 3000, checkpoint_every_steps: 1500}
""",
}
STUDENT = """
base: digits-ayf-emd
teacher: {card: CARD}
objective: {warmup_steps: 200}
trainer: {steps: 600, checkpoint_every_steps: 300}
metrics: [{kind: frechet, features: pixels, images: 898, reference_images: 898}]
evaluation: {teacher_steps: 16, teacher_extra_steps: []}
log: {every_steps: 20, samples_every_steps: 0, metrics_every_steps: 0, wandb: false}
"""
EMBEDDINGS = {"teacher's": "null", "t": "t"}
KEYS = ("tangent_norm", "residual_norm")


def recipe_of(network: str, seed: int, embedding: str):
    """The student's recipe, whose teacher is trained first; the files that it names are written to ROOT."""
    ROOT.mkdir(parents=True, exist_ok=True)
    teacher, card = ROOT / f"{network}-teacher.yaml", ROOT / f"{network}-card.yaml"
    teacher.write_text(f"base: digits-teacher\nmetrics: []\n{TEACHERS[network]}")
    card.write_text(f"kind: recipe\nrecipe: {teacher.absolute()}\nshape: [1, 8, 8]\nnum_classes: 10\n")
    path = ROOT / f"{network}.yaml"
    path.write_text(STUDENT.replace("CARD", str(card.absolute())))
    settings = [f"seed={seed}", f"teacher.overrides=[seed={seed}]", f"student.time_embedding={EMBEDDINGS[embedding]}"]
    return flowmap.read_recipe(path, settings)


def run_folder(network: str, seed: int, embedding: str) -> Path:
    return ROOT / f"seed-{seed}" / f"{network}-{EMBEDDINGS[embedding]}"


def teacher_folder(network: str, seed: int) -> Path:
    """The folder of that teacher, trained now if it is not there."""
    os.environ["FLOWMAP_RUNS"] = str(ROOT / f"seed-{seed}")
    run = resolve(recipe_of(network, seed, "teacher's")).teachers[0]
    if not run.complete:
        flowmap.fit(run.recipe, run.folder, resume=True)
    return run.folder


def trained(network: str, seed: int, embedding: str) -> dict:
    """The curves and the figures of that student, trained now if it is not there."""
    folder = run_folder(network, seed, embedding)
    os.environ["FLOWMAP_RUNS"] = str(ROOT / f"seed-{seed}")
    if not (folder / "metrics.json").is_file():
        flowmap.fit(recipe_of(network, seed, embedding), folder, resume=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    with (folder / "log.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/tangent_norm")]
    curves = {"step": [int(float(row["step"])) for row in rows]}
    curves |= {key: [float(row[f"train/{key}"]) for row in rows] for key in KEYS}
    keys = ("frechet_pixels", "frechet_pixels_train")
    figures = {k: {key: value for key, value in row.items() if key in keys} for k, row in metrics["student"].items()}
    return {"network": network, "seed": seed, "embedding": embedding, "curves": curves, "figures": figures}


def at_start(network: str, seed: int, draw: int) -> list[dict]:
    """For both embeddings and each time: the output's relative error and the norm of dF/dt.

    The points are held-out samples with the noise of that draw.
    """
    teacher = load_student(teacher_folder(network, seed))
    data = build_data(resolve(read_resolved(teacher.folder / "recipe.yaml")))
    x0, cond = data.held_out_samples()
    x0, cond = x0[:POINTS], {key: value[:POINTS] for key, value in cond.items()}
    x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(draw))
    maps = {"teacher's": teacher.flow_map, "t": FlowMapNet(teacher.flow_map.net.with_embedding_of_t())}
    rows = []
    for time in TIMES:
        t = torch.full((len(x0),), time)
        xt = (1 - time) * x0 + time * x1
        with torch.no_grad():
            v = teacher.flow_map.velocity(xt, t, cond)
        for name, flow_map in maps.items():
            with torch.no_grad():
                value, rate = eulerian_derivative(flow_map, xt, t, torch.zeros_like(t), v, cond)
            norm = lambda x: x.flatten(1).norm(dim=1)
            error = float(norm(value - v).mean() / norm(v).mean())
            found = {"error": error, "tangent": float(norm(rate).median()), "velocity": float(norm(v).median())}
            rows.append({"network": network, "seed": seed, "draw": draw, "embedding": name, "t": time, **found})
    return rows


def start_table(rows: list[dict]) -> dict:
    columns = ["network", "t", "tangent, teacher's embedding", "tangent, embedding of t", "output error", "velocity"]
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        for time in TIMES:
            mine = [row for row in rows if row["network"] == network and row["t"] == time]
            old, new = ([row for row in mine if row["embedding"] == name] for name in EMBEDDINGS)
            norms = [spread([row["tangent"] for row in part]) for part in (old, new)]
            lines.append([network, time, *norms, spread([row["error"] for row in new], bare=True),
                          spread([row["velocity"] for row in new], bare=True)])  # fmt: skip
    return {"columns": columns, "rows": lines}


def trained_table(runs: list[dict]) -> dict:
    """A row a network and embedding: the figures, and the largest and the last of the norms in training."""
    columns = ["network", "embedding", "1 step", "2 steps", "4 steps"]
    columns += [f"{which} {key.replace('_', ' ')}" for key in KEYS for which in ("largest", "last")]
    lines = []
    for network in dict.fromkeys(run["network"] for run in runs):
        for embedding in EMBEDDINGS:
            mine = [run for run in runs if run["network"] == network and run["embedding"] == embedding]
            figures = [spread([run["figures"][k]["frechet_pixels"] for run in mine]) for k in ("1", "2", "4")]
            curves = [[run["curves"][key] for run in mine] for key in KEYS]
            norms = [spread([of(one) for one in part]) for part in curves for of in (max, lambda one: one[-1])]
            lines.append([network, embedding, *figures, *norms])
    return {"columns": columns, "rows": lines}


def plot(rows: list[dict], runs: list[dict], path: str) -> None:
    """Above: the tangent's norm at step 0 by t; below: its norm in training. A column a network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    networks, times = list(dict.fromkeys(row["network"] for row in rows)), TIMES[:-1]  # no axis of logit(t) has 1
    figure, axes = plt.subplots(2, len(networks), figsize=(4.6 * len(networks), 6.4), squeeze=False)
    for column, network in enumerate(networks):
        for name, colour in zip(EMBEDDINGS, ("tab:red", "tab:blue"), strict=True):
            label = "the teacher's embedding" if name != "t" else "an embedding of t"
            norms = [
                [row["tangent"] for row in rows if (row["network"], row["embedding"], row["t"]) == (network, name, t)]
                for t in times
            ]
            axis = axes[0][column]
            axis.plot(times, [statistics.median(one) for one in norms], color=colour, marker=".", label=label)
            axis.fill_between(times, [min(one) for one in norms], [max(one) for one in norms], color=colour, alpha=0.2)
            for run in runs:
                if (run["network"], run["embedding"]) == (network, name):
                    axes[1][column].plot(run["curves"]["step"], run["curves"]["tangent_norm"], color=colour, alpha=0.6)
        axes[0][column].set(xscale="logit", yscale="log", xlabel="t", title=f"{network}: at step 0")
        axes[1][column].set(yscale="log", xlabel="training step", title=f"{network}: AYF-EMD, one curve a seed")
    axes[0][0].legend(fontsize=8)
    for row in axes:
        row[0].set_ylabel("norm of dF/dt")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=list(TEACHERS), choices=TEACHERS)
    parser.add_argument("--seeds", type=int, default=1, help="of teachers and their students")
    parser.add_argument("--draws", type=int, default=5, help="of the noise of the points that are measured at step 0")
    parser.add_argument("--train-only", action="store_true", help="train, and write no figures")
    a = parser.parse_args()
    for network in a.networks:
        starts, runs = [], []
        for seed in range(a.seeds):
            starts += [row for draw in range(a.draws) for row in at_start(network, seed, draw)]
            runs += [trained(network, seed, embedding) for embedding in EMBEDDINGS]
        if not a.train_only:
            record(network, a, starts, runs)


def record(network: str, a: argparse.Namespace, starts: list[dict], runs: list[dict]) -> None:
    """Print and write the tables and the plot of that network."""
    tables = {"start": start_table(starts), "trained": trained_table(runs)}
    for one in tables.values():
        print(table(one["rows"], one["columns"]), "\n")
    plot(starts, runs, f"docs/images/time_embedding_{network}.png")
    settings = {"teachers": a.seeds, "draws of points": a.draws, "points": POINTS}
    question = __doc__.splitlines()[0]
    facts = {"question": question, "environment": environment(), "settings": settings, "tables": tables}
    write(f"time_embedding_{network}", {**facts, "starts": starts, "trainings": runs})


if __name__ == "__main__":
    main()
