"""Which checkpoints of a run are kept, which one it goes on from, and how a finished run is extended."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import bytes_of, spoil_average

import flowmap
from flowmap.base.files import read_json, read_tensors
from flowmap.base.schema import RecipeError
from flowmap.recipe.settings import Trainer
from flowmap.train.agree import Agree
from flowmap.train.checkpoint_file import checkpoint_step
from flowmap.train.checkpoints import drop_retired, repair, retire
from flowmap.train.fit import FitError, fit


def recipe_of(path, *overrides):
    return flowmap.read_recipe(path, overrides)


def quiet(message):
    pass


def steps_of(folder):
    """The checkpoints by name, each with the step that is in it."""
    names = sorted((folder / "checkpoints").iterdir())
    return {path.name: checkpoint_step(path) for path in names if path.name != "damaged.ckpt"}


KEEP = ("trainer.checkpoint_every_steps=3", "metrics=[]", "ema={kind: constant}")


def test_one_checkpoint_is_kept_unless_a_setting_keeps_more(tiny, tmp_path):
    fit(recipe_of(tiny, *KEEP), tmp_path / "one", log=quiet)
    assert steps_of(tmp_path / "one") == {"last.ckpt": 20}
    more = ("trainer.keep_checkpoints=3", "trainer.milestone_every_steps=8")
    fit(recipe_of(tiny, *KEEP, *more), tmp_path / "more", log=quiet)
    kept = {f"step-{step:08d}.ckpt": step for step in (8, 15, 16, 18)}
    assert steps_of(tmp_path / "more") == {"last.ckpt": 20, **kept}, "two before the last one, and milestones"
    student = "student/model.safetensors"
    assert (tmp_path / "one" / student).read_bytes() == (tmp_path / "more" / student).read_bytes()
    fit(recipe_of(tiny, *KEEP, *more, "seed=1"), tmp_path / "more", overwrite=True, log=quiet)
    assert len(steps_of(tmp_path / "more")) == 5, "the old run's are removed"


def test_how_many_are_kept_makes_no_other_run(tiny):
    one = recipe_of(tiny)
    more = ("trainer.keep_checkpoints=3", "trainer.milestone_every_steps=8", "trainer.checkpoint_every_minutes=5")
    other = recipe_of(tiny, *more)
    assert (one.hash(), one.training()) == (other.hash(), other.training())
    for setting in ("keep_checkpoints=0", "checkpoint_every_minutes=0", "milestone_every_steps=-1"):
        with pytest.raises(RecipeError, match=f"trainer.{setting.partition('=')[0]}"):
            recipe_of(tiny, f"trainer.{setting}")


def test_checkpoints_by_the_clock(tiny, tmp_path, monkeypatch):
    """A step takes a minute here; a checkpoint by steps also counts."""
    monkeypatch.setattr(
        "flowmap.train.stage.Agree", lambda minutes, at_once: Agree(minutes, at_once, now=lambda: 60.0 * next(clock))
    )
    clock = iter(range(10_000))
    saved = []
    monkeypatch.setattr("flowmap.train.callbacks.drop_retired", lambda folder, _: saved.append(step(folder)))
    step = lambda folder: checkpoint_step(folder / "checkpoints/last.ckpt")
    settings = ("trainer.checkpoint_every_steps=10", "trainer.checkpoint_every_minutes=5", *KEEP[1:])
    fit(recipe_of(tiny, *settings), tmp_path / "run", log=quiet)
    assert saved[-1] == 20 and 10 in saved and 2 < len(saved) < 8, saved


def test_a_run_that_diverges_does_not_replace_its_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    spoil_average(monkeypatch, 0, 14, float("nan"))
    with pytest.raises(FitError, match="not finite"):
        fit(recipe_of(tiny, *KEEP, "trainer.keep_checkpoints=2"), tmp_path / "run", log=quiet)
    assert steps_of(tmp_path / "run") == {"last.ckpt": 12, "step-00000009.ckpt": 9}


@pytest.mark.parametrize("how", ["torn", "removed"])
def test_the_checkpoint_before_is_used_if_the_last_one_is_damaged(tiny, tmp_path, monkeypatch, how):
    settings = (*KEEP, "trainer.keep_checkpoints=3")
    fit(recipe_of(tiny, *settings), tmp_path / "whole", log=quiet)
    spoil_average(monkeypatch, 0, 14, float("nan"))
    with pytest.raises(FitError):
        fit(recipe_of(tiny, *settings), tmp_path / "run", log=quiet)
    monkeypatch.undo()
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    last, before = (tmp_path / "run/checkpoints" / name for name in ("last.ckpt", "step-00000009.ckpt"))
    whole = before.read_bytes()
    before.write_bytes(whole[: len(whole) // 2])  # that one too
    if how == "torn":
        last.write_bytes(last.read_bytes()[:-100])
    else:
        last.unlink()
    said = []
    fit(recipe_of(tiny, *settings), tmp_path / "run", resume=True, log=said.append)
    what = "is damaged: is torn: File is not a zip file" if how == "torn" else "is missing"
    assert f"{last}: {what}; going on from step-00000006.ckpt instead" in said and "resuming at step 6" in said
    assert ("damaged.ckpt" in [path.name for path in last.parent.iterdir()]) == (how == "torn")
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    student = "student/model.safetensors"
    assert (tmp_path / "whole" / student).read_bytes() == (tmp_path / "run" / student).read_bytes()


def test_without_another_checkpoint_a_damaged_one_is_named(tiny, tmp_path):
    fit(recipe_of(tiny, *KEEP), tmp_path / "run", log=quiet)
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    repair(tmp_path / "run", quiet)
    (tmp_path / "run/metrics.json").unlink()
    with pytest.raises(RecipeError, match="--resume: .*last.ckpt: is not a whole checkpoint"):
        fit(recipe_of(tiny, *KEEP), tmp_path / "run", resume="auto", log=quiet)


def test_a_sharded_checkpoint_is_a_folder_that_is_kept_and_repaired_in_the_same_way(tmp_path):
    from flowmap.base.files import file_digest, write_json
    from flowmap.train.checkpoint_file import write_checkpoint

    def save(path, step):
        path.mkdir(parents=True)
        (path / "shard-00000.safetensors").write_bytes(bytes([step]))
        digest = {"shard-00000.safetensors": file_digest(path / "shard-00000.safetensors")}
        write_json(path / "index.json", {"shards": 1, "shapes": {}, "sha256": digest})
        write_checkpoint(path / "rest.ckpt", {"global_step": step})

    settings, last = Trainer(keep_checkpoints=2, milestone_every_steps=4), tmp_path / "checkpoints/last.ckpt"
    for step in (2, 4, 6, 8):
        retire(tmp_path, step - 2, settings)
        save(last, step)
        drop_retired(tmp_path, settings)
    names = sorted(path.name for path in last.parent.iterdir())
    assert names == ["last.ckpt", "step-00000004.ckpt", "step-00000006.ckpt"]
    (last / "shard-00000.safetensors").write_bytes(b"?")
    said = []
    repair(tmp_path, said.append)
    assert "(SHA-256); going on from step-00000006.ckpt instead" in said[0]
    assert (last / "shard-00000.safetensors").read_bytes() == bytes([6]) and (last.parent / "damaged.ckpt").is_dir()
    drop_retired(tmp_path, settings)
    assert (last.parent / "step-00000004.ckpt").is_dir()


CONSTANT = ("optimizer.schedule=constant", *KEEP)


def test_a_run_extended_at_a_constant_rate_is_the_longer_run(tiny, tmp_path):
    fit(recipe_of(tiny, *CONSTANT, "trainer.steps=30"), tmp_path / "long", log=quiet)
    fit(recipe_of(tiny, *CONSTANT), tmp_path / "run", log=quiet)
    before, said = read_json(tmp_path / "run/metrics.json"), []
    longer = recipe_of(tiny, *CONSTANT, "trainer.steps=30")
    run = fit(longer, tmp_path / "run", extend=True, log=said.append)
    assert said[0] == f"{tmp_path / 'run'}: extended from step 20: trainer.steps 20 -> 30"
    one, two = (read_tensors(tmp_path / name / "student/model.safetensors") for name in ("long", "run"))
    assert all(torch.equal(one[name], two[name]) for name in one) and run.metrics["student"]
    (change,) = read_json(tmp_path / "run/extended.json")["changes"]
    changed = {"trainer.steps": {"from": 20, "to": 30}}
    assert change == {"step": 20, "changed": changed, "student": before["student"]}
    files = bytes_of(tmp_path / "run")
    fit(longer, tmp_path / "run", extend=True, log=quiet)
    assert bytes_of(tmp_path / "run") == files, "the same command again finds it finished"


def test_an_extension_that_is_cut_off_goes_on(tiny, tmp_path, monkeypatch):
    fit(recipe_of(tiny, *KEEP), tmp_path / "run", log=quiet)
    spoil_average(monkeypatch, 0, 26, float("nan"))
    longer = recipe_of(tiny, *KEEP, "trainer.steps=30", "optimizer.lr=0.001", "optimizer.schedule=linear")
    with pytest.raises(FitError):
        fit(longer, tmp_path / "run", extend=True, log=quiet)
    monkeypatch.undo()
    fit(longer, tmp_path / "run", resume="auto", log=quiet)
    (change,) = json.loads((tmp_path / "run/extended.json").read_text())["changes"]
    assert set(change["changed"]) == {"trainer.steps", "optimizer.lr", "optimizer.schedule"}
    assert steps_of(tmp_path / "run") == {"last.ckpt": 30}


def test_an_extension_refuses_what_it_cannot_do_in_one_line(tiny, tmp_path, command):
    out = tmp_path / "run"
    with pytest.raises(RecipeError, match=r"--extend: .* has no run"):
        fit(recipe_of(tiny), out, extend=True, log=quiet)
    fit(recipe_of(tiny, *KEEP), out, log=quiet)
    files = bytes_of(out)
    for settings, message in (
        (("trainer.steps=30", "data.batch_size=8"), "first difference: data.batch_size, 16 there and 8 here"),
        (("trainer.steps=15",), "trainer.steps: 15 must be above 20, the steps that the run has made"),
        (("optimizer.lr=0.5",), "trainer.steps: 20 must be above 20"),
    ):
        code, _, err = command("fit", "--recipe", tiny, "--out", out, "--extend", *KEEP, *settings)
        assert code == 2 and message in err and len(err.splitlines()) == 1, err
    for also in (("--extend", "--overwrite"), ("--resume", "auto", "--overwrite")):
        code, _, err = command("fit", "--recipe", tiny, "--out", out, *KEEP, *also)
        assert code == 2 and "--overwrite: starts a new run" in err, err
    code, _, err = command("fit", "--recipe", tiny, "--out", out, "--resume", "auto", "seed=3", *KEEP)
    assert code == 2 and "first difference: seed" in err, "auto overwrites nothing"
    assert bytes_of(out) == files


def test_resume_auto_waits_for_the_process_that_still_ends_in_the_folder(tiny, tmp_path, monkeypatch, command):
    from flowmap.base import files

    holder = files.only_process(tmp_path / "run")
    holder.__enter__()
    monkeypatch.setattr(files.time, "sleep", lambda seconds: holder.__exit__(None, None, None))
    code, _, err = command("fit", "--recipe", tiny, *KEEP, "--out", tmp_path / "run", "--resume", "auto")
    assert code == 0 and "another flowmap process is filling" in err
    monkeypatch.undo()
    code, _, err = command("fit", "--recipe", tiny, "--out", tmp_path / "run", "--resume", *KEEP)
    assert code == 0 and "complete in" in err
    assert command("fit", "--recipe", tiny, "--resume", "never")[0] == 2
