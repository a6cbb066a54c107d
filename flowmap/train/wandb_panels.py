"""The layout of panels in W&B, and the saved view of a project that has it.

W&B offers views only through the package wandb-workspaces (extra `panels`), and only online. An offline run has the
same names, whose first part is the section in which W&B puts a panel by itself.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from flowmap.base.images import steps_name
from flowmap.base.progress import LogFunction
from flowmap.recipe.recipe import Recipe

PACKAGE = "wandb_workspaces"
STEP = "trainer/global_step"  # the step of every figure
VIEW = "flowmap"  # the name of the view


@dataclass(frozen=True)
class Lines:
    """Curves against training steps: those of the keys, or of all keys that the regular expression matches."""

    title: str
    keys: tuple[str, ...] = ()
    regex: str | None = None


@dataclass(frozen=True)
class Pictures:
    """Pictures that are logged under these keys, with a slider of the step."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    key: str


Panel = Lines | Pictures | Table


def layout(recipe: Recipe) -> dict[str, list[Panel]]:
    """The panels of each section, in their order."""
    names = [steps_name(k) for k in recipe.sampler.steps] + ["teacher"] * (recipe.teacher is not None)
    keys = [getattr(spec, "key", None) for spec in recipe.metrics]
    metrics: list[Panel] = [Lines(key, regex=rf"metrics(_of_\d+)?/{key}/\d+") for key in dict.fromkeys(keys) if key]
    return {
        "samples": [Pictures(tuple(f"samples/{name}" for name in names)), Table("samples/table")],
        "metrics": metrics or [Lines("metrics", regex=r"metrics(_of_\d+)?/.*")],
        "training": [
            Lines("loss", ("train/loss",)),
            Lines("residual norm", ("train/residual_norm",)),
            Lines("tangent norm", ("train/tangent_norm",)),
            Lines("tangent against difference", ("train/tangent_against_difference",)),
            Lines("learning rate", ("train/lr",)),
        ],
        "by time": [
            Lines("loss by time", regex=r"by_time/loss_t.*"),
            Lines("residual norm by time", regex=r"by_time/residual_norm_t.*"),
            Lines("tangent norm by time", regex=r"by_time/tangent_norm_t.*"),
        ],
        "speed": [
            Lines("seconds a step", ("speed/step_seconds",)),
            Lines("images a second", ("speed/images_per_second",)),
            Lines("memory, GiB", ("speed/memory_gib",)),
        ],
    }


def installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def as_panels(panels: list[Panel]) -> list[Any]:
    """The panels as those of wandb-workspaces."""
    import wandb_workspaces.reports.v2 as reports

    made: list[Any] = []
    for panel in panels:
        if isinstance(panel, Lines):
            options = {"metric_regex": panel.regex} if panel.regex else {"y": list(panel.keys)}
            made.append(reports.LinePlot(title=panel.title, x=STEP, **options))
        elif isinstance(panel, Pictures):
            made.append(reports.MediaBrowser(media_keys=list(panel.keys), num_columns=1))
        else:
            made.append(reports.WeavePanelSummaryTable(table_name=panel.key))
    return made


def workspace(recipe: Recipe, entity: str, project: str) -> Any:
    """The view as an object of wandb-workspaces, which is not saved yet; W&B adds all other keys by itself."""
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(name=name, panels=as_panels(panels), is_open=name in ("samples", "metrics", "training"))
        for name, panels in layout(recipe).items()
    ]
    settings = workspaces.WorkspaceSettings(x_axis=STEP)
    options = dict(entity=entity, project=project, name=VIEW, sections=sections, settings=settings)
    return workspaces.Workspace(**options, auto_generate_panels=True)


def save_view(run: Any, recipe: Recipe, log: LogFunction) -> None:
    """Save the view in the run's project if the run is its first; does nothing without the extra.

    Later runs leave it alone, so that a project has one view, and keeps what its user makes of it.
    """
    if not installed() or not _is_first(run):
        return
    view = workspace(recipe, run.entity, run.project)
    view.save()
    log(f"W&B: the view {VIEW!r} of the panels: {view.url}")


def _is_first(run: Any) -> bool:
    import wandb

    others = wandb.Api().runs(f"{run.entity}/{run.project}", filters={"name": {"$ne": run.id}}, per_page=1)
    return len(others) == 0
