"""A run that is killed with SIGKILL anywhere and resumed is bit-equal: weights, averages, optimizer, losses."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import TINY  # noqa: E402

DIGITS = """\
name: tiny-digits
data: {kind: digits, batch_size: 8, drop_condition: 0.3}
student: {kind: dit, preset: nano, depth: 1}
objective: {kind: ayf_emd, warmup_steps: 8}
optimizer: {lr: 1.0e-3, schedule: cosine, warmup_steps: 4, clip_norm: 1.0}
sampler: {kind: deterministic, steps: [1, 2]}
trainer: {steps: 12, checkpoint_every_steps: 4, accumulate: 2, accelerator: cpu}
ema: {kind: constant, decay: 0.9}
metrics: [{kind: frechet, features: pixels, images: 100}]
log: {wandb: false, every_steps: 1, samples_every_steps: 4, grid_images: 4}
"""


def train(recipe: str, out: str, die: dict | None) -> None:
    """Runs or goes on with the recipe; `die` says at which moment this process kills itself."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")
    import flowmap

    if die is not None:
        _arrange_death(**die)
    flowmap.fit(flowmap.read_recipe(recipe), out, resume=True)


def _arrange_death(kind: str, count: int) -> None:
    """Before the count-th training step, inside the count-th write of a file (half written), or before a rename."""
    from flowmap.train.module import DistillModule

    left = [count]

    def passed() -> bool:
        left[0] -= 1
        return left[0] < 0

    def wrap(owner, name: str, before) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if passed():
                before(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    if kind == "step":
        wrap(DistillModule, "training_step", lambda *a: None)
    elif kind == "rename":
        wrap(os, "replace", lambda *a: None)
    else:
        wrap(torch, "save", lambda state, path: Path(path).write_bytes(b"PK\x03\x04 half a checkpoint"))


DROPPED = DIGITS.replace(
    "{kind: dit, preset: nano, depth: 1}",
    "{kind: edm2, channels: 8, multipliers: [1, 2], num_blocks: 1, attention_at: [], dropout: 0.3}",
).replace("{kind: ayf_emd, warmup_steps: 8}", "{kind: psd}")


def in_process(recipe: Path, out: Path, die: dict | None = None) -> int:
    """The exit code of `train` in a clean process, forked from one that has already imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowmap.train.fit", "flowmap.metrics.frechet", "sklearn.datasets"])
    process = context.Process(target=train, args=(str(recipe), str(out), die))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def assert_same_run(a: Path, b: Path) -> None:
    same = [
        p
        for name in ("student", "ema", "samples")
        for p in sorted((a / name).rglob("*"))
        if p.is_file() and p.name != "README.md"
    ]
    assert len(same) >= 3
    for path in same:
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes(), path
    one, two = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (a, b))
    assert one["global_step"] == two["global_step"]
    _assert_equal(one["state_dict"], two["state_dict"], "state_dict")
    _assert_equal(one["optimizer_states"], two["optimizer_states"], "optimizer_states")
    assert trace(a) == trace(b)
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (a, b))
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in two.items() if k != "seconds"}
    assert not list(b.rglob(".*.tmp")), "a killed process's temporary files stay behind"


def _assert_equal(a, b, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            _assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def trace(run: Path) -> list[dict[str, str]]:
    """The loss trace as text: speed apart, every column of every step."""
    from flowmap.train.csv_log import read_log

    return [
        {key: value for key, value in row.items() if not key.startswith("speed/")} for row in read_log(run / "log.csv")
    ]


def killed_until_done(recipe: Path, out: Path, deaths: list[dict]) -> int:
    """How many of the deaths took place; afterwards the run is resumed to its end."""
    killed = 0
    for die in deaths:
        code = in_process(recipe, out, die)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
    assert in_process(recipe, out) == 0
    return killed


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_left_alone(recipe, tmp_path):
    assert in_process(recipe, tmp_path / "whole") == 0
    assert len(trace(tmp_path / "whole")) == 20
    deaths = [{"kind": "step", "count": 9}, {"kind": "save", "count": 0}, {"kind": "rename", "count": 7}]
    assert killed_until_done(recipe, tmp_path / "killed", deaths) == 3
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_dropouts_masks_are_those_of_the_run_that_was_left_alone(tmp_path):
    """Torch's own generator, which EDM2's dropout draws from, stands elsewhere in a resumed run."""
    path = tmp_path / "dropped.yaml"
    path.write_text(DROPPED)
    assert in_process(path, tmp_path / "whole") == 0
    assert killed_until_done(path, tmp_path / "killed", [{"kind": "step", "count": 11}]) == 1
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("text", [TINY, DIGITS], ids=["toy", "digits"])
def test_twenty_kills_at_random_moments(text, tmp_path):
    path, chance = tmp_path / "recipe.yaml", random.Random(0)
    path.write_text(text)
    assert in_process(path, tmp_path / "whole") == 0
    killed = 0
    for attempt in range(20):
        if killed >= 20:
            break
        ranges = {"step": 14, "rename": 24, "save": 2}
        deaths = [
            {"kind": (kind := chance.choice(list(ranges))), "count": chance.randrange(ranges[kind])} for _ in range(6)
        ]
        killed += killed_until_done(path, tmp_path / f"killed-{attempt}", deaths)
        assert_same_run(tmp_path / "whole", tmp_path / f"killed-{attempt}")
    assert killed >= 20
