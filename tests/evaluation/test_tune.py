"""The search of settings for each number of steps: it finds the best of a known distance, checks it, and writes it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import flowmap
from flowmap.base.files import read_json, read_tensors, write_json, write_tensors
from flowmap.evaluation import journal
from flowmap.evaluation import tune as module
from flowmap.evaluation.halving import Round, halved, rounds_of
from flowmap.evaluation.tune import EveryOther, Measured, candidates, start_of, tune
from flowmap.metrics import Frechet
from flowmap.student.tuned import Figure, Tuned


class Known:
    """A distance with its minimum at gamma 0.6 and 0.8 as the middle time; the check has its own offset."""

    worse, drawn, fails_after = False, [], None

    def __init__(self, recipe, student, data, specs, first):
        self.first, self.samples = first, specs[0].images

    def __call__(self, settings):
        if self.fails_after is not None and len(self.drawn) >= self.fails_after:
            raise KeyboardInterrupt
        self.drawn.append((settings, self.samples))
        found = abs(settings.gamma - 0.6) + sum(abs(t - 0.8) for t in settings.middle)
        return {"frechet_pixels": 1 - found if self.first and self.worse else found, "recall_pixels": 0.5}


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(module, "Measured", Known)
    monkeypatch.setattr(Known, "drawn", [])
    return Known


def test_every_round_has_a_quarter_of_the_settings_on_three_times_the_samples():
    assert rounds_of(100, 900) == [Round(100, 100), Round(25, 300), Round(7, 900)]
    assert rounds_of(3, 900) == [Round(3, 100), Round(1, 300), Round(1, 900)]
    assert rounds_of(100, 100) == [Round(100, 64), Round(25, 100)], "64 samples at least"
    assert rounds_of(5, 50) == [Round(5, 50)] and rounds_of(0, 900) == [Round(0, 900)]


def test_halving_finds_the_best_of_noisy_distances_for_a_quarter_of_the_samples():
    """The noise of a distance falls as 1/sqrt(samples). In 200 searches the mean rank of what is found is compared with
    that of measuring all on as many samples in total.
    """
    values, ranks, cost = [i / 100 for i in range(100)], {"halved": 0, "even": 0}, 0

    def distance(one, samples):
        nonlocal cost
        cost += samples
        return values[one] + generator.gauss(0, 3 / samples**0.5)

    for seed in range(200):
        generator = random.Random(seed)
        ranks["halved"] += halved(50, range(100), 900, distance)[0]
        even = cost // (seed + 1) // 101
        ranks["even"] += min(range(100), key=lambda one: values[one] + generator.gauss(0, 3 / even**0.5))
    assert cost / 200 < 0.3 * 101 * 900 and ranks["halved"] < 0.7 * ranks["even"]


def test_the_start_is_compared_in_every_round_and_nothing_is_chosen_for_not_being_finite():
    seen = []

    def distance(one, samples):
        seen.append((one, samples))
        return float("nan") if one == 1 else float(samples == 900) if one == 0 else 2.0 - (one == 9) / 2

    assert halved(0, range(10), 900, distance) == (0, 1.0, 1.0)
    assert [samples for one, samples in seen if one == 0] == [100, 300, 900] and seen.count((9, 900)) == 1
    assert halved(5, [1], 900, lambda one, samples: float("nan") if one == 1 else 7.0)[0] == 5


def test_all_combinations_are_candidates_with_the_students_own_settings(finished):
    student = flowmap.load_student(finished)
    student.config = replace(student.config, guidance=(1.0, 3.0, 2.1))
    start = start_of(student, 2)
    assert start == Tuned(2, 2.1, 0.0, (0.5,))
    found = candidates(student, start, None, module.GAMMAS)
    assert len(set(found)) == len(found) == 6 * 4 * 5 and start in found
    assert Tuned(2, 1.5, 0.3, (0.6667,)) in found
    assert {one.guidance for one in found} == {1.0, 1.5, 2.0, 2.1, 2.5, 3.0}
    given = candidates(student, start, [4.0], [0.5], [])
    assert given == [Tuned(2, 4.0, 0.5, (0.5,))]
    assert {one.gamma for one in candidates(student, start_of(student, 1), None, (0.3, 0.6))} == {0.0}


def test_what_is_found_is_written_with_its_figures_and_used(finished, command, known):
    folder = finished / "student"
    before = read_json(folder / "config.json")
    code, out, _ = command("tune", "--student", finished, "--no-write")
    assert code == 0 and read_json(folder / "config.json") == before and not (folder / "tuning.json").exists()
    assert "2 steps, gamma 0.6, middle 0.8" in out and "1 step: nothing is better than the student's own" in out
    assert "2 steps, check: recall_pixels 0.5 -> 0.5" in out
    assert command("tune", "--student", finished)[0] == 0
    after, figures = read_json(folder / "config.json"), known(None, None, None, [Frechet()], 1)
    was, now = figures(Tuned(2, None, 0.0, (0.5,)))["frechet_pixels"], figures(Tuned(2, None, 0.6, (0.8,)))
    rows = [
        {"metric": "frechet_pixels", "before": was, "after": now["frechet_pixels"]},
        {"metric": "recall_pixels", "before": 0.5, "after": 0.5},
    ]
    assert after == before | {"tuned": {"2": {"guidance": None, "gamma": 0.6, "middle": [0.8], "figures": rows}}}
    config = flowmap.load_student(finished).config
    assert config.sampler_at(2).gamma == 0.6 and config.tuned_at(2).figures[0] == Figure("frechet_pixels", was, 0.0)
    assert not (folder / "tuning.json").exists()


def test_settings_that_the_check_does_not_confirm_are_not_written(finished, known, monkeypatch):
    monkeypatch.setattr(Known, "worse", True)
    assert not any(one.better for one in tune(finished, [2]))
    assert "tuned" not in read_json(finished / "student" / "config.json")


def test_a_search_that_was_cut_off_measures_nothing_twice(finished, known, monkeypatch):
    whole = tune(finished, [2], write=False)
    drawn, Known.drawn = Known.drawn, []
    monkeypatch.setattr(journal, "PAUSE", 1e9)  # it is written when the search ends, however it ends
    monkeypatch.setattr(Known, "fails_after", 7)
    with pytest.raises(KeyboardInterrupt):
        tune(finished, [2])
    assert len(read_json(finished / "student" / "tuning.json")["found"]) == 7
    monkeypatch.setattr(Known, "fails_after", None)
    assert tune(finished, [2]) == whole and Known.drawn == drawn
    assert not (finished / "student" / "tuning.json").exists()


def test_figures_of_other_weights_or_of_another_search_are_measured_anew(finished, known, monkeypatch):
    def cut_off(**options):
        Known.drawn = []
        monkeypatch.setattr(Known, "fails_after", 3)
        with pytest.raises(KeyboardInterrupt):
            tune(finished, [2], **options)
        assert len(Known.drawn) == 3

    cut_off()
    cut_off(seed=5)
    weights = finished / "student" / "model.safetensors"
    write_tensors(weights, {name: 2 * value for name, value in read_tensors(weights).items()})
    cut_off(seed=5)
    (finished / "student" / "tuning.json").write_text("{")  # torn
    cut_off(seed=5)


def test_a_dry_run_says_what_would_be_measured_and_draws_nothing(finished, command, known):
    code, out, _ = command("tune", "--student", finished, "--dry-run")
    assert code == 0 and not Known.drawn
    assert "2 steps: settings 19 on 64 samples, 5 on 100 samples; 4,160 calls of the student" in out
    assert "1 step: settings 0 on 100 samples; 300 calls" in out


def test_search_and_check_have_other_noise_and_other_samples(finished, monkeypatch):
    made = []

    class Watched(Measured):
        def __init__(self, recipe, student, data, specs, first):
            super().__init__(recipe, student, data, specs, first)
            made.append((recipe.evaluation.seed, self.rows.built[0][1].real[""].rows, self))

    monkeypatch.setattr(module, "Measured", Watched)
    (found,) = tune(finished, [2], gammas=[0.0, 0.5], images=64)
    assert found.search[1] <= found.search[0]
    (search, one, _), (check, other, figures) = made
    assert search != check and len(one) == len(other)
    assert not set(one.places.tolist()) & set(other.places.tolist())
    assert figures(start_of(flowmap.load_student(finished), 2)) == pytest.approx(found.check[0])


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


@pytest.mark.parametrize("arguments, says", [
    (("--metric", "fid"), "--metric: 'fid' is not one of frechet_pixels"),
    (("--seed", 1234), "--seed: 1234 is the seed of evaluation"),
    (("--scales", 2), "--scales: this student was not trained with a guidance scale"),
    (("--gammas", 1.5), "--gammas: 1.5 must lie in 0..1"),
    (("--shifts", 0), "--shifts: 0.0 must be above 0"),
    (("--steps", 2, 0), "--steps: 0 must be 1 or more"),
    (("--images", 1), "--images: 1 must be 2 or more"),
])  # fmt: skip
def test_mistakes_are_one_line(finished, command, arguments, says):
    for verb in (("tune",), ("tune", "--dry-run")):
        code, _, err = command(*verb, "--student", finished, *arguments)
        assert code == 2 and says in err and err.count("\n") == 1


def test_a_student_of_another_sampler_is_refused(finished, command):
    path = finished / "student" / "config.json"
    config = read_json(path)
    write_json(path, config | {"sampler": config["sampler"] | {"kind": "anchored"}})
    code, _, err = command("tune", "--student", finished)
    assert code == 2 and "only students that are flow maps" in err
