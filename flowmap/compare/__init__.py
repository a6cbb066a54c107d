"""Compare recipes on equal terms.

Each recipe is trained for the same seconds, or the same number of network evaluations, against the same teacher at each
seed, and measured by the same metrics at each number of steps. `finished` and `curves` tabulate and plot existing runs.

In the folder of a comparison, seed-N/NAME/ has a run and its result.json. compare.json, table.md and quality.png are
written after every run. A finished run is kept: the same call continues a comparison that was interrupted, and a call
with more recipes or seeds adds them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowmap.base.files import check_writable, only_process, read_json, write_json
from flowmap.base.progress import LogFunction
from flowmap.base.schema import RecipeError
from flowmap.compare.entrants import at_seed, read_entrants
from flowmap.compare.entry import Entry, EvalSpec, baseline_rows
from flowmap.compare.report import report, write_report
from flowmap.compare.terms import Terms, evaluations_of, make, needs_of, own_stages, shared_folders
from flowmap.estimate.dry_run import dry_run
from flowmap.plan.plan import resolve
from flowmap.plan.requirements import check_beforehand
from flowmap.plan.run_folders import runs_root
from flowmap.recipe import Recipe

STEPS = (1, 2, 4, 8)
REPORT = ("table.md", "quality.png")  # written after compare.json


def compare(
    recipes: Sequence[str],
    *,
    budget: float | None = None,
    calls: float | None = None,
    seeds: int = 5,
    steps: Sequence[int] = STEPS,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    log: LogFunction | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Train every recipe at seeds 0 to seeds - 1; returns the contents of compare.json, with its `folder`.

    budget: seconds of training each; calls: network evaluations each; exactly one must be given. out: the folder, by
    default runs/compare. now: returns the time in seconds. The teacher of a seed is trained once, in a run folder below
    runs/, and is not counted. Pairs, and runs that a recipe starts from, count for that recipe. Raises RecipeError
    (ValueError) for a user's mistake, such as recipes of different data or teachers.
    """
    log = log or (lambda message: print(message, file=sys.stderr, flush=True))
    terms = Terms(budget, calls, tuple(steps))
    entrants, folder = _checked(recipes, overrides, seeds, out)
    look = EvalSpec.of(entrants[0])
    for entrant in entrants:  # refuse what can be refused before the folder is made
        if entrant.batches.processes > 1:
            raise RecipeError(f"{entrant.name}: trainer.devices: compare trains on one process; set it to 1")
        check_beforehand(resolve(entrant.changed(metrics=look.metrics)))
    with only_process(folder):
        by_seed = [_entries(entrants, seed, folder, terms, look, now) for seed in range(seeds)]
        for entry in (entry for entries in by_seed for entry in entries):
            entry.found()  # refuses runs on other terms before anything is trained
        for seed, entries in enumerate(by_seed):
            _baseline_rows(entries, folder / f"seed-{seed}" / "beside.json", log)
            for entry in entries:
                result = entry.kept(log) or entry.run(log)
                log(f"seed {seed}, {entry.recipe.name}: {_in_words(result)}")
                write_report(folder, _report(by_seed, folder))
    return {**read_json(folder / "compare.json"), "folder": str(folder)}


def dry_compare(
    recipes: Sequence[str], *, budget=None, calls=None, seeds=5, steps=STEPS, out=None, overrides=()
) -> list[str]:
    """The lines of `flowmap compare --dry-run`: what would be trained, what exists, what is missing on this machine."""
    terms = Terms(budget, calls, tuple(steps))
    entrants, folder = _checked(recipes, overrides, seeds, out)
    ready = [
        _entries(entrants, seed, folder, terms, EvalSpec.of(entrants[0]), time.perf_counter) for seed in range(seeds)
    ]
    teachers = {
        stage.folder: stage.complete
        for row in ready
        for e in row
        for stage in needs_of(e.recipe)
        if stage.folder in e.shared
    }
    todo = sum(not done for done in teachers.values())
    lines = [_dry_line(entrant, [row[i] for row in ready], terms) for i, entrant in enumerate(entrants)]
    lines.append(
        f"{len(entrants)} recipes x {seeds} seeds x {terms}, "
        f"beside {todo} of {len(teachers)} teachers to make first -> {folder}"
    )
    last = list(dict.fromkeys(dry_run(entry.recipe, None)[-1] for entry in ready[0]))
    return [*lines, *(line for line in last if len(last) == 1 or not line.startswith("nothing"))]


