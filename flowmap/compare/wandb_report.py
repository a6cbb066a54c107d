"""`flowmap report --to wandb`: a report in W&B of runs that are there, with figures, tables and panels.

It is made by the package wandb-workspaces (extra `panels`), and needs a login.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowmap.compare.finished import Finished, check_alike, read_runs, tabulated
from flowmap.compare.report import note, table
from flowmap.evaluation import tables
from flowmap.metrics import TRAIN
from flowmap.recipe.recipe import Recipe, read_resolved
from flowmap.train.wandb_log import first_line
from flowmap.train.wandb_panels import as_panels, installed, layout

LABELS = {
    "student": "student, {steps} step{s}",
    "teacher": "teacher, {steps} step{s}",
    "floor": "real against real",
}
INSTALL = "--to wandb: needs wandb-workspaces: pip install 'flowmap-distillation[panels]'"


def write_wandb_report(folders: Sequence[str | Path]) -> str:
    """Save a report of these runs in their W&B project and return its address. ValueError for a user's mistake."""
    if not installed():
        raise ValueError(INSTALL)
    runs = read_runs(folders, unfinished=True)
    recipes = [read_resolved(run.folder / "recipe.yaml") for run in runs]
    ids = [_id(run) for run in runs]
    projects = {recipe.log.project for recipe in recipes}
    if len(projects) > 1:
        raise ValueError(f"--to wandb: the runs are of several projects: {', '.join(sorted(projects))}")
    (project,) = projects
    entity = _entity(project, ids, runs)
    made = report_of(runs, recipes, ids, entity, project)
    made.save()
    return str(made.url)


def report_of(
    runs: Sequence[Finished], recipes: Sequence[Recipe], ids: Sequence[str], entity: str, project: str
) -> Any:
    """The report as an object of wandb-workspaces, which is not saved yet."""
    import wandb_workspaces.reports.v2 as reports

    blocks: list[Any] = []
    for name, panels in layout(recipes[0]).items():
        chosen = "ID in [" + ", ".join(repr(one) for one in ids) + "]"
        runset = reports.Runset(entity=entity, project=project, filters=chosen)
        blocks += [reports.H2(name), reports.PanelGrid(runsets=[runset], panels=as_panels(panels))]
    title = ", ".join(run.name for run in runs)[:128]
    texts = [reports.MarkdownBlock("\n".join(lines)) for lines in (_figures(runs), _league(runs)) if lines]
    return reports.Report(project=project, entity=entity, title=title, blocks=[*texts, *blocks])


def _figures(runs: Sequence[Finished]) -> list[str]:
    """The rows of each finished run's metrics.json as a table of Markdown."""
    lines = []
    for run in runs:
        if not run.metrics:
            continue
        names, rows = tables.tabulated(run.metrics, LABELS)
        shown = [i for i, name in enumerate(names) if not name.endswith(TRAIN)] or [*range(len(names))]
        lines += [f"## {run.name}", "", f"| | {' | '.join(names[i] for i in shown)} |", f"|---|{'---|' * len(shown)}"]
        lines += [f"| {key} | {' | '.join(row[i] for i in shown)} |" for key, row in rows.items()] + [""]
    return lines


def _league(runs: Sequence[Finished]) -> list[str]:
    """The tables of `compare --runs`, if the runs can be compared."""
    finished = [run for run in runs if run.metrics]
    try:
        if len(finished) < 2:
            return []
        check_alike(finished)
        found = tabulated(finished)
    except ValueError:
        return []
    lines = ["## Side by side", ""]
    for metric in [name for name in found["metrics"] if not name.endswith(TRAIN)] or found["metrics"]:
        lines += [f"### {metric}", "", table(found, metric, costs=False), ""]
    return [*lines, *note(found)]


def _id(run: Finished) -> str:
    path = run.folder / "wandb" / "run-id"
    if not path.is_file():
        raise ValueError(f"--to wandb: {run.folder} has no W&B run (log.wandb was off)")
    return path.read_text(encoding="utf-8").strip()


def _entity(project: str, ids: Sequence[str], runs: Sequence[Finished]) -> str:
    """The owner of the runs: that of W&B's settings, otherwise of the login.

    ValueError without a login, or if one of the runs is not in W&B.
    """
    import wandb

    try:
        api = wandb.Api()
        entity = str(api.settings["entity"] or api.default_entity)
    except Exception as error:  # no key, no network: W&B's errors have no common class
        raise ValueError(f"--to wandb: `wandb login` first ({first_line(error)})") from error
    for one, run in zip(ids, runs, strict=True):
        try:
            api.run(f"{entity}/{project}/{one}")
        except Exception as error:
            there = f"`wandb sync {run.folder}/wandb/offline-run-*` uploads an offline one"
            there += ", and WANDB_ENTITY=TEAM names the owner of another team's"
            raise ValueError(f"--to wandb: {entity}/{project} has no run {one} of {run.folder}; {there}") from error
    return entity
