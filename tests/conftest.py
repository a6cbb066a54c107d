"""Shared fixtures: a tiny recipe and a tiny flow as text, a tiny finished run, the command in this process."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import flowmap
from flowmap.base import preempt

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

flowmap.allow_import("tests.support.straight")  # networks that tests name in settings

# files that take 15 seconds or more: with them last, one process of two would wait for the other
LONGEST = (
    "test_compiled.py", "test_measured_again.py", "test_run_folder.py", "test_readme.py", "test_compare.py",
    "test_custom.py", "test_make_pairs.py", "test_stock.py", "test_bad_teachers.py", "test_dry_run.py", "test_split.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Begin with the longest files; xdist hands files out in this order (--no-loadscope-reorder).

    What is imported by now is left out of garbage collection, which then takes half the time.
    """
    gc.collect()
    gc.freeze()
    items.sort(key=lambda item: item.path.name not in LONGEST)


TINY = """\
name: tiny
data: {kind: toy, batch_size: 16, conditional: false, points: 500}
teacher: {card: exact}
student: {kind: mlp, width: 16, depth: 1}
times: {kind: mixture, base: {kind: interval}, diagonal: 0.25}
objective: {kind: ayf_emd, warmup_steps: 12}
optimizer: {lr: 1.0e-2, schedule: cosine}
sampler: {kind: deterministic, steps: [1, 2]}
trainer: {steps: 20, checkpoint_every_steps: 6, accelerator: cpu}
ema: {kind: power, std: 0.1, snapshot_stds: [0.05, 0.1], snapshot_every_steps: 5}
metrics: [{kind: frechet, features: pixels, images: 100}]
evaluation: {teacher_steps: 4, batch_size: 200}
log: {wandb: false, every_steps: 1, grid_images: 16}
"""

FLOW = """\
name: flow
data: {kind: toy, points: 200, batch_size: 16, drop_condition: 0.1}
student: {kind: mlp, width: 16, depth: 1}
times: {kind: uniform}
objective: {kind: flow_matching}
optimizer: {lr: 1.0e-2}
sampler: {kind: deterministic, steps: [2]}
trainer: {steps: 4, accelerator: cpu}
log: {wandb: false, every_steps: 1, grid_images: 4}
"""


@pytest.fixture(autouse=True)
def signals():
    """The handlers are again those of before: a command that was asked to end leaves signals ignored."""
    before = {number: signal.getsignal(number) for number in (*preempt.SIGNALS, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler or signal.SIG_DFL)


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A recipe of twenty small steps in a folder of its own, where its runs go as well."""
    monkeypatch.setenv("FLOWMAP_RUNS", str(tmp_path / "runs"))
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def _finished(tmp_path_factory) -> Path:
    import flowmap

    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    flowmap.fit(flowmap.read_recipe(folder / "tiny.yaml"), folder / "run", log=lambda message: None)
    return folder / "run"


@pytest.fixture
def finished(_finished, tmp_path) -> Path:
    """A finished run of the tiny recipe, a copy that the test may spoil."""
    return Path(shutil.copytree(_finished, tmp_path / "finished"))


@pytest.fixture
def command(capsys):
    """command(*arguments) -> (exit code, stdout, stderr) of `flowmap arguments`, run inside this process."""
    from flowmap.cli import main

    def call(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as error:  # argparse's way
            code = error.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def no_runs(folder: Path) -> set[str]:
    """The files in that run folder that are not in the list of files that a run writes.

    Overwriting the run would not remove them.
    """
    from flowmap.train.run_folder import written

    return set(bytes_of(folder)) - {str(path.relative_to(folder)) for path in written(folder)}


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below that folder, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def spoil_average(monkeypatch, which, at, value):
    """From here on that average of a run is not finite from step `at` on."""
    from flowmap.train.module import DistillModule

    original = DistillModule.average

    def average(self):
        original(self)
        if self.global_step == at:
            next(self.averages[which].parameters())[0, 0] = value

    monkeypatch.setattr(DistillModule, "average", average)
