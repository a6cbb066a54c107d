"""Charts, best figures and the layout of panels of a run in W&B, without a W&B run."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest

import flowmap
from flowmap.train import logging, wandb_log, wandb_panels
from flowmap.train.wandb_charts import Best, Chart, charts_of
from flowmap.train.wandb_log import _Lasting
from flowmap.train.wandb_panels import Lines, Pictures, Table, layout, save_view

METRICS = {
    "student": {"1": {"recall_pixels": 0.5, "recall_pixels_train": 0.7}, "2": {"recall_pixels": 0.6}},
    "teacher": {"nfe": 8, "steps": 8, "recall_pixels": 0.9},
    "teacher_few": {"1": {"recall_pixels": 0.1}, "2": {"recall_pixels": math.nan}},
    "floor": {"recall_pixels": 0.95},
}


def test_a_metric_is_drawn_against_the_number_of_steps():
    (chart,) = charts_of(METRICS, [])
    assert chart == Chart(
        "recall_pixels_by_steps",
        "recall_pixels by number of steps",
        "steps",
        {
            "student": [(1, 0.5), (2, 0.6)],
            "teacher": [(1, 0.1)],
            "teacher, 8 steps": [(1, 0.9), (2, 0.9)],
            "real": [(1, 0.95), (2, 0.95)],
        },
    )
    assert charts_of({"student": {"1": {"rmse": 0.5}}}, []) == [], "one point is no chart"


def test_figures_by_time_are_drawn_at_even_training_steps():
    rows = [
        {"step": str(i), "by_time/loss_t0.50-0.75": str(i + 0.5), "by_time/loss_t0.00-0.25": str(i)} for i in range(101)
    ]
    (chart,) = charts_of({"student": {}}, rows)
    assert chart.name == "loss_by_time" and chart.x == "t"
    assert [*chart.lines] == ["step 1", "step 26", "step 51", "step 76", "step 101"]
    assert chart.lines["step 26"] == [(0.125, 25.0), (0.625, 25.5)]


def test_the_best_figure_is_the_least_distance_and_the_greatest_recall():
    best = Best([{"metrics/frechet_pixels/1": "3.0", "train/loss": "1.0"}])
    assert best.update({"metrics/frechet_pixels/1": 4.0, "metrics/recall_pixels/1": 0.2}) == {
        "best/recall_pixels/1": 0.2
    }
    assert best.update({"metrics/recall_pixels/1": 0.1, "metrics/frechet_pixels/1": math.nan}) == {}
    assert best.update({"metrics_of_64/cmmd/2": 2.0}) == {"best_of_64/cmmd/2": 2.0}
    assert best.values["best/frechet_pixels/1"] == 3.0 and "best/loss" not in best.values


def test_charts_and_best_figures_reach_the_run(monkeypatch):
    logged, summary = [], {}
    logger = _Lasting(print, project="p", mode="disabled")
    logger._experiment = SimpleNamespace(log=logged.append, summary=summary)
    logger.log_metrics({"metrics/cmmd/1": 2.0}, 3)
    logger.log_chart(Chart("c_by_steps", "c", "steps", {"a": [(1, 2.0)], "b": [(1, 3.0), (2, 4.0)]}), 3)
    assert logged[0] == {"metrics/cmmd/1": 2.0, "trainer/global_step": 3} and summary == {"best/cmmd/1": 2.0}
    chart = logged[1]["charts/c_by_steps"]
    assert chart.table.columns == ["step", "lineKey", "lineVal"]
    assert chart.table.data == [[1, "a", 2.0], [1, "b", 3.0], [2, "b", 4.0]]


def test_in_a_sweep_the_run_has_the_id_of_the_agent(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "of-agent")
    own = wandb_log._id(tmp_path, 0)
    assert own != "of-agent" and wandb_log._id(tmp_path, 5) == own
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert wandb_log._id(tmp_path, 5) == "of-agent" == (tmp_path / "wandb" / "run-id").read_text()


def test_in_a_sweep_a_needed_run_is_not_recorded_in_wandb(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "wandb_logger", lambda *_: "of W&B")
    monkeypatch.setenv("WANDB_MODE", "offline")
    lines, stage = [], SimpleNamespace(recipe=flowmap.read_recipe("digits", ["log.wandb=true"]), folder=tmp_path)
    assert logging.loggers_of(stage, 0, lines.append, needed=True)[1:] == ["of W&B"] and not lines
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert logging.loggers_of(stage, 0, lines.append)[1:] == ["of W&B"] and not lines
    assert not logging.loggers_of(stage, 0, lines.append, needed=True)[1:]
    assert len(lines) == 1 and "digits is in log.csv alone" in lines[0]


def test_the_layout_has_every_step_and_every_distance():
    sections = layout(flowmap.read_recipe("digits"))
    assert [*sections] == ["samples", "metrics", "training", "by time", "speed"]
    pictures, table = sections["samples"]
    assert pictures == Pictures(("samples/1 step", "samples/2 steps", "samples/4 steps", "samples/teacher"))
    assert table == Table("samples/table")
    assert Lines("frechet_pixels", regex=r"metrics(_of_\d+)?/frechet_pixels/\d+") in sections["metrics"]


@pytest.mark.parametrize(("others", "saves"), [(0, 1), (1, 0)])
def test_the_first_run_of_a_project_saves_the_view(monkeypatch, others, saves):
    import wandb

    made, lines = [], []
    view = SimpleNamespace(save=lambda: made.append(1), url="the address")
    monkeypatch.setattr(wandb_panels, "workspace", lambda *names: view)
    monkeypatch.setattr(wandb_panels, "installed", lambda: True)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda *a, **k: [None] * others))
    run = SimpleNamespace(entity="me", project="p", id="abc")
    save_view(run, flowmap.read_recipe("digits"), lines.append)
    assert len(made) == len(lines) == saves and all("the address" in line for line in lines)


def test_a_view_that_cannot_be_saved_is_one_line(monkeypatch):
    def fail(*_):
        raise ConnectionError("no answer\nat all")

    monkeypatch.setattr(wandb_log, "save_view", fail)
    lines = []
    wandb_log._save_view(None, SimpleNamespace(recipe=None), lines.append)
    assert lines == ["W&B: no view of the panels is saved (no answer)"]


def test_the_view_is_one_of_wandb_workspaces(monkeypatch):
    pytest.importorskip("wandb_workspaces")
    view = wandb_panels.workspace(flowmap.read_recipe("digits"), "me", "p")._to_model()
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    sections = {one["name"]: one["panels"] for one in spec["section"]["panelBankConfig"]["sections"]}
    assert [*sections] == ["samples", "metrics", "training", "by time", "speed"]
    assert sections["samples"][0]["config"]["mediaKeys"][0] == "samples/1 step"
    assert sections["training"][0]["config"]["metrics"] == ["train/loss"]
    assert "wandb_workspaces" in sys.modules
