"""A run removes only what a run wrote from its folder, and an old run only once a new one has a checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import bytes_of

import flowmap
from flowmap.train import run_folder
from flowmap.train.fit import FitError, fit
from flowmap.train.module import DistillModule
from flowmap.train.run_folder import written

THEIRS = (
    ".git/config",
    "main.py",
    "notes.md",
    "student/notes.md",
    "student/.git/HEAD",
    "samples/mine.png",
    "samples/step-by-step.png",
)
THEIRS += (".hidden.tmp", ".git/.index.7.tmp", "checkpoints/best.ckpt", "wandb/settings", "wandb/data/mine.csv")


def recipe_of(path, *overrides):
    return flowmap.read_recipe(path, overrides)


def quiet(message):
    pass


def with_theirs(folder: Path) -> Path:
    """That folder with files of the user's in it, each of which holds its own name."""
    for name in THEIRS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def assert_theirs(folder: Path) -> None:
    assert [name for name in THEIRS if not (folder / name).is_file() or (folder / name).read_text() != name] == []


def hidden(folder: Path) -> list[str]:
    return [name for name in bytes_of(folder) if run_folder.ASIDE in name or run_folder.REPLACING in name]


def test_the_list_has_every_file_of_a_run(finished):
    assert {str(path.relative_to(finished)) for path in written(finished)} == set(bytes_of(finished))


def test_only_temporary_files_of_a_run_are_swept(tmp_path):
    ours = (
        "checkpoints/.last.ckpt.17.tmp",
        ".metrics.json.3.tmp",
        "student/prior/.config.json.12.tmp",
        "samples/.step-00000020.png.5.tmp",
    )
    theirs = (
        "mine.tmp",
        ".hidden",
        ".last.ckpt.17.tmp",
        "deep/.x.3.tmp",
        ".metrics.json.old.tmp",
        "samples/.mine.png.5.tmp",
    )
    for name in (*ours, *theirs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    run_folder.sweep(tmp_path)
    assert set(bytes_of(tmp_path)) == set(theirs)
    run_folder.sweep(tmp_path / "nowhere")


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tiny, finished):
    with_theirs(finished)
    stale = finished / "samples/step-00000099.png"
    shutil.copy(finished / "samples/step-00000020.png", stale)
    fit(recipe_of(tiny, "seed=1", "ema.snapshot_every_steps=0"), finished, overwrite=True, log=quiet)
    assert_theirs(finished)
    assert not stale.exists() and not list(finished.glob("ema/*")) and hidden(finished) == []
    assert set(bytes_of(finished)) - set(THEIRS) == {str(path.relative_to(finished)) for path in written(finished)}


def test_a_folder_that_no_run_wrote_is_left_alone(tiny, tmp_path, command):
    mine = tmp_path / "mine"
    mine.mkdir()
    for text in ("seed: 1\nobjective: {kind: ayf_emd}\n", tiny.read_text() + "# mine\n"):
        (mine / "recipe.yaml").write_text(text)
        for flags in ((), ("--resume",), ("--overwrite",)):
            code, _, err = command("fit", "--recipe", tiny, "--out", mine, *flags)
            assert code == 2 and "recipe.yaml is of no run" in err
            assert bytes_of(mine) == {"recipe.yaml": text.encode()}


@pytest.mark.parametrize(
    "name", ["''", ".", "..", "a/b", "/tmp", "a\\b", "x" * 101, "ä" * 101, '"a\\nb"', '"a\\0b"', '"\\u202e"']
)
def test_a_name_is_the_name_of_one_folder(tiny, tmp_path, command, name):
    with_theirs(tmp_path / "runs" / "other")
    before = bytes_of(tmp_path)
    for flags in ((), ("--overwrite",), ("--dry-run",)):
        code, _, err = command("fit", "--recipe", tiny, f"name={name}", *flags)
        assert code == 2 and ": name: " in err and len(err.splitlines()) == 1, err
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize(
    "bad", ["optimizer.betas=[-1,0.9]", "student.kind=from_teacher", "trainer.accelerator=abacus", "data.points=0"]
)
def test_what_is_refused_leaves_the_run_as_it_was(tiny, finished, command, bad):
    before = bytes_of(finished)
    code, _, err = command("fit", "--recipe", tiny, "--out", finished, "--overwrite", bad)
    assert code == 2 and len([line for line in err.splitlines() if line.startswith("flowmap: ")]) == 1, err
    assert bytes_of(finished) == before


@pytest.mark.parametrize("step", [0, 5])
def test_a_run_that_fails_before_its_first_checkpoint_gives_the_old_one_back(tiny, finished, monkeypatch, step):
    before, said = bytes_of(with_theirs(finished)), []
    failing_at(monkeypatch, step)
    with pytest.raises(RuntimeError, match="as arranged"):
        fit(recipe_of(tiny, "seed=1"), finished, overwrite=True, log=said.append)
    assert bytes_of(finished) == before
    assert "the run that was there is back" in said[-1]


def test_a_run_that_fails_after_its_first_checkpoint_has_replaced_the_old_one(tiny, finished, monkeypatch):
    with_theirs(finished)
    failing_at(monkeypatch, 6)
    with pytest.raises(RuntimeError, match="as arranged"):
        fit(recipe_of(tiny, "seed=1"), finished, overwrite=True, log=quiet)
    assert (
        "seed: 1\n" in (finished / "recipe.yaml").read_text()
        and not (finished / "metrics.json").exists()
        and hidden(finished) == []
    )
    monkeypatch.undo()
    fit(recipe_of(tiny, "seed=1"), finished, resume=True, log=quiet)
    assert_theirs(finished)


