"""Two runs that need the same untrained run, or the same data on disk: the second waits for the first."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import flowmap
from flowmap.base import files
from flowmap.base.files import only_process
from flowmap.plan.plan import Pairing, plan
from flowmap.plan.run_folders import dependency_folder
from flowmap.train.fit import fit


def recipe_of(path, *overrides):
    return flowmap.read_recipe(path, overrides)


def quiet(message):
    pass


@pytest.fixture
def taught(tiny, tmp_path):
    """Recipes of a teacher, a student of it, and one on its pairs; nothing is trained."""
    short = tiny.read_text().replace("steps: 20", "steps: 4")
    flow = re.sub(r"teacher: .*\n|objective: .*\n|ema: .*\n", "", short).replace("name: tiny", "name: flow")
    (tmp_path / "flow.yaml").write_text(flow + "objective: {kind: flow_matching}\n")
    student = short.replace("name: tiny", "name: taught").replace(
        "{card: exact}", f"{{recipe: {tmp_path / 'flow.yaml'}}}"
    )
    (tmp_path / "taught.yaml").write_text(student)
    teacher = f"{{recipe: {tmp_path / 'flow.yaml'}}}"
    pairs = "objective: {kind: rectified}\n"
    pairs += f"coupling: {{kind: pairs, teacher: {teacher}, num: 40, shard_items: 20}}\n"
    (tmp_path / "paired.yaml").write_text(flow.replace("name: flow", "name: paired") + pairs)
    return tmp_path


@pytest.fixture
def while_waiting(monkeypatch):
    """while_waiting(folder, *looks): another process has the folder's lock; it calls looks[n] at the n-th attempt."""

    def holding(folder: Path, *looks) -> None:
        holder, left = only_process(folder), list(looks)
        holder.__enter__()

        def sleep(seconds):
            left.pop(0)()
            if not left:
                holder.__exit__(None, None, None)

        monkeypatch.setattr(files.time, "sleep", sleep)

    return holding


def test_a_teacher_that_another_process_trains_is_waited_for(taught, tmp_path, monkeypatch, while_waiting):
    flow = recipe_of(taught / "flow.yaml")
    folder = dependency_folder(flow)
    fit(flow, tmp_path / "made", log=quiet)
    made = tmp_path / "made/student/model.safetensors"
    while_waiting(folder, lambda: None, lambda: shutil.copytree(tmp_path / "made", folder, dirs_exist_ok=True))
    said = []
    run = fit(recipe_of(taught / "taught.yaml"), tmp_path / "run", log=said.append)
    assert said[1] == f"[1/2] flow: another flowmap process is filling {folder}; waiting for it"
    assert said[2] == f"[1/2] flow: complete in {folder}, made by another process"
    assert (folder / "student/model.safetensors").read_bytes() == made.read_bytes() and run.metrics["student"]


def test_a_teacher_whose_process_died_is_trained(taught, tmp_path, while_waiting):
    folder = dependency_folder(recipe_of(taught / "flow.yaml"))
    while_waiting(folder, lambda: None)
    said = []
    fit(recipe_of(taught / "taught.yaml"), tmp_path / "run", log=said.append)
    assert sum("waiting for it" in line for line in said) == 1 and not any("made by another" in line for line in said)
    assert (folder / "metrics.json").is_file()


@pytest.mark.parametrize("lock", [".process-0-of-1", ".process-last"])
def test_pairs_that_another_process_makes_are_waited_for(taught, tmp_path, monkeypatch, while_waiting, lock):
    recipe = recipe_of(taught / "paired.yaml")
    fit(recipe_of(taught / "flow.yaml"), log=quiet)
    (pairing,) = (stage for stage in plan(recipe, tmp_path / "run") if isinstance(stage, Pairing))
    while_waiting(pairing.folder / lock, lambda: None, lambda: None)
    said = []
    fit(recipe, tmp_path / "run", log=said.append)
    assert pairing.complete and (sum("waiting for it" in line for line in said) == 1) == (lock == ".process-0-of-1")


def test_the_folder_of_the_run_itself_is_not_waited_for_unless_it_is_shared(taught, tmp_path, command, while_waiting):
    with only_process(tmp_path / "run"):
        code, _, err = command("fit", "--recipe", taught / "flow.yaml", "--out", tmp_path / "run")
        assert code == 2 and err.splitlines() == [
            f"flowmap: {tmp_path / 'run'}: another flowmap process is filling this folder; "
            "wait for it or choose another"
        ]
    while_waiting(tmp_path / "run", lambda: None)
    fit(recipe_of(taught / "flow.yaml"), tmp_path / "run", log=quiet, shared=True)  # as compare trains a teacher


def train(recipe: str, out: str, runs: str, die: bool) -> None:
    torch.set_num_threads(1)
    os.environ["FLOWMAP_RUNS"] = runs
    sys.stderr = open(f"{out}.log", "w", buffering=1)
    if die:
        from flowmap.train.module import DistillModule

        original = DistillModule.training_step

        def slowly(self, batch, batch_idx):
            Path(f"{out}.begun").touch()
            while Path(f"{out}.wait").exists():
                time.sleep(0.05)
            return original(self, batch, batch_idx)

        DistillModule.training_step = slowly
    fit(recipe_of(recipe), out)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_two_processes_that_need_one_teacher(taught, tmp_path, dies):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowmap.train.fit", "flowmap.metrics.frechet", "sklearn.datasets"])
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    Path(f"{one}.wait").touch()
    recipe, runs = str(taught / "taught.yaml"), str(tmp_path / "runs")
    first, second = (context.Process(target=train, args=(recipe, out, runs, out == one)) for out in (one, two))
    first.start()
    until(lambda: Path(f"{one}.begun").exists())
    second.start()
    until(lambda: Path(f"{two}.log").exists() and "waiting for it" in Path(f"{two}.log").read_text())
    if dies:
        os.kill(first.pid, signal.SIGKILL)
    Path(f"{one}.wait").unlink()
    for process in (first, second):
        process.join(300)
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL if dies else 0, 0)
    assert ("made by another process" in Path(f"{two}.log").read_text()) == (not dies)
    assert (tmp_path / "two/metrics.json").is_file() and len(list((tmp_path / "runs").iterdir())) == 1


def until(done, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)
