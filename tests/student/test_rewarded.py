"""Sampling a student by a reward: from Python and from the command line, on its grid, with each sample its own."""

from __future__ import annotations

import pytest
import torch

import flowmap
from flowmap.metrics.rewards import Ink
from flowmap.recipe import read_recipe
from flowmap.samplers import Tilted


def right(x, cond):
    return x[:, 0]


def test_samples_of_a_reward_are_better_and_each_is_its_own(finished):
    student = flowmap.load_student(finished)
    plain = student.sample(40, steps=2, seed=3)
    tilted = Tilted(reward=right, scale=8.0, particles=8, moves=2)
    found = student.sample(40, steps=2, seed=3, reward=tilted)
    assert found.shape == plain.shape and float(right(found, None).mean()) > float(right(plain, None).mean()) + 0.2
    torch.testing.assert_close(student.sample(7, steps=2, seed=3, reward=tilted), found[:7])
    torch.testing.assert_close(student.sample(40, steps=2, seed=3, reward=tilted, batch_size=16), found)
    assert not torch.equal(student.sample(40, steps=2, seed=4, reward=tilted), found)
    by_function = student.sample(40, steps=2, seed=3, reward=right)
    assert torch.equal(by_function, student.sample(40, steps=2, seed=3, reward=Tilted(reward=right)))


def test_what_a_reward_excludes_is_said(finished):
    student = flowmap.load_student(finished)
    for options in ({"gamma": 0.5}, {"solver": "heun"}):
        with pytest.raises(ValueError, match="exclude one another"):
            student.sample(4, steps=2, reward=right, **options)


def test_from_the_command_line(finished, command, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def right(x, cond):\n    return x[:, 0]\n")
    draw = ("sample", "--student", finished, "--num", 20, "--steps", 2, "--out", tmp_path / "out")
    code, _, err = command(*draw, "--reward", "mine:right")
    assert code == 2 and "reward.function: 'mine:right' names code" in err and err.count("\n") == 1
    tilt = ("--tilt", "scale=8", "particles=4", "moves=1")
    code, _, err = command(*draw, "--import", tmp_path / "mine.py", "--reward", "mine:right", *tilt)
    assert code == 0, err
    rows = [line.split(",") for line in (tmp_path / "out" / "steps-2.csv").read_text().splitlines()]
    wanted = Tilted(reward=right, scale=8.0, particles=4, moves=1)
    assert float(rows[0][0]) == pytest.approx(
        float(flowmap.load_student(finished).sample(20, 2, reward=wanted)[0, 0]), 1e-4
    )
    for arguments, says in (
        (("--reward", "inc"), "reward.kind: no 'inc', did you mean 'ink'"),
        (("--reward", "ink", "size=3"), "reward.size: no such setting"),
        (("--reward", "ink", "--tilt", "particles=0"), "particles: 0 must be 1 or more"),
        (("--tilt", "particles=2"), "--tilt: goes with --reward"),
        (("--reward", "ink", "--gamma", 0.5), "exclude one another"),
    ):
        code, _, err = command(*draw, *arguments)
        assert code == 2 and says in err and err.count("\n") == 1


def test_a_recipe_may_have_it_as_its_sampler(tiny):
    recipe = read_recipe(tiny, ["sampler.kind=tilted", "sampler.reward={kind: ink}", "sampler.particles=3"])
    assert recipe.sampler == Tilted(reward=Ink(), particles=3)
