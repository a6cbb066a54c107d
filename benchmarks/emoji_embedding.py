"""Does AYF-EMD run away on a text-to-image transformer of diffusers, with and without an embedding of t?

emoji32's networks at a small scale: its autoencoder, teacher and students are trained here for fewer steps, in smaller
batches, from one teacher.  Recorded by step: loss and the norms of tangent and residual; with --images, Frechet
distances at 1, 2 and 4 steps.  Needs `make data` and the extra `data`.
`python benchmarks/emoji_embedding.py [--only "emd t" ...] [--steps 120] [--teacher-steps 100] [--images 0]`
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from pathlib import Path

from lib.report import environment, table, write

import flowmap

ROOT = Path("runs/bench/emoji_embedding")
BATCH = 16
STUDENTS = {
    "emd t": ("emoji32-ayf-emd", []),
    "emd teacher's": ("emoji32-ayf-emd", ["student.time_embedding=null"]),
    "mixed t": ("emoji32-ayf-mixed", []),
    "mixed teacher's": ("emoji32-ayf-mixed", ["student.time_embedding=null"]),
    "lmd teacher's": ("emoji32", []),
}
KEYS = ("loss", "tangent_norm", "residual_norm")


def folder_of(a: argparse.Namespace) -> Path:
    """Of the runs with that autoencoder and teacher."""
    return ROOT / f"{a.autoencoder_steps}-{a.teacher_steps}"


def files(a: argparse.Namespace) -> tuple[Path, Path]:
    """The autoencoder's recipe and the small teacher's card, written to the folder of the runs."""
    root = folder_of(a)
    root.mkdir(parents=True, exist_ok=True)
    autoencoder, teacher, card = (root / f"{name}.yaml" for name in ("autoencoder", "teacher", "card"))
    autoencoder.write_text(
        "base: emoji32-autoencoder\nmetrics: []\n"
        f"trainer: {{steps: {a.autoencoder_steps}, checkpoint_every_steps: 50}}\n"
    )
    teacher.write_text(
        f"base: emoji32-teacher\nmetrics: []\ndata: {{autoencoder: {{recipe: {autoencoder.absolute()}}}, "
        f"batch_size: {BATCH}}}\ntrainer: {{steps: {a.teacher_steps}, checkpoint_every_steps: 50}}\n"
        "ema: {snapshot_every_steps: 50}\n"
    )
    card.write_text(f"kind: recipe\nrecipe: {teacher.absolute()}\nshape: [8, 8, 8]\n")
    return autoencoder, card


def recipe_of(name: str, a: argparse.Namespace):
    base, more = STUDENTS[name]
    autoencoder, card = files(a)
    images, steps = a.images, a.steps
    metrics = f"[{{kind: frechet, features: efficientnet_lite0, images: {images}}}]" if images else "[]"
    settings = [
        f"teacher.card={card.absolute()}",
        f"data.autoencoder.recipe={autoencoder.absolute()}",
        f"data.batch_size={BATCH}",
        f"trainer.steps={steps}",
        f"trainer.checkpoint_every_steps={min(steps, 300)}",
        f"objective.warmup_steps={3 * steps // 4}",
        f"optimizer.warmup_steps={steps // 6}",
        "ema={kind: power, std: 0.10}",
        f"metrics={metrics}",
        "evaluation.teacher_steps=8",
        "evaluation.teacher_extra_steps=[]",
        "log={every_steps: 5, samples_every_steps: 0, wandb: false}",
        *more,
    ]
    return flowmap.read_recipe(base, settings)


def trained(name: str, a: argparse.Namespace) -> dict:
    """The curves and figures of that student, trained now if it is not there."""
    os.environ["FLOWMAP_RUNS"] = str(folder_of(a))
    folder = folder_of(a) / f"{a.steps}-{name.replace(' ', '-').replace(chr(39), '')}"
    found = folder / "metrics.json"
    if not found.is_file():
        flowmap.fit(recipe_of(name, a), folder, resume=True)
    with (folder / "log.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/residual_norm")]
    curves = {key: [float(row.get(f"train/{key}") or "nan") for row in rows] for key in KEYS}
    curves["step"] = [int(float(row["step"])) for row in rows]
    return {"student": name, "curves": curves, "metrics": json.loads(found.read_text()) if found.is_file() else {}}


def row_of(run: dict) -> list:
    measured = run["metrics"].get("student", {})
    figures = [measured.get(k, {}).get("frechet_efficientnet_lite0", "") for k in ("1", "2", "4")]
    norms = [of(run["curves"][key]) for key in KEYS[1:] for of in (lambda x: x[0], max, lambda x: x[-1])]
    objective, embedding = run["student"].split()
    return [objective, embedding, *figures, *norms]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(STUDENTS), choices=STUDENTS)
    parser.add_argument("--steps", type=int, default=120, help="of each student")
    parser.add_argument("--teacher-steps", type=int, default=100)
    parser.add_argument("--autoencoder-steps", type=int, default=150)
    parser.add_argument("--images", type=int, default=0, help="of the Frechet distances; 0 for none")
    a = parser.parse_args()
    runs = []
    for name in a.only:
        runs.append(trained(name, a))
        record(runs, a)


def record(runs: list[dict], a: argparse.Namespace) -> None:
    columns = ["objective", "embedding", "FD 1 step", "2 steps", "4 steps"]
    columns += [f"{which} {key.replace('_', ' ')}" for key in KEYS[1:] for which in ("first", "largest", "last")]
    rows = [row_of(run) for run in runs]
    print(table(rows, columns), flush=True)
    settings = {"seeds": [0], "autoencoder steps": a.autoencoder_steps, "teacher steps": a.teacher_steps,
                "student steps": a.steps, "batch": BATCH, "images": a.images}  # fmt: skip
    facts = {"question": __doc__.splitlines()[0], "environment": environment(), "settings": settings}
    write("emoji_embedding", {**facts, "columns": columns, "rows": rows, "trainings": runs})


if __name__ == "__main__":
    main()
