"""The search of settings for each number of steps: it finds the best of a known distance, checks it, and writes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flowmap
from flowmap.base.files import read_json, write_json
from flowmap.evaluation import tune as module
from flowmap.evaluation.tune import Distance, EveryOther, best_of, candidates, start_of, tune
from flowmap.student.tuned import Tuned


class Known:
    """A distance with its minimum at gamma 0.6 and 0.8 as the middle time; the check has its own offset."""

    key, worse = "frechet_pixels", False

    def __init__(self, recipe, student, data, spec, key, first):
        self.first = first

    def __call__(self, settings):
        found = abs(settings.gamma - 0.6) + sum(abs(t - 0.8) for t in settings.middle)
        return 1 - found if self.first and self.worse else found


def test_one_setting_after_another_finds_the_best_of_a_separable_distance(finished):
    student = flowmap.load_student(finished)
    student.config = replace(student.config, guidance=(1.0, 3.0, 2.0))
    distance = lambda one: (one.guidance - 1.5) ** 2 + (one.gamma - 0.3) ** 2 + sum((t - 0.67) ** 2 for t in one.middle)
    start = start_of(student, 2)
    assert start == Tuned(2, 2.0, 0.0, (0.5,))
    best, least = best_of(start, distance(start), distance, lambda one: candidates(student, one, None, module.GAMMAS))
    assert best == Tuned(2, 1.5, 0.3, (0.6667,)) and least == pytest.approx(distance(best))


def test_what_is_found_is_written_and_used(finished, command, monkeypatch):
    monkeypatch.setattr(module, "Distance", Known)
    before = read_json(finished / "student" / "config.json")
    code, out, _ = command("tune", "--student", finished, "--dry-run")
    assert code == 0 and read_json(finished / "student" / "config.json") == before
    assert "2 steps, gamma 0.6, middle 0.8" in out and "1 steps: no better in the check" in out
    assert command("tune", "--student", finished)[0] == 0
    after = read_json(finished / "student" / "config.json")
    assert after == before | {"tuned": {"2": {"guidance": None, "gamma": 0.6, "middle": [0.8]}}}
    assert flowmap.load_student(finished).config.sampler_at(2).gamma == 0.6


def test_settings_that_the_check_does_not_confirm_are_not_written(finished, monkeypatch):
    monkeypatch.setattr(module, "Distance", Known)
    monkeypatch.setattr(Known, "worse", True)
    assert not any(one.better for one in tune(finished, [2]))
    assert "tuned" not in read_json(finished / "student" / "config.json")


def test_search_and_check_have_other_noise_and_other_samples(finished, monkeypatch):
    made = []

    class Watched(Distance):
        def __init__(self, recipe, student, data, spec, key, first):
            super().__init__(recipe, student, data, spec, key, first)
            made.append((recipe.evaluation.seed, self.rows.built[0][1].real[""].rows, self))

    monkeypatch.setattr(module, "Distance", Watched)
    (found,) = tune(finished, [2], gammas=[0.0, 0.5], images=64)
    assert found.after[0] <= found.before[0]
    (search, one, _), (check, other, distance) = made
    assert search != check and len(one) == len(other)
    assert not set(one.places.tolist()) & set(other.places.tolist())
    assert distance(start_of(flowmap.load_student(finished), 2)) == pytest.approx(found.before[1])


def test_evaluate_measures_by_them_and_says_so(finished):
    plain = flowmap.evaluate(finished, [1, 2], teacher=False)
    student = flowmap.load_student(finished)
    student.config = replace(student.config, tuned=(Tuned(2, gamma=0.9, middle=(0.8,)),))
    tuned = flowmap.evaluate(student, [1, 2], teacher=False)
    assert "tuned" not in plain and tuned["tuned"] == {"2": {"guidance": None, "gamma": 0.9, "middle": [0.8]}}
    assert tuned["student"]["1"] == plain["student"]["1"] and tuned["student"]["2"] != plain["student"]["2"]


def test_every_other_row_is_read_by_index():
    rows = EveryOther(torch.arange(9)[:, None], 1)
    assert rows.shape == (4, 1) and rows[:].flatten().tolist() == [1, 3, 5, 7] and rows[torch.tensor([2])].item() == 5


def test_mistakes_are_one_line(finished, command):
    for arguments, says in (
        (("--metric", "fid"), "--metric: 'fid' is not one of frechet_pixels"),
        (("--seed", 1234), "--seed: 1234 is the seed of evaluation"),
    ):
        code, _, err = command("tune", "--student", finished, *arguments)
        assert code == 2 and says in err and err.count("\n") == 1
    path = finished / "student" / "config.json"
    config = read_json(path)
    write_json(path, config | {"sampler": config["sampler"] | {"kind": "anchored"}})
    code, _, err = command("tune", "--student", finished)
    assert code == 2 and "only students that are flow maps" in err
