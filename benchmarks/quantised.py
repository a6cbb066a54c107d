"""What do int8 and NF4 weights cost a student in Frechet distance, and what do they save?

`python benchmarks/quantised.py --student runs/digits --name digits` measures the student with its weights in float32,
bf16, int8 and NF4 at 1, 2 and 4 steps, all from the same noise, against held-out data; its teacher with the first seed,
if its run is here (FLOWMAP_RUNS says where). `--name emoji` has the metrics of emoji. Each finished (format, seed) is
kept at once in benchmarks/results/quantised.json, so a run goes on where it was stopped. It needs the extra `quantize`,
and for emoji `features`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from lib.report import RESULTS, environment, keep, kept, spread, table

from flowmap.base.schema import RecipeError
from flowmap.base.trust import allow_import
from flowmap.build.data import build_data
from flowmap.build.teacher import build_teacher
from flowmap.evaluation.measure import measure
from flowmap.metrics.specs import Frechet, PrecisionRecall
from flowmap.nets.lora import fingerprint
from flowmap.nets.precision import hold
from flowmap.plan.plan import resolve
from flowmap.recipe.recipe import read_resolved
from flowmap.student.folder import load_student
from flowmap.student.student import Student

RESULT = RESULTS / "quantised.json"
FORMATS, STEPS, SEEDS = ("float32", "bf16", "int8", "nf4"), (1, 2, 4), (0, 1, 2)
NET, CLASSIFIER = "efficientnet_lite0", "lib.digit_features:classifier"
METRICS = {
    "digits": {
        "frechet_pixels": Frechet("pixels", images=898, reference_images=898),
        "frechet_classifier": Frechet(CLASSIFIER, images=898, reference_images=898),
        "precision_pixels recall_pixels": PrecisionRecall("pixels", images=898),
    },
    "emoji": {
        "frechet_pca": Frechet("pca", images=1000),
        f"frechet_{NET}": Frechet(NET, images=1000),
        f"precision_{NET} recall_{NET}": PrecisionRecall(NET, images=1000),
    },
}
BATCH, WARM, CALLS, DRAWN = 64, 3, 20, 256


def student_of(folder: Path, form: str) -> Student:
    """The student with its weights in that format."""
    student = load_student(folder, quantize=form if form in ("int8", "nf4") else None)
    if form == "bf16":
        hold(student.flow_map, torch.bfloat16)
    return student


def one(folder: Path, form: str, seed: int, name: str, known: Mapping, taught: bool) -> dict:
    """The figures of a format from the noise of that seed. known: those of float32, which have the floor. taught:
    measure the teacher too.
    """
    student = student_of(folder, form)
    run = resolve(read_resolved(student.folder / "recipe.yaml"))
    recipe = replace(run.recipe, evaluation=replace(run.recipe.evaluation, seed=seed, teacher_extra_steps=()))
    data, teacher = build_data(run), None
    if taught:
        try:
            teacher = build_teacher(run, data)
        except RecipeError as error:
            print(f"no teacher's row: {error}")
    metrics = list(METRICS[name].values())
    found = measure(recipe, student, teacher, data, steps=STEPS, metrics=metrics, progress=print, known=known)
    return {key: found[key] for key in ("student", "teacher", "floor", "stamp") if key in found}


@torch.no_grad()
def costs(folder: Path, form: str) -> dict:
    """Bytes of weights, milliseconds of the CPU for a call, and how far samples are from those of float32 weights."""
    student, whole = student_of(folder, form), load_student(folder)
    rows, seconds = student.conditions(BATCH), []
    x, t = torch.randn(BATCH, *student.config.shape), torch.ones(BATCH)
    for _ in range(WARM + CALLS):
        start = time.process_time()  # of this process's one thread, whatever else the machine does
        student.flow_map(x, t, 0 * t, rows)
        seconds.append(time.process_time() - start)
    differences = {}
    for k in STEPS:
        samples, wanted = (one.sample(DRAWN, steps=k, seed=7, latents=True) for one in (student, whole))
        differences[str(k)] = float((samples - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    found = {"weight_bytes": student.weight_bytes, "milliseconds": 1000 * statistics.median(seconds[WARM:])}
    return found | {"differences": differences}


def rows_of(found: Mapping, name: str) -> tuple[list[str], list[list]]:
    """(columns, rows) of the table of one student: the median of seeds, with least and most."""
    keys = " ".join(METRICS[name]).split()
    columns = ["weights", "steps", *keys, "difference of samples", "weights, MiB", f"CPU ms a call of {BATCH}"]
    rows = []
    for form in FORMATS:
        seeds, cost = list(found["measured"].get(form, {}).values()), found["costs"].get(form)
        for k in STEPS if seeds and cost else ():
            figures = [spread(one["student"][str(k)][key] for one in seeds) for key in keys]
            sizes = [
                cost["differences"][str(k)],
                round(cost["weight_bytes"] / 2**20, 2),
                round(cost["milliseconds"], 2),
            ]
            rows.append([form, k, *figures, *sizes])
    whole = list(found["measured"].get(FORMATS[0], {}).values())
    if teachers := [one["teacher"] for one in whole if "teacher" in one]:
        rows.append(
            ["teacher", teachers[0]["steps"], *(spread(one[key] for one in teachers) for key in keys), *[""] * 3]
        )
    if whole:
        rows.append(["real against real", "", *(_floor(whole[0]["floor"], key) for key in keys), *[""] * 3])
    return columns, rows


def _floor(floor: Mapping, key: str) -> str:
    return f"{floor[key]:.3g}" if key in floor else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, required=True, help="the student's folder, or its run's")
    parser.add_argument("--name", choices=list(METRICS), default="digits", help="the row of metrics")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    a = parser.parse_args()
    torch.set_num_threads(1)
    allow_import("lib.digit_features")
    made = kept(RESULT)
    weights = fingerprint(load_student(a.student).flow_map)
    found = made.setdefault("students", {}).get(a.name, {})
    if found.get("weights") != weights:  # another student: nothing of the earlier one's is kept
        found = {"weights": weights, "measured": {}, "costs": {}}
    made["students"][a.name] = found
    for form in FORMATS:
        found["costs"][form] = found["costs"].get(form) or costs(a.student, form)
        for seed in map(str, a.seeds):
            done = found["measured"].setdefault(form, {})
            if seed not in done:
                print(f"{a.name}: {form}, seed {seed}", flush=True)
                known = found["measured"][FORMATS[0]].get(seed, {})
                taught = form == FORMATS[0] and int(seed) == a.seeds[0]
                done[seed] = one(a.student, form, int(seed), a.name, known, taught)
            columns, rows = rows_of(found, a.name)
            made.setdefault("tables", {})[a.name] = {"columns": columns, "rows": rows}
            made |= {"question": __doc__.splitlines()[0], "environment": environment()}
            keep(RESULT, made | {"settings": {"seeds": list(a.seeds), "samples timed": BATCH}})
    print(table(rows, columns))


if __name__ == "__main__":
    main()
