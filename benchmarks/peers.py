"""Do our objectives agree with the nearest public code, what does a step cost, what is trained in equal seconds?

All rows use our network. Peers: NVlabs/FastGen (Apache-2.0), MeanFlow and sCM; Gsunshine/py-meanflow (CC BY-NC-SA 4.0),
MeanFlow. They are imported from checkouts next to the project (git clone), and none of their code is kept here; the row
of a missing peer is marked as missing, as is AYF, which neither has.
Digits: same network, start, data, batches, noise, times, teacher, optimiser and average for all; only the loss differs.
In rows "as published" its weights, and py-meanflow's times, differ too; rows "as recommended" are the shipped recipes.
Seconds are CPU time of loss, backward pass, optimiser and average; all rows from a teacher take turns, and all from
data.  Figures are to held-out digits.  Finished rows are kept in runs/peers, and the same command continues an
interrupted benchmark.
`python benchmarks/peers.py --fastgen FOLDER --meanflow FOLDER [--seeds 3] [--seconds 120] [--rounds 40]
    [--rows WORD ...] [--anew]`
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from league import take_over
from lib.peers import FastGen, PyMeanFlow, load, said_of
from lib.peers_jobs import DATA, TAUGHT, Job, Row, all_rows
from lib.report import environment, keep, kept, table, write
from tables.peers import STEPS, made, timing

from flowmap.compare.terms import make, needs_of
from flowmap.evaluation.measure import measure
from flowmap.flow.averaging import exponent_from_std, power_beta
from flowmap.plan.run_folders import runs_root
from flowmap.recipe import read_recipe
from flowmap.student.student import Student

WARM = 3  # steps that are not timed
GROUPS = FROM_TEACHER, FROM_DATA, BASELINES = "from a teacher", "from data", "baselines"  # what is kept together


class Training:
    """A student that trains by one row's loss until its CPU seconds are spent."""

    def __init__(self, row: Row, job: Job, seconds: float):
        self.row, self.job, self.seconds = row, job, seconds
        self.student = job.student()
        self.average = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.loss = row.make(job.recipe, self.student, job.guided)
        self.optimizer = job.recipe.optimizer(self.student.parameters())
        self.spent, self.steps, self.took, self.failed = 0.0, 0, [], None

    @property
    def over(self) -> bool:
        return self.failed is not None or self.spent >= self.seconds

    def step(self) -> None:
        sample, seed = self.job.draw(self.steps)
        share = min(
            self.spent / self.seconds, 1.0
        )  # the cosine falls with the time that is spent, as each row's number of steps is its own
        rate = (
            self.job.recipe.optimizer.lr_at(self.steps, self.steps / share)
            if share
            else self.job.recipe.optimizer.lr_at(0, 1)
        )
        self.optimizer.param_groups[0]["lr"] = rate
        started = time.process_time()
        value = self.loss(sample, seed, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        if limit := self.job.recipe.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit)
        self.optimizer.step()
        self.steps += 1
        self._average()
        took = time.process_time() - started
        self.spent += took
        self.took.append(took)
        if not torch.isfinite(value):
            self.failed = f"the loss is {value.item()} at step {self.steps}"

    @torch.no_grad()
    def _average(self) -> None:
        kept = power_beta(self.steps, exponent_from_std(self.job.recipe.ema.std))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.student.parameters()), 1 - kept)

    def result(self) -> dict:
        """Steps, seconds, and the figures of the averaged student."""
        found = {
            "job": self.row.job,
            "whose": self.row.whose,
            "steps": self.steps,
            "cpu_seconds": round(self.spent, 3),
            "failed": self.failed,
        }
        found["step_seconds"] = statistics.median(self.took[WARM:] or self.took)
        if self.failed is None:
            recipe = replace(self.job.recipe, metrics=looked_at(self.job))
            student = Student(self.job.config, self.average)
            found["figures"] = measure(recipe, student, None, self.job.data, steps=STEPS)["student"]
        return found


def looked_at(job: Job) -> tuple:
    """The metrics of the recipe that are measured: Frechet distance, precision and recall."""
    return job.recipe.metrics[:2]


