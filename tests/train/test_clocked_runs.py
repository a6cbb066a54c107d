"""A run on a clock ends after the step in which its seconds are spent; what happens between steps does not count."""

from __future__ import annotations

import json

import pytest

import flowmap
from flowmap.objectives import OBJECTIVES
from flowmap.train import callbacks
from flowmap.train.clock import SETTLING, Clock
from flowmap.train.fit import FitError, fit
from flowmap.train.pictures import Pictures
from flowmap.train.strategy import read_checkpoint
from tests.support.slow_clock import HANDS, Slow


@pytest.fixture
def slow(tiny, monkeypatch):
    """read(*overrides): the tiny recipe, whose steps take time by the hands alone."""
    monkeypatch.setitem(OBJECTIVES, "slow", Slow)
    HANDS.at = 0.0
    return lambda *overrides: flowmap.read_recipe(tiny, ["objective={kind: slow}", "metrics=[]", *overrides])


def quiet(message): ...


def test_it_ends_when_its_seconds_are_spent_and_leaves_a_whole_run(slow, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks.Keep, "check", lambda self, module, done: setattr(HANDS, "at", HANDS.at + 100))
    clock = Clock(7.0, HANDS)
    run = fit(slow(), tmp_path / "run", log=quiet, clock=clock)
    assert (clock.seconds, clock.steps, clock.spent) == (7.0, 7, True)
    assert clock.step_seconds == 1.0 and HANDS.at > 100
    assert run.student.config.step == 7 and json.loads((tmp_path / "run" / "metrics.json").read_text())["student"] == {
        "1": {},
        "2": {},
    }


def test_with_time_left_it_runs_to_its_last_step(slow, tmp_path):
    clock = Clock(1000.0, HANDS)
    assert fit(slow(), tmp_path / "run", log=quiet, clock=clock).student.config.step == 20
    assert clock.seconds == 20 and not clock.spent


def test_the_first_steps_are_not_counted_in_the_time_of_a_step():
    class Trainer:
        global_step, should_stop = 0, False

    clock, trainer = Clock(now=HANDS), Trainer()
    clock.on_train_start(trainer, None)
    for cost in (50,) * SETTLING + (2, 4, 6):
        HANDS.at += cost
        trainer.global_step += 1
        clock.on_train_batch_end(trainer, None, None, None, 0)
        clock.restart.on_train_batch_end(trainer, None, None, None, 0)
    assert clock.step_seconds == 4 and not trainer.should_stop


def test_a_resumed_run_goes_on_with_the_seconds_that_it_has_used(slow, tmp_path, monkeypatch):
    recipe = slow("objective.cost=2.0")

    def stop(self, trainer, module, done):
        if done == 9:
            raise FitError("stopped from outside")

    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "at", stop)
        with pytest.raises(FitError):
            fit(recipe, tmp_path / "run", log=quiet, clock=Clock(24.0, HANDS))
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6
    clock = Clock(24.0, HANDS)
    assert fit(recipe, tmp_path / "run", resume=True, log=quiet, clock=clock).student.config.step == 12
    assert clock.seconds == 24.0
