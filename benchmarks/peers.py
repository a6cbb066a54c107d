"""Do our objectives agree with the nearest public code, what does a step cost, what is trained in equal seconds?

All rows use our network. Peers: NVlabs/FastGen (Apache-2.0), MeanFlow and sCM; Gsunshine/py-meanflow (CC BY-NC-SA 4.0),
MeanFlow. They are imported from checkouts next to the project (git clone), and none of their code is kept here; the row
of a missing peer is marked as missing.
Digits: same network, start, data, batches, noise, times, teacher, optimiser and average for all; only the loss differs.
In rows "as published" its weights, and py-meanflow's times, differ too.  Seconds are CPU time of loss, backward pass,
optimiser and average; rows take turns. Finished rows are kept in runs/peers, and the same command continues an
interrupted benchmark.
`python benchmarks/peers.py --fastgen FOLDER --meanflow FOLDER [--seeds 3] [--seconds 120] [--rounds 40]
    [--rows WORD ...] [--anew]`
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from league import take_over
from lib.peers import FastGen, PyMeanFlow
from lib.peers_jobs import TAUGHT, Job, Row, all_rows
from lib.report import environment, keep, kept, table, write
from tables.peers import AGREEMENT, NAME, QUALITY, STEPS, TIMING, agreement, quality, timing

from flowmap.compare.terms import make, needs_of
from flowmap.evaluation.measure import measure
from flowmap.flow.averaging import exponent_from_std, power_beta
from flowmap.plan.run_folders import runs_root
from flowmap.recipe import read_recipe
from flowmap.student.student import Student

WARM = 3  # steps that are not timed


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

    def result(self, look: tuple) -> dict:
        """Steps, seconds, and the Frechet distances of the averaged student."""
        found = {
            "job": self.row.job,
            "whose": self.row.whose,
            "steps": self.steps,
            "cpu_seconds": round(self.spent, 3),
            "failed": self.failed,
        }
        found["step_seconds"] = statistics.median(self.took[WARM:] or self.took)
        if self.failed is None:
            recipe = replace(self.job.recipe, metrics=look)
            figures = measure(recipe, Student(self.job.config, self.average), None, self.job.data, steps=STEPS)[
                "student"
            ]
            for suffix in ("", "_train"):
                found[f"figures{suffix}"] = {k: row[NAME + suffix] for k, row in figures.items()}
        return found


def train_all(rows: list[Row], seed: int, seconds: float) -> list[dict]:
    """Every row's training at that seed, in turns of one step, so that a busy machine is busy for all."""
    jobs = {name: Job(name, seed) for name in dict.fromkeys(row.job for row in rows)}
    trainings = [Training(row, jobs[row.job], seconds) for row in rows]
    while running := [training for training in trainings if not training.over]:
        for training in running:
            training.step()
    look = read_recipe("digits").metrics[:1]
    return [training.result(look) for training in trainings] + [ours(seed, look)]


def ours(seed: int, look: tuple) -> dict:
    """The teacher at its own number of steps, and real digits against real digits."""
    job = Job(TAUGHT, seed)
    recipe = replace(job.recipe, metrics=look, evaluation=replace(job.recipe.evaluation, teacher_extra_steps=()))
    found = measure(recipe, Student(job.config, job.student().eval()), job.teacher, job.data, steps=[1])
    both = {"": NAME, "_train": f"{NAME}_train"}
    teacher = {f"figure{suffix}": found["teacher"][name] for suffix, name in both.items()}
    return {
        "teacher": {"steps": found["teacher"]["steps"], **teacher},
        **{f"floor{suffix}": found["floor"][name] for suffix, name in both.items()},
    }


def trained_at(seed: int, rows: list[Row], same: dict, anew: bool) -> list[dict]:
    """What is kept of that seed where it was made on the same terms, else made and kept."""
    path = runs_root() / "peers" / f"seed-{seed}.json"
    before = kept(path)
    if not anew and before.get("same") == same:
        return before["results"]
    take_over(["digits-meanflow"], "digits", seed)
    for stage in needs_of(Job.recipe_of(TAUGHT, seed)):
        if not stage.complete:
            make(stage, print, time.perf_counter)
    results = train_all([row for row in rows if row.make], seed, same["seconds"])
    keep(path, {"same": same, "results": results})
    return results


def load(kind, folder: Path | None):
    """The peer in that folder; None where there is none."""
    if folder is None or not folder.is_dir():
        print(f"{kind.__name__}: {folder or 'no folder given'}: not there")
        return None
    peer = kind(folder.resolve())
    print(f"{kind.__name__}: {peer.checkout.said()}")
    return peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fastgen", type=Path)
    parser.add_argument("--meanflow", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of training, each row at each seed")
    parser.add_argument("--rounds", type=int, default=40, help="rounds in which the losses are timed")
    parser.add_argument(
        "--rows", nargs="+", default=[""], help="only rows whose name holds one of these words, and ours"
    )
    parser.add_argument("--name", default="peers")
    parser.add_argument("--anew", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(1)
    peers = load(FastGen, a.fastgen), load(PyMeanFlow, a.meanflow)
    wanted = lambda row: row.whose == "flowmap" or any(word in row.name for word in a.rows)
    rows, to_ask = ([row for row in all_rows(*peers, to_train=train) if wanted(row)] for train in (True, False))
    said = {
        kind.__name__: peer.checkout.said() if peer else "not there"
        for kind, peer in zip((FastGen, PyMeanFlow), peers, strict=True)
    }
    recipes = {row.job: Job.recipe_of(row.job, 0).hash() for row in rows}
    same = {
        "to": "held-out digits",
        "seconds": a.seconds,
        "rows": [row.name for row in rows if row.make],
        "peers": said,
        "recipes": recipes,
    }
    trained = {seed: trained_at(seed, rows, same, a.anew) for seed in range(a.seeds)}
    tables = {
        "agreement": {"columns": AGREEMENT, "rows": list(agreement(to_ask))},
        "timing": {"columns": TIMING, "rows": list(timing(rows, a.rounds))},
        "quality": {"columns": QUALITY, "rows": list(quality(rows, trained))},
    }
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