def train_all(rows: list[Row], seed: int, seconds: float) -> list[dict]:
    """Every row's training at that seed, in turns of one step, so that a busy machine is busy for all."""
    jobs = {name: Job(name, seed) for name in dict.fromkeys(row.recipe for row in rows)}
    trainings = [Training(row, jobs[row.recipe], seconds) for row in rows]
    while running := [training for training in trainings if not training.over]:
        for training in running:
            training.step()
    return [training.result() for training in trainings]


def baselines(seed: int) -> dict:
    """The figures of the teacher at its own number of steps, and of real digits against real digits."""
    job = Job(TAUGHT, seed)
    evaluation = replace(job.recipe.evaluation, teacher_extra_steps=())
    recipe = replace(job.recipe, metrics=looked_at(job), evaluation=evaluation)
    found = measure(recipe, Student(job.config, job.student().eval()), job.teacher, job.data, steps=[1])
    return {"teacher": found["teacher"], "floor": found["floor"]}


def trained_at(seed: int, group: str, rows: list[Row], said: dict, a: argparse.Namespace) -> list[dict]:
    """The results of the rows "from a teacher" or "from data", or the baselines: kept on the same terms, else made."""
    terms: dict = {"to": "held-out digits"}
    if group == BASELINES:
        terms |= {"teacher": Job.recipe_of(TAUGHT, seed).hash()}
        make = lambda: [baselines(seed)]
    else:
        chosen = [row for row in rows if row.make and (row.job == DATA) == (group == FROM_DATA)]
        terms |= {"seconds": a.seconds, "peers": said}
        terms |= {"recipes": {row.name: Job.recipe_of(row.recipe, seed).hash() for row in chosen}}
        if not chosen:
            return []
        make = lambda: train_all(chosen, seed, a.seconds)
    return known(runs_root() / "peers" / f"seed-{seed}-{group.replace(' ', '-')}.json", terms, make, a.anew)


def known(path: Path, terms: dict, make: Callable[[], list], anew: bool) -> list:
    """What is kept in that file if it was made on the same terms, else made and kept."""
    before = kept(path)
    if anew or before.get("same") != terms:
        before = {"same": terms, "results": make()}
        keep(path, before)
    return before["results"]


def teacher_of(seed: int) -> None:
    """Train the teacher of that seed, unless it or another benchmark's is there."""
    take_over(["digits-meanflow"], "digits", seed)
    for stage in needs_of(Job.recipe_of(TAUGHT, seed)):
        if not stage.complete:
            make(stage, print, time.perf_counter)


def wanted(rows: list[Row], words: list[str]) -> list[Row]:
    """The rows whose name holds one of the words, and our rows of the same jobs."""
    chosen = {row.name: row.job for row in rows if any(word in row.name for word in words)}
    return [row for row in rows if row.name in chosen or (row.ours and row.job in chosen.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fastgen", type=Path)
    parser.add_argument("--meanflow", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of training, each row at each seed")
    parser.add_argument("--rounds", type=int, default=40, help="rounds in which the losses are timed")
    parser.add_argument(
        "--rows", nargs="+", default=[""], help="only rows whose name holds one of these words, and ours of their jobs"
    )
    parser.add_argument("--name", default="peers")
    parser.add_argument("--anew", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(1)
    peers = {kind: load(kind, folder) for kind, folder in ((FastGen, a.fastgen), (PyMeanFlow, a.meanflow))}
    said = said_of(peers)
    rows, to_ask = (wanted(all_rows(*peers.values(), to_train=train), a.rows) for train in (True, False))
    trained: dict[int, list[dict]] = {seed: [] for seed in range(a.seeds)}
    for group in GROUPS:
        for seed, found in trained.items():
            teacher_of(seed)
            found += trained_at(seed, group, rows, said, a)
    terms = {"rounds": a.rounds, "peers": said, "rows": [row.name for row in rows if row.make]}
    timed = known(runs_root() / "peers/timing.json", terms, lambda: list(timing(rows, a.rounds)), a.anew)
    tables = made(rows, to_ask, trained, timed)
    for part in tables.values():
        print(table(part["rows"], part["columns"]), end="\n\n")
    settings = {
        "seeds": list(range(a.seeds)),
        "CPU seconds": a.seconds,
        "rounds": a.rounds,
        "batch": read_recipe("digits").data.batch_size,
    }
    payload = {"question": __doc__.splitlines()[0], "environment": environment(), "peers": said, "settings": settings}
    write(a.name, {**payload, "tables": tables, "trained": trained})


if __name__ == "__main__":
    main()
