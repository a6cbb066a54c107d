"""The tables of peers.py: do the losses agree, what does a step cost, what is trained in equal seconds?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from lib.peers_jobs import DATA, Job, Row, ours
from lib.report import spread

from flowmap.flow.times import Mixture
from flowmap.objectives import FlowMatching
from flowmap.recipe import Recipe

STEPS = (1, 2, 4)
FRECHET = "frechet_pixels"  # to held-out digits; with _train to those of training
WARM = 3  # rounds that are not timed


def agreement(rows: list[Row]) -> Iterator[list]:
    """Each peer's loss and gradient next to ours on one draw and one network with random weights.

    In float64 and in float32.
    """
    for job_name in dict.fromkeys(row.job for row in rows):
        job = Job(job_name, 0)
        mine, *peers = [row for row in rows if row.job == job_name]
        found = {
            dtype: {row.whose: value_and_gradient(row, job, dtype) for row in (mine, *peers)}
            for dtype in (torch.float64, torch.float32)
        }
        for row in peers:
            if row.make is None:
                yield [row.job, row.whose, "not there", "", "", "", ""]
                continue
            pairs = [(found[dtype][mine.whose], found[dtype][row.whose]) for dtype in found]
            (value, gradient), (their_value, their_gradient) = pairs[0]
            ratio = float(their_gradient @ gradient / (gradient @ gradient))
            cosine = float(torch.nn.functional.cosine_similarity(their_gradient, gradient, dim=0))
            yield [
                row.job,
                row.whose,
                their_value / value,
                ratio,
                cosine,
                *(apart_by(one[1], other[1]) for one, other in pairs),
            ]


AGREEMENT = [
    "job",
    "loss of",
    "loss / ours",
    "gradient / ours",
    "cosine of gradients",
    "gradients apart, float64",
    "float32",
]


def apart_by(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """|theirs / k - mine| / |mine| with k = <theirs, mine> / |mine|^2: a constant factor is no difference."""
    ratio = theirs @ mine / (mine @ mine)
    return float((theirs / ratio - mine).norm() / mine.norm())


def value_and_gradient(row: Row, job: Job, dtype: torch.dtype) -> tuple[float, torch.Tensor] | None:
    """The loss at half of its warm-up and its gradient, flat in float64.

    The network's zero-initialised branches are perturbed, so that all of them contribute.
    """
    if row.make is None:
        return None
    for module in job.teacher.modules if job.teacher else ():
        module.to(dtype)
    student, generator = job.student().to(dtype), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(dtype))
    sample, seed = job.draw(0, dtype=dtype)
    value = row.make(job.recipe, student, job.guided)(sample, seed, 200)
    value.backward()
    return value.item(), torch.cat([p.grad.flatten().double() for p in student.parameters() if p.grad is not None])


def timing(rows: list[Row], rounds: int) -> Iterator[list]:
    """Loss and backward pass, row after row within a round on the same draw.

    Times are drawn as the recipes do, and without samples at s = t.
    """
    for job_name in dict.fromkeys(row.job for row in rows):
        job = Job(job_name, 0)
        ready = [row for row in rows if row.job == job_name and row.make is not None and not row.own_settings]
        for recipe, share in laws(job.recipe):
            plain = Row(
                job_name,
                "plain flow matching",
                lambda recipe, *nets: ours(replace(recipe, objective=FlowMatching()), *nets),
            )
            students = [(row.whose, row.make, job.student()) for row in (*ready, plain)]
            losses = {name: (student, make(job.recipe, student, job.guided)) for name, make, student in students}
            seconds = time_in_turns(job, recipe, losses, rounds)
            for name, times in seconds.items():
                ratios = sorted(a / b for a, b in zip(times, seconds["flowmap"], strict=True))
                quarter = len(ratios) // 4
                yield [
                    job_name,
                    share,
                    name,
                    1e3 * statistics.median(times),
                    statistics.median(ratios),
                    ratios[quarter],
                    ratios[-1 - quarter],
                ]


TIMING = ["job", "share at s = t", "loss of", "milliseconds", "of ours (median)", "lower quartile", "upper quartile"]


def laws(recipe: Recipe) -> list[tuple[Recipe, float]]:
    """The recipe and its share of samples at s = t, and the same without them."""
    if not isinstance(recipe.times, Mixture) or not recipe.times.diagonal:
        return [(recipe, 0.0)]
    return [(recipe, recipe.times.diagonal), (replace(recipe, times=replace(recipe.times, diagonal=0.0)), 0.0)]


def time_in_turns(job: Job, recipe: Recipe, losses: dict, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for i in range(rounds + WARM):
        sample, seed = job.draw(i, recipe)
        for name, (student, loss) in losses.items():
            student.zero_grad(set_to_none=True)
            started = time.process_time()
            loss(sample, seed, i).backward()
            if i >= WARM:
                seconds[name].append(time.process_time() - started)
    return seconds


def made(rows: list[Row], to_ask: list[Row], trained: dict[int, list[dict]], timed: list) -> dict[str, dict]:
    """name -> {"columns": [...], "rows": [...]} of every table."""
    held_out, to_training = ([f"{FRECHET}{suffix} at {k}" for k in STEPS] for suffix in ("", "_train"))
    shares = [f"{name} at {k}" for name in ("precision", "recall") for k in STEPS]
    heads = ["job", "loss of"]
    return {
        "agreement": {"columns": AGREEMENT, "rows": list(agreement(to_ask))},
        "timing": {"columns": TIMING, "rows": timed},
        "quality": {
            "columns": [*heads, "steps", "milliseconds", *held_out],
            "rows": list(figures(rows, trained, [FRECHET], costs=True)),
        },
        "ahead": {"columns": AHEAD, "rows": list(ahead(rows, trained))},
        "recall": {
            "columns": [*heads, *shares],
            "rows": list(figures(rows, trained, ["precision_pixels", "recall_pixels"])),
        },
        "train": {"columns": [*heads, *to_training], "rows": list(figures(rows, trained, [f"{FRECHET}_train"]))},
    }


def figures(rows: list[Row], trained: dict[int, list[dict]], metrics: list[str], costs: bool = False) -> Iterator[list]:
    """A row for each that trained, the teacher and real against real: each metric at each number of steps.

    Figures are medians over seeds with their range. costs: steps and the time of a step before them.
    """
    count = len(metrics) * len(STEPS)
    for row in rows:
        found = [result for seed in trained.values() for result in seed if of(row, result)]
        if not found:
            yield [row.job, row.whose, row.missing, *[""] * (count - 1 + 2 * costs)]
            continue
        done = [result["figures"] for result in found if result["failed"] is None]
        failed = f"{len(found) - len(done)} of {len(found)} failed"
        cells = [
            spread([one[str(k)][name] for one in done]) if len(done) == len(found) else failed
            for name in metrics
            for k in STEPS
        ]
        steps, seconds = (statistics.median(result[key] for result in found) for key in ("steps", "step_seconds"))
        yield [row.job, row.whose, *([int(steps), 1e3 * seconds] if costs else []), *cells]
    besides = [result for seed in trained.values() for result in seed if "floor" in result]
    for key, label in (("teacher", "teacher at {} steps"), ("floor", "real against real")) if besides else ():
        cells = [spread([one[key][name] for one in besides]) for name in metrics for _ in STEPS]
        yield [label.format(besides[0]["teacher"]["steps"]), *[""] * (1 + 2 * costs), *cells]


def of(row: Row, result: dict) -> bool:
    return (result.get("job"), result.get("whose")) == (row.job, row.whose)


def ahead(rows: list[Row], trained: dict[int, list[dict]]) -> Iterator[list]:
    """A row for each loss of ours: its distance over the best that a peer has in that job, at each number of steps.

    The best is taken at each seed and number of steps.  A job in which no peer has a loss is compared with the peers'
    losses in all jobs from a teacher.  Ratios are medians over seeds with their range.
    """
    for row in (one for one in rows if one.ours):
        peers = [one for one in rows if not one.ours and one.make]
        rivals = [one for one in peers if one.job == row.job] or [one for one in peers if one.job != DATA]
        ratios = {k: [ratio(row, rivals, seed, k) for seed in trained.values()] for k in STEPS} if rivals else {}
        first = [str(k) for k, found in ratios.items() if max(found) < 1]
        against = ", ".join(f"{one.job}: {one.whose}" if one.job != row.job else one.whose for one in rivals)
        cells = [spread(ratios.get(k, [])) for k in STEPS]
        yield [row.job, row.whose, against or "not there", *cells, ", ".join(first)]


def ratio(row: Row, rivals: list[Row], results: list[dict], k: int) -> float:
    """The row's distance at k steps over the least of its rivals', of one seed; infinite if it failed."""
    distance = lambda one: next(
        result["figures"][str(k)][FRECHET] if result["failed"] is None else math.inf
        for result in results
        if of(one, result)
    )
    least, mine = min(map(distance, rivals)), distance(row)
    return mine / least if math.isfinite(mine) else math.inf


AHEAD = [
    "job",
    "ours",
    "the best of",
    *(f"ours / theirs at {k}" for k in STEPS),
    "ahead in every seed at",
]