def _dry_line(entrant: Recipe, entries: list[Entry], terms: Terms) -> str:
    asked = evaluations_of(entrant)
    own = [stage.folder.name for stage in own_stages(entries[0].recipe, entries[0].shared)]
    length = (
        f"{int(terms.evaluations / asked)} steps"
        if terms.evaluations is not None
        else "as many steps as a trial of its speed foresees"
    )
    paid = f", less what {', '.join(own)} takes" if own else ""
    done = sum((entry.folder / "result.json").is_file() for entry in entries)
    finished = f"{done} of {len(entries)} seeds finished"
    return f"{entrant.name}: {asked:.4g} network evaluations a step, {length}{paid}; {finished}"


def _checked(
    recipes: Sequence[str], overrides: Sequence[str], seeds: int, out: str | Path | None
) -> tuple[list[Recipe], Path]:
    if seeds < 1:
        raise ValueError(f"seeds: {seeds} must be 1 or more")
    if any(word.startswith("seed=") for word in overrides):
        raise ValueError("seed: compare trains at the seeds 0 to N - 1 of --seeds N")
    folder = Path(out) if out else runs_root() / "compare"
    check_writable(folder, "--out")
    foreign = [] if (folder / "compare.json").is_file() else [name for name in REPORT if (folder / name).exists()]
    if foreign:
        raise ValueError(
            f"--out: {folder} holds {foreign[0]} and no compare.json: no comparison wrote it; choose another folder"
        )
    return read_entrants(recipes, overrides), folder


def _entries(entrants: list[Recipe], seed: int, folder: Path, terms: Terms, look: EvalSpec, now) -> list[Entry]:
    """The entries of all recipes at that seed."""
    seeded = [at_seed(entrant, seed) for entrant in entrants]
    shared = frozenset(shared_folders(seeded))
    return [Entry(recipe, folder / f"seed-{seed}" / recipe.name, terms, look, shared, now) for recipe in seeded]


def _baseline_rows(entries: list[Entry], path: Path, log: LogFunction) -> None:
    """Measure the teacher and the real-vs-real baseline of a seed and write them to beside.json.

    The first recipe that samples with the teacher's guidance is chosen for it.
    """
    taught = [(entry, entry.recipe.teacher) for entry in entries if entry.recipe.teacher is not None]
    guided = [entry for entry, teacher in taught if teacher.guidance is not None]
    chosen = [*guided, *(entry for entry, _ in taught), *entries][0]
    same = {"look": chosen.look.hash, "steps": list(chosen.terms.steps), "by": chosen.recipe.name}
    if path.is_file() and read_json(path).get("same") == same:
        return
    for stage in needs_of(chosen.recipe):
        if stage.folder in chosen.shared and not stage.complete:
            make(stage, log, chosen.now)
    write_json(path, {"same": same, **baseline_rows(chosen, log)})


def _report(by_seed: list[list[Entry]], folder: Path) -> dict[str, Any]:
    """The report on the finished entries that were measured alike, in the order of recipes and seeds."""
    first = by_seed[0][0]
    found = [entry.found() for entries in zip(*by_seed, strict=True) for entry in entries]
    besides = [
        read_json(path) for seed in range(len(by_seed)) if (path := folder / f"seed-{seed}" / "beside.json").is_file()
    ]
    alike = [result for result in found if result and (not result["figures"] or result["look"] == first.look.hash)]
    besides = [one for one in besides if one.get("same", {}).get("look") == first.look.hash]
    return report([entry.recipe.name for entry in by_seed[0]], alike, besides, first.terms, len(by_seed))


def _in_words(result: dict[str, Any]) -> str:
    if result["ended"] in ("diverged", "no time"):
        return f"{result['ended']}: {result['why']}"
    first = {k: next(iter(row.values())) for k, row in result["figures"].items()}
    figures = ", ".join(f"{value:.4g} at {k}" for k, value in first.items())
    return f"{result['steps']} steps, {result['train_seconds']:.4g} s of training: {figures}"
