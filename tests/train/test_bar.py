"""Progress of a training run where stderr is no terminal: its lines, when they come, and the residual norm in them."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from flowmap.flow.types import Loss
from flowmap.recipe import read_recipe
from flowmap.train.bar import Bar, shown
from flowmap.train.csv_log import read_log
from flowmap.train.fit import fit


class Hands:
    at = 0.0

    def __call__(self) -> float:
        return self.at


def module(**logs):
    return SimpleNamespace(last_loss=Loss(torch.tensor(0.8123), logs))


def lines(steps: int, seconds: float, *, every: int = 1, start: int = 0, zero: bool = True, **logs) -> list[str]:
    """What a run of so many steps says, each of which takes so many seconds."""
    hands, said = Hands(), []
    bar, trainer = (
        Bar(every, said.append, hands),
        SimpleNamespace(global_step=start, max_steps=steps, is_global_zero=zero),
    )
    bar.on_train_start(trainer, module())
    for done in range(start + 1, steps + 1):
        hands.at += seconds
        bar.at(trainer, module(**logs), done)
    bar.on_train_end(trainer, module())
    return said


def test_a_line_says_step_loss_residual_speed_and_the_time_left():
    said = lines(100, 10.0, every=50, residual_norm=torch.tensor([0.04, 0.046]))
    assert said == [
        "step 1/100  loss 0.812  residual 0.043",
        "step 50/100  loss 0.812  residual 0.043  0.1 it/s  8:20 left",
        "step 100/100  loss 0.812  residual 0.043  0.1 it/s  0:00 left",
    ]


def test_fast_steps_have_a_line_every_ten_seconds_and_the_last_one():
    said = lines(105, 0.5)
    assert [int(re.match(r"step (\d+)/105", line)[1]) for line in said] == [1, 21, 41, 61, 81, 101, 105]
    assert all("residual" not in line for line in said), "the objective has none"
    assert said[1] == "step 21/105  loss 0.812  2 it/s  0:42 left"


def test_a_resumed_run_counts_its_own_steps_for_the_speed():
    assert lines(100, 20.0, every=50, start=98) == [
        "step 99/100  loss 0.812",
        "step 100/100  loss 0.812  0.05 it/s  0:00 left",
    ]


def test_only_the_first_process_speaks():
    assert lines(5, 20.0, zero=False) == []


def test_a_run_says_what_its_log_says(tiny, tmp_path):
    said = []
    fit(read_recipe(tiny), tmp_path / "run", log=said.append)
    found = [line for line in said if line.startswith("step ")]
    assert len(found) == 2 and found[0].startswith("step 1/20  loss ") and found[1].startswith("step 20/20  loss ")
    last = read_log(tmp_path / "run" / "log.csv")[-1]
    assert f"loss {float(last['train/loss']):.3g}  residual {float(last['train/residual_norm']):.3g}  " in found[1]
    assert [line for line in said if line.startswith("evaluating")][:2] == [
        "evaluating: student 1 step",
        "evaluating: student 2 steps",
    ]


def test_a_terminal_has_a_bar_with_the_residual_norm(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    said = []
    fit(read_recipe(tiny), tmp_path / "run", log=said.append)
    assert not [line for line in said if line.startswith("step ")]
    assert re.search(r"/20 .*loss=[\d.e-]+, residual=[\d.e-]+", capsys.readouterr().err)


def test_before_the_first_step_there_is_nothing_to_show():
    with pytest.raises(AssertionError, match="no step"):
        shown(SimpleNamespace(last_loss=None))


def test_the_measurement_during_training_logs_its_progress(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("flowmap.train.callbacks.paced", lambda log: log)  # every line, not one in 10 seconds
    said = []
    fit(read_recipe(tiny, ["trainer.steps=6", "log.metrics_every_steps=3"]), tmp_path / "run", log=said.append)
    during = said[: next(i for i, line in enumerate(said) if line.startswith("step 6/6"))]
    assert "evaluating: student 1 step" in during and "evaluating: real against real" in during