def failing_at(monkeypatch, step: int) -> None:
    original = DistillModule.training_step

    def fail(self, batch, batch_idx):
        if self.global_step == step:
            raise RuntimeError("as arranged")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DistillModule, "training_step", fail)


def killed_while_overwriting(recipe: str, out: str, owner: str, name: str, count: int) -> None:
    """Train that recipe with another seed over `out`; kill its process before the count-th call of that function."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")
    place = {"path": Path, "module": DistillModule, "folder": run_folder}[owner]
    original, left = getattr(place, name), [count]

    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(place, name, call)
    fit(recipe_of(recipe, "seed=1"), out, overwrite=True)


def kill(*arguments) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowmap.train.fit", "flowmap.metrics.frechet", "sklearn.datasets"])
    process = context.Process(target=killed_while_overwriting, args=tuple(map(str, arguments[:-1])) + arguments[-1:])
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [("path", "rename", 4), ("folder", "write_text", 0), ("module", "training_step", 5)],
)
def test_a_process_that_is_killed_before_its_first_checkpoint_loses_nothing(tiny, finished, owner, name, count):
    before, said = bytes_of(with_theirs(finished)), []
    kill(tiny, finished, owner, name, count)
    assert bytes_of(finished) != before
    fit(recipe_of(tiny), finished, log=said.append)
    assert bytes_of(finished) == before
    assert "complete in" in said[-1] and (len(said) == 1 or "this one is back" in said[0])


def test_putting_back_may_be_killed_as_well(tiny, finished, monkeypatch):
    before = bytes_of(with_theirs(finished))
    kill(tiny, finished, "module", "training_step", 5)
    for owner, name, count in ((Path, "unlink", 1), (Path, "unlink", 1), (Path, "rename", 3)):
        with monkeypatch.context() as patch:
            original, calls = getattr(owner, name), iter(range(1000))

            def stop(self, *args, original=original, calls=calls, count=count, **kwargs):
                if next(calls) == count:
                    raise KeyboardInterrupt
                return original(self, *args, **kwargs)

            patch.setattr(owner, name, stop)
            with pytest.raises(KeyboardInterrupt):
                fit(recipe_of(tiny), finished, log=quiet)
    fit(recipe_of(tiny), finished, log=quiet)
    assert bytes_of(finished) == before


@pytest.mark.parametrize("count", [0, 3])
def test_a_process_that_is_killed_with_its_first_checkpoint_has_replaced_the_old_run(
    tiny, finished, monkeypatch, count
):
    with_theirs(finished)
    original, calls = Path.unlink, iter(range(1000))

    def stop(self, *args, **kwargs):
        if self.name.startswith(run_folder.ASIDE) and next(calls) == count:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        patch.setattr("flowmap.train.stage.put_back", lambda folder: False)  # a killed process does not come to that
        with pytest.raises(KeyboardInterrupt):
            fit(recipe_of(tiny, "seed=1"), finished, overwrite=True, log=quiet)
    assert hidden(finished)
    said = []
    fit(recipe_of(tiny, "seed=1"), finished, resume=True, log=said.append)
    assert "resuming at step 6" in said and hidden(finished) == []
    assert_theirs(finished)


def test_a_symbolic_link_is_followed_and_kept(tiny, finished, tmp_path, command):
    link, before = tmp_path / "link", bytes_of(with_theirs(finished))
    link.symlink_to(finished, target_is_directory=True)
    assert command("fit", "--recipe", tiny, "--out", link)[0] == 0 and bytes_of(finished) == before
    code, _, err = command("fit", "--recipe", tiny, "--out", link, "--overwrite", "seed=1")
    assert code == 0, err
    assert link.is_symlink() and link.resolve() == finished and "seed: 1\n" in (finished / "recipe.yaml").read_text()
    assert_theirs(finished)


def test_a_symbolic_link_to_no_folder_is_refused(tiny, tmp_path, command):
    for name, target in (("dangling", tmp_path / "nowhere"), ("file", tiny), ("loop", tmp_path / "loop")):
        (tmp_path / name).symlink_to(target)
        before = bytes_of(tmp_path)
        for flags in ((), ("--overwrite",)):
            code, _, err = command("fit", "--recipe", tiny, "--out", tmp_path / name, *flags)
            assert code == 2 and "--out: " in err and "is a symbolic link to" in err and len(err.splitlines()) == 1, err
        assert bytes_of(tmp_path) == before and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("step", [0, 8])
def test_no_second_fit_gets_into_the_folder_of_an_overwriting_one(tiny, finished, monkeypatch, step):
    tried, original = [], DistillModule.training_step

    def second(self, batch, batch_idx):
        if self.global_step == step:
            for flags in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(ValueError, match="another flowmap process is filling this folder"):
                    fit(recipe_of(tiny, "seed=1"), finished, log=quiet, **flags)
                tried.append(step)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DistillModule, "training_step", second)
    fit(recipe_of(tiny, "seed=1"), finished, overwrite=True, log=quiet)
    assert len(tried) == 3


def test_a_run_that_is_refused_leaves_no_folder(tiny, tmp_path, command):
    assert command("fit", "--recipe", tiny, "--out", tmp_path / "a" / "b", "optimizer.betas=[-1,0.9]")[0] == 2
    assert not (tmp_path / "a").exists()


def test_a_run_that_stops_is_said_once(tiny, finished, monkeypatch):
    monkeypatch.setattr("flowmap.train.module.torch.isfinite", lambda value: torch.zeros_like(value, dtype=torch.bool))
    before = bytes_of(finished)
    with pytest.raises(FitError, match="at step 0 .*no checkpoint was kept yet"):
        fit(recipe_of(tiny, "seed=1"), finished, overwrite=True, log=quiet)
    assert bytes_of(finished) == before
