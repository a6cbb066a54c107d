"""A report in W&B: what is wrong is one line, and the report is one of wandb-workspaces with the runs' panels."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from flowmap.compare import wandb_report
from flowmap.compare.finished import read_runs
from flowmap.compare.wandb_report import report_of, write_wandb_report
from flowmap.recipe.recipe import read_resolved


@pytest.fixture
def logged_in(monkeypatch):
    """A login to a W&B that has the runs in the list that it returns."""
    import wandb

    there = []

    def run(path):
        if path not in there:
            raise ValueError("not found")

    api = lambda: SimpleNamespace(settings={"entity": os.environ.get("WANDB_ENTITY")}, default_entity="me", run=run)
    monkeypatch.setattr(wandb, "Api", api)
    monkeypatch.setattr(wandb_report, "installed", lambda: True)
    return there


def test_without_the_package_a_run_or_a_login_it_is_one_line(finished, logged_in, monkeypatch, command):
    import wandb

    for more in (("--no-draw",), ("--device", "cpu")):
        code, _, err = command("report", finished, "--to", "wandb", *more)
        assert code == 2 and err.startswith(f"flowmap: {more[0]}: goes with --to html")
    code, _, err = command("report", finished, "--to", "wandb", "--out", "x.html")
    assert code == 2 and "--out: is the file of --to html" in err
    with pytest.raises(ValueError, match="has no W&B run"):
        write_wandb_report([finished])
    (finished / "wandb").mkdir()
    (finished / "wandb" / "run-id").write_text("abc")
    with pytest.raises(ValueError, match=r"me/flowmap has no run abc of .*; `wandb sync .* WANDB_ENTITY=TEAM"):
        write_wandb_report([finished])

    def fails():
        raise ConnectionError("no key\nat all")

    monkeypatch.setattr(wandb, "Api", fails)
    with pytest.raises(ValueError, match=r"`wandb login` first \(no key\)$"):
        write_wandb_report([finished])
    monkeypatch.setattr(wandb_report, "installed", lambda: False)
    code, _, err = command("report", finished, "--to", "wandb")
    assert code == 2 and "pip install 'flowmap-distillation[panels]'" in err


def test_a_report_is_saved_and_its_address_printed(finished, logged_in, monkeypatch, command):
    (finished / "wandb").mkdir()
    (finished / "wandb" / "run-id").write_text("abc")
    logged_in.append("me/flowmap/abc")
    saved, given = [], []
    made = SimpleNamespace(save=lambda: saved.append(1), url="the address")
    monkeypatch.setattr(wandb_report, "report_of", lambda runs, recipes, *rest: given.append(rest) or made)
    code, out, err = command("report", finished, "--to", "wandb")
    assert code == 0 and out.strip() == "the address" and saved == [1], err
    assert given == [(["abc"], "me", "flowmap")]


def test_a_run_of_another_team_is_found(finished, logged_in, monkeypatch):
    (finished / "wandb").mkdir()
    (finished / "wandb" / "run-id").write_text("abc")
    logged_in.append("team/flowmap/abc")
    with pytest.raises(ValueError, match="me/flowmap has no run abc"):
        wandb_report._entity("flowmap", ["abc"], read_runs([finished], unfinished=True))
    monkeypatch.setenv("WANDB_ENTITY", "team")
    assert wandb_report._entity("flowmap", ["abc"], read_runs([finished], unfinished=True)) == "team"


def test_the_report_is_one_of_wandb_workspaces(finished, monkeypatch):
    pytest.importorskip("wandb_workspaces")
    from wandb_workspaces.reports.v2 import interface

    monkeypatch.setattr(interface, "_get_api", lambda: None)  # it would ask for the project's number
    monkeypatch.setattr(interface, "execute_graphql", lambda *_: {"project": {"internalId": "7"}})
    runs = read_runs([finished], unfinished=True)
    made = report_of(runs, [read_resolved(finished / "recipe.yaml")], ["abc"], "me", "flowmap")
    spec = json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    text = json.dumps(spec)
    assert "frechet_pixels" in text and "student, 1 step" in text and "train/loss" in text and '"abc"' in text
