"""The file of a W&B sweep: W&B's agent makes of it a command that `flowmap fit` takes, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml

import flowmap
from flowmap.cli.parser import parse
from flowmap.metrics.direction import direction
from flowmap.plan.sweep import sweep_of

SETTINGS = ["optimizer.lr=1e-5..1e-2:log", "objective.warmup_steps=10..100", "sampler.steps=[1,2],[1]", "seed=3"]


def of(settings=SETTINGS, recipe="digits", **options):
    return yaml.safe_load(sweep_of(recipe, settings, **options).text)


def test_ranges_choices_and_the_figure_that_is_optimised():
    found = of(metric="recall_pixels", steps=2, runs=7)
    assert (found["method"], found["run_cap"]) == ("bayes", 7)
    assert found["metric"] == {"name": "metrics/recall_pixels/2", "goal": "maximize"}
    assert of()["metric"] == {"name": "metrics/frechet_pixels/1", "goal": "minimize"}
    assert found["parameters"] == {
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
        "objective.warmup_steps": {"distribution": "int_uniform", "min": 10, "max": 100},
        "sampler.steps": {"values": [[1, 2], [1]]},
    }
    assert of(["optimizer.schedule=constant,cosine"])["method"] == "grid"
    assert of(["optimizer.lr=0.1..0.2"])["parameters"]["optimizer.lr"]["distribution"] == "uniform"


def test_the_figure_has_the_name_that_a_run_logs():
    nothing_held_out = [*SETTINGS, "data.held_out=0"]
    for metric in ("recall_pixels", "recall_pixels_train"):
        assert of(nothing_held_out, metric=metric)["metric"]["name"] == "metrics/recall_pixels_train/1"


def test_the_better_direction_of_what_was_asked_for():
    for name in ("tag_hit/1", "tags_exactly", "sentiment_hit/4", "style_hit", "phrase_hit_even", "infilled_bleu/2"):
        assert direction(name) == 1, name
    assert [direction(name) for name in ("tag_chance", "phrase_chance", "frechet_pixels/1")] == [0, 0, -1]


def test_a_sweep_over_sentences_finds_the_share_of_tags():
    found = of(["seed=1,2", "log.wandb=true"], "language/wordnet-tags", metric="tag_hit")["metric"]
    assert found["name"].startswith("metrics/tag_hit/") and found["goal"] == "maximize"
    for name in ("part_of_speech_hit", "length_within", "phrase_hit", "phrase_hit_even"):  # by the recipe's attributes
        found = of(["seed=1,2", "log.wandb=true"], "language/wordnet", metric=name)["metric"]
        assert found["name"].startswith(f"metrics/{name}/") and found["goal"] == "maximize"


def test_the_command_of_the_agent_is_one_of_fit(tmp_path, monkeypatch):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    given = {"optimizer.lr": 1.2345e-05, "objective.warmup_steps": 37, "sampler.steps": [1, 2]}
    macros = create_sweep_command_args({"args": {key: {"value": value} for key, value in given.items()}})
    macros["env"] = ["/usr/bin/env"]
    command = []
    for word in create_sweep_command(of()["command"]):  # as wandb_agent.py does
        command += macros[word[2:-1]] if word.startswith("${") else [word]
    stand_in = tmp_path / "flowmap"
    stand_in.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stand_in.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc123"}
    words = json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout)
    a = parse(words)
    assert (a.verb, a.recipe, a.out) == ("fit", "digits", "runs/digits-sweep/abc123")
    recipe = flowmap.read_recipe(a.recipe, a.overrides)
    assert (recipe.optimizer.lr, recipe.objective.warmup_steps, recipe.seed) == (1.2345e-05, 37, 3)
    assert tuple(recipe.sampler.steps) == (1, 2)


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        (["seed=3"], {}, "no setting has several values"),
        (["optimizer.lr=1..0.1"], {}, "the lower end first"),
        (["optimizer.lr=0..1:log"], {}, ":log wants a range of fractions above 0"),
        (["optimizer.lr=-1.0..1.0"], {}, "optimizer.lr"),
        (["optimizer.lrr=0.1,0.2"], {}, "did you mean 'lr'"),
        (["optimizer.schedule=cosine,cosin"], {}, "cosin"),
        (["objective.warmup_steps=0.5..2"], {}, "warmup_steps"),
        (["student.dropout=null,0.1"], {}, "null cannot be a value of a sweep"),
        (["log.wandb=false", "seed=1,2"], {}, "log.wandb: false"),
        (["seed=1,2"], {"metric": "recal"}, "'recal' is not one of frechet_pixels"),
        (["seed=1,2"], {"runs": 0}, "--runs: 0 must be 1 or more"),
        (["seed=1,2"], {"steps": 3}, "--steps: 3 is not one of the recipe's: 1, 2, 4"),
        (["seed=1..2"], {"method": "grid"}, "grid wants values, and seed is a range"),
        (["seed=1..2"], {"method": "hill"}, "'hill' is not one of bayes, random, grid"),
    ],
)
def test_what_a_run_would_refuse_is_refused_now(settings, options, says):
    with pytest.raises(ValueError, match=".") as caught:
        sweep_of("digits", settings, **options)
    assert says in str(caught.value)


def test_the_verb_writes_the_file_and_replaces_no_other(tmp_path, command):
    file = tmp_path / "sweep.yaml"
    words = ("sweep", "--recipe", "digits", "optimizer.lr=1e-4,1e-3", "--out", file)
    code, out, err = command(*words)
    assert code == 0 and f"wandb sweep {file}" in out, err
    assert yaml.safe_load(file.read_text())["parameters"] == {"optimizer.lr": {"values": [1e-4, 1e-3]}}
    assert command(*words)[0] == 0
    file.write_text("method: grid\n")
    code, _, err = command(*words)
    assert code == 2 and "was not written by `flowmap sweep`" in err


def test_the_schema_of_the_sweeps_engine_is_met():
    engine = pytest.importorskip("sweeps")
    for settings in (SETTINGS, ["seed=1,2,3"]):
        assert engine.schema_violations_from_proposed_config(of(settings, runs=3)) == []
